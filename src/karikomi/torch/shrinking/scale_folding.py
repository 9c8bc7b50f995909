"""Fold factors that code computes from a width: a smaller head would be scaled by another ``1 / sqrt(width)``.

The graph of the original has the factor as a number, which stays. Code that computes it anew from the smaller
tensors gets another one; the weights that make the scaled tensor are multiplied by the ratio of both, so that
the module computes what the graph does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from karikomi.torch.exporting.rewriting import owner_of
from karikomi.torch.labelling.label_run import call_of, name_of, shape_of

_MOVES = frozenset(
    """
    view reshape _unsafe_view flatten unflatten squeeze unsqueeze permute transpose t swapaxes movedim select
    narrow slice contiguous clone detach alias to dropout getitem unbind chunk split split_with_sizes roll
    expand
    """.split()
)


@torch.no_grad()
def fold_scales_(module: nn.Module, wanted: fx.GraphModule, present: fx.GraphModule) -> bool:
    """Multiply weights of a module so that factors in its graph become those of the wanted graph.

    `wanted`, `present`: exported graphs with the same operators in the same order. Returns whether all
    factors that differ could be folded.
    """
    ones = [node for node in wanted.graph.nodes if node.op == "call_function"]
    others = [node for node in present.graph.nodes if node.op == "call_function"]
    if [name_of(node) for node in ones] != [name_of(node) for node in others]:
        return False
    done: set[str] = set()
    for first, other in zip(ones, others, strict=True):
        ratio = _ratio(first, other)
        if ratio is None or ratio == 1.0:
            continue
        made = _made_by(other.args[0])
        if made is None:
            return False
        producer, rows = made
        for argument in ("weight", "bias"):
            stored = call_of(producer).arguments.get(argument)
            if not isinstance(stored, fx.Node):
                continue
            if stored.op != "get_attr":
                return False
            key = f"{stored.target}{rows.tolist()[:1]}"
            if key in done:
                return False
            done.add(key)
            owner, leaf = owner_of(module, str(stored.target))
            getattr(owner, leaf)[rows] *= ratio
    return bool(done)


def _ratio(first: fx.Node, other: fx.Node) -> float | None:
    """Return by what the first argument of a call has to be multiplied, or None if it is not scaled."""
    name = name_of(first)
    if name == "scaled_dot_product_attention":
        scales = [
            call["scale"]
            if call["scale"] is not None
            else shape_of(call["query"].meta["val"])[-1] ** -0.5
            for call in (call_of(first), call_of(other))
        ]
        return scales[0] / scales[1]
    if name in ("mul", "div") and all(isinstance(node.args[1], float) for node in (first, other)):
        before, after = float(first.args[1]), float(other.args[1])  # type: ignore[arg-type]
        return before / after if name == "mul" else after / before
    return None


def _made_by(node: Any) -> tuple[fx.Node, torch.Tensor] | None:
    """Return the layer whose output, only moved, is a tensor, and which of its rows are in it."""
    moves = []
    while isinstance(node, fx.Node) and node.op == "call_function" and name_of(node) in _MOVES:
        moves.append(node)
        node = node.args[0]
    if (
        not isinstance(node, fx.Node)
        or node.op != "call_function"
        or name_of(node)
        not in (
            "linear",
            "layer_norm",
            "rms_norm",
        )
    ):
        return None
    weight = call_of(node).arguments.get("weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    shape = shape_of(node.meta["val"])
    value: Any = torch.arange(shape[-1]).expand(shape)
    for move in reversed(moves):
        target: Any = move.target
        value = target(value, *move.args[1:], **move.kwargs)
    return node, torch.unique(value)
