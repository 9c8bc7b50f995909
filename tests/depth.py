"""How deep a run tests: `make test` samples where `make test-full` enumerates.

A sample is fixed, by a name: every value is met by some rule in some framework in each run, and a failure
comes back. ``KARIKOMI_FULL=1`` is what `make test-full` sets.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
FULL = os.environ.get("KARIKOMI_FULL") == "1"


def examples(quick: int, *, full: int) -> int:
    """Return the number of random examples of a law."""
    return full if FULL else quick


def turns(values: Sequence[T], *key: object, most: int = 1, full: bool | None = None) -> list[T]:
    """Return all `values` of a full run, else `most` of them, one after another from a place that `key` gives.

    Over many keys every value is met.
    """
    if FULL if full is None else full:
        return list(values)
    start = zlib.crc32(repr([getattr(part, "__name__", str(part)) for part in key]).encode())
    return [values[(start + place) % len(values)] for place in range(most)]
