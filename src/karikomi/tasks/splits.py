"""The data of a task: splits of arrays, gathered from loaders or streams, or dealt from one set of examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument, check

Inputs = np.ndarray | Mapping[str, np.ndarray] | tuple[np.ndarray, ...]
"""One array, a mapping for the keywords of the network, or a tuple for its positional arguments."""

_BLOCK = 1 << 22
"""Elements that are read at once: the arrays may be memory-mapped and larger than the memory."""


@dataclass(frozen=True, slots=True)
class Split:
    """Inputs of shape (n, ...) and targets of shape (n, ...), arrays of the same length.

    A network of several inputs has a mapping of arrays, which are its keyword arguments, or a tuple
    of arrays, which are its positional arguments. Memory-mapped arrays are read batch by batch.
    """

    inputs: Inputs
    targets: np.ndarray

    def __len__(self) -> int:
        return len(next(iter(self.arrays().values()), ()))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return name -> array of the inputs; a single array is called ``inputs``."""
        return named_inputs(self.inputs)

    def take(self, index: np.ndarray) -> Split:
        """Return the examples at `index`."""
        return Split(mapped_inputs(self.inputs, lambda array: array[index]), self.targets[index])

    def first(self, most: int = 64) -> Split:
        """Return the first `most` examples, or all of fewer."""
        return self.take(np.arange(min(len(self), most)))

    @classmethod
    def of(
        cls, batches: Iterable[Any], *, targets: str | None = None, most: int | None = None
    ) -> Split:
        """Return one pass over batches as arrays: a loader, a generator, a stream.

        `batches`: pairs ``(inputs, targets)`` of arrays or CPU tensors, or with `targets` mappings
        with the targets under that key. `most`: examples to take; an endless stream needs it. The
        order is that of the loader, so let it not shuffle: a run resumes on the same data only.

        Raises `InvalidArgument` for batches of another form, without examples, or of different shapes.

        >>> Split.of([(np.zeros((2, 3)), np.array([0, 1])), (np.ones((1, 3)), np.array([1]))]).targets
        array([0, 1, 1])
        """
        whole_number = most is None or (isinstance(most, int) and most >= 1)
        check("Split.of", (whole_number, "most is a whole number", most, ">= 1"))
        parts: list[Split] = []
        for batch in batches:
            parts.append(cls(*_pair(batch, targets)))
            if most is not None and sum(map(len, parts)) >= most:
                break
        if not parts:
            raise InvalidArgument(
                "there are no batches", where="Split.of", hint="an exhausted generator?"
            )
        whole = slice(most)
        try:
            found = _joined([part.inputs for part in parts])
            labels = np.concatenate([part.targets for part in parts])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(
                "the batches differ in form",
                where="Split.of",
                got=error,
                hint="pad all batches to one shape",
            ) from error
        return cls(mapped_inputs(found, lambda array: array[whole]), labels[whole])


@dataclass(frozen=True, slots=True)
class Data:
    """`train` is for training, `validation` for decisions, `test` for measurement only.

    `certify`: examples that no decision sees, for the certificate of a budget; without them it is of `test`.
    """

    train: Split
    validation: Split
    test: Split
    certify: Split | None = None

    def calibration(self) -> list[Split]:
        """Return the first training examples in parts of 64, on which is measured what needs no training.

        512; of texts, arrays (n, steps) of whole numbers, so many that they have some 8,192 steps, but 64 or more.

        >>> split = Split(np.zeros((70, 2)), np.zeros(70))
        >>> [len(part) for part in Data(split, split, split).calibration()]
        [64, 6]
        """
        first, count = next(iter(self.train.arrays().values())), 512
        if first.dtype.kind in "iu" and first.ndim == 2:
            # Each step is a row of the sums, of which there have to be some times as many as columns.
            count = min(max(8_192 // max(first.shape[1], 1), 64), count)
        few = self.train.first(count)
        starts = range(0, len(few), 64)
        return [few.take(np.arange(k, min(k + 64, len(few)))) for k in starts]

    def fingerprint(self) -> str:
        """Return a digest of all arrays, so that a run is never resumed on other data."""
        digest = hashlib.sha256()
        splits = (self.train, self.validation, self.test, self.certify)
        for split in (split for split in splits if split is not None):
            for name, array in {**split.arrays(), "targets": split.targets}.items():
                label = "" if name in ("inputs", "targets") else name
                digest.update(f"{label}{array.dtype.str}{array.shape}".encode())
                for block in blocks(array):
                    digest.update(block.data)
        return digest.hexdigest()[:16]


def named_inputs(inputs: Inputs) -> dict[str, np.ndarray]:
    """Return name -> array; positional inputs are called ``inputs[0]``, ``inputs[1]``, ..."""
    if isinstance(inputs, Mapping):
        return {f"inputs[{name!r}]": array for name, array in inputs.items()}
    if isinstance(inputs, tuple):
        return {f"inputs[{place}]": array for place, array in enumerate(inputs)}
    return {"inputs": inputs}


def mapped_inputs(inputs: Any, change: Callable[[Any], Any]) -> Any:
    """Return inputs of the same form, with each array changed."""
    if isinstance(inputs, Mapping):
        return {name: change(array) for name, array in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(change(array) for array in inputs)
    return change(inputs)


def as_array(value: Any, *, where: str) -> np.ndarray:
    """Return a tensor, or what else has an array form, as an array.

    Raises `InvalidArgument` for a type that NumPy has not, and for a tensor on another device.
    """
    try:
        # Tensors of torch may be in a graph, which NumPy refuses.
        return np.asarray(value.detach() if hasattr(value, "detach") else value)
    except TypeError as error:
        raise InvalidArgument(
            "NumPy cannot read this",
            where=where,
            got=error,
            hint="convert it to float32 first: tensor.float(); on another device: tensor.cpu()",
        ) from error


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the elements of an array in order, in contiguous pieces of bounded size."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            yield flat[start : start + _BLOCK]
        return
    rows = max(_BLOCK * len(array) // max(array.size, 1), 1)
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1)


def _pair(batch: Any, key: str | None) -> tuple[Inputs, np.ndarray]:
    allowed = '(inputs, targets); or a mapping, with targets="key"'
    where = "Split.of"
    if isinstance(batch, Mapping) and key is not None and key in batch:
        rest = {name: as_array(value, where=where) for name, value in batch.items() if name != key}
        inputs, targets = (next(iter(rest.values())) if len(rest) == 1 else rest), batch[key]
    elif key is None and isinstance(batch, tuple | list) and len(batch) == 2:
        given, targets = batch
        several = tuple(given) if isinstance(given, list) else given
        inputs = mapped_inputs(several, lambda value: as_array(value, where=where))
    else:
        got = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise InvalidArgument("a batch has another form", where=where, got=got, allowed=allowed)
    return inputs, as_array(targets, where=where)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: np.concatenate([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        columns = zip(*parts, strict=True)
        return tuple(np.concatenate(list(column)) for column in columns)
    return np.concatenate(parts)


def partition(strata: np.ndarray, counts: Mapping[str, int], *, seed: int) -> dict[str, np.ndarray]:
    """Return name -> sorted places, disjoint, of exactly so many examples each.

    `strata`: (n,) the class of each example, or any value whose proportions the parts should keep. `counts`:
    name -> number, together at most n. The examples of a class are shuffled by `seed` and dealt to the
    parts in proportion, so that each part has its share of every class to within two examples.

    >>> parts = partition(np.repeat([0, 1], [6, 4]), {"search": 5, "certify": 5}, seed=0)
    >>> [np.bincount(np.repeat([0, 1], [6, 4])[part]).tolist() for part in parts.values()]
    [[3, 2], [3, 2]]
    """
    total, n = sum(counts.values()), len(strata)
    whole = all(isinstance(count, int) and count >= 0 for count in counts.values())
    check(
        "partition",
        (whole and counts, "the parts need numbers of examples", dict(counts), ">= 0"),
        (total <= n, "the parts have more examples than there are", total, f"<= {n}"),
    )
    random = np.random.default_rng(seed).random(n)
    _, classes = np.unique(strata, return_inverse=True)
    order = np.lexsort((random, classes.reshape(-1)))
    dealt = _dealt({**counts, "": n - total})
    return {name: np.sort(order[dealt == place]) for place, name in enumerate(counts)}


def _dealt(counts: Mapping[str, int]) -> np.ndarray:
    """Return the part of each place in turn, every part spread as evenly as its number allows."""
    turns = [(np.arange(count) + 0.5) / max(count, 1) for count in counts.values()]
    parts = np.repeat(np.arange(len(counts)), [len(turn) for turn in turns])
    return parts[np.argsort(np.concatenate(turns), kind="stable")]
