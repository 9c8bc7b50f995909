"""Rows of parameters that contain attention heads: by layer type or by declaration, never guessed from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from karikomi.errors import InvalidArgument
from karikomi.schedule import whole
from karikomi.torch.modules.parameters import unwrapped

_DECLARED = "_karikomi_attention"


@dataclass(frozen=True, slots=True)
class Rows:
    """A block of one parameter that contains heads one after the other along an axis."""

    name: str
    axis: int
    first: int
    heads: int
    width: int

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a writable view with the heads as its first axis."""
        part = parameter.detach().narrow(self.axis, self.first, self.heads * self.width)
        return part.unflatten(self.axis, (self.heads, self.width)).movedim(self.axis, 0)


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention layer: the rows of its heads' queries, keys, values, and output projection if declared."""

    layer: nn.Module
    heads: int
    shared: bool
    query: tuple[Rows, ...]
    key: tuple[Rows, ...]
    value: tuple[Rows, ...] = ()
    output: tuple[Rows, ...] = ()

    @property
    def names(self) -> set[str]:
        """The parameters of its queries and keys."""
        return {rows.name for rows in (*self.query, *self.key)}


@dataclass(frozen=True, slots=True)
class _Declared:
    query: str
    key: str
    heads: int
    key_heads: int
    value: str | None = None
    output: str | None = None


def declare_attention(
    module: nn.Module,
    *,
    heads: int,
    kv_heads: int | None = None,
    q: str | None = None,
    k: str | None = None,
    qkv: str | None = None,
    v: str | None = None,
    out: str | None = None,
) -> None:
    """Declare the heads of a module's attention, so that `QKClip` can scale and `Heads` prune them.

    `heads`: query heads; `kv_heads`: key heads, fewer where query heads share them. `q`, `k`: names of
    the ``nn.Linear`` layers in the module that compute queries and keys, head after head along their
    outputs; or `qkv`: one that computes queries, keys and values, in this order. For pruning heads also
    `v`, the layer of the values (without a `qkv`), and `out`, the output projection. The
    declaration is stored with the module and its copies. Its largest logits are then passed to `note_logits`
    in the forward pass, or to ``bound_(..., logits=)``.

    Raises `InvalidArgument` for names that are not Linear layers and for outputs that do not divide.

    >>> block = nn.ModuleDict({"query": nn.Linear(8, 8), "key": nn.Linear(8, 4)})
    >>> declare_attention(block, heads=4, kv_heads=2, q="query", k="key")
    """
    count = whole(heads)
    shared = count if kv_heads is None else whole(kv_heads)
    if not count or not shared or count < 1 or shared < 1 or count % shared:
        raise InvalidArgument(
            "the number of query heads must be a multiple of the key heads",
            where="torch.declare_attention",
            got=f"heads={heads!r}, kv_heads={kv_heads!r}",
            allowed="heads >= 1, a multiple of kv_heads",
        )
    if (
        (qkv is None) == (q is None or k is None)
        or (qkv is not None and (q or k))
        or (q and q == k)
    ):
        raise InvalidArgument(
            "name two layers, or one that computes queries, keys and values",
            where="torch.declare_attention",
            got=f"q={q!r}, k={k!r}, qkv={qkv!r}",
            allowed="q= and k=, or qkv=",
        )
    declared = _Declared(str(qkv or q), str(qkv or k), count, shared, v, out)
    _declared_rows(module, declared, "", {})
    _declared_readers(module, declared, "", {})
    setattr(module, _DECLARED, declared)


def attentions(module: nn.Module) -> dict[str, Attention]:
    """Return name -> attention layer, of a module and its submodules, without those that compute their weights."""
    module = unwrapped(module)
    kept = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, Attention] = {}
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        declared = getattr(layer, _DECLARED, None)
        if isinstance(declared, _Declared):
            query, key = _declared_rows(layer, declared, prefix, kept)
            shared = declared.key_heads < declared.heads
            readers = _declared_readers(layer, declared, prefix, kept)
            found[name] = Attention(layer, declared.heads, shared, query, key, *readers)
        elif isinstance(layer, nn.MultiheadAttention) and _has_weights(layer, kept):
            found[name] = Attention(layer, layer.num_heads, False, *_own_rows(layer, kept))
    return found


def _has_weights(layer: nn.MultiheadAttention, kept: Mapping[int, str]) -> bool:
    """Return whether the projections are parameters, and not computed from others."""
    separate = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    weights = (layer.in_proj_weight, *separate, layer.out_proj.weight)
    return all(weight is None or id(weight) in kept for weight in weights)


def _own_rows(
    layer: nn.MultiheadAttention, kept: Mapping[int, str]
) -> tuple[tuple[Rows, ...], ...]:
    width, heads = layer.embed_dim // layer.num_heads, layer.num_heads

    def rows(parameter: torch.Tensor | None, first: int, axis: int = 0) -> list[Rows]:
        if parameter is None:
            return []
        return [Rows(kept[id(parameter)], axis, first, heads, width)]

    separate = layer.in_proj_weight is None
    query = rows(layer.q_proj_weight if separate else layer.in_proj_weight, 0)
    key = rows(layer.k_proj_weight, 0) if separate else rows(layer.in_proj_weight, layer.embed_dim)
    query += rows(layer.in_proj_bias, 0)
    key += rows(layer.in_proj_bias, layer.embed_dim) + rows(layer.bias_k, 0, 2)
    second = 2 * layer.embed_dim
    value = rows(layer.v_proj_weight, 0) if separate else rows(layer.in_proj_weight, second)
    value += rows(layer.in_proj_bias, second) + rows(layer.bias_v, 0, 2)
    return tuple(query), tuple(key), tuple(value), tuple(rows(layer.out_proj.weight, 0, 1))


def _declared_rows(
    module: nn.Module, declared: _Declared, prefix: str, kept: Mapping[int, str]
) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    fused = declared.query == declared.key
    query, key = (_linear(module, name) for name in (declared.query, declared.key))
    parts = declared.heads + 2 * declared.key_heads if fused else declared.heads
    width, rest = divmod(query.out_features, parts)
    if rest or (not fused and key.out_features != width * declared.key_heads):
        raise InvalidArgument(
            "the outputs do not divide into these heads",
            where=f"torch.declare_attention: {prefix}{declared.query}, {declared.key}",
            got=f"{query.out_features} and {key.out_features} outputs",
            allowed=f"{declared.heads} query and {declared.key_heads} key heads of one width",
        )
    first = declared.heads * width if fused else 0

    def rows(name: str, layer: nn.Linear, first: int, heads: int) -> tuple[Rows, ...]:
        return _rows_of(layer, f"{prefix}{name}", kept, first, heads, width)

    return (
        rows(declared.query, query, 0, declared.heads),
        rows(declared.key, key, first, declared.key_heads),
    )


def _declared_readers(
    module: nn.Module, declared: _Declared, prefix: str, kept: Mapping[int, str]
) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    """Return the rows of the values and the columns of the output projection; empty if not declared."""
    fused = declared.query == declared.key
    if declared.output is None or (declared.value is None and not fused):
        return (), ()
    name = declared.query if fused else str(declared.value)
    value, output = _linear(module, name), _linear(module, declared.output)
    parts = declared.heads + 2 * declared.key_heads if fused else declared.key_heads
    width, rest = divmod(value.out_features, parts)
    if rest or output.in_features != width * declared.heads:
        raise InvalidArgument(
            "the values or the output projection do not divide into these heads",
            where=f"torch.declare_attention: {prefix}{name}, {declared.output}",
            got=f"{value.out_features} outputs, {output.in_features} inputs",
            allowed=f"{declared.key_heads} heads of values, {declared.heads} heads read",
        )
    first = (declared.heads + declared.key_heads) * width if fused else 0
    columns = kept.get(id(output.weight), f"{prefix}{declared.output}.weight")
    return (
        _rows_of(value, f"{prefix}{name}", kept, first, declared.key_heads, width),
        (Rows(columns, 1, 0, declared.heads, width),),
    )


def _rows_of(
    layer: nn.Linear, path: str, kept: Mapping[int, str], first: int, heads: int, width: int
) -> tuple[Rows, ...]:
    names = [
        kept.get(id(parameter), f"{path}.{leaf}")
        for leaf in ("weight", "bias")
        if (parameter := getattr(layer, leaf)) is not None
    ]
    return tuple(Rows(name, 0, first, heads, width) for name in names)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = dict(module.named_modules()).get(name)
    if not isinstance(layer, nn.Linear):
        raise InvalidArgument(
            "not an nn.Linear of the module",
            where="torch.declare_attention",
            got=repr(name),
            allowed=", ".join(
                n for n, item in module.named_modules() if isinstance(item, nn.Linear)
            ),
        )
    return layer
