"""Export a module as a graph of ATen operators whose labels can be propagated."""

from __future__ import annotations

import io
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

import torch
from torch import fx, nn

from karikomi.errors import Unsupported
from karikomi.torch.internals import open_at_one, schema_of
from karikomi.torch.labelling.label_run import name_of
from karikomi.torch.modules.parameters import other_names
from karikomi.torch.tracing.source_line import raised_at

Inputs = tuple[Any, ...]


def exported(
    module: nn.Module,
    inputs: Inputs,
    options: dict[str, Any],
    dynamic_shapes: Any = None,
    *,
    where: str = "torch.shrink",
) -> fx.GraphModule:
    """Return a module in evaluation mode as a graph module with the names of its tensors.

    Raises `Unsupported` with the reason and the source line if `torch.export` does not take the module.
    """
    try:
        opened = nullcontext() if dynamic_shapes is None else open_at_one()
        with warnings.catch_warnings(), torch.no_grad(), opened, without_cache(module):
            warnings.simplefilter("ignore")
            program = program_of(module, inputs, options, dynamic_shapes)
            graph = program.module(check_guards=False)
    except Exception as error:
        raise Unsupported(
            f"torch.export does not take the module ({type(error).__name__}: {_first_lines(error)})",
            where=where,
            got=raised_at(error, after=__file__) or "an error in torch",
            hint=_hint(error),
        ) from error
    assert isinstance(graph, fx.GraphModule)  # noqa: S101  (what `module` returns)
    _name_by_the_first_(graph, module)
    _drop_unused(graph)
    return graph


def program_of(
    module: nn.Module, inputs: Inputs, options: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """Return what `torch.export` makes of a module, without strict mode.

    Where it fails torch prints the graph so far to the standard error; the exception says what is needed.
    """
    with redirect_stderr(io.StringIO()):
        return torch.export.export(
            module, inputs, options, dynamic_shapes=dynamic_shapes, strict=False
        )


@contextmanager
def without_cache(module: nn.Module) -> Iterator[None]:
    """Let networks of transformers return no cache of keys and values, for which an exported graph has no form."""
    configs: list[Any] = [getattr(part, "config", None) for part in module.modules()]
    cached = {id(c): c for c in configs if getattr(c, "use_cache", None) is True}
    for config in cached.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached.values():
            config.use_cache = True


def _name_by_the_first_(graph: fx.GraphModule, module: nn.Module) -> None:
    """Let every node read a tensor that has several names by the first of them."""
    first = other_names(module)
    held = dict(graph.named_parameters(remove_duplicate=False))
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            name = first.get(str(node.target), str(node.target))
            if held.get(name) is not None and held[name] is held.get(str(node.target)):
                node.target = name


def _hint(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "_detect_is_causal_mask" for frame in frames):
        return (
            "pass is_causal= (in nn.Transformer tgt_is_causal=) beside the mask; without it torch.nn compares the "
            "entries of the mask"
        )
    if "pytree" in str(error):
        return (
            "return tensors, tuples, lists or dicts, or register the class of the outputs: "
            "torch.export.register_dataclass or torch.utils._pytree.register_pytree_node"
        )
    return (
        "write what depends on the data with torch.where or torch.cond, "
        "or shrink the part of the network without it"
    )


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def _drop_unused(graph: fx.GraphModule) -> None:
    """Remove what no output depends on; operators that write in place stay."""
    for node in reversed(list(graph.graph.nodes)):
        if node.users or node.op in ("output", "placeholder"):
            continue
        schema = schema_of(node.target)
        if node.op == "get_attr" or (schema is not None and not schema.is_mutable):
            graph.graph.erase_node(node)
        elif name_of(node) == "getitem":
            graph.graph.erase_node(node)
    graph.recompile()
