"""Groups of weights for pruning heads of MultiHeadAttention: queries, keys, values, and the output."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from keras import layers

from karikomi.errors import Unsupported
from karikomi.keras.internals import all_layers, kernel_of
from karikomi.keras.layers.prunable import Oriented
from karikomi.prune import Coupled, Member


def coupled_heads(
    found: Mapping[str, Oriented], model: Any, chosen: Collection[str]
) -> tuple[list[Coupled], dict[str, str]]:
    """Return ``(one group per MultiHeadAttention, weight -> why it belongs to no head)``.

    Only layers whose output projection is `chosen` have a group. Raises `Unsupported` if there is none.
    """
    names = {id(item.variable): name for name, item in found.items()}
    groups = []
    for layer in all_layers(model):
        if isinstance(layer, layers.MultiHeadAttention):
            group = _group(layer, names)
            if any(member.name in chosen for member in group.members if member.axis == 1):
                groups.append(group)
    if not groups:
        raise Unsupported(
            "the model has no attention whose heads are known",
            where="keras.prune_",
            got="no selected MultiHeadAttention",
        )
    taken = {member.name for item in groups for member in item.members}
    return groups, {name: "not a part of an attention head" for name in chosen if name not in taken}


def _group(layer: Any, names: Mapping[int, str]) -> Coupled:
    widths = {"query": layer.key_dim, "key": layer.key_dim, "value": layer.value_dim}
    members = []
    for which, width in widths.items():
        dense = getattr(layer, f"{which}_dense")
        members.append(Member(names[id(kernel_of(dense))], 0, size=width))
        if dense.bias is not None:
            members.append(Member(names[id(dense.bias)], 0, size=width, scored=False))
    out = kernel_of(layer.output_dense)
    members.append(Member(names[id(out)], 1, size=layer.value_dim))
    return Coupled(layer.path, layer.num_heads, tuple(members))
