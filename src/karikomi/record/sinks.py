"""Where rows go besides the file: anything that takes a row, whose failure stops no training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from karikomi.errors import InvalidArgument


@runtime_checkable
class Sink(Protocol):
    """What a `Recorder` passes every row on to; see `karikomi.plugins` for ready ones."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row of plain data."""
        ...

    def flush(self) -> Any:
        """Pass on what was held back."""
        ...

    def close(self) -> None:
        """Flush, and give back what the sink itself has opened."""
        ...


class Fanout:
    """Several sinks as one; a sink that fails is named in one warning and still gets later rows."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = _checked(sinks)
        self._failed: set[int] = set()

    def write(self, row: Mapping[str, Any]) -> None:
        """Pass one row to every sink."""
        self._each("write", row)

    def flush(self) -> None:
        """Flush every sink."""
        self._each("flush")

    def close(self) -> None:
        """Close every sink."""
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for place, sink in enumerate(self._sinks):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:
                self._say(place, sink, error)

    def _say(self, place: int, sink: Sink, error: Exception) -> None:
        if place in self._failed:
            return
        self._failed.add(place)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"the sink {type(sink).__name__} of the record failed ({text}); the training and the "
            "record's file go on, and further failures of this sink are not said",
            stacklevel=2,
        )


def _checked(sinks: Iterable[Sink]) -> tuple[Sink, ...]:
    found = tuple(sinks) if isinstance(sinks, Iterable) else ()
    strange = [item for item in found if isinstance(item, type) or not isinstance(item, Sink)]
    if strange or not isinstance(sinks, Iterable):
        raise InvalidArgument(
            "this is no sink" if strange else "this is no list of sinks",
            where="Recorder(sinks)",
            got=repr(strange[0] if strange else sinks)[:80],
            allowed="objects with write(row), flush() and close(), as in karikomi.plugins",
        )
    return found
