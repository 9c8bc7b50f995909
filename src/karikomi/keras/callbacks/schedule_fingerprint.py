"""A text that identifies a schedule after a restart: its class and fields, the same in every process."""

from __future__ import annotations

import dataclasses
import enum
import numbers
from collections.abc import Mapping
from typing import Any

from karikomi.errors import InvalidArgument
from karikomi.prune import Pattern, Score
from karikomi.prune.schedules.pruning_schedule import PruningSchedule


def described(thing: Any, *, where: str) -> str:
    """Return the class of a thing and its fields; of plain values their ``repr``.

    Raises `InvalidArgument` naming a field that has no lasting text, such as an array or a function.

    >>> import karikomi as kk
    >>> described(kk.prune.Random(seed=3), where="score")
    'Random(seed=3)'
    """
    if thing is None or isinstance(thing, str | bytes | numbers.Number):
        return repr(thing)
    if isinstance(thing, enum.Enum):
        return str(thing)
    if isinstance(thing, tuple | list | set | frozenset):
        return _of_many(thing, where)
    if isinstance(thing, Mapping):
        pairs = [
            (described(key, where=where), described(value, where=f"{where}[{key!r}]"))
            for key, value in thing.items()
        ]
        return "{" + ", ".join(f"{key}: {value}" for key, value in sorted(pairs)) + "}"
    fields = _fields(thing)
    if fields is None:
        raise InvalidArgument(
            "this cannot be identified after a restart",
            where=where,
            got=type(thing).__name__,
            hint="numbers, strings, tuples, and scores and dataclasses of such fields can",
        )
    parts = [
        f"{name}={described(field, where=f'{where}.{name}')}" for name, field in fields.items()
    ]
    return f"{type(thing).__qualname__}({', '.join(parts)})"


def _of_many(things: Any, where: str) -> str:
    parts = [described(thing, where=f"{where}[{place}]") for place, thing in enumerate(things)]
    if isinstance(things, set | frozenset):
        return "{" + ", ".join(sorted(parts)) + "}"
    if isinstance(things, list):
        return "[" + ", ".join(parts) + "]"
    return "(" + ", ".join(parts) + ("," if len(parts) == 1 else "") + ")"


def _fields(thing: Any) -> dict[str, Any] | None:
    """Return the fields of an object that has no other state, else nothing."""
    kind: Any = type(thing)
    is_dataclass = dataclasses.is_dataclass(kind)
    if not is_dataclass and not isinstance(thing, Score | Pattern | PruningSchedule):
        return None
    fields = [field.name for field in dataclasses.fields(kind)] if is_dataclass else []
    # A class of one's own may be derived from a dataclass without being one.
    slots = [name for cls in kind.__mro__ for name in _slots(cls)]
    own = {name: getattr(thing, name) for name in (*fields, *slots) if hasattr(thing, name)}
    return own | getattr(thing, "__dict__", {})


def _slots(cls: type) -> list[str]:
    found = vars(cls).get("__slots__", ())
    every = (found,) if isinstance(found, str) else found
    return [name for name in every if name not in ("__dict__", "__weakref__")]
