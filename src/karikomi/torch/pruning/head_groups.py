"""Groups of weights for pruning attention heads: queries, keys, values, and the weights that read them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.prune import Coupled, Member
from karikomi.prune.protection import BY_DEFAULT, STACKED
from karikomi.torch.modules.attention import Attention, Rows, attentions
from karikomi.torch.modules.prunable import prunable


def coupled_heads(
    module: nn.Module, weights: Mapping[str, torch.Tensor]
) -> tuple[list[Coupled], dict[str, str]]:
    """Return ``(one group per attention layer, weight -> why it belongs to no head)``.

    Where query heads share a key head, an item is a key head with all its query heads. Only layers whose
    projections are among the `weights` have a group. Raises `Unsupported` if there is none.
    """
    known = prunable(module, (*BY_DEFAULT, *STACKED))[0].keys()
    groups = [
        _group(name, attention)
        for name, attention in attentions(module).items()
        if _is_chosen(attention, weights, known)
    ]
    if not groups:
        raise Unsupported(
            "the module has no attention whose heads are known",
            where="torch.prune_",
            hint="declare your own layers: kk.torch.declare_attention(layer, heads=8, q=..., k=..., "
            "v=..., out=...)",
        )
    taken = {member.name for group in groups for member in group.members}
    return groups, {
        name: "not a part of an attention head" for name in weights if name not in taken
    }


def _is_chosen(
    attention: Attention, weights: Mapping[str, torch.Tensor], known: Collection[str]
) -> bool:
    # In-projections of nn.MultiheadAttention belong to no Linear layer, and are pruned with the output.
    linear = (
        rows for rows in (*attention.query, *attention.key, *attention.value) if rows.name in known
    )
    return bool(attention.output) and all(
        rows.name in weights for rows in (*linear, *attention.output)
    )


def _group(name: str, attention: Attention) -> Coupled:
    items = min(rows.heads for rows in (*attention.query, *attention.key))

    def member(rows: Rows) -> Member:
        size = rows.width * (rows.heads // items)
        scored = "bias" not in rows.name.rpartition(".")[2]
        return Member(rows.name, rows.axis, rows.first, size, scored)

    projections = (*attention.query, *attention.key, *attention.value, *attention.output)
    return Coupled(name or "attention", items, tuple(member(rows) for rows in projections))
