"""Sinks: receivers of rows besides the file, whose failures do not stop a training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from karikomi.errors import InvalidArgument


@runtime_checkable
class Sink(Protocol):
    """A receiver of all rows of a `Recorder`; see `karikomi.plugins` for implementations."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row of plain data."""
        ...

    def flush(self) -> Any:
        """Write pending rows."""
        ...

    def close(self) -> None:
        """Flush, and close the resources that the sink opened."""
        ...


class Fanout:
    """Several sinks as one; a sink that fails is named in one warning and still receives later rows."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = _checked(sinks)
        self._failed: set[int] = set()

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row to all sinks."""
        self._each("write", row)

    def flush(self) -> None:
        """Flush all sinks."""
        self._each("flush")

    def close(self) -> None:
        """Close all sinks."""
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for place, sink in enumerate(self._sinks):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:
                if place in self._failed:
                    continue
                self._failed.add(place)
                text = " ".join(f"{type(error).__name__}: {error}".split())
                warnings.warn(
                    f"the sink {type(sink).__name__} of the record failed ({text}); the training and the "
                    "record's file continue, without warnings of further failures of this sink",
                    stacklevel=2,
                )


def _checked(sinks: Iterable[Sink]) -> tuple[Sink, ...]:
    checked = tuple(sinks) if isinstance(sinks, Iterable) else ()
    invalid = [sink for sink in checked if isinstance(sink, type) or not isinstance(sink, Sink)]
    if invalid or not isinstance(sinks, Iterable):
        raise InvalidArgument(
            "not a sink" if invalid else "not a list of sinks",
            where="Recorder(sinks)",
            got=repr(invalid[0] if invalid else sinks)[:80],
            allowed="objects with write(row), flush() and close(), as in karikomi.plugins",
        )
    return checked
