"""Resize the layers of a fresh module to the stored shapes of a shrunk network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from karikomi.errors import Unsupported, check_known
from karikomi.torch.internals import norm_type

Shape = tuple[int, ...]
HOOKED = ("weight", "weight_orig", "weight_v")
"""Names of a weight, and of what hooks of `torch.nn.utils` compute it of."""
_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def resize_(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], *, attributes_follow: bool = False
) -> dict[str, tuple[Shape, Shape]]:
    """Resize the tensors of a module to smaller shapes; return name -> (old, new) shape.

    The new tensors are uninitialised: the caller fills them. All shapes are checked before any layer
    is changed. Tensors that are not named keep their shapes, which must fit the named ones; one with several names
    has to get one shape. Layers of torch get the attributes that state their sizes (``in_features``, ...).

    `shapes`: tensor name, as in the state dict, -> shape; no size may exceed the present one. `attributes_follow`:
    the caller sets what shapes do not say, such as the groups of a convolution. Raises `UnknownName` for a name
    that the module does not have, `Unsupported` naming the tensor whose shape does not fit its layer, or is
    larger, and for grouped convolutions of which the number of groups is not known.

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
    state = module.state_dict(keep_vars=True)
    old = {
        name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)
    }
    for name in shapes:
        check_known(name, old, "the module has no such tensor", where="torch.resize_")
    new = {**old, **{name: tuple(shape) for name, shape in shapes.items()}}
    changed = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    prefixes = list(dict.fromkeys(name.rpartition(".")[0] for name in changed))
    for prefix in prefixes:
        _check_layer(prefix, module.get_submodule(prefix), new, attributes_follow)
    _check_names({name: state[name] for name in old}, changed, new)
    made: dict[int, torch.Tensor] = {}
    for name in changed:
        path, _, leaf = name.rpartition(".")
        fresh = made.setdefault(id(state[name]), _empty_like(state[name], new[name]))
        setattr(module.get_submodule(path), leaf, fresh)
    for prefix in prefixes:
        set_sizes_(module.get_submodule(prefix))
    return changed


def set_sizes_(given: nn.Module) -> None:
    """Set the attributes in which a layer of torch states the sizes of its tensors (``in_features``, ...)."""
    layer: Any = given
    if isinstance(given, nn.MultiheadAttention):
        inner = layer.out_proj.in_features
        if layer.in_proj_weight is not None and len(layer.in_proj_weight) == 3 * inner:
            layer.embed_dim = layer.kdim = layer.vdim = layer.in_proj_weight.shape[1]
            layer.head_dim = inner // layer.num_heads
        return
    if isinstance(given, nn.RNNBase):
        layer.hidden_size = layer.weight_hh_l0.shape[0] // {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
        layer.input_size = layer.weight_ih_l0.shape[1]
        layer.proj_size = layer.weight_hh_l0.shape[1] if layer.proj_size else 0
        return
    tensors = dict(layer.named_buffers(recurse=False)) | dict(layer.named_parameters(recurse=False))
    weight = next((tensors[name] for name in HOOKED if name in tensors), None)
    if parametrize.is_parametrized(given, "weight"):
        weight = layer.weight
    if isinstance(given, norm_type()):
        own = weight if weight is not None else tensors.get("running_mean")
        layer.num_features = layer.num_features if own is None else len(own)
    if weight is None:
        return
    if isinstance(given, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(given, _TRANSPOSED):
        layer.in_channels, layer.out_channels = weight.shape[0], weight.shape[1] * layer.groups
    elif isinstance(given, _DENSE):
        layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
    elif isinstance(given, nn.LayerNorm | nn.RMSNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(given, nn.GroupNorm):
        layer.num_channels = len(weight)
    elif isinstance(given, nn.Embedding | nn.EmbeddingBag):
        layer.embedding_dim = weight.shape[1]
    elif isinstance(given, nn.PReLU):
        layer.num_parameters = len(weight)


def _check_layer(
    prefix: str, layer: nn.Module, new: Mapping[str, Shape], attributes_follow: bool
) -> None:
    present = {leaf: tuple(tensor.shape) for leaf, tensor in _tensors(layer).items()}
    wanted = _fitting(layer, prefix, present, new)
    for leaf, old in present.items():
        name = _joined(prefix, leaf)
        shape = new[name]
        if shape != old and not attributes_follow and _is_closed(layer, present):
            raise Unsupported(
                f"a {type(layer).__name__} layer cannot be resized",
                where=name,
                got=shape,
                allowed=old,
            )
        if len(shape) != len(old) or (leaf in wanted and shape != wanted[leaf]):
            raise Unsupported(
                "the shape does not fit its layer",
                where=name,
                got=shape,
                allowed=wanted.get(leaf, old),
            )
        if any(
            not (1 <= size <= most or size == most) for size, most in zip(shape, old, strict=True)
        ):
            raise Unsupported(
                "a resized layer must be smaller, and not empty",
                where=name,
                got=shape,
                allowed=f"at most {old}",
            )


def _is_closed(layer: nn.Module, present: Collection[str]) -> bool:
    """Return whether shapes alone do not say how a layer gets smaller: it is grouped, or its weight is computed."""
    products = isinstance(layer, _DENSE + _TRANSPOSED)
    return products and ("weight" not in present or getattr(layer, "groups", 1) > 1)


def _fitting(
    layer: nn.Module, prefix: str, present: Mapping[str, Shape], new: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Return leaf -> the only shape that fits, given the new shape of the layer's first tensor."""
    first = next(iter(present))
    sizes = new[_joined(prefix, first)]
    if len(sizes) != len(present[first]):
        return {first: present[first]}
    if isinstance(layer, norm_type() | nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        return {leaf: sizes if shape else () for leaf, shape in present.items()}
    if isinstance(layer, _DENSE + _TRANSPOSED) and not _is_closed(layer, present):
        outputs = sizes[1] if isinstance(layer, _TRANSPOSED) else sizes[0]
        return {"weight": sizes[:2] + present["weight"][2:], "bias": (outputs,)}
    return {}


def _check_names(
    state: Mapping[str, torch.Tensor], changed: Collection[str], new: Mapping[str, Shape]
) -> None:
    """Raise `Unsupported` for a tensor that would get different shapes under its different names."""
    shapes: dict[int, Shape] = {}
    for name, tensor in state.items():
        shape = shapes.setdefault(id(tensor), new[name])
        if shape != new[name]:
            raise Unsupported(
                "the tensor is shared by several layers, and has to get one shape",
                where=name,
                got=new[name],
                allowed=shape,
            )


def _empty_like(old: torch.Tensor, shape: Shape) -> torch.Tensor:
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors stored by a layer itself that a state dict has, the weight first."""
    saved = layer.state_dict(keep_vars=True)
    own = {n: item for n, item in saved.items() if "." not in n and isinstance(item, torch.Tensor)}
    return dict(sorted(own.items(), key=lambda item: item[0] != "weight"))


def _joined(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf
