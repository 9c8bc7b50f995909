"""Attention heads as things that go together: their queries, keys, values, and what reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.prune import Coupled, Member
from karikomi.torch.modules.attention import Attention, Rows, attentions
from karikomi.torch.modules.prunable import prunable


def coupled_heads(
    module: nn.Module, weights: Mapping[str, torch.Tensor]
) -> tuple[list[Coupled], dict[str, str]]:
    """Return ``(one group per attention layer, weight -> why it belongs to no head)``.

    Where query heads share a key head, an item is a key head with all its query heads. Only layers are
    meant whose projections are among the `weights`. Raises `Unsupported` if there is none.
    """
    found = attentions(module)
    known = prunable(module)[0].keys()
    groups = [_group(name, item) for name, item in found.items() if _chosen(item, weights, known)]
    if not groups:
        raise Unsupported(
            "the module has no attention whose heads are known here",
            where="torch.prune_",
            hint="declare your own layers: kk.torch.declare_attention(layer, heads=8, q=..., k=..., "
            "v=..., out=...)",
        )
    taken = {member.name for group in groups for member in group.members}
    return groups, {name: "no part of an attention head" for name in weights if name not in taken}


def _chosen(
    attention: Attention, weights: Mapping[str, torch.Tensor], known: Collection[str]
) -> bool:
    # In-projections of nn.MultiheadAttention belong to no Linear layer, and go with what reads them.
    linear = (
        rows for rows in (*attention.query, *attention.key, *attention.value) if rows.name in known
    )
    every = [*linear, *attention.output]
    return bool(attention.output) and all(rows.name in weights for rows in every)


def _group(name: str, attention: Attention) -> Coupled:
    items = min(rows.heads for rows in (*attention.query, *attention.key))

    def member(rows: Rows) -> Member:
        size = rows.width * (rows.heads // items)
        scored = "bias" not in rows.name.rpartition(".")[2]
        return Member(rows.name, rows.axis, rows.first, size, scored)

    every = (*attention.query, *attention.key, *attention.value, *attention.output)
    return Coupled(name or "attention", items, tuple(member(rows) for rows in every))
