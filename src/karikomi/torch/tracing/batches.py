"""Batches of a user's data: inputs of the network and targets of the loss, on a device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.tasks.splits import mapped_inputs
from karikomi.torch.tracing.forward_arguments import (
    ALLOWED,
    LABELS,
    ForwardArguments,
    is_named_tuple,
)

_CUT = 64
MISSING = object()
"""The targets of a batch without targets: None is a valid target."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch on the device of the network: `positional` and `named` inputs, and `targets`."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any] = field(default_factory=dict)
    targets: Any = MISSING

    def inputs(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return the batch with every tensor among its inputs changed."""
        return Batch(mapped(self.positional, change), mapped(self.named, change), self.targets)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors among its inputs, in order."""
        return leaves((self.positional, self.named))

    @property
    def examples(self) -> int:
        """The number of examples: the length of the first input; 1 where there is no tensor with axes."""
        first = next(iter([*self.positional, *self.named.values()]), None)
        if isinstance(first, PackedSequence):
            return int(first.batch_sizes[0])
        tensors = self.tensors()
        return len(tensors[0]) if tensors and tensors[0].dim() else 1


def batch_of(
    given: Any, device: torch.device, *, module: nn.Module | None = None, where: str
) -> Batch:
    """Return one element of the data, read as ``(inputs, targets)`` or as inputs alone.

    A tuple or list of two is a pair; of a longer one the last entry is the targets, where the network takes exactly the
    others by position. Inputs that are a tuple or list are spread over the arguments of the
    network, or are one argument where its ``forward`` takes only that; a mapping, and a named tuple with the names
    of arguments, go by name; a `PackedSequence` is one argument. A mapping or named tuple that is a whole batch, as
    data collators make them, or that begins with its targets, has these under ``labels`` (or another name in
    `LABELS`): they are passed to the network too if it takes them. Arguments of `module` are read from its
    signature, and floats of NumPy are cast to the type of its parameters.

    Raises `InvalidArgument` for what the network does not take, and for a tuple of another length, also where both
    its whole and all but its last entry fit.

    >>> batch_of(((torch.zeros(2, 3), "mask"), None), torch.device("cpu"), where="data").targets is None
    True
    """
    arguments = ForwardArguments(module, where=where)
    given, targets = _parted(given, arguments, where)
    dtype = None if module is None else float_type(module)
    targets = targets if targets is MISSING else moved(targets, device, dtype)
    positional, named = arguments.of(given)
    return Batch(moved(positional, device, dtype), moved(named, device, dtype), targets)


def float_type(module: nn.Module) -> torch.dtype | None:
    """Return the type of the first floating parameter, ``None`` where there is none."""
    return next((item.dtype for item in module.parameters() if item.is_floating_point()), None)


def batches_of(data: Iterable[Any], module: nn.Module, *, where: str) -> Iterator[Batch]:
    """Yield the batches of one pass over the data, on the device of a module, read by `batch_of`.

    `data`: a loader or another iterable of batches; or all examples at once (`cut`). Raises `InvalidArgument` if the
    data has no batches.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    empty = True
    for given in cut(data):
        empty = False
        yield batch_of(given, device, module=module, where=where)
    if empty:
        raise InvalidArgument(
            "the data has no batches",
            where=where,
            hint="an exhausted generator? pass a list or a DataLoader",
        )


def cut(data: Iterable[Any]) -> Iterable[Any]:
    """Return all examples at once in batches of 64, in their order; other data as they are.

    All at once are a ``Dataset`` of examples, and a tuple ``(inputs, targets)`` of arrays of the same length, of which
    the inputs may be a tuple or mapping. A tuple of two arrays of one form and type, or of two texts of different
    lengths, is two batches without targets.

    >>> [len(x) for x, y in cut((torch.zeros(70, 2), torch.zeros(70)))]
    [64, 6]
    >>> len(list(cut(torch.utils.data.TensorDataset(torch.zeros(70, 2), torch.zeros(70)))))
    2
    """
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, _CUT)
    if not is_whole(data):
        return data
    inputs, targets = data
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    parts = (slice(start, start + _CUT) for start in range(0, len(targets), _CUT))
    return [(mapped_inputs(inputs, itemgetter(part)), targets[part]) for part in parts]


def is_whole(data: Any) -> TypeGuard[tuple[Any, Any]]:
    """Return whether data are a pair of all inputs and all targets, and no two batches."""
    if type(data) is not tuple or len(data) != 2:
        return False
    inputs, targets = data
    arrays = [*_values(inputs), targets]
    if not all(isinstance(array, np.ndarray | torch.Tensor) and array.ndim for array in arrays):
        return False
    if len({len(array) for array in arrays}) > 1:
        return False
    if inputs is not arrays[0] or inputs is targets:
        return True
    kinds = [str(array.dtype).rpartition(".")[2] for array in arrays]
    texts = kinds[0].startswith(("int", "uint")) and inputs.ndim == targets.ndim
    return kinds[0] != kinds[1] or (inputs.shape != targets.shape and not texts)


def _values(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]


def length_of(data: Iterable[Any]) -> int | None:
    """Return the number of batches, or ``None`` where it is not known.

    A `DataLoader` of an `IterableDataset` has a ``__len__``, which raises.
    """
    try:
        return len(cut(data))  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _parted(given: Any, arguments: ForwardArguments, where: str) -> tuple[Any, Any]:
    """Return ``(inputs, targets)`` of one element of the data."""
    entries: Any = given
    if is_named_tuple(given) and (
        len(given) > 2 or arguments.has_fields(given) or given._fields[0] in LABELS
    ):
        entries = given._asdict()
    if isinstance(entries, Mapping):
        inputs, targets = arguments.parted(entries)
        return inputs, next(iter(targets.values()), MISSING)
    if not isinstance(given, tuple | list) or isinstance(given, PackedSequence):
        return given, MISSING
    several: tuple[Any, ...] = tuple(given)
    if len(several) > 2 and arguments.takes_all_but_last(several):
        return several[:-1], several[-1]
    if len(several) == 2:
        return several[0], several[1]
    if len(several) == 1:
        return several[0], MISSING
    raise InvalidArgument(
        "a batch is a pair or inputs alone",
        where=where,
        got=f"{type(given).__name__} of {len(several)}",
        allowed=ALLOWED,
    )


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Return a value with all tensors and arrays in it as tensors on a device; `dtype`: of arrays of floats."""
    return mapped(value, lambda item: item.to(device), dtype)


def mapped(
    value: Any, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
) -> Any:
    """Return a value of tuples, lists and dicts with its tensors changed, and arrays as tensors.

    `dtype`: to which arrays of floats are cast. NumPy makes float64, which torch's layers refuse.
    """
    if isinstance(value, np.ndarray):
        tensor = torch.as_tensor(value)
        return change(tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return _repacked(value, change(value.data))
    if isinstance(value, Mapping):
        return {key: mapped(element, change, dtype) for key, element in value.items()}
    if isinstance(value, tuple | list):
        changed = [mapped(element, change, dtype) for element in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return value


def _repacked(packed: PackedSequence, data: torch.Tensor) -> PackedSequence:
    if len(data) != len(packed.data):
        raise Unsupported(
            "a packed sequence has no single example",
            where="data",
            hint="pad it: torch.nn.utils.rnn.pad_packed_sequence",
        )
    order = [
        None if places is None else places.to(data.device)
        for places in (packed.sorted_indices, packed.unsorted_indices)
    ]
    return PackedSequence(data, packed.batch_sizes, order[0], order[1])


def leaves(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a value of tuples, lists and dicts, in order.

    >>> len(leaves({"a": torch.zeros(1), "b": [torch.ones(2), "text"]}))
    2
    """
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [leaf for element in value for leaf in leaves(element)]
    return []
