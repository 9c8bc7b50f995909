"""Named parameters, each logical tensor once, and the unit axis of each weight."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from karikomi.bound import spared
from karikomi.errors import InvalidArgument, Unsupported, check_known
from karikomi.select import select
from karikomi.torch.internals import uncompiled

Parameters = nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | torch.Tensor

_OUT_IN = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.EmbeddingBag)
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
_IN_OUT = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def named(parameters: Parameters, *, where: str) -> dict[str, torch.Tensor]:
    """Return name -> parameter, a tensor that is used twice (tied weights) once, generators consumed once.

    Names are those of the module or of the pairs; bare tensors are named by their position. Raises for
    optimizer groups and for an empty selection.
    """
    if isinstance(parameters, nn.Module):
        found = dict(unwrapped(parameters).named_parameters())
    elif isinstance(parameters, torch.Tensor):
        found = {"0": parameters}
    else:
        found = _pairs(parameters, where=where)
    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in found.items():
        unique.setdefault(id(tensor), (name, tensor))
    if not unique:
        raise InvalidArgument(
            "there is no parameter to act on",
            where=where,
            hint="an exhausted generator? pass the module itself",
        )
    return dict(unique.values())


def by_any_name(
    module: nn.Module, patterns: str | Sequence[str] | None
) -> str | Sequence[str] | None:
    """Return patterns that find a tensor with several names (tied weights) by each of them.

    `karikomi.select.select` has the first name alone.

    >>> tied = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    >>> tied["head"].weight = tied["embed"].weight
    >>> by_any_name(tied, "head.*"), by_any_name(tied, "head.weight")
    (['head.*', 'embed.weight'], ['embed.weight'])
    """
    if isinstance(patterns, str):
        found = by_any_name(module, [patterns])
        return patterns if found == [patterns] else found
    if not isinstance(patterns, Sequence | Set) or not (others := other_names(module)):
        return patterns
    names = {name for name, _ in _every_tensor(module)} - others.keys()
    return list(dict.fromkeys(q for p in patterns for q in _also_first(p, names, others)))


def every_name(
    module: nn.Module, patterns: str | Sequence[str] | None, *, where: str
) -> str | Sequence[str] | None:
    """Return patterns so that a parameter with several names is found under all of them by each; raises as `select`."""
    if patterns is None or not other_names(module):
        return patterns
    named = dict(unwrapped(module).named_parameters(remove_duplicate=False))
    meant = {id(named[name]) for name in select(list(named), only=patterns, where=where)}
    return [name for name, tensor in named.items() if id(tensor) in meant]


def keys_by_any_name(module: nn.Module, values: Any) -> Any:
    """Return values by pattern so that each finds a tensor by any of its names; what is no mapping as it is."""
    if not isinstance(values, Mapping) or not (others := other_names(module)):
        return values
    names = {name for name, _ in _every_tensor(module)} - others.keys()
    found: dict[Any, Any] = {}
    for pattern, value in values.items():
        for key in _also_first(pattern, names, others):
            found.setdefault(key, value)
    return {**found, **{key: value for key, value in values.items() if key in names}}


def _also_first(pattern: Any, names: Set[str], others: Mapping[str, str]) -> list[Any]:
    if not isinstance(pattern, str):
        return [pattern]
    meant = [others[n] for n in others if n == pattern or fnmatch.fnmatchcase(n, pattern)]
    own = any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)
    return [*([pattern] if own or not meant else []), *meant]


def other_names(module: nn.Module) -> dict[str, str]:
    """Return every further name of a parameter or buffer -> its first."""
    first: dict[int, str] = {}
    others = {}
    for name, tensor in _every_tensor(module):
        if first.setdefault(id(tensor), name) != name:
            others[name] = first[id(tensor)]
    return others


def _every_tensor(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    module = unwrapped(module)
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, data-parallel and averaging wrappers, with the user's names."""
    while True:
        if isinstance(module, _WRAPPERS):
            module = module.module
        elif (inner := uncompiled(module)) is not module:
            module = inner
        else:
            return module


def through_adapters(
    names: Iterable[str], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return parameters, also under those of these names that they had before, or get after, LoRA adapters.

    PEFT puts an adapted layer into one that adds the adapter (``q.weight`` becomes
    ``base_model.model.q.base_layer.weight``), and merging takes it out again.

    >>> list(through_adapters(["q.weight"], {"base_model.model.q.base_layer.weight": torch.ones(1)}))
    ['base_model.model.q.base_layer.weight', 'q.weight']
    """
    missing = [name for name in names if name not in parameters]
    plain = {_without_adapter(name): item for name, item in parameters.items()} if missing else {}
    found = {name: plain.get(_without_adapter(name)) for name in missing}
    return {**parameters, **{name: item for name, item in found.items() if item is not None}}


def _without_adapter(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("base_layer.", "")


def check_values(tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Raise `Unsupported` naming the first tensor on the meta device, which has a shape and no values."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise Unsupported(
                "a tensor on the meta device has no values",
                where=f"{where}: {name}",
                hint="fill the module first: kk.load(path, into=module), "
                "or module.load_state_dict(state, assign=True)",
            )


def check_names(names: Iterable[str], parameters: Mapping[str, Any], *, where: str) -> None:
    """Raise `UnknownName` for a name that is not one of these parameters of a module."""
    for name in names:
        check_known(name, parameters, "the module has no such parameter", where=where)


def check_parameters(found: dict[str, torch.Tensor], *, where: str) -> None:
    """Raise `InvalidArgument` if no tensor can have a gradient, as gradients passed as parameters."""
    if not any(_can_have_gradient(tensor) for tensor in found.values()):
        raise InvalidArgument(
            "none of these tensors can have a gradient; were gradients passed as parameters?",
            where=where,
            got=", ".join(itertools.islice(found, 3)),
            allowed="a module or its parameters",
        )


def unit_axes(module: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
    """Return ``(name -> unit axis, name -> why it has none)`` for the floating parameters of a module.

    The axis is a fact of the layer's type, never guessed from rank: 0 for Linear, Conv and Embedding
    weights and for the stacked gates of recurrent cells and attention, 1 for transposed convolutions.
    """
    axes: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for layer, name, tensor in owned(module):
        axis, reason = unit_axis_of(layer, name.rpartition(".")[2], tensor)
        if axis is None:
            reasons[name] = reason
        else:
            axes[name] = axis
    return axes, reasons


def gains(module: nn.Module) -> dict[str, str]:
    """Return name -> why a bound spares it, of the gains of normalisation layers, by the types of the layers.

    >>> list(gains(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
    ['1.weight']
    """
    return {
        name: spared.GAIN
        for layer, name, _ in owned(module)
        if spared.is_normalisation(type(layer)) and "bias" not in name.rpartition(".")[2]
    }


def owned(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield ``(layer, parameter name, parameter)``; a parameter with several names under its first."""
    module = unwrapped(module)
    kept = {name for name, _ in module.named_parameters()}
    for prefix, layer in module.named_modules():
        for name, parameter in layer.named_parameters(prefix, recurse=False):
            if name in kept:
                yield layer, name, parameter


def _can_have_gradient(tensor: torch.Tensor) -> bool:
    # A gradient computed with create_graph=True requires grad, but is not a leaf.
    if not tensor.is_leaf:
        return tensor.retains_grad
    return tensor.requires_grad or tensor.grad is not None


def _pairs(parameters: Any, *, where: str) -> dict[str, torch.Tensor]:
    if not isinstance(parameters, Iterable):
        raise InvalidArgument(
            "not a module or parameters", where=where, got=type(parameters).__name__
        )
    found: dict[str, torch.Tensor] = {}
    for index, parameter in enumerate(parameters):
        name, tensor = _pair(index, parameter, where)
        if found.setdefault(name, tensor) is not tensor:
            raise InvalidArgument(
                "two tensors have the same name",
                where=where,
                got=repr(name),
                hint="prefix the names",
            )
    return found


def _pair(index: int, value: Any, where: str) -> tuple[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return str(index), value
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.Tensor):
        return str(value[0]), value[1]
    if isinstance(value, dict):
        raise Unsupported(
            "these are optimizer parameter groups", where=where, hint="pass group['params']"
        )
    raise InvalidArgument(
        "not a parameter", where=where, got=type(value).__name__, allowed="tensor or (name, tensor)"
    )


def unit_axis_of(layer: nn.Module, leaf: str, tensor: torch.Tensor) -> tuple[int | None, str]:
    """Return the unit axis of a layer's tensor, or ``None`` and why it has none."""
    if not tensor.is_floating_point():
        return None, "not floating"
    if isinstance(layer, _OUT_IN) and leaf == "weight":
        return 0, ""
    if isinstance(layer, _IN_OUT) and leaf == "weight":
        if layer.groups == 1:
            return 1, ""
        return None, "a grouped transposed convolution has no single unit axis"
    if is_projection(layer) and leaf == "weight":
        return 1, ""
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase) and leaf.startswith("weight"):
        return 0, ""
    if isinstance(layer, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
        return 0, ""
    if "bias" in leaf:
        return None, "a bias"
    return None, f"{type(layer).__name__} declares no unit axis"


def is_projection(layer: nn.Module) -> bool:
    """Return whether a layer is the linear one of GPT-2 in transformers, whose weight is (inputs, units)."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
