"""The largest logit of every head since the last step, recorded in the forward pass: fused attention keeps none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.torch.modules.attention import Attention, attentions

_ENTRIES = 1 << 22  # how many logits are held at a time
_ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
_noted: WeakKeyDictionary[nn.Module, torch.Tensor | None] = WeakKeyDictionary()


class LogitHooks:
    """The result of `watch_logits`: the watched layers, and the method that removes the hooks."""

    def __init__(self, hooks: Mapping[str, tuple[nn.Module, RemovableHandle]]) -> None:
        self.names = tuple(hooks)
        """The layers that are watched."""
        self._hooks = dict(hooks)

    def remove(self) -> None:
        """Remove the hooks and the recorded logits."""
        for layer, hook in self._hooks.values():
            hook.remove()
            _noted.pop(layer, None)


def watch_logits(module: nn.Module) -> LogitHooks:
    """Record the largest logit per head in every training pass through ``nn.MultiheadAttention``.

    ``S_h = max(q_i k_j / sqrt(d))`` over the batch and all pairs that the masks allow. Costs, per
    pass, the projection of queries and keys and their products once more, without gradients, at most
    4 Mi logits at a time; passes in ``eval()`` cost nothing and are not recorded. A layer that computes
    its logits otherwise calls `note_logits`.

    Raises `Unsupported` where the module has no ``nn.MultiheadAttention``.

    >>> layer = nn.MultiheadAttention(8, 2)
    >>> watch = watch_logits(layer)
    >>> _ = layer(*[torch.ones(3, 1, 8)] * 3)
    >>> watch.names, known(layer)
    (('',), True)
    """
    layers = {
        name: attention.layer
        for name, attention in attentions(module).items()
        if isinstance(attention.layer, nn.MultiheadAttention)
    }
    if not layers:
        raise Unsupported(
            "the module has no nn.MultiheadAttention to watch",
            where="torch.watch_logits",
            hint="declare your layers by declare_attention and call note_logits in their forward",
        )
    hooks = {}
    for name, layer in layers.items():
        _noted.setdefault(layer, None)
        hooks[name] = (layer, layer.register_forward_pre_hook(_watched, with_kwargs=True))
    return LogitHooks(hooks)


@torch.no_grad()
def note_logits(module: nn.Module, largest: torch.Tensor) -> None:
    """Record the largest logit of each head of an attention layer in this forward pass.

    `module`: the layer, as it was declared. `largest`: shape (heads,), the logits as softmax takes
    them, scale included, or any shape (..., heads), of which the largest counts. Several passes before
    one step are joined. Raises `InvalidArgument` for what is no such tensor.

    >>> layer = nn.MultiheadAttention(8, 2)
    >>> note_logits(layer, torch.tensor([120.0, 3.0]))
    """
    if not isinstance(largest, torch.Tensor) or largest.dim() == 0 or not largest.numel():
        raise InvalidArgument(
            "the largest logits are a tensor with one entry per head",
            where="torch.note_logits",
            got=tuple(largest.shape)
            if isinstance(largest, torch.Tensor)
            else type(largest).__name__,
        )
    heads = largest.detach().reshape(-1, largest.shape[-1]).amax(0)
    heads = heads.to(torch.promote_types(heads.dtype, torch.float32))
    before = _noted.get(module)
    if before is not None and before.shape != heads.shape:
        raise InvalidArgument(
            "another number of heads than before",
            where="torch.note_logits",
            got=len(heads),
            allowed=len(before),
        )
    _noted[module] = heads if before is None else torch.maximum(before.to(heads.device), heads)


def known(module: nn.Module) -> bool:
    """Return whether the logits of this layer are recorded."""
    return module in _noted


def taken(layers: Mapping[str, Attention]) -> dict[str, torch.Tensor]:
    """Return attention -> largest logits since the last call, and remove the records.

    Where several processes train, the largest over all of them: else their weights would part.
    """
    found = {name: _noted[layer.layer] for name, layer in layers.items() if layer.layer in _noted}
    for name in found:
        _noted[layers[name].layer] = None
    if not (dist.is_available() and dist.is_initialized()):
        return {name: heads for name, heads in found.items() if heads is not None}
    reduced = {}
    for name in found:
        device = next(layers[name].layer.parameters()).device
        heads = found[name]
        heads = torch.zeros(layers[name].heads) if heads is None else heads
        reduced[name] = heads.to(device)
        dist.all_reduce(reduced[name], op=dist.ReduceOp.MAX)
    return reduced


@torch.no_grad()
def _watched(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if layer.training and isinstance(layer, nn.MultiheadAttention):
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        note_logits(layer, largest_logits(layer, given))


def largest_logits(layer: nn.MultiheadAttention, given: Mapping[str, Any]) -> torch.Tensor:
    """Return the largest logit per head, shape (heads,), for these arguments of its forward pass."""
    query, key = _projected(layer, given["query"], given["key"])
    heads, width = layer.num_heads, layer.head_dim
    batch, targets, sources = len(query), query.shape[1], key.shape[1]
    query = query.reshape(batch, targets, heads, width).transpose(1, 2)
    key = key.reshape(batch, sources, heads, width).transpose(1, 2)
    hidden = _hidden(given.get("key_padding_mask"), given.get("attn_mask"), batch, heads)
    best = query.new_full((heads,), -math.inf)
    step = max(1, _ENTRIES // max(1, heads * targets * sources))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        logits = query[part] @ key[part].mT / math.sqrt(width)
        for mask in hidden:
            mask = mask if len(mask) == 1 else mask[part]
            # What add_bias_kv appends to the keys is hidden by no mask.
            mask = functional.pad(mask, (0, sources - mask.shape[-1]))
            logits = logits.masked_fill(mask, -math.inf)
        best = torch.maximum(best, logits.amax((0, 2, 3)))
    return best


def _projected(
    layer: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return projected queries and keys, shapes (batch, targets, width) and (batch, sources, width)."""
    if query.dim() == 2:
        query, key = query.unsqueeze(0), key.unsqueeze(0)
    elif not layer.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    biases = (None, None) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)[:2]
    if layer.in_proj_weight is None:
        weights = (layer.q_proj_weight, layer.k_proj_weight)
    else:
        weights = layer.in_proj_weight.chunk(3)[:2]
    query = functional.linear(query, weights[0], biases[0])
    key = functional.linear(key, weights[1], biases[1])
    if layer.bias_k is not None:
        key = torch.cat([key, layer.bias_k.to(key).expand(len(key), -1, -1)], dim=1)
    return query, key


def _hidden(padding: Any, mask: Any, batch: int, heads: int) -> list[torch.Tensor]:
    """Return masks that broadcast to (batch, heads, targets, sources), true for entries that softmax excludes."""
    found = []
    if padding is not None:
        found.append(_as_bool(padding).reshape(batch, 1, 1, -1))
    if mask is not None:
        flags = _as_bool(mask)
        shape = (1, 1, *flags.shape) if flags.dim() == 2 else (batch, heads, *flags.shape[1:])
        found.append(flags.reshape(shape))
    return found


def _as_bool(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype is torch.bool else mask == -math.inf
