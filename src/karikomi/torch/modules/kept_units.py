"""What a shrink left of a module: stored on it, for files, and applied to what else has the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx, nn

from karikomi.errors import Unsupported
from karikomi.shrink.cuts import Axes, Cut, Cuts, Removed
from karikomi.torch.modules.resizing import resize_, set_sizes_

_ATTRIBUTE = "_karikomi_cuts"
NOTE = "shrunk"
"""The key of the note in a file."""


def remember_(module: nn.Module, cuts: Cuts) -> None:
    """Store the cuts with a module, in place of those of its parts."""
    for layer in module.modules():
        layer.__dict__.pop(_ATTRIBUTE, None)
    module.__dict__[_ATTRIBUTE] = cuts


def recall(module: nn.Module) -> Cuts | None:
    """Return the cuts of a module and of all its parts; None if none of it was shrunk."""
    found: Cuts | None = None
    for path, layer in module.named_modules():
        own = layer.__dict__.get(_ATTRIBUTE)
        if own is not None:
            found = own.below(path) if found is None else found.then(own.below(path))
    return found


def sizes_in_attributes(before: nn.Module, after: nn.Module) -> dict[str, dict[str, Any]]:
    """Return path -> attribute -> value of a smaller module, of those whole numbers that changed."""
    changed: dict[str, dict[str, Any]] = {}
    originals = dict(before.named_modules())
    for path, layer in after.named_modules():
        old = vars(originals[path]) if path in originals else {}
        for name, value in vars(layer).items():
            named = name in old and not name.startswith("_")
            if named and _is_size(value) and not _same(old[name], value):
                plain = value if isinstance(value, int) else list(value)
                changed.setdefault(path, {})[name] = plain
    return changed


def check_form(module: nn.Module, cuts: Cuts) -> None:
    """Raise `Unsupported` for a module of the original class, if its code does not run with smaller tensors."""
    if cuts.form == "graph" and not isinstance(module, fx.GraphModule):
        raise Unsupported(
            "the shrunk network is an exported graph, since the code of its class does not run with smaller tensors",
            where=type(module).__name__,
            allowed="the exported graph itself",
            hint="save it with torch.export.save(torch.export.export(small, inputs), path)",
        )


@torch.no_grad()
def cut_(module: nn.Module, shapes: dict[str, tuple[int, ...]], cuts: Cuts) -> None:
    """Make a module of the original class as small as the shrunk one; `shapes`: of its tensors, those that differ.

    Tensors that no file contains are cut, the others uninitialised. All is checked before anything is changed: raises
    `Unsupported` where the cuts do not fit the module.
    """
    state = module.state_dict()
    for name, shape in shapes.items():
        before = tuple(state[name].shape)
        if cuts.shape(name, before) != shape:
            raise Unsupported(
                "the kept indices in the file do not fit the module",
                where=name,
                got=f"{before} before, {shape} after",
                allowed="a fresh module of the class, with the arguments, that was shrunk",
            )
    others = list(_unsaved(module, cuts, set(state)))
    sizes = list(_attributes(module, cuts))
    resize_(module, shapes, attributes_follow=True)
    for owner, leaf, tensor in others:
        setattr(owner, leaf, tensor)
    for layer, name, value in sizes:
        setattr(layer, name, value)
    for layer, _, _ in sizes:
        set_sizes_(layer)


def _unsaved(
    module: nn.Module, cuts: Cuts, saved: set[str]
) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Yield module, attribute and smaller tensor of what a state dict does not contain."""
    owners: dict[str, Any] = dict(module.named_modules())
    for name, axes in cuts.axes.items():
        path, _, leaf = name.rpartition(".")
        owner = owners.get(path)
        old = getattr(owner, leaf, None)
        if owner is not None and name not in saved and isinstance(old, torch.Tensor):
            if cuts.shape(name, tuple(old.shape)) is None:
                raise Unsupported(
                    "the kept indices in the file do not fit the module",
                    where=name,
                    got=tuple(old.shape),
                )
            yield owner, leaf, chosen(old, axes)


def _attributes(module: nn.Module, cuts: Cuts) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield layer, attribute and new value; it may only get smaller, and keeps its type."""
    layers = dict(module.named_modules())
    for path, values in cuts.attributes.items():
        own = vars(layers[path]) if path in layers else {}
        for name, value in values.items():
            old = None if name.startswith("_") else own.get(name)
            new = tuple(value) if isinstance(old, tuple) and isinstance(value, list) else value
            if not (_is_size(old) and _not_larger(new, old)):
                raise Unsupported(
                    "a size in the file does not fit the module",
                    where=f"{path}.{name}".strip("."),
                    got=value,
                    allowed=f"at most {old}" if _is_size(old) else "the size of a layer",
                )
            yield layers[path], name, new


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
            # In the memory format of the stream, so that what follows need not change it.
            found = torch.zeros_like(first, dtype=self.value.dtype) + self.value
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


def chosen(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    """Return the kept indices of a tensor, as a new one."""
    for axis, cut in axes.items():
        places = torch.from_numpy(cut.kept).to(tensor.device)
        tensor = tensor.index_select(axis, places)
    return tensor.contiguous()


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(type(part) is int for part in value)
    return type(value) is int


def _same(before: Any, after: Any) -> bool:
    return type(before) is type(after) and before == after


def _not_larger(new: Any, old: Any) -> bool:
    if isinstance(old, int) or isinstance(new, int):
        return type(new) is type(old) and abs(new) <= abs(old)
    return len(new) == len(old) and all(abs(n) <= abs(o) for n, o in zip(new, old, strict=True))


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
