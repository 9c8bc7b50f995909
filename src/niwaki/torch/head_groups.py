"""Attention heads as things that go together: their queries, keys, values, and what reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from niwaki.errors import Refused
from niwaki.prune import Coupled, Member
from niwaki.torch.attention import Attention, Rows, attentions


def coupled_heads(
    module: nn.Module, weights: Mapping[str, torch.Tensor]
) -> tuple[list[Coupled], dict[str, str]]:
    """Return ``(one group per attention layer, weight -> why it belongs to no head)``.

    Where query heads share a key head, an item is a key head with all its query heads. Only layers are
    meant whose output projection is among the `weights`. Raises `Refused` if there is none.
    """
    found = attentions(module)
    groups = [_group(name, one) for name, one in found.items() if _chosen(one, weights)]
    if not groups:
        raise Refused(
            "the module has no attention whose heads are known here",
            where="torch.prune_",
            hint="declare your own layers: nw.torch.declare_attention(layer, heads=8, q=..., k=..., "
            "v=..., out=...)",
        )
    taken = {member.name for one in groups for member in one.members}
    return groups, {name: "no part of an attention head" for name in weights if name not in taken}


def _chosen(one: Attention, weights: Mapping[str, torch.Tensor]) -> bool:
    return bool(one.output) and all(rows.name in weights for rows in one.output)


def _group(name: str, one: Attention) -> Coupled:
    items = min(rows.heads for rows in (*one.query, *one.key))

    def member(rows: Rows) -> Member:
        size = rows.width * (rows.heads // items)
        scored = "bias" not in rows.name.rpartition(".")[2]
        return Member(rows.name, rows.axis, rows.first, size, scored)

    every = (*one.query, *one.key, *one.value, *one.output)
    return Coupled(name or "attention", items, tuple(member(rows) for rows in every))
