"""Pooling, resizing and other layers over positions, which stay as they are; channels pass."""

from __future__ import annotations

from karikomi.keras.labelling.contractions import channel_axis
from karikomi.keras.labelling.label_run import Call, LabelRun, Value, placed, rule

NAMES = [
    f"{kind}{axes}D"
    for axes in (1, 2, 3)
    for kind in (
        *("MaxPooling", "AveragePooling", "GlobalMaxPooling", "GlobalAveragePooling", "UpSampling"),
        *("AdaptiveAveragePooling", "AdaptiveMaxPooling", "ZeroPadding", "Cropping"),
    )
]


@rule(*(f"layers.{name}" for name in (*NAMES, "Resizing", "CenterCrop")))
def over_places(run: LabelRun, call: Call) -> Value:
    """Pass the labels of the channels."""
    layer = call.operation
    axis = channel_axis(layer) if hasattr(layer, "data_format") else -1
    return placed(run.vector(call.values[0], axis, call.site), call.shape, axis)
