"""Rewinding: a copy of weights, buffers and moments of an early step, kept until the last masks are made."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from karikomi.errors import InvalidArgument
from karikomi.torch.modules.parameters import unwrapped

_PARTS = ("weights", "buffers", "moments")


class Rewind:
    """Weights and moments of optimizers, and the model's buffers, at the time of `keep`."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        found: Mapping[str, torch.Tensor],
    ) -> None:
        self._optimizers, self._model, self._found = optimizers, model, found
        self._kept: dict[str, dict[str, Any]] | None = None

    def keep(self) -> None:
        """Copy everything."""
        self._kept = {
            "weights": {name: item.detach().clone() for name, item in self._found.items()},
            "buffers": {name: buffer.clone() for name, buffer in self._buffers().items()},
            "moments": {name: _copied(self._moments(item)) for name, item in self._found.items()},
        }

    def take_in(self, found: Mapping[str, torch.Tensor], stays: Collection[str]) -> None:
        """Continue with these parameters; of all but `stays` the copy is what they are now."""
        self._found, before = found, self._kept
        if before is None:
            return
        self.keep()
        for part, kept in (self._kept or {}).items():
            unchanged = kept if part == "buffers" else stays
            kept.update({name: before[part][name] for name in unchanged if name in before[part]})

    def restore_(self) -> None:
        """Restore everything that was copied."""
        if self._kept is None:
            return
        for name, weight in self._kept["weights"].items():
            self._found[name].copy_(weight)
        buffers = self._buffers()
        for name, buffer in self._kept["buffers"].items():
            buffers[name].copy_(buffer)
        for name, moments in self._kept["moments"].items():
            present = self._moments(self._found[name])
            present.clear()
            present.update(_copied(moments))

    def forget(self) -> None:
        """Drop the copy."""
        self._kept = None

    def plain(self) -> dict[str, Any] | None:
        """Return the copy for a checkpoint."""
        return None if self._kept is None else {part: {**self._kept[part]} for part in _PARTS}

    def read(self, plain: Any) -> dict[str, dict[str, Any]] | None:
        """Return a result of `plain` on the devices of its parameters; raises `InvalidArgument` if it does not fit."""
        if plain is None:
            return None
        if not isinstance(plain, Mapping) or set(plain) != set(_PARTS):
            raise InvalidArgument("not a copy to rewind to", where="prune: rewind")
        weights = _fitting(plain["weights"], self._found)
        moments = plain["moments"]
        if not isinstance(moments, Mapping) or moments.keys() != self._found.keys():
            raise InvalidArgument("the copy to rewind to is of another model", where="prune")
        return {
            "weights": weights,
            "buffers": _fitting(plain["buffers"], self._buffers()),
            "moments": {name: self._placed(name, moment) for name, moment in moments.items()},
        }

    def load(self, kept: dict[str, dict[str, Any]] | None) -> None:
        """Continue with a result of `read`."""
        self._kept = kept

    def _buffers(self) -> dict[str, torch.Tensor]:
        return dict(unwrapped(self._model).named_buffers())

    def _moments(self, parameter: torch.Tensor) -> dict[str, Any]:
        return self._holder(parameter)[0].state[parameter]

    def _holder(self, parameter: torch.Tensor) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        return next(
            (optimizer, group)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if any(parameter is member for member in group["params"])
        )

    def _placed(self, name: str, moments: Mapping[str, Any]) -> dict[str, Any]:
        """Return moments on the device of their parameter; step counts only for fused and capturable ones."""
        parameter = self._found[name]
        group = self._holder(parameter)[1]
        counts_too = group.get("fused") or group.get("capturable")
        return {
            key: value.to(parameter.device)
            if isinstance(value, torch.Tensor) and (counts_too or value.dim() > 0)
            else value
            for key, value in _copied(moments).items()
        }


def _copied(moments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for key, value in moments.items()
    }


def _fitting(saved: Any, present: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not isinstance(saved, Mapping) or saved.keys() != present.keys():
        raise InvalidArgument("the copy to rewind to is of another model", where="prune")
    for name, tensor in saved.items():
        if not isinstance(tensor, torch.Tensor) or tensor.shape != present[name].shape:
            raise InvalidArgument(
                "the copy to rewind to does not fit",
                where=name,
                got=tuple(getattr(tensor, "shape", ())),
                allowed=tuple(present[name].shape),
            )
    return {name: tensor.to(present[name].device, copy=True) for name, tensor in saved.items()}
