"""A trained module and its loaders, as a search takes them: copies of the module, and arrays of its examples."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.tasks.padding import at_one_length
from karikomi.tasks.splits import Inputs, Split
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.tasks.widened import widen_
from karikomi.torch.tracing.batches import MISSING, Batch, batches_of
from karikomi.torch.tracing.forward_arguments import LABELS, ForwardArguments


class Copies:
    """A function without arguments that returns a copy of a module; pickled with the module itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        """Return a copy on the CPU, in evaluation mode; bfloat16 as float32."""
        return widen_(copy.deepcopy(self.module).cpu().eval())


def copies_of(module: nn.Module) -> Copies:
    """Return a function that returns copies of a module, without wrappers of ``torch.compile`` and data parallelism.

    Raises `Unsupported` for a module whose layers torch has quantized.
    """
    for name, part in unwrapped(module).named_modules():
        if ".quantized" in type(part).__module__ and type(part).__module__.startswith("torch."):
            raise Unsupported(
                "the module is quantized already",
                where=f"compress: {name}".rstrip(": "),
                got=f"{type(part).__module__}.{type(part).__name__}",
                hint="compress the network in floats that it was made of",
            )
    return Copies(unwrapped(module))


def examples(
    module: nn.Module, data: Iterable[Any], *, where: str, own_loss: bool = True
) -> tuple[Inputs, np.ndarray | None]:
    """Return one pass over data as arrays: the inputs of a module, and the targets, or None where it has none.

    `data`: batches as in `kk.torch.prune_`: pairs, inputs alone, mappings with ``labels``, named tuples; a loader,
    a list, or any iterable that ends. All batches must have the same form and, beside their number of examples,
    the same shapes; those with an ``attention_mask`` may differ in their length (`at_one_length`).

    Labels that ``forward`` may be given are no inputs, unless `own_loss`: the loss may be read of its outputs then.

    Raises `InvalidArgument` for what the module does not take, and `Unsupported` for positional inputs beside named
    ones, and for inputs that are no tensors.

    >>> found, targets = examples(nn.Linear(2, 1), [torch.ones(3, 2), torch.zeros(1, 2)], where="validation")
    >>> found.shape, targets
    ((4, 2), None)
    """
    labelled: set[bool] = set()
    arguments = ForwardArguments(module, where=where)

    def pairs() -> Iterator[tuple[Inputs, np.ndarray]]:
        for batch in batches_of(data, module, where=where):
            optional = set() if own_loss else arguments.optional(LABELS)
            inputs = _inputs(batch, optional, where)
            labelled.add(batch.targets is not MISSING)
            known = batch.targets is not MISSING
            yield inputs, _array(batch.targets, where) if known else np.zeros(batch.examples, int)

    found = Split.of(at_one_length(list(pairs()), labels=LABELS))
    if len(labelled) > 1:
        raise InvalidArgument("some batches have targets and some have none", where=where)
    return found.inputs, found.targets if labelled == {True} else None


def _inputs(batch: Batch, without: Collection[str], where: str) -> Inputs:
    named = {n: v for n, v in batch.named.items() if v is not None and n not in without}
    if named and batch.positional:
        raise Unsupported(
            "a batch has positional and named inputs",
            where=where,
            allowed="a mapping with all of them by name",
        )
    if named:
        return {name: _array(value, f"{where}: {name}") for name, value in named.items()}
    arrays = tuple(_array(value, where) for value in batch.positional)
    return arrays[0] if len(arrays) == 1 else arrays


def _array(value: Any, where: str) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        raise Unsupported("a batch has what is no tensor", where=where, got=type(value).__name__)
    tensor = value.detach().cpu()
    # NumPy has no bfloat16; the search casts floats to the type of the module anyway.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
