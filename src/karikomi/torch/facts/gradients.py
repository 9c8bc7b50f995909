"""Facts from derivatives of the loss: gradients, their squares, Hessian times gradient.

The network is called with copies of its parameters: those to be scored share the memory of the originals
and require gradients, the others do not. So no flag and no ``.grad`` of the user's parameters is changed,
nor any hook on them run; copies of weights in half precision are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.torch.tracing.batches import MISSING, Batch

Loss = Callable[[Any, Any], torch.Tensor]
_HALF = (torch.float16, torch.bfloat16)


class Gradients:
    """Means over batches of ``dL/dw``, ``(dL/dw)^2`` and ``H dL/dw``, each by its name.

    The Hessian is multiplied with the mean gradient, so it takes a second pass over the data; only
    weights that are scored take part in the product. Sums are kept in float32 (float64 for float64 weights).
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, torch.Tensor],
        facts: frozenset[str],
        loss: Loss,
    ) -> None:
        self.passes = 2 if "hessian_gradient" in facts else 1
        self._module = module
        self._loss = loss
        self._names = list(weights)
        copies = _copies(module, {id(weight) for weight in weights.values()})
        self._arguments = {name: copy for name, (_, copy) in copies.items()}
        by_identity = dict(copies.values())
        self._weights = [by_identity[id(weight)] for weight in weights.values()]
        wanted = facts | {"gradient"} if self.passes == 2 else facts
        self._sums = {
            fact: [torch.zeros_like(weight, requires_grad=False) for weight in self._weights]
            for fact in wanted
        }
        self._facts = facts
        self._counts = [0] * self.passes

    def see(self, batch: Batch, number: int) -> None:
        """Add one batch in the pass of that number."""
        self._counts[number] += 1
        with torch.enable_grad(), _twice_differentiable(self._module, number == 1):
            loss = self._value(batch)
            gradients = self._of(loss, create_graph=number == 1)
            if number == 1:
                gradients = self._products(gradients)
        if number == 1:
            self._add("hessian_gradient", gradients)
            return
        if "gradient" in self._sums:
            self._add("gradient", gradients)
        if "squared_gradient" in self._sums:
            self._add("squared_gradient", [gradient.square() for gradient in gradients])

    def result(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return fact -> weight name -> mean."""
        return {
            fact: {
                name: total / self._counts[fact == "hessian_gradient"]
                for name, total in zip(self._names, self._sums[fact], strict=True)
            }
            for fact in self._facts
        }

    def _value(self, batch: Batch) -> torch.Tensor:
        if batch.targets is MISSING:
            raise InvalidArgument(
                "a loss takes targets, and this batch has none",
                where="data",
                allowed="(inputs, targets), with None for targets that the loss does not read",
            )
        batch = batch.inputs(lambda value: value.float() if value.dtype in _HALF else value)
        outputs = functional_call(
            self._module, self._arguments, batch.positional, dict(batch.named)
        )
        loss = self._loss(outputs, batch.targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = getattr(loss, "shape", None)
            raise InvalidArgument(
                "a loss is one number",
                where="loss",
                got=type(loss).__name__ if shape is None else f"shape {tuple(shape)}",
                hint="its mean over the batch",
            )
        if not bool(torch.isfinite(loss.detach())):
            raise NonFinite("the loss is NaN or infinite", where="loss", got=float(loss.detach()))
        if not loss.requires_grad:
            raise Unsupported(
                "the loss depends on none of the weights that are scored",
                where="loss",
                hint="is it computed under no_grad, or from detached outputs?",
            )
        return loss.reshape(())

    def _of(self, value: torch.Tensor, *, create_graph: bool = False) -> list[torch.Tensor]:
        gradients = torch.autograd.grad(
            value,
            self._weights,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return list(gradients)

    def _products(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        means = [total / self._counts[0] for total in self._sums["gradient"]]
        along = torch.stack(
            [(gradient * mean).sum() for gradient, mean in zip(gradients, means, strict=True)]
        ).sum()
        # The gradient of a loss that is linear in the weights depends on none of them.
        return (
            self._of(along) if along.requires_grad else [torch.zeros_like(mean) for mean in means]
        )

    def _add(self, fact: str, new: list[torch.Tensor]) -> None:
        for total, term in zip(self._sums[fact], new, strict=True):
            total += term.detach()


def _copies(module: nn.Module, scored: set[int]) -> dict[str, tuple[int, torch.Tensor]]:
    """Return name -> (identity of the original, copy); buffers only where they are cast."""
    copies: dict[str, tuple[int, torch.Tensor]] = {}
    for name, parameter in module.named_parameters():
        copy = parameter.detach().float() if parameter.dtype in _HALF else parameter.detach()
        copies[name] = id(parameter), copy.requires_grad_(id(parameter) in scored)
    for name, parameter in module.named_buffers():
        if parameter.dtype in _HALF:
            copies[name] = id(parameter), parameter.float()
    return copies


@contextmanager
def _twice_differentiable(module: nn.Module, twice: bool) -> Iterator[None]:
    """Choose implementations that have the derivatives that are needed."""
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules())
    attention = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
    # cuDNN differentiates recurrent layers in training mode only, and once only.
    cells = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with attention, cells:
        yield
