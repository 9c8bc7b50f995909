"""The move from a module to its smaller copy: which tensor became which, and how anything of its shape is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.shrink.cuts import Axes, Cut
from karikomi.torch.modules.kept_units import chosen


class Move:
    """From `before` to `after`, in which a tensor has the `kept` indices only: tensor name -> axis -> indices."""

    def __init__(
        self,
        before: nn.Module,
        after: nn.Module,
        kept: Mapping[str, Mapping[int, Sequence[int]]],
    ) -> None:
        self.before, self.after = before, after
        self.old, self.new = _tensors(before), _tensors(after)
        self.axes: dict[str, Axes] = {
            name: {
                axis: Cut(self.old[name].shape[axis], np.array(own, np.int64))
                for axis, own in axes.items()
            }
            for name, axes in kept.items()
            if name in self.old
        }
        self._names: dict[int, str] = {}
        for name, tensor in self.old.items():
            known = self._names.get(id(tensor))
            # The graph has a shared tensor under one of its names.
            if known is None or known not in self.new:
                self._names[id(tensor)] = name

    def name(self, tensor: torch.Tensor) -> str | None:
        """Return the name of a tensor of the module before, None for any other tensor."""
        return self._names.get(id(tensor))

    def cut(self, name: str, value: torch.Tensor, *, what: str) -> torch.Tensor:
        """Return what is left of a value that belongs to a tensor: of its shape, or of size 1 along some axes.

        Raises `Unsupported` for any other shape, of which nothing says how it is cut; `what`: the value, for the error.
        """
        axes = self.axes.get(name, {})
        shape = tuple(self.old[name].shape)
        if not axes or value.numel() == 1:
            return value
        fits = value.dim() == len(shape) and all(
            size in (1, whole) for size, whole in zip(value.shape, shape, strict=True)
        )
        if not fits:
            raise Unsupported(
                f"{what} has another shape than its tensor, so it cannot be cut along",
                where=f"torch.shrink: follow: {name}",
                got=tuple(value.shape),
                allowed=shape,
                hint="make it anew for the smaller network",
            )
        return chosen(value, {axis: cut for axis, cut in axes.items() if value.shape[axis] > 1})


class Follower(Protocol):
    """What can continue with a smaller copy of its module."""

    def following(self, move: Move) -> Any:
        """Return a function that makes it follow, in place; all is checked before, and nothing changed."""
        ...


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
