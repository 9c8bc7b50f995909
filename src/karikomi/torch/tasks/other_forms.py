"""A network in the forms that other programs read: ONNX, in floats or integers, an exported program, plain arrays."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import nn

from karikomi.errors import BadFile
from karikomi.files import tensor_file, write_bytes
from karikomi.pack.models import load
from karikomi.tasks.runner import Form
from karikomi.tasks.splits import Data, Split
from karikomi.tasks.task import Task
from karikomi.torch.exporting.proof import apart
from karikomi.torch.internals import flattened
from karikomi.torch.modules.arrays import fill_, to_arrays
from karikomi.torch.modules.deep_copies import copied
from karikomi.torch.onnx_export.engine_runs import outputs_of, session_of
from karikomi.torch.onnx_export.export_report import OnnxExport
from karikomi.torch.onnx_export.float_graph import exported_program
from karikomi.torch.onnx_export.latency import measure_onnx
from karikomi.torch.onnx_export.to_file import export_onnx
from karikomi.torch.tasks.integer_engine import INTEGERS
from karikomi.torch.tasks.losses import place_of_selected
from karikomi.torch.tasks.training import batch_for, calibration
from karikomi.torch.tracing.batches import Batch, leaves

BATCH = 32
CALIBRATION = 512
"""Training examples that ranges of activations are measured on."""
SECONDS = 0.5
"""How long the two networks are timed in turn in the engine, for each batch size."""

_ONNX = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")
FORMS = {
    form.name: form
    for form in (
        Form("safetensors", "model.safetensors", "the tensors, expanded"),
        Form("pt2", "model.pt2", "torch.export.load(file).module(), without the class"),
        Form("onnx", "model.onnx", "ONNX in floats, weights as stored codes", _ONNX, "onnx"),
        Form("int8", "model.int8.onnx", "ONNX for integer kernels (QDQ)", _ONNX, "onnx"),
    )
}


class OtherForms:
    """The small network of a task beside its dense one, to be written in the forms of `FORMS`."""

    def __init__(self, task: Task, data: Data, dense: nn.Module, small: nn.Module) -> None:
        self._task, self._data = task, data
        self._dense, self._small = dense.eval(), small.eval()

    def write(self, name: str, path: Path) -> dict[str, Any]:
        """Write one form, and return its bytes, its difference to the network, and what became of the layers.

        ``difference``: of the outputs on up to 64 training examples, relative to the largest; ``metric``: that of
        the test split, where an engine other than torch ran it.
        """
        writers: dict[str, Callable[[Path], dict[str, Any]]] = {
            "safetensors": self._arrays,
            "pt2": self._program,
            "onnx": lambda to: self._onnx(to),
            "int8": self._integers,
        }
        facts = writers[name](path)
        return {"bytes": path.stat().st_size, **facts}

    def _arrays(self, path: Path) -> dict[str, Any]:
        write_bytes(path, tensor_file(to_arrays(self._small)))
        back = safetensors.numpy.load_file(path)
        other = fill_(copied(self._small), {name: np.array(array) for name, array in back.items()})
        return {"difference": self._difference(lambda batch: _outputs(other, batch))}

    def _program(self, path: Path) -> dict[str, Any]:
        program = exported_program(self._small, self._example(2), "batch", where="export: pt2")
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(program, buffer)
            write_bytes(path, buffer.getvalue())
            module = torch.export.load(io.BytesIO(path.read_bytes())).module(check_guards=False)
        return {"difference": self._difference(lambda batch: _outputs(module, batch))}

    def _integers(self, path: Path) -> dict[str, Any]:
        """Write the network that a search for integer kernels runs."""
        return self._onnx(path, **INTEGERS, data=calibration(self._small, self._data))

    def _onnx(self, path: Path, **choices: Any) -> dict[str, Any]:
        example = self._example(2)
        given = dict(example.named) or example.positional
        report = export_onnx(self._small, given, path, progress=False, **choices)
        session = session_of(path)
        names = [value.name for value in session.get_inputs()]

        def outputs(batch: Batch) -> list[torch.Tensor]:
            return [torch.from_numpy(found) for found in outputs_of(session, _feeds(names, batch))]

        return {
            "difference": self._difference(outputs),
            "engine": report.engine,
            "metric": self._metric(outputs),
            "layers": len(report.layers),
            "macs_float": report.macs_float if choices else None,
            "fell_back": report.fell_back,
            "float_weights": report.float_weights,
            "rounded_again": list(report.rounded_again),
            "speed": self._speed(path, names),
        }

    def _speed(self, path: Path, names: list[str]) -> list[dict[str, Any]]:
        """Return milliseconds in the engine beside those of the dense network in floats, at batch 1 and 32."""
        example, dense = self._example(2), path.with_name(f".{path.name}.dense.part")
        try:
            given = dict(example.named) or example.positional
            export_onnx(self._dense, given, dense, codes={}, progress=False)
            feeds = {n: _feeds(names, self._example(n)) for n in (1, BATCH)}
            rows = measure_onnx(
                {"dense": dense, "small": path},
                batches=tuple(feeds),
                feeds=feeds,
                seconds=SECONDS,
            )
        finally:
            dense.unlink(missing_ok=True)
        return [row.as_dict() for row in rows]

    def _example(self, count: int) -> Batch:
        """Return the first validation examples, again from the first where there are fewer."""
        split = self._data.validation
        return batch_for(self._small, split.take(np.arange(count) % len(split)).inputs)

    def _difference(self, outputs: Callable[[Batch], list[torch.Tensor]]) -> float:
        train = self._data.train
        some = train.take(np.arange(min(len(train), 64)))
        batch = batch_for(self._small, some.inputs)
        pairs = zip(_outputs(self._small, batch), outputs(batch), strict=True)
        return max((apart(expected.float(), got.float()) for expected, got in pairs), default=0.0)

    def _metric(self, outputs: Callable[[Batch], list[torch.Tensor]]) -> float | None:
        example = self._example(1)
        with torch.no_grad():
            found = self._small(*example.positional, **example.named)
        place = place_of_selected(found, self._task)
        test = self._data.test
        parts = [
            outputs(batch_for(self._small, part.inputs))[place].numpy() for part in _parts(test)
        ]
        return self._task.judge(np.concatenate(parts), test.targets)


def export_task(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    module: nn.Module,
    data: Data,
    *,
    examples: int = CALIBRATION,
    **choices: Any,
) -> OnnxExport:
    """Write the network of a packed file as an ONNX file; `module`: to fill; `choices`: of `export_onnx`.

    The example is the first of the validation split. With integer activations their ranges are measured
    on the first `examples` of the training split, in batches of 32. Raises what `karikomi.load` and `export_onnx` do.
    """
    module = load(file, into=module)
    example = batch_for(
        module, data.validation.take(np.arange(min(2, len(data.validation)))).inputs
    )
    if not len(data.train):
        raise BadFile("the task has no training examples", where="export")
    if choices.get("activations"):
        choices["data"] = list(_batches(module, data.train, examples))
    return export_onnx(module, dict(example.named) or example.positional, out, **choices)


def _outputs(module: Any, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        return leaves(module(*batch.positional, **batch.named))


def _feeds(names: list[str], batch: Batch) -> dict[str, np.ndarray]:
    tensors = [leaf for leaf in flattened((batch.positional, dict(batch.named)))[0]]
    plain = (tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)
    return {name: tensor.numpy() for name, tensor in zip(names, plain, strict=True)}


def _parts(split: Split) -> Iterator[Split]:
    for first in range(0, len(split), BATCH):
        yield split.take(np.arange(first, min(first + BATCH, len(split))))


def _batches(module: nn.Module, train: Split, examples: int) -> Iterator[Any]:
    for part in _parts(train.take(np.arange(min(examples, len(train))))):
        batch = batch_for(module, part.inputs)
        yield dict(batch.named) if batch.named else (batch.positional, None)
