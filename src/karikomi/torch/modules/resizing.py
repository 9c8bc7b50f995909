"""Resize the layers of a fresh module to the stored shapes of a shrunk network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported, check_known
from karikomi.torch.modules.layer_types import LAYERS, NORMS

Shape = tuple[int, ...]


@torch.no_grad()
def resize_(
    module: nn.Module, shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Shape, Shape]]:
    """Resize Linear, Conv and BatchNorm layers to smaller shapes; return name -> (old, new) shape.

    The new tensors are uninitialised: the caller fills them. All shapes are checked before any layer
    is changed. Tensors that are not named keep their shapes, which must fit the named ones.

    `shapes`: tensor name, as in the state dict, -> shape; no size may exceed the present one.
    Raises `UnknownName` for a name that the module does not have, `Unsupported` naming the tensor whose
    shape does not fit its layer, is larger, or belongs to a layer that cannot be resized.

    >>> import torch, karikomi as kk
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> kk.torch.resize_(net, {"0.weight": (3, 4), "0.bias": (3,), "1.weight": (2, 3)})["0.bias"]
    ((8,), (3,))
    >>> net
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    state = module.state_dict()
    old = {
        name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)
    }
    for name in shapes:
        check_known(name, old, "the module has no such tensor", where="torch.resize_")
    new = {**old, **{name: tuple(shape) for name, shape in shapes.items()}}
    changed = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    prefixes = list(dict.fromkeys(name.rpartition(".")[0] for name in changed))
    for prefix in prefixes:
        _check_layer(prefix, module.get_submodule(prefix), changed, new)
    _check_owners(module, changed)
    for prefix in prefixes:
        layer = module.get_submodule(prefix)
        for leaf in _leaves(layer):
            _replace_(layer, leaf, new[_joined(prefix, leaf)])
        set_sizes_(layer)
    return changed


def set_sizes_(layer: nn.Module) -> None:
    """Set a layer's attributes (``in_features``, ...) to the sizes of its tensors."""
    sizes: Any = getattr(layer, _leaves(layer)[0]).shape
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = sizes
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer.out_channels, layer.in_channels = sizes[:2]
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        (layer.num_features,) = sizes


def _check_layer(
    prefix: str, layer: nn.Module, changed: Mapping[str, object], new: Mapping[str, Shape]
) -> None:
    present = {leaf: tuple(getattr(layer, leaf).shape) for leaf in _leaves(layer)}
    known = (type(layer) in LAYERS and "weight" in present) or type(layer) in NORMS
    known = known and getattr(layer, "groups", 1) == 1
    wanted = _fitting(layer, prefix, present, new) if known else {}
    for leaf, old in present.items():
        name = _joined(prefix, leaf)
        if leaf not in wanted and name in changed:
            raise Unsupported(
                f"a {type(layer).__name__} layer cannot be resized",
                where=name,
                got=new[name],
                allowed=old,
            )
        if leaf in wanted and new[name] != wanted[leaf]:
            raise Unsupported(
                "the shape does not fit its layer", where=name, got=new[name], allowed=wanted[leaf]
            )
        if any(not 1 <= size <= most for size, most in zip(new[name], old, strict=True)):
            raise Unsupported(
                "a resized layer must be smaller, and not empty",
                where=name,
                got=new[name],
                allowed=f"at most {old}",
            )


def _fitting(
    layer: nn.Module, prefix: str, present: Mapping[str, Shape], new: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Return leaf -> the only shape that fits, given the new shape of the layer's first tensor."""
    first = next(iter(present))
    sizes = new[_joined(prefix, first)]
    if len(sizes) != len(present[first]):
        return {first: present[first]}
    if type(layer) in NORMS:
        return {leaf: sizes if shape else () for leaf, shape in present.items()}
    return {"weight": sizes[:2] + present["weight"][2:], "bias": sizes[:1]}


def _check_owners(module: nn.Module, changed: Mapping[str, object]) -> None:
    layers = list(module.modules())
    owners = Counter(id(item) for layer in layers for item in layer.parameters(recurse=False))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in changed and owners[id(parameter)] > 1:
            raise Unsupported("the tensor is shared by several layers", where=name)


def _replace_(layer: nn.Module, leaf: str, shape: Shape) -> None:
    old = getattr(layer, leaf)
    if tuple(old.shape) == shape:
        return
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(layer, leaf, new)


def _leaves(layer: nn.Module) -> list[str]:
    """Return the names of the tensors stored by a layer itself, the weight first."""
    leaves = [leaf for leaf, _ in layer.named_parameters(recurse=False, remove_duplicate=False)]
    buffers = [leaf for leaf, _ in layer.named_buffers(recurse=False, remove_duplicate=False)]
    saved = layer.state_dict(keep_vars=True) if buffers else {}
    leaves += [leaf for leaf in buffers if leaf in saved]
    return sorted(leaves, key=lambda leaf: leaf != "weight")


def _joined(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf
