"""The public function that writes a network as an ONNX file, in floats, with codes, or for integer kernels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from karikomi.errors import InvalidArgument, Unavailable, Unsupported, check, check_known
from karikomi.files import as_path, write_bytes
from karikomi.quantize import Coded
from karikomi.quantize.activation_ranges import CALIBRATIONS, activation_grid
from karikomi.select import select
from karikomi.torch.equalization.batch_norm_folding import fold_batch_norms_
from karikomi.torch.facts.measure import check_data
from karikomi.torch.modules import codes as stored_codes
from karikomi.torch.modules.deep_copies import copied
from karikomi.torch.modules.parameters import by_any_name, check_names, unwrapped
from karikomi.torch.onnx_export.coded_weights import (
    StoredCodes,
    decode_in_graph_,
    fold_transposes_,
    found_codes,
    parameter_names,
    why_decoded,
)
from karikomi.torch.onnx_export.engine_runs import (
    engine_name,
    histograms,
    inner_values,
    optimized_kinds,
    outputs_of,
    session_of,
)
from karikomi.torch.onnx_export.export_report import LayerRow, OnnxExport
from karikomi.torch.onnx_export.float_graph import Feeds, FloatGraph, float_graph
from karikomi.torch.onnx_export.graph_edits import WHERE, GraphEdits, Value, imported
from karikomi.torch.onnx_export.integer_regions import IntegerRegions
from karikomi.torch.onnx_export.kernel_fitting import fit_, fitted_values
from karikomi.torch.onnx_export.weighted_nodes import (
    WeightedNode,
    code_weights_,
    shaped_values,
    weighted_nodes,
)
from karikomi.torch.tracing.batches import Batch, batch_of, batches_of, leaves, length_of

MOST_BYTES = 2**31 - 2**24
"""The limit of protobuf, less room for the graph."""
ACTIVATIONS = (None, "int8")
INTEGERS = frozenset(
    "QLinearConv QGemm QLinearMatMul MatMulIntegerToFloat MatMulInteger QLinearAdd".split()
)


@torch.no_grad()
def export_onnx(
    model: nn.Module,
    inputs: Any,
    path: str | os.PathLike[str],
    *,
    codes: Mapping[str, Coded] | None = None,
    activations: str | None = None,
    data: Iterable[Any] | None = None,
    calibration: str = "minmax",
    bits: int | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    fold: bool = True,
    dynamic: str = "batch",
    opset: int = 20,
    progress: bool = True,
) -> OnnxExport:
    """Write a network as an ONNX file, and return what became of each layer.

    Weights with codes are stored as these integers with ``DequantizeLinear`` (per channel ``w = scale * code``), the
    same integers and scales that `karikomi.save` packs. `codes`: None for those that `quantize_` left in the
    module, ``{}`` for float weights, else name -> codes. `fold`: fold batch norms first (`fold_batch_norms_`),
    which keeps the integers and multiplies the scales.

    ``activations="int8"``: activations become unsigned bytes, ``x = scale * (code - zero_point)``, so that engines run
    linear layers and convolutions in integers. Their ranges are measured on `data`, batches as in `prune_`, by
    `calibration`: "minmax", "percentile" (99.999), "mse" or "entropy". Weights without codes, or with codes that
    integer kernels do not take (codebooks, more than 8 bits), then get `bits`, with one scale per output unit; units
    whose codes fit keep them. By default 8 where the module has no codes at all, else such layers stay in
    float; 7 for processors without VNNI, whose kernels saturate at 8. `only`, `exclude`: globs over
    names of weights; other layers stay in float.

    `inputs`: an example, a tensor, the tuple of arguments, or a mapping of keywords. `dynamic`: which axes of the
    inputs are open: the first of each ("batch"), "all", "none". `opset`: 18 or later, 21 for codes of more than 8 bits.
    bfloat16, float16 and float64 modules are written as float32.

    Raises `Unavailable` without the ``onnx`` extra, `Unsupported` where `torch.export` or the exporter do not take
    the module, `InvalidArgument` for missing data and for codes of another shape, `NonFinite` for an activation.

    >>> import tempfile, karikomi as kk
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> x = torch.randn(4, 3, 8, 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = kk.torch.export_onnx(net, x, f"{folder}/a.onnx", activations="int8", data=[x])
    >>> done.weights, done.macs_float, done.cosine > 0.99
    (('0.weight',), 0.0, True)

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference"; the QDQ format of ONNX Runtime.
    """
    request = _Request(activations, calibration, bits, only, exclude, progress)
    request.check(data)
    path, module = as_path(path), unwrapped(model)
    request.only, request.exclude = by_any_name(module, only), by_any_name(module, exclude)
    device = next((item.device for item in module.parameters()), torch.device("cpu"))
    example = batch_of((inputs, None), device, module=module, where=WHERE)
    expected = _expected(module, example)
    example = example.inputs(_plain)
    network, left_alone = _prepared(module, example, codes, fold)
    coded = _plainly_named(network)
    if bits is None and not coded:
        request.bits = 8
    wide = any(tensor.codes.dtype.itemsize > 1 for tensor in coded.values())
    graph = float_graph(network, example, dynamic=dynamic, opset=max(opset, 21) if wide else opset)
    edits = GraphEdits(graph.model)
    fold_transposes_(edits)
    float_bytes = sum(value.const_value.nbytes for value in edits.graph.initializers.values())
    found, missing = found_codes(edits, coded)
    layers: list[WeightedNode] = []
    as_given = dict(found)
    if activations:
        assert data is not None  # noqa: S101  (checked by `_Request`)
        runs = (
            graph.feeds(batch.inputs(_plain), example) for batch in _batches(data, network, request)
        )
        layers = _with_integers_(
            edits, graph, found, example, runs, request, dict(network.named_parameters())
        )
    decode_in_graph_(edits, found)
    edits.tidy_()
    serialized = _serialized(edits)
    write_bytes(path, serialized)
    return OnnxExport(
        path=str(path),
        bytes=len(serialized),
        bytes_float=float_bytes,
        weights=tuple(dict.fromkeys(item.name for item in found.values() if not why_decoded(item))),
        float_weights={**missing, **_decoded_weights(found)},
        layers=tuple(_rows(layers, serialized, example)),
        open_axes=tuple(graph.open_axes),
        calibration=calibration if activations else "",
        left_alone=left_alone,
        rounded_again=tuple(_changed(edits, as_given, found)),
        **_compared(serialized, graph.feeds(example, example), expected),
    )


def _serialized(edits: GraphEdits) -> bytes:
    size = sum(value.const_value.nbytes for value in edits.graph.initializers.values())
    if size > MOST_BYTES:
        raise Unsupported(
            "the weights do not fit in one ONNX file",
            where=WHERE,
            got=f"{size:,} bytes",
            allowed=f"<= {MOST_BYTES:,}",
            hint="quantize_ first, or export the network in parts",
        )
    return imported("onnx_ir").to_proto(edits.model).SerializeToString()


def _changed(
    edits: GraphEdits, before: Mapping[Value, StoredCodes], after: Mapping[Value, StoredCodes]
) -> list[str]:
    """Return the names of codes that have other values now."""
    changed = []
    for value, stored in before.items():
        floats = edits.constant(value)
        if after[value] is stored or floats is None:
            continue
        if not np.array_equal(after[value].coded.decode(), floats):
            changed.append(stored.name)
    return changed


def _decoded_weights(found: Mapping[Value, StoredCodes]) -> dict[str, str]:
    reasons = {stored.name: why_decoded(stored) for stored in found.values()}
    return {name: reason for name, reason in reasons.items() if reason}


class _Request:
    """The choices of one export, checked."""

    def __init__(
        self,
        activations: Any,
        calibration: str,
        bits: int | None,
        only: Any,
        exclude: Any,
        progress: bool,
    ) -> None:
        self.activations, self.calibration, self.bits = activations, calibration, bits
        self.only, self.exclude, self.progress = only, exclude, progress

    def check(self, data: Any) -> None:
        """Raise `InvalidArgument` or `UnknownName` for what is missing or unknown."""
        good = self.activations in ACTIVATIONS
        check(WHERE, (good, "unknown type of activations", self.activations, "None or 'int8'"))
        check_known(self.calibration, CALIBRATIONS, "unknown calibration", where=WHERE)
        if not self.activations:
            given = {"bits": self.bits, "only": self.only, "exclude": self.exclude}
            for name, value in given.items():
                none = value is None
                check(
                    WHERE, (none, f"{name} is of integer layers: activations='int8'", value, None)
                )
            return
        small = self.bits is None or self.bits in range(2, 9)
        check(WHERE, (small, "bits out of range", self.bits, "2..8"))
        imported("onnxruntime")
        if data is None:
            raise InvalidArgument(
                "the ranges of activations are measured on data",
                where=WHERE,
                hint="pass data=, some hundred examples in batches, such as training data",
            )
        check_data(data, WHERE)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu()


def _expected(module: nn.Module, example: Batch) -> list[np.ndarray]:
    network = copied(module).eval()
    found = leaves(network(*example.positional, **example.named))
    return [tensor.detach().float().cpu().numpy() for tensor in found]


def _prepared(
    module: nn.Module, example: Batch, codes: Mapping[str, Coded] | None, fold: bool
) -> tuple[nn.Module, dict[str, str]]:
    """Return a float32 copy in eval mode whose coded weights are exactly what the codes decode to."""
    held = stored_codes.recall(module) if codes is None else dict(codes)
    network = copied(module).eval().float().cpu()
    parameters: dict[str, torch.Tensor] = dict(network.named_parameters(remove_duplicate=False))
    parameters |= dict(network.named_buffers(remove_duplicate=False))
    check_names(held, parameters, where=WHERE)
    for name, tensor in held.items():
        got, shape = tensor.shape, tuple(parameters[name].shape)
        check(f"{WHERE}: {name}", (got == shape, "codes of another shape", got, shape))
        parameters[name].copy_(torch.from_numpy(tensor.decode()))
    stored_codes.remember_(network, held)
    if not fold:
        return network, {}
    return network, fold_batch_norms_(network, example).left_alone


def _plainly_named(network: nn.Module) -> dict[str, Coded]:
    """Return name -> codes, a tied weight under its first name."""
    coded = stored_codes.recall(network)
    return {name: coded[name] for name, _ in network.named_parameters() if name in coded}


def _batches(data: Iterable[Any], network: nn.Module, request: _Request) -> Iterable[Batch]:
    return tqdm(
        batches_of(data, network, where=f"{WHERE}: data"),
        desc="calibrate",
        unit="batch",
        total=length_of(data),
        disable=None if request.progress else True,
        leave=False,
    )


def _with_integers_(
    edits: GraphEdits,
    graph: FloatGraph,
    found: dict[Value, StoredCodes],
    example: Batch,
    runs: Iterable[Feeds],
    request: _Request,
    parameters: Mapping[str, torch.Tensor],
) -> list[WeightedNode]:
    """Put integer regions into the graph, with ranges measured on the runs; return the layers."""
    threads = torch.get_num_threads()
    given = graph.feeds(example, example)
    fit_(edits, _shapes(edits, fitted_values(edits), given))
    shapes = _shapes(edits, shaped_values(edits), given)
    names = parameter_names(edits, parameters)
    kept = set(select(parameters, only=request.only, exclude=request.exclude, where=WHERE))

    def selected(name: str) -> bool:
        return name in kept or name not in parameters

    if request.bits is not None:
        code_weights_(edits, found, names, request.bits, selected)
    layers = weighted_nodes(edits, found, names, shapes, selected)
    regions = IntegerRegions(edits, layers)
    seen = histograms(edits.model, [value.name for value in regions.values], runs, threads=threads)
    grids = {name: activation_grid(item, request.calibration) for name, item in seen.items()}
    regions.apply_(grids)
    return layers


def _shapes(edits: GraphEdits, names: list[str], given: Feeds) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of inner values on the example."""
    found = next(iter(inner_values(edits.model, names, [given], threads=1)))
    return {name: array.shape for name, array in found.items()}


def _rows(layers: list[WeightedNode], serialized: bytes, example: Batch) -> list[LayerRow]:
    if not layers:
        return []
    kinds, engine = optimized_kinds(serialized), engine_name()
    rows = []
    for item in layers:
        kind = kinds.get(item.node.name, "")
        reason = item.why_float
        if reason is None and kind not in INTEGERS:
            reason = f"{engine} runs it as {kind or 'a part of another node'}"
        runs = "float32" if reason else "int8"
        macs = item.macs // max(example.examples, 1)
        rows.append(LayerRow(item.name, item.kind, macs, runs, reason or ""))
    return rows


def _compared(serialized: bytes, feeds: Feeds, expected: list[np.ndarray]) -> dict[str, Any]:
    """Return how far the outputs of the file are from those of the module, where onnxruntime is installed."""
    try:
        engine = engine_name()
    except Unavailable:
        return {}
    got = outputs_of(session_of(serialized), feeds)
    if [array.shape for array in got] != [array.shape for array in expected]:
        # What the module returns beside tensors of its own has no counterpart among the outputs of the file.
        return {"engine": engine}
    pairs = [
        (a.astype(np.float64).ravel(), b.astype(np.float64).ravel())
        for a, b in zip(got, expected, strict=True)
    ]
    largest = max((float(np.abs(b).max(initial=0)) for _, b in pairs), default=0.0) or 1.0
    apart = max((float(np.abs(a - b).max(initial=0)) for a, b in pairs), default=0.0)
    a, b = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / length if length else 1.0
    return {"engine": engine, "max_difference": apart / largest, "cosine": cosine}
