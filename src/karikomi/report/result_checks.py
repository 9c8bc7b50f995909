"""Checks of the JSON that a view is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.errors import InvalidArgument, check


def require(result: Any, keys: Sequence[str], *, where: str) -> Mapping[str, Any]:
    """Return `result` if it is a mapping with all `keys`; raise `InvalidArgument` otherwise.

    >>> require({"task": "digits"}, ("task",), where="audit_page")["task"]
    'digits'
    """
    known = isinstance(result, Mapping)
    check(where, (known, "the result must be a mapping", type(result).__name__, None))
    missing = [key for key in keys if key not in result]
    if missing:
        raise InvalidArgument(
            f"the result lacks {', '.join(missing)}",
            where=where,
            hint="pass the whole content of the result file",
        )
    return result


def records(value: Any, name: str, *, where: str) -> list[Mapping[str, Any]]:
    """Return a list of mappings; None counts as an empty list."""
    if value is None:
        return []
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes | Mapping)
    check(where, (listed, f"{name} must be a list of mappings", type(value).__name__, None))
    for index, entry in enumerate(value):
        what, known = f"entry {index} of {name} must be a mapping", isinstance(entry, Mapping)
        check(where, (known, what, type(entry).__name__, None))
    return list(value)


def table(value: Any) -> Mapping[str, Any]:
    """Return a mapping; anything else counts as an empty one."""
    return value if isinstance(value, Mapping) else {}


def warning_texts(result: Mapping[str, Any]) -> list[str]:
    """Return the warnings of a result as text."""
    warnings = result.get("warnings")
    return [named(text) for text in warnings] if isinstance(warnings, list | tuple) else []


def named(value: Any, missing: str = "n/a") -> str:
    """Return text for a name that may be missing.

    >>> named("fc1"), named(None), named(float("nan"))
    ('fc1', 'n/a', 'n/a')
    """
    lost = value is None or (isinstance(value, float) and not math.isfinite(value))
    return missing if lost else str(value)


def shape(value: Any) -> str:
    """Return a shape as ``256x64``; a scalar has the shape ``()``.

    >>> shape([256, 64]), shape([]), shape(None)
    ('256x64', '()', 'n/a')
    """
    if not isinstance(value, list | tuple):
        return "n/a"
    return "x".join(str(axis) for axis in value) or "()"
