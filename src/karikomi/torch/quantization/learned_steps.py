"""Parameters that a module sees rounded to a uniform grid, whose steps are trained with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import NonFinite, check
from karikomi.quantize import Coded, OutputUnits, UniformGrid
from karikomi.quantize.grids import SMALLEST_SCALE, split_units
from karikomi.torch.quantization import straight_through

NEAR = 0.45
"""How far from its code a weight may begin, in steps: codes change at half a step."""


class _Exp(torch.autograd.Function):
    """``initial * exp(offset)``, its gradient divided by the result instead of multiplied.

    A small step of SGD then changes the result as if it were the parameter, and one of Adam changes it by a share
    that its learning rate states.
    """

    @staticmethod
    def forward(ctx: Any, offset: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        step = (initial.float() * offset.float().exp()).clamp_(min=SMALLEST_SCALE)
        ctx.save_for_backward(step)
        ctx.dtype = offset.dtype
        return step

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (step,) = ctx.saved_tensors
        return (gradients[0] / step).to(ctx.dtype), None


class LearnedGrid(nn.Module):
    """A parametrization: the weight rounded to ``step * k``, ``|k| <= 2**(bits - 1) - 1``; masked entries are zero.

    `offset`: the parameter, ``log(step / initial)`` of each step, so that weight decay pulls a step to its
    initial value. `kept`: a mask, all true without one.
    """

    initial: torch.Tensor
    kept: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bits: int,
        units: OutputUnits,
        kept: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.units = bits, units
        self.limit = 2 ** (bits - 1) - 1
        self._split, self._laid = split_units(tuple(weight.shape), units.axis, units.groups)
        per_step = math.prod(self._split) // max(math.prod(self._laid), 1)
        self.share = 1.0 / math.sqrt(max(per_step * self.limit, 1))
        self.register_buffer("initial", self._initial(weight))
        self.register_buffer("kept", kept)
        self.register_load_state_dict_pre_hook(_expect_mask)
        self.offset = nn.Parameter(torch.zeros_like(self.initial))

    def check_codes(self, coded: Coded, weight: torch.Tensor, where: str) -> None:
        """Raise `InvalidArgument` for codes at which this grid cannot begin."""
        grid, known = coded.grid, (self.units.axis, self.units.groups)
        whole = getattr(grid, "axis", None) is None
        even = isinstance(grid, UniformGrid) and (whole or (grid.axis, grid.groups) == known)
        most, shape = int(np.abs(coded.codes).max(initial=0)), tuple(weight.shape)
        check(
            where,
            (coded.shape == shape, "codes of another shape", coded.shape, shape),
            (even, "codes of another grid", grid, f"UniformGrid with axis {known[0]}"),
            (most <= self.limit, "a code beyond `bits`", most, f"<= {self.limit}"),
        )

    @torch.no_grad()
    def begin_(self, weight: torch.Tensor, coded: Coded) -> None:
        """Take the steps of codes, and move the weight to within `NEAR` of a step of each, in place."""
        self.initial.copy_(torch.from_numpy(coded.grid.numbers.copy()))
        step = self._step()
        codes = torch.from_numpy(coded.codes.astype(np.float32)).to(step.device).view(self._split)
        floats = weight.float().view(self._split)
        near = torch.clamp(floats, (codes - NEAR) * step, (codes + NEAR) * step).to(weight.dtype)
        # A type of few digits may round a weight beyond the middle between two codes.
        kept = torch.round(near.float() / step) == codes
        weight.copy_(torch.where(kept, near, (codes * step).to(weight.dtype)).view(weight.shape))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight on the grid."""
        value = straight_through.rounded(
            self._masked(weight), self._step(), limit=self.limit, share=self.share
        )
        return value.view(weight.shape)

    def bits_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the bits of the weight's codes, differentiable."""
        return straight_through.bits(
            self._masked(weight), self._step(), limit=self.limit, share=self.share
        )

    @torch.no_grad()
    def size_of(self, weight: torch.Tensor) -> tuple[float, int]:
        """Return the bits of the weight's codes, and how many are not zero."""
        return straight_through.size(self._masked(weight), self._step(), limit=self.limit)

    @torch.no_grad()
    def hold_zeros_(self, weight: torch.Tensor) -> None:
        """Mask what is rounded to zero now, so that it stays zero."""
        self.kept = self.forward(weight) != 0

    @torch.no_grad()
    def coded(self, weight: torch.Tensor, name: str) -> Coded:
        """Return the codes of the weight and their grid; raises `NonFinite` naming it."""
        step, masked = self._step(), self._masked(weight)
        if not bool(step.isfinite().all()) or not bool(masked.isfinite().all()):
            raise NonFinite(
                "a weight or the step of its grid is NaN or infinite",
                where=name,
                hint="continue from a checkpoint before the network diverged",
            )
        codes = (masked.to(step.dtype) / step).round_().clamp_(-self.limit, self.limit)
        scale = step.reshape(-1).cpu().numpy().astype(np.float32)
        grid = UniformGrid(scale, self.units.axis, self.bits, self.units.groups)
        return Coded(codes.view(weight.shape).cpu().numpy().astype(grid.code_dtype), grid)

    def _masked(self, weight: torch.Tensor) -> torch.Tensor:
        if self.kept is not None:
            weight = weight * self.kept
        return weight.view(self._split)

    def _step(self) -> torch.Tensor:
        step: torch.Tensor = _Exp.apply(self.offset, self.initial)  # type: ignore[assignment]
        return step.view(self._laid)

    def _initial(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``2 mean|w| / sqrt(limit)``; a unit of zeros gets a range of one."""
        parts = weight.detach().float().reshape(self._split).abs()
        others = [axis for axis, length in enumerate(self._laid) if length == 1]
        mean = parts.mean(others) if others else parts
        step = 2.0 * mean / math.sqrt(self.limit)
        step = torch.where(step > 0, step, 1.0 / self.limit)
        return step.clamp(min=SMALLEST_SCALE).reshape(-1)


def _expect_mask(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Have a mask where a checkpoint has one, and none where it has none."""
    stored = state.get(f"{prefix}kept")
    if (stored is None) != (module.kept is None):
        module.kept = (
            None if stored is None else torch.empty_like(stored, device=module.initial.device)
        )
