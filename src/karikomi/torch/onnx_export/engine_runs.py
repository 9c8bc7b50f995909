"""Runs of an ONNX graph in onnxruntime: outputs, inner values, and what its optimizer made of the nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from karikomi.errors import Unsupported
from karikomi.quantize.activation_ranges import ActivationHistogram
from karikomi.torch.onnx_export.float_graph import Feeds
from karikomi.torch.onnx_export.graph_edits import WHERE, imported

QUIET = 3
"""Errors only: onnxruntime warns of initializers that its own fusions leave unused."""


def engine_name() -> str:
    """Return the engine with its version."""
    return f"onnxruntime {imported('onnxruntime').__version__}"


def session_of(source: Any, *, threads: int = 1, optimized: Path | None = None) -> Any:
    """Return an inference session on the CPU of the bytes of a model, or of a file."""
    runtime = imported("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = QUIET
    # A matrix that is decoded and multiplied is fused into a kernel that by default rounds its inputs to 8 bits too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    given = source if isinstance(source, bytes) else str(source)
    try:
        return runtime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Unsupported(
            f"onnxruntime does not load the graph ({' '.join(str(error).split())[:300]})",
            where=WHERE,
        ) from error


def outputs_of(session: Any, feeds: Feeds) -> list[np.ndarray]:
    """Return the outputs of one run."""
    return session.run(None, feeds)


def with_outputs(model: Any, names: Iterable[str]) -> bytes:
    """Return a serialized model that also gives inner values as outputs."""
    onnx = imported("onnx")
    proto = imported("onnx_ir").to_proto(model)
    known = {output.name for output in proto.graph.output}
    for name in names:
        if name not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return proto.SerializeToString()


def inner_values(
    model: Any, names: list[str], runs: Iterable[Feeds], *, threads: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield name -> array of inner values, or of inputs, for each run."""
    session = session_of(with_outputs(model, names), threads=threads)
    given = {value.name for value in session.get_inputs()}
    wanted = [name for name in names if name not in given]
    for feeds in runs:
        found = dict(zip(wanted, session.run(wanted, feeds), strict=True)) if wanted else {}
        yield {**{name: feeds[name] for name in names if name in given}, **found}


def histograms(
    model: Any, names: list[str], runs: Iterable[Feeds], *, threads: int
) -> dict[str, ActivationHistogram]:
    """Return name -> histogram of the values of all runs."""
    seen = {name: ActivationHistogram(name) for name in names}
    for values in inner_values(model, names, runs, threads=threads):
        for name, array in values.items():
            seen[name].add(array)
    return seen


def optimized_kinds(serialized: bytes, *, threads: int = 1) -> dict[str, str]:
    """Return node name -> operator of the graph that onnxruntime really runs.

    A fused node has the name of the node that it is made of, with the ending of the pass that made it.
    """
    onnx = imported("onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session_of(serialized, threads=threads, optimized=path)
        nodes = onnx.load(str(path), load_external_data=False).graph.node
    return {node.name.partition("_token_")[0]: node.op_type for node in nodes}
