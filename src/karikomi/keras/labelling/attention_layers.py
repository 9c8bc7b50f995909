"""Attention: queries and keys are contracted over their width, values pass their own."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from karikomi.keras.internals import child_layers
from karikomi.keras.labelling.contractions import projected
from karikomi.keras.labelling.label_run import Call, LabelRun, Value, rule
from karikomi.shrink.label_planes import Labelled

UNUSUAL = "only three axes with attention over the second have a rule"


@rule("layers.MultiHeadAttention")
def multi_head_attention(run: LabelRun, call: Call) -> Value:
    """Keys and queries go with each other, values with the rows of the output; or whole heads go."""
    layer = call.operation
    given = _given(call)
    shape = layer.get_config()["output_shape"]
    usual = layer.attention_axes in (None, (1,), [1]) and (shape is None or len(shape) == 1)
    if not usual or any(len(value.shape) != 3 for value in given):
        return run.refuse(call, UNUSUAL)
    query, key, value = _projections(run, call)
    if keras.backend.backend() == "jax" and not run.whole and layer.key_dim == layer.value_dim:
        # There the attention of JAX itself takes one width only.
        run.meet([run.vector(part, -1, call.site) for part in (query, value)], call.site)
    return _attended(run, call, query, key, value)


@rule("layers.GroupedQueryAttention")
def grouped_query_attention(run: LabelRun, call: Call) -> Value:
    """As with all heads, but one head of keys and values serves several of queries, and all widths are equal."""
    query, key, value = _projections(run, call)
    if not run.whole:
        run.meet([run.vector(part, -1, call.site) for part in (query, value)], call.site)
    key, value = (_repeated(part, call.operation.num_repeats) for part in (key, value))
    found = _attended(run, call, query, key, value)
    parts = found if isinstance(found, list) else [found]
    # The layer makes as many features as its queries have.
    features = [run.vector(part, -1, call.site) for part in (_given(call)[0], parts[0])]
    run.meet(features, call.site)
    return found


def _projections(run: LabelRun, call: Call) -> list[Labelled]:
    """Return the labels of queries, keys and values of all heads."""
    parts = parts_of(call.operation)
    given = zip(_given(call), ("query", "key", "value"), strict=True)
    return [projected(run, call, value, parts[name], "btd,dhk->bthk") for value, name in given]


def parts_of(layer: Any) -> dict[str, Any]:
    """Return the layers inside of an attention by name."""
    return {part.name: part for part in child_layers(layer)}


def _given(call: Call) -> list[Labelled]:
    """Return query, key and value."""
    query, value = call.argument(0, "query"), call.argument(1, "value")
    key = call.argument(2, "key")
    return [query, value if key is None else key, value]


def _repeated(value: Labelled, times: int) -> Labelled:
    shape = (*value.shape[:2], value.shape[2] * times, value.shape[3])
    planes = tuple(
        np.repeat(plane, times, 2) if plane.shape[2] > 1 else plane for plane in value.planes
    )
    return Labelled(shape, planes)


def _attended(run: LabelRun, call: Call, query: Labelled, key: Labelled, value: Labelled) -> Value:
    parts = parts_of(call.operation)
    scores = run.contract(query, "bthk", key, "bshk", "bhts", call.site)
    mixed = run.contract(scores, "bhts", value, "bshv", "bthv", call.site)
    if "gate" in parts:
        gate = projected(run, call, _given(call)[0], parts["gate"], "btd,dhv->bthv")
        mixed = run.meet([mixed, gate], call.site)
    out = projected(run, call, mixed, parts["attention_output"], "bthv,hvo->bto")
    return out if len(call.shapes) == 1 else [out, run.current(scores, call.site)]


@rule("layers.Attention")
def attention(run: LabelRun, call: Call) -> Value:
    """``softmax(query key^T) value`` of three tensors of three axes."""
    layer, given = call.operation, call.values
    three = 2 <= len(given) <= 3 and all(len(value.shape) == 3 for value in given)
    if layer.score_mode != "dot" or not three:
        return run.refuse(call, UNUSUAL)
    query, value = given[:2]
    key = given[-1] if len(given) == 3 else value
    scores = run.contract(query, "btd", key, "bsd", "bts", call.site)
    out = run.contract(scores, "bts", value, "bsv", "btv", call.site)
    return out if len(call.shapes) == 1 else [out, run.current(scores, call.site)]
