"""A network in the forms that other programs read: the model file of Keras, and plain arrays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors.numpy

from karikomi.files import tensor_file, write_bytes
from karikomi.keras.layers.arrays import to_arrays
from karikomi.keras.layers.codes import as_floats
from karikomi.tasks.runner import Form

FORMS = {
    form.name: form
    for form in (
        Form("safetensors", "model.safetensors", "the tensors, expanded"),
        Form("keras", "model.keras", "keras.models.load_model(file), without karikomi"),
    )
}


class OtherForms:
    """A network, to be written in the forms of `FORMS` and compared on some inputs."""

    def __init__(self, small: Any, inputs: Any) -> None:
        self._small, self._inputs = small, inputs

    def write(self, name: str, path: Path) -> dict[str, Any]:
        """Write one form, and return its bytes and the difference of its outputs, relative to the largest."""
        writers: dict[str, Callable[[Path], float]] = {
            "safetensors": self._arrays,
            "keras": self._model,
        }
        difference = writers[name](path)
        return {"bytes": path.stat().st_size, "difference": difference}

    def _arrays(self, path: Path) -> float:
        arrays = to_arrays(self._small)
        write_bytes(path, tensor_file(arrays))
        back = safetensors.numpy.load_file(path)
        same = all(back[name].tobytes() == array.tobytes() for name, array in arrays.items())
        return 0.0 if same else float("inf")

    def _model(self, path: Path) -> float:
        part = path.with_name(f".{path.stem}.part.keras")
        try:
            self._small.save(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        other = keras.models.load_model(path, compile=False)
        pairs = zip(self._outputs(self._small), self._outputs(other), strict=True)
        return max((_apart(first, second) for first, second in pairs), default=0.0)

    def _outputs(self, model: Any) -> list[np.ndarray]:
        found = keras.tree.flatten(model.predict_on_batch(self._inputs))
        return [as_floats(np.asarray(leaf)) for leaf in found]


def _apart(expected: np.ndarray, got: np.ndarray) -> float:
    scale = float(np.abs(expected).max(initial=0)) or 1.0
    return float(np.abs(expected - got).max(initial=0)) / scale
