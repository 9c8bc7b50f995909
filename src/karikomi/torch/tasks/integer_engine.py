"""A quantized network of a search in ONNX Runtime with integer activations: its outputs and its time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.tasks.splits import Inputs, Split, mapped_inputs
from karikomi.tasks.task import Task
from karikomi.torch.onnx_export.engine_runs import outputs_of, session_of
from karikomi.torch.onnx_export.latency import measure_onnx
from karikomi.torch.onnx_export.to_file import export_onnx
from karikomi.torch.tasks.losses import place_of_selected
from karikomi.torch.tasks.training import batch_for

INTEGERS: dict[str, Any] = {"activations": "int8", "bits": 8}
"""The choices of `export_onnx` for integer kernels: what is searched is what is written."""
SECONDS = 2.0
"""Of measuring both networks in turns."""

_BATCH = 100


class IntegerEngine:
    """A module exported to a temporary file with int8 activations, as long as the context is open.

    `data`: batches that calibrate the ranges. `few`: the examples of the export and of its time.
    """

    def __init__(self, module: nn.Module, data: Sequence[Any], few: Split) -> None:
        self._module, self._data, self._few = module, data, few
        self._folder = tempfile.TemporaryDirectory(prefix="karikomi-")
        self._path = Path(self._folder.name) / "int8.onnx"

    def __enter__(self) -> IntegerEngine:
        try:
            self._exported(self._module, self._path, **INTEGERS, data=self._data)
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def outputs(self, inputs: Inputs, task: Task) -> np.ndarray:
        """Return the outputs that are judged."""
        session = session_of(self._path)
        count, parts = len(Split(inputs, np.empty(0))), []
        place = self._place(task)
        for start in range(0, count, _BATCH):
            rows = slice(start, start + _BATCH)
            some = mapped_inputs(inputs, lambda array, rows=rows: array[rows])
            parts.append(outputs_of(session, self._feeds(session, some))[place])
        return np.concatenate(parts).astype(np.float32, copy=False)

    def milliseconds(self, dense: nn.Module) -> dict[str, float]:
        """Return the median processor time of a forward pass, ``ms``, and ``dense_ms`` of another network in floats."""
        before = Path(self._folder.name) / "float.onnx"
        self._exported(dense, before)
        feeds = self._feeds(session_of(self._path), self._few.inputs)
        files = {"dense": before, "int8": self._path}
        size = len(self._few)
        rows = measure_onnx(files, batches=(size,), seconds=SECONDS, feeds={size: feeds})
        return {"ms": rows[1].cpu_ms, "dense_ms": rows[0].cpu_ms}

    def _exported(self, module: nn.Module, path: Path, **how: Any) -> None:
        two = self._few.take(np.arange(min(2, len(self._few))))
        example = batch_for(module, two.inputs)
        export_onnx(module, dict(example.named) or example.positional, path, progress=False, **how)

    def _place(self, task: Task) -> int:
        """Return which output of the graph is judged."""
        batch = batch_for(self._module, self._few.take(np.arange(1)).inputs)
        with torch.no_grad():
            return place_of_selected(self._module(*batch.positional, **batch.named), task)

    def _feeds(self, session: Any, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return the inputs by the names of the graph, as the network takes them."""
        batch = batch_for(self._module, inputs)
        named = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in batch.named.items()
        }
        names = [given.name for given in session.get_inputs()]
        if named:
            return {name: named[name].numpy() for name in names}
        given = (t.float() if t.is_floating_point() else t for t in batch.positional)
        return {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
