"""What stands in a module in the place of layers that were removed whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.shrink.cuts import Cuts, Removed


class RemovedLayer(nn.Module):
    """A layer without weights, of any arguments: it returns a constant, or its first argument.

    `value`: the constant, which is broadcast to the outputs of the layer that was removed; None: its first
    argument. `outputs`: how many these were, 0 for a tensor by itself; those after the first are None.
    """

    value: torch.Tensor | None

    def __init__(self, value: torch.Tensor | None = None, outputs: int = 0) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.outputs = outputs

    def forward(self, *args: Any, **options: Any) -> Any:
        """Return the constant in the shape of the first argument where it fits, as others may write to it."""
        first = next(iter([*args, *options.values()]), None)
        if self.value is None:
            found = first
        elif isinstance(first, torch.Tensor) and _fits(self.value, first):
            found = self.value.expand(first.shape).clone()
        else:
            found = self.value.clone()
        return (found, *[None] * (self.outputs - 1)) if self.outputs else found

    def extra_repr(self) -> str:
        """Return what it returns."""
        return (
            "its first argument" if self.value is None else f"a constant {tuple(self.value.shape)}"
        )


def _fits(value: torch.Tensor, like: torch.Tensor) -> bool:
    pairs = zip(reversed(value.shape), reversed(like.shape), strict=False)
    return value.dim() <= like.dim() and all(own in (1, size) for own, size in pairs)


def stand_in(removed: Removed, like: nn.Module) -> RemovedLayer:
    """Return a layer of which the constant is zero, of the type and on the device of what was removed."""
    if removed.shape is None:
        return RemovedLayer(outputs=removed.outputs)
    tensor = next(iter(like.parameters()), torch.zeros(()))
    value = torch.zeros(removed.shape, dtype=tensor.dtype, device=tensor.device)
    return RemovedLayer(value, removed.outputs)


def put_(module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put layers at their paths, in place; return those that were there."""
    before = {}
    for path, layer in layers.items():
        before[path] = module.get_submodule(path)
        module.set_submodule(path, layer)
    return before


@contextmanager
def removed_(
    module: nn.Module, cuts: Cuts | None, stored: Mapping[str, tuple[int, ...]]
) -> Iterator[None]:
    """Take the layers that went out of a fresh module; they come back if the body raises.

    `stored`: tensor name -> shape in the file, which the constants must have. Raises `Unsupported` otherwise.
    """
    present = dict(module.named_modules())
    removed = {} if cuts is None else cuts.removed
    new = {}
    for path, own in removed.items():
        name = f"{path}.value"
        fits = own.shape is None or cuts.shape(name, own.shape) == stored.get(name)  # type: ignore[union-attr]
        if not path or path not in present or not fits:
            raise Unsupported(
                "a layer that was removed does not fit the module, or its constant the file",
                where=path,
                got=own.shape,
                allowed="a fresh module of the class, with the arguments, that was shrunk",
            )
        if not isinstance(present[path], RemovedLayer):
            new[path] = stand_in(own, present[path])
    before = put_(module, new)
    try:
        yield
    except BaseException:
        put_(module, before)
        raise
