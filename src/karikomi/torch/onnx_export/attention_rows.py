"""Attention in rows without keys: zeros as in torch, by one factor per row.

The exporter writes fused attention as ``softmax(scores + mask) @ v``, for a mask of truth values with the least number
in place of -inf and a guard, ``Where(IsNaN(p), 0, p)``, which so never acts: rows without keys attend to all keys
alike. For a mask of floats it has neither, and such rows are NaN. In torch their outputs are zeros. Here,

    ``alive * (softmax(scores + where(alive, mask, 0)) @ v)``  with  ``alive = max(mask) > -inf``  of each row,

on a mask that heads share, which is less work than a guard on all scores. Found in torch 2.13 with onnxscript 0.7.
"""

from __future__ import annotations

import numpy as np

from karikomi.torch.onnx_export.graph_edits import GraphEdits, Node, Value

_MADE_FOR, _ATTENTION = "pkg.torch.onnx.fx_node", "scaled_dot_product_attention.default"
"""The note that the exporter leaves on a node, and what it has on those of fused attention."""


def zero_rows_(edits: GraphEdits) -> None:
    """Give the rows of fused attention that have no keys outputs of zero.

    The shapes and notes that the exporter leaves have to be there still.
    """
    rows: dict[int, tuple[Value, Value]] = {}
    for softmax in edits.nodes("Softmax"):
        scores = softmax.inputs[0].producer()
        if not _is_attention(softmax) or scores is None or scores.op_type != "Add":
            continue
        place = _mask_place(scores)
        product = _product(edits, softmax)
        if place is None or product is None:
            continue
        mask = scores.inputs[place]
        if id(mask) not in rows:
            rows[id(mask)] = _rows(edits, mask)
        safe, alive = rows[id(mask)]
        scores.replace_input_with(place, safe)
        product.replace_input_with(0, softmax.outputs[0])
        found = product.outputs[0]
        readers = edits.uses(found)
        kept = edits.after(found, "Mul", alive, name=f"{found.name}_rows_kept")
        kept.type, kept.shape = found.type, found.shape
        for reader, at in readers:
            reader.replace_input_with(at, kept)
        if found.is_graph_output():
            outputs = edits.graph.outputs
            outputs[list(outputs).index(found)] = kept
            kept.name, found.name = found.name, kept.name


def _is_attention(node: Node | None) -> bool:
    return node is not None and _ATTENTION in node.metadata_props.get(_MADE_FOR, "")


def _product(edits: GraphEdits, softmax: Node) -> Node | None:
    """Return the product with the values, behind a guard if there is one."""
    value = softmax.outputs[0]
    for reader, place in edits.uses(value):
        if reader.op_type == "Where" and place == 2:
            value = reader.outputs[0]
    found = edits.only_reader(value)
    product = found is not None and found.op_type == "MatMul" and found.inputs[0] is value
    return found if product else None


def _mask_place(scores: Node) -> int | None:
    """Return which input of a sum of scores and a mask is the mask, None for one that has axes of no known number."""
    made = [
        _is_attention(value.producer()) and value.producer().op_type == "MatMul"
        for value in scores.inputs
    ]
    mask = scores.inputs[made.index(False)] if sum(made) == 1 else None
    return None if mask is None or mask.shape is None or not len(mask.shape) else made.index(False)


def _rows(edits: GraphEdits, mask: Value) -> tuple[Value, Value]:
    """Return a mask without rows of -inf throughout, and 1 for each row that has a key, else 0."""
    name, zero = mask.name, edits.stored("zero", np.float32(0))
    axis, least = (
        edits.stored("keys", np.asarray([-1], np.int64)),
        edits.stored("least", np.float32(-np.inf)),
    )
    if _stands_for_infinity(edits, mask):
        wanted = mask.producer().inputs[0]
        mask = edits.after(wanted, "Where", zero, least, name=f"{name}_infinite")
    largest = edits.after(mask, "ReduceMax", axis, name=f"{name}_largest", keepdims=1)
    alive = edits.after(largest, "Greater", least, name=f"{name}_alive")
    kept = edits.after(alive, "Cast", name=f"{name}_kept", to=1)
    return edits.after(alive, "Where", mask, zero, name=f"{name}_safe"), kept


def _stands_for_infinity(edits: GraphEdits, mask: Value) -> bool:
    """Return whether the exporter made a mask of truth values, with the least number where torch has -inf.

    Of one that the module itself makes with least numbers, a row without keys does attend to all of them alike.
    """
    maker = mask.producer()
    if not _is_attention(maker) or maker.op_type != "Where":
        return False
    kept, least = (edits.constant(value) for value in maker.inputs[1:])
    if kept is None or least is None:
        return False
    return not kept.any() and bool(np.all(least == np.finfo(np.float32).min))
