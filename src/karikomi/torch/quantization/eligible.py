"""Which tensors of a module are quantized, as weights or as vectors, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from karikomi.quantize.every_tensor import Eligible, is_large_matrix, is_matrix
from karikomi.torch.internals import batch_norm_type
from karikomi.torch.modules.parameters import is_projection, unwrapped
from karikomi.torch.modules.parametrized import computed_from
from karikomi.torch.modules.prunable import EMBEDDINGS, NORMS, PRUNED

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def eligible(module: nn.Module) -> Eligible[torch.Tensor]:
    """Return the tensors of a module that are quantized, and why the others are not.

    >>> found = eligible(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
    >>> list(found.weights), list(found.variances), list(found.left_alone)
    (['0.weight'], ['1.running_var'], ['1.num_batches_tracked'])
    """
    module = unwrapped(module)
    found: Eligible[torch.Tensor] = Eligible()
    computed, seen = computed_from(module), set()
    masked = {name.removesuffix("_orig") + "_mask" for name in computed}
    stored = module.state_dict().keys()
    for name, layer, tensor in _owned(module):
        if id(tensor) in seen or name not in stored:
            continue
        seen.add(id(tensor))
        reason = _why_not(tensor) or ("a mask" if name in masked else None)
        kind = None if reason else _kind(name, layer, tensor, parametrized=name in computed)
        if kind is None:
            found.left_alone[name] = reason or _of_buffers(name, layer)
        else:
            getattr(found, kind)[name] = tensor
    return found


def _owned(module: nn.Module) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    for prefix, layer in module.named_modules():
        for leaf, tensor in (
            *layer.named_parameters(recurse=False),
            *layer.named_buffers(recurse=False),
        ):
            yield f"{prefix}.{leaf}" if prefix else leaf, layer, tensor


def _why_not(tensor: torch.Tensor) -> str | None:
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer) or tensor.is_meta:
        return "it has no values yet"
    if tensor.dtype not in FLOATS:
        return f"its dtype is {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    return None if tensor.numel() else "it is empty"


def _kind(name: str, layer: nn.Module, tensor: torch.Tensor, *, parametrized: bool) -> str | None:
    """Return the field of `Eligible` for a tensor, ``None`` for a buffer that no rule is known for."""
    leaf = name.rpartition(".")[2]
    if not isinstance(tensor, nn.Parameter):
        statistic = leaf in ("running_mean", "running_var") and isinstance(layer, batch_norm_type())
        if statistic and leaf == "running_var":
            return "variances" if bool((tensor >= 0).all()) else None
        return "vectors" if statistic else None
    if leaf.startswith("bias") or isinstance(layer, NORMS):
        return "vectors"
    if leaf == "weight" and (isinstance(layer, (*PRUNED, *EMBEDDINGS)) or is_projection(layer)):
        return "weights"
    recurrent = isinstance(layer, nn.RNNBase | nn.RNNCellBase)
    if recurrent or parametrized or isinstance(layer, nn.MultiheadAttention | nn.Bilinear):
        return "weights" if is_matrix(tuple(tensor.shape)) else "vectors"
    return "weights" if is_large_matrix(tuple(tensor.shape)) else "vectors"


def _of_buffers(name: str, layer: nn.Module) -> str:
    leaf = name.rpartition(".")[2]
    return f"{leaf} of {type(layer).__name__}: a buffer that no rule is known for"


def embeddings(module: nn.Module) -> set[str]:
    """Return the names of the weights of embeddings that no layer of another kind shares.

    >>> sorted(embeddings(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))))
    ['0.weight']
    """
    owners: dict[int, list[nn.Module]] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(layer)
    return {
        name
        for name, parameter in module.named_parameters()
        if all(isinstance(layer, EMBEDDINGS) for layer in owners[id(parameter)])
    }
