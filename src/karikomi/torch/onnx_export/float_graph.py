"""A module as an ONNX graph of float32 tensors, free of what the exporter leaves behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ShapesCollection
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from karikomi.errors import Unsupported, check_known
from karikomi.torch.exporting.exported import program_of, without_cache
from karikomi.torch.internals import flattened, open_at_one
from karikomi.torch.onnx_export.attention_rows import zero_rows_
from karikomi.torch.onnx_export.graph_edits import WHERE, GraphEdits, imported
from karikomi.torch.tracing.batches import Batch
from karikomi.torch.tracing.source_line import raised_at

DYNAMIC = ("batch", "all", "none")
NEEDED = ("onnx", "onnx_ir", "onnxscript")

Feeds = dict[str, np.ndarray]


class FloatGraph(NamedTuple):
    """`model`: of onnx_ir. `inputs`: names, in the order of the tensors of a batch. `open_axes`: names of open axes."""

    model: Any
    inputs: list[str]
    open_axes: list[str]

    def feeds(self, batch: Batch, like: Batch) -> Feeds:
        """Return name -> array of a batch with the arguments of the example `like`, whatever the order of its names."""
        named = {name: batch.named[name] for name in like.named}
        tensors = [leaf for leaf in flattened((batch.positional, named))[0] if _is_tensor(leaf)]
        return {name: _array(tensor) for name, tensor in zip(self.inputs, tensors, strict=True)}


@torch.no_grad()
def float_graph(module: nn.Module, example: Batch, *, dynamic: str, opset: int) -> FloatGraph:
    """Return a float32 module in eval mode as an ONNX graph whose weights are initializers.

    `dynamic`: which axes of the inputs are open: the first of each ("batch"), "all", or "none"; an axis that the
    forward fixes stays fixed. Constants are folded, but no operator is fused: weights stay as they are in the
    module. Shapes of inner values are dropped: those of the exporter are wrong after rewriting, and engines
    infer their own.
    """
    check_known(dynamic, DYNAMIC, "unknown choice of open axes", where=f"{WHERE}: dynamic")
    for name in NEEDED:
        imported(name)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        program = exported_program(module, example, dynamic)
        try:
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, optimize=False, opset_version=opset
            )
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise Unsupported(
                f"the exporter of torch has no ONNX form ({type(error).__name__}: {text})",
                where=WHERE,
                hint="give the part of the network without the operator that it names",
            ) from error
    model: Any = made.model  # type: ignore[union-attr]
    imported("onnxscript.optimizer").optimize_ir(model)
    zero_rows_(GraphEdits(model))
    _clean_(model)
    names = [value.name for value in model.graph.inputs]
    return FloatGraph(model, names, _name_axes_(model.graph))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def exported_program(module: nn.Module, example: Batch, dynamic: str, *, where: str = WHERE) -> Any:
    """Return a module in eval mode as an exported program; `dynamic`: as in `float_graph`.

    A single example is taken twice, since sizes of one are often made constants where the code computes with them.
    """
    single = [tensor for tensor in example.tensors() if tensor.dim()]
    if dynamic == "batch" and single and all(len(tensor) == 1 for tensor in single):
        twice = example.inputs(lambda t: torch.cat([t, t]) if t.dim() else t)
        try:
            return _program(module, twice, dynamic, where)
        except Unsupported:
            pass  # not a first axis of examples
    return _program(module, example, dynamic, where)


def _program(module: nn.Module, example: Batch, dynamic: str, where: str) -> Any:
    shapes = ShapesCollection()
    if dynamic != "none":
        for value in flattened((example.positional, dict(example.named)))[0]:
            if _is_tensor(value) and value.dim():
                opened = value.dim() if dynamic == "all" else 1
                shapes[value] = dict.fromkeys(range(opened), Dim.AUTO)
    named = dict(example.named)
    try:
        with nullcontext() if dynamic == "none" else open_at_one(), without_cache(module):
            given = shapes.dynamic_shapes(module, example.positional, named)
            opened = None if dynamic == "none" else given
            program = program_of(module, example.positional, named, opened)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise Unsupported(
            f"torch.export does not take the module ({type(error).__name__}: {text})",
            where=where,
            got=raised_at(error, after=__file__) or "an error in torch",
            hint=""
            if dynamic == "none"
            else "dynamic='none' exports for the shapes of the example",
        ) from error
    if dynamic != "none":
        _check_open(program, where)
    return program


def _check_open(program: Any, where: str) -> None:
    """Raise `Unsupported` where the code of a network fixes the number of examples, which an export takes silently."""
    given = set(program.graph_signature.user_inputs)
    shapes = [
        tuple(node.meta["val"].shape)
        for node in program.graph.nodes
        if node.name in given and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    firsts = [shape[0] for shape in shapes if shape]
    if firsts and all(map(is_concrete_int, firsts)):
        raise Unsupported(
            "the code of the network fixes the number of examples",
            where=where,
            got=f"{firsts[0]} in the exported graph, as in the example",
            hint="leave a first size a size: x.shape[0] without int(), no loop over examples; or dynamic='none'",
        )


def _clean_(model: Any) -> None:
    passes = imported("onnx_ir.passes.common")
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        for key in list(node.metadata_props):
            del node.metadata_props[key]
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in ends:
                value.shape = None


def _name_axes_(graph: Any) -> list[str]:
    """Name the open axes of the inputs, and the same axes of the outputs; return the names."""
    ir = imported("onnx_ir")
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                plain = "batch" if axis == 0 else f"{value.name}_{axis}"
                taken = plain in names.values() and str(size.value) not in names
                names.setdefault(str(size.value), f"{value.name}_{axis}" if taken else plain)
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            sizes = [_renamed(size, names, ir) for size in value.shape]
            value.shape = ir.Shape(sizes)
    return list(names.values())


def _renamed(size: Any, names: dict[str, str], ir: Any) -> Any:
    if not isinstance(size, ir.SymbolicDim):
        return size
    known = names.get(str(size.value))
    return ir.SymbolicDim(known)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _array(tensor: torch.Tensor) -> np.ndarray:
    wide = tensor.float() if tensor.is_floating_point() else tensor
    return wide.detach().cpu().contiguous().numpy()
