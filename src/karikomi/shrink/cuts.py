"""What a shrink left of each tensor, by axis and index, as text for a file and back."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from karikomi.errors import BadFile, InvalidArgument

WHERE = "shrink.Cuts"
FORMS = ("module", "graph")
Axes = dict[int, "Cut"]


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """One axis: its `size` before, and the indices that were `kept`, in increasing order, at least one.

    >>> Cut(4, np.array([0, 3])).then(Cut(2, np.array([1]))).kept.tolist()
    [3]
    """

    size: int
    kept: np.ndarray

    def __post_init__(self) -> None:
        kept = self.kept
        whole = isinstance(kept, np.ndarray) and kept.ndim == 1 and kept.dtype.kind == "i"
        if not whole or not len(kept) or (np.diff(kept) <= 0).any():
            raise InvalidArgument(
                "kept indices are whole numbers in increasing order, at least one",
                where=WHERE,
                got=np.asarray(kept).tolist()[:8],
            )
        if not 0 <= int(kept[0]) <= int(kept[-1]) < self.size:
            raise InvalidArgument(
                "a kept index is outside of its axis",
                where=WHERE,
                got=int(kept[0] if kept[0] < 0 else kept[-1]),
                allowed=f"0 to {self.size - 1}",
            )

    def then(self, later: Cut) -> Cut:
        """Return this cut and a later one of what it left, as one."""
        if later.size != len(self.kept):
            raise InvalidArgument(
                "the second cut is of another size",
                where=WHERE,
                got=later.size,
                allowed=len(self.kept),
            )
        return Cut(self.size, self.kept[later.kept])


@dataclass(frozen=True, slots=True)
class Removed:
    """A layer that was removed whole: the `shape` of the constant in its place, None for its first argument.

    `outputs`: how many it returned, 0 for a tensor by itself.
    """

    shape: tuple[int, ...] | None
    outputs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cuts:
    """All that tells a shrunk network from the original: tensor name -> axis -> cut, and sizes in attributes.

    `attributes`: path of a layer -> attribute -> whole number, or list of them, that the smaller layer has.
    `removed`: path of a layer -> what stands in its place; the axes are those of what is left. `form`: "module", or
    "graph" for an exported graph, which no module of the original class can take.

    >>> cuts = Cuts(axes={"fc.weight": {1: Cut(300, np.arange(0, 300, 2))}}, attributes={"fc": {"in_features": 150}})
    >>> again = Cuts.from_text(cuts.to_text(), where="a file")
    >>> again.indices()["fc.weight"][1][:3], again.attributes
    ([0, 2, 4], {'fc': {'in_features': 150}})
    """

    axes: Mapping[str, Axes]
    attributes: Mapping[str, Mapping[str, int | list[int]]] = field(default_factory=dict)
    removed: Mapping[str, Removed] = field(default_factory=dict)
    form: str = "module"

    def indices(self) -> dict[str, dict[int, list[int]]]:
        """Return tensor name -> axis -> kept indices, as plain values."""
        return {
            n: {a: cut.kept.tolist() for a, cut in axes.items()} for n, axes in self.axes.items()
        }

    def shape(self, name: str, before: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of a tensor after the cuts; None if they do not fit its shape before."""
        after = list(before)
        for axis, cut in self.axes.get(name, {}).items():
            if axis >= len(before) or before[axis] != cut.size:
                return None
            after[axis] = len(cut.kept)
        return tuple(after)

    def then(self, later: Cuts) -> Cuts:
        """Return these cuts and later ones of the network that they left, as one."""
        axes = {n: dict(own) for n, own in self.axes.items() if not _within(n, later.removed)}
        for name, own in later.axes.items():
            known = axes.setdefault(name, {})
            for axis, cut in own.items():
                known[axis] = known[axis].then(cut) if axis in known else cut
        attributes = {
            path: dict(own)
            for path, own in self.attributes.items()
            if not _within(path, later.removed)
        }
        for path, values in later.attributes.items():
            attributes.setdefault(path, {}).update(values)
        removed = {p: own for p, own in self.removed.items() if not _within(p, later.removed)}
        form = "graph" if "graph" in (self.form, later.form) else "module"
        return Cuts(
            axes=axes, attributes=attributes, removed={**removed, **later.removed}, form=form
        )

    def below(self, path: str) -> Cuts:
        """Return these cuts for a network in which theirs is the part at `path`."""
        if not path:
            return self
        return Cuts(
            axes={f"{path}.{name}": own for name, own in self.axes.items()},
            attributes={f"{path}.{own}".rstrip("."): v for own, v in self.attributes.items()},
            removed={f"{path}.{own}": v for own, v in self.removed.items()},
            form=self.form,
        )

    def to_text(self) -> str:
        """Return it as JSON; equal cuts are written once, as a bit per index."""
        numbers: dict[tuple[int, str], int] = {}
        tensors = {
            name: {
                str(axis): numbers.setdefault((cut.size, _bits(cut)), len(numbers))
                for axis, cut in sorted(own.items())
            }
            for name, own in sorted(self.axes.items())
        }
        whole = {"form": self.form, "cuts": list(numbers), "tensors": tensors}
        whole["attributes"] = {path: dict(own) for path, own in sorted(self.attributes.items())}
        if self.removed:
            whole["removed"] = {
                path: [own.outputs, None if own.shape is None else list(own.shape)]
                for path, own in sorted(self.removed.items())
            }
        return json.dumps(whole, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str, *, where: str) -> Cuts:
        """Return the cuts that `to_text` wrote; raises `BadFile` for any other text."""
        try:
            whole = json.loads(text)
            form, listed = whole["form"], whole["cuts"]
            cuts = [_cut(size, bits) for size, bits in listed]
            axes = {
                name: {_natural(int(axis)): cuts[_natural(place)] for axis, place in own.items()}
                for name, own in whole["tensors"].items()
            }
            attributes = {
                path: {name: _number(value) for name, value in own.items()}
                for path, own in whole["attributes"].items()
            }
            removed = {p: _removed(*own) for p, own in whole.get("removed", {}).items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise BadFile(
                f"the account of a shrink is malformed ({str(error)[:120]})", where=where
            ) from error
        if form not in FORMS:
            raise BadFile("unknown form of a shrunk network", where=where, got=repr(form)[:80])
        return cls(axes=axes, attributes=attributes, removed=removed, form=form)


def _bits(cut: Cut) -> str:
    kept = np.zeros(cut.size, bool)
    kept[cut.kept] = True
    return base64.b85encode(np.packbits(kept).tobytes()).decode("ascii")


def _cut(size: Any, bits: Any) -> Cut:
    packed = np.frombuffer(base64.b85decode(bits), np.uint8)
    if len(packed) != -(-_natural(size) // 8):
        raise ValueError("a cut has another number of bits than its size")
    kept = np.unpackbits(packed)
    return Cut(size, np.flatnonzero(kept))


def _within(name: str, paths: Mapping[str, Any]) -> bool:
    """Return whether a tensor or layer is, or is a part of, one at these paths."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _removed(outputs: Any, shape: Any) -> Removed:
    sizes = None if shape is None else tuple(_natural(size) for size in shape)
    return Removed(sizes, _natural(outputs))


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:20]} is not a natural number")
    return value


def _number(value: Any) -> int | list[int]:
    parts = value if isinstance(value, list) else [value]
    if any(type(part) is not int for part in parts):
        raise ValueError(f"{str(value)[:20]} is no whole number, nor a list of them")
    return value
