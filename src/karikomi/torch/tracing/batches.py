"""Batches of a user's data: inputs of the network and targets of the loss, on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from karikomi.errors import InvalidArgument

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


def batch_of(given: Any, device: torch.device, *, where: str) -> Batch:
    """Return one element of the data, read as ``(inputs, targets)`` or as inputs alone.

    A tuple or list of two is always a pair. Inputs that are a tuple or list are spread over the
    arguments of the network, a mapping over its keywords. NumPy arrays become tensors. Raises
    `InvalidArgument` for a tuple of another length.

    >>> batch_of(((torch.zeros(2, 3), "mask"), None), torch.device("cpu"), where="data").targets is None
    True
    """
    targets = MISSING
    if isinstance(given, tuple | list):
        if len(given) not in (1, 2):
            raise InvalidArgument(
                "a batch is a pair or inputs alone",
                where=where,
                got=f"{type(given).__name__} of {len(given)}",
                allowed="(inputs, targets); several inputs as ((a, b), targets)",
            )
        given, targets = given[0], given[1] if len(given) == 2 else MISSING
    targets = targets if targets is MISSING else moved(targets, device)
    if isinstance(given, Mapping):
        return Batch((), moved(dict(given), device), targets)
    inputs = tuple(given) if isinstance(given, tuple | list) else (given,)
    return Batch(moved(inputs, device), {}, targets)


def batches_of(data: Iterable[Any], device: torch.device, *, where: str) -> Iterator[Batch]:
    """Yield the batches of one pass over the data; raises `InvalidArgument` if it has no batches."""
    empty = True
    for given in data:
        empty = False
        yield batch_of(given, device, where=where)
    if empty:
        raise InvalidArgument(
            "the data has no batches",
            where=where,
            hint="an exhausted generator? pass a list or a DataLoader",
        )


def moved(value: Any, device: torch.device) -> Any:
    """Return a value with all tensors and arrays in it as tensors on a device."""
    return mapped(value, lambda item: item.to(device))


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a value of tuples, lists and dicts with its tensors changed, and arrays as tensors."""
    if isinstance(value, np.ndarray):
        return change(torch.as_tensor(value))
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(element, change) for key, element in value.items()}
    if isinstance(value, tuple | list):
        changed = [mapped(element, change) for element in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return value


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
