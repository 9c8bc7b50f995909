"""Rules on updates: what a step did to the weights is measured, and taken back in part.

The update of a parameter is its change divided by the learning rate, decoupled weight decay included;
the moments of the optimizer stay as the step left them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.rule import Composite, Rule
from karikomi.rules.decide import leaves
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import Kind
from karikomi.torch.clipping.host_step import Clipping
from karikomi.torch.clipping.joint_norms import Sharding
from karikomi.torch.clipping.second_moments import Moments, relative
from karikomi.torch.distributed.dtensors import local


class Updates:
    """A rule for the updates of some optimizers; costs a copy of the weights."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        found: Mapping[str, torch.Tensor],
        rule: Rule | Composite,
        sharding: Sharding | None,
        *,
        where: str,
    ) -> None:
        _check_moments(optimizers, rule, where=where)
        self._found, self._optimizers = dict(found), optimizers
        self._before = {name: p.detach().clone() for name, p in found.items()}
        self._clipping = _UpdateClipping(
            self._before,
            rule,
            module=model,
            nonfinite="skip",
            moments=_Corrected(optimizers, found),
            sharding=sharding,
            where=where,
        )

    def remember(self) -> None:
        """Keep the weights as they are before the step."""
        for name, parameter in self._found.items():
            self._before[name].copy_(parameter)

    def pass_over(self) -> None:
        """Count a step that was not taken; it teaches nothing."""
        state = self._clipping.state
        self._clipping.state = {**state, "attempted": state["attempted"] + 1}

    def clip(self) -> Outcome:
        """Clip the updates of the step that was just taken."""
        rates = self._rates()
        for name, parameter in self._found.items():
            moved = parameter.grad is not None
            before = self._before[name]
            before.grad = (parameter.detach() - before).div_(rates[name]) if moved else None
        outcome = self._clipping.step()
        changed = set(self._found) if outcome.skipped else _changed(outcome)
        for name in changed:
            update, before = self._before[name].grad, self._before[name]
            self._found[name].copy_(before if update is None else before + update * rates[name])
        for before in self._before.values():
            before.grad = None
        return outcome

    def plain(self) -> dict[str, Any]:
        """Return the state of the rule as plain data."""
        return self._clipping.plain()

    def load(self, plain: Mapping[str, Any] | None) -> None:
        """Continue from what `plain` returned."""
        self._clipping.load(plain)

    def _rates(self) -> dict[str, float]:
        rates = {
            id(parameter): float(group["lr"]) or 1.0
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        return {name: rates[id(parameter)] for name, parameter in self._found.items()}


class _UpdateClipping(Clipping):
    def _entries(
        self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, kind: Kind
    ) -> torch.Tensor:
        if kind is Kind.RELATIVE_NORM:
            assert isinstance(self.moments, _Corrected)  # noqa: S101  (made with it)
            own = self.moments.gradients[name].grad
            assert own is not None  # noqa: S101  (it has an update)
            return relative(local(own), self.moments.of(name, parameter))
        return super()._entries(name, parameter, gradient, kind)


class _Corrected(Moments):
    """The second moments after the step, bias-corrected, of the parameters that the optimizers hold."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], found: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(*optimizers)
        self.gradients = found

    def of(self, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
        own = self.gradients[name]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if any(own is item for item in group["params"]):
                    kept = optimizer.state[own]
                    decay = float(group["betas"][1]) ** float(kept["step"])
                    return local(kept["exp_avg_sq"]) / (1.0 - decay)
        return None

    def follow(
        self,
        parameters: Mapping[str, torch.Tensor],
        *,
        skip: torch.Tensor | None = None,
        scale: torch.Tensor | float | None = None,
    ) -> None:
        """Keep nothing: the optimizer does."""


def _check_moments(
    optimizers: Sequence[torch.optim.Optimizer], rule: Rule | Composite, *, where: str
) -> None:
    if not any("second_moment" in leaf.needs for leaf in leaves(rule)):
        return
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise Unsupported(
                f"{type(rule).__name__} needs the second moments that Adam and AdamW keep",
                where=where,
                got=type(optimizer).__name__,
                hint="BlockRMS needs none",
            )


def _changed(outcome: Outcome) -> set[str]:
    stages = (*outcome.earlier, outcome)
    return {
        name
        for stage in stages
        for name, before, after in zip(stage.names, stage.norms, stage.after, strict=True)
        if before != after
    }
