"""The extent of a bound by norm, one unit or one tensor, and its tolerance for rounding.

Shared by several bounds.
"""

from __future__ import annotations

from karikomi.errors import InvalidArgument
from karikomi.rule import Scope

SLACK = 1e-6
"""The rounding of a float32 unit that was just scaled onto its bound, relative to the bound."""

_SCOPES = {"unit": Scope.UNIT, "tensor": Scope.TENSOR}


def check_extent(per: object, *, where: str) -> None:
    """Raise `InvalidArgument` unless `per` is ``"unit"`` or ``"tensor"``."""
    if not isinstance(per, str) or per not in _SCOPES:
        raise InvalidArgument(
            "unknown extent of the bound", where=where, got=repr(per), allowed="'unit', 'tensor'"
        )


def scope_of(per: str) -> Scope:
    """Return the scope of an extent."""
    return _SCOPES[per]
