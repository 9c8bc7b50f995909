"""Parameters of a module that can be pruned, their axes, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from karikomi.prune import Layout
from karikomi.prune.protection import BY_DEFAULT, PROTECTED, check_protect
from karikomi.torch.internals import norm_type
from karikomi.torch.modules.parameters import is_projection, owned, unwrapped
from karikomi.torch.modules.parametrized import computed_from

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRUNED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
"""Layer types whose ``weight`` is pruned."""

NORMS = (norm_type(), nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def prunable(
    module: nn.Module,
    protect: Collection[str] = BY_DEFAULT,
    named: Collection[str] = (),
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return ``(name -> weight that can be pruned, name -> why a parameter cannot)``.

    A parameter with several owners (tied weights) counts once, under its first name, and only if
    each owner is a layer whose weights are pruned. `protect`: keys of `PROTECTED`, else `UnknownName`;
    first and last are those in the order of registration. `named`: parameters that can be pruned whatever they are,
    biases and those of unknown layers too.
    """
    check_protect(protect)
    reasons: dict[int, str] = {}
    module = unwrapped(module)
    known = dict(module.named_parameters())
    every = dict(module.named_parameters(remove_duplicate=False))
    meant = {id(every[name]) for name in named}
    for name, reason in computed_from(module).items():
        reasons[id(known[name])] = reason
    for layer in module.modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            reason = _why_not(layer, leaf, parameter, protect)
            if id(parameter) in meant:
                reason = _no_values(parameter)
            if reason:
                reasons.setdefault(id(parameter), reason)
    weights: dict[str, torch.Tensor] = {
        name: item for name, item in known.items() if id(item) not in reasons
    }
    left_alone = {n: reasons[id(item)] for n, item in known.items() if id(item) in reasons}
    names = {id(item): name for name, item in known.items()}
    # All layers, also those left alone: the layer before a tied head is not the last.
    layers = [
        dict(item.named_parameters(recurse=False)).get("weight")
        for item in module.modules()
        if isinstance(item, PRUNED) or is_projection(item)
    ]
    for which, place in (("first", 0), ("last", -1)):
        name = names.get(id(layers[place])) if layers else None
        if which in protect and name in weights and id(weights[name]) not in meant:
            left_alone[name] = PROTECTED[which]
            del weights[name]
    return weights, left_alone


def layouts(module: nn.Module) -> dict[str, Layout]:
    """Return parameter name -> axes of units and inputs; a grouped transposed convolution has no axis of units."""
    axes = {}
    for layer, name, _ in owned(module):
        leaf = name.rpartition(".")[2]
        known = leaf == "weight" and isinstance(layer, (nn.Linear, *CONVOLUTIONS, *EMBEDDINGS))
        if known or _fused(layer, leaf):
            axes[name] = Layout(units=0, inputs=1)
        elif leaf == "weight" and (
            (isinstance(layer, TRANSPOSED) and layer.groups == 1) or is_projection(layer)
        ):
            axes[name] = Layout(units=1, inputs=0)
        elif leaf == "weight" and isinstance(layer, NORMS):
            axes[name] = Layout(units=0)
    return axes


def owner(module: nn.Module, name: str) -> nn.Module:
    """Return the layer that a parameter of this name belongs to."""
    return module.get_submodule(name.rpartition(".")[0])


def projections(module: nn.Module) -> list[str]:
    """Return the names of the projections of LSTM states, whose inputs stay inside of the kernel."""
    return [
        name
        for layer, name, _ in owned(module)
        if isinstance(layer, nn.RNNBase) and name.rpartition(".")[2].startswith("weight_hr")
    ]


def siblings(module: nn.Module, name: str, norms: Mapping[str, str]) -> list[str]:
    """Return the parameters with a weight's units: bias, scale and shift. `norms`: layer name -> norm after it."""
    module, path = unwrapped(module), name.rpartition(".")[0]
    known = dict(module.named_parameters())
    prefix = f"{path}." if path else ""
    wanted = [f"{prefix}bias"]
    if path in norms:
        wanted += [f"{norms[path]}.weight", f"{norms[path]}.bias"]
    return [item for item in wanted if item in known]


def _why_not(
    layer: nn.Module, leaf: str, parameter: torch.Tensor, protect: Collection[str]
) -> str | None:
    if leaf.startswith("bias") or leaf.endswith("_bias") or leaf in ("bias_k", "bias_v"):
        return "a bias"
    if isinstance(parameter, nn.UninitializedParameter) or parameter.is_meta:
        return _no_values(parameter)
    kinds = () if "norms" in protect else NORMS
    kinds += () if "embeddings" in protect else EMBEDDINGS
    fused = _fused(layer, leaf)
    if fused in protect:
        return f"{leaf} of {type(layer).__name__}: {PROTECTED[fused]}"
    known = isinstance(layer, (*PRUNED, *kinds)) or is_projection(layer)
    if not fused and (not known or leaf != "weight"):
        return f"{leaf} of {type(layer).__name__}: no weight of a Linear or Conv layer"
    return _no_values(parameter)


def _no_values(parameter: torch.Tensor) -> str | None:
    """Return why a parameter has no numbers that can be compared, or None."""
    if isinstance(parameter, nn.UninitializedParameter) or parameter.is_meta:
        return "it has no values yet"
    if parameter.dtype not in _FLOATS:
        return f"its dtype is {parameter.dtype}"
    if parameter.layout != torch.strided:
        return f"its layout is {parameter.layout}"
    if not parameter.numel():
        return "it is empty"
    return None


def _fused(layer: nn.Module, leaf: str) -> str:
    """Return "recurrent" or "attention" if the weight of this name stacks several projections, else ""."""
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase) and leaf.startswith("weight_"):
        return "recurrent"
    if isinstance(layer, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
        return "attention"
    return ""
