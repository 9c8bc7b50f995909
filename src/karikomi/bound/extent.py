"""The extent of a bound: one unit, one tensor or all of them, and its tolerance for rounding.

Shared by several bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

from karikomi.errors import InvalidArgument
from karikomi.rule import Scope

SLACK = 1e-6
"""The rounding of a float32 unit that was just scaled onto its bound, relative to the bound."""

_SCOPES = {"unit": Scope.UNIT, "tensor": Scope.TENSOR, "global": Scope.GLOBAL}


def check_extent(per: object, *, where: str, extents: Sequence[str] = tuple(_SCOPES)) -> None:
    """Raise `InvalidArgument` unless `per` is one of these extents."""
    if not isinstance(per, str) or per not in extents:
        raise InvalidArgument(
            "unknown extent of the bound",
            where=where,
            got=repr(per),
            allowed=", ".join(map(repr, extents)),
        )


def scope_of(per: str) -> Scope:
    """Return the scope of an extent."""
    return _SCOPES[per]
