"""Errors with one line of text: where, what, got, allowed, next step."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class KarikomiError(Exception):
    """Root of all errors that karikomi raises on purpose.

    The text is one line, built from its parts: ``where: what; got ...; allowed: ...; next step``.
    Each child also derives from the built-in that fits, so that ``except ValueError`` keeps working.

    >>> print(InvalidArgument("the limit must be positive", where="ByNorm", got=-1, allowed="> 0"))
    ByNorm: the limit must be positive; got -1; allowed: > 0
    """

    # AutoGraph re-creates errors raised in a tf.function, and cannot re-create one with several arguments.
    ag_pass_through = True

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        allowed: object = None,
        hint: str | None = None,
    ) -> None:
        parts = [f"{where}: {what}" if where else what]
        if got is not None:
            parts.append(f"got {got}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if hint:
            parts.append(hint)
        super().__init__("; ".join(" ".join(str(part).split()) for part in parts))


class InvalidArgument(KarikomiError, ValueError):
    """A value outside of its range, or an invalid combination of arguments."""


class UnknownName(KarikomiError, LookupError):
    """An unknown name: of a rule, a task, a tensor, a key of a file."""


class Unsupported(KarikomiError, RuntimeError):
    """A combination of arguments, models or versions that is not supported."""


Refused = Unsupported
"""Alias of `Unsupported`."""


class NonFinite(KarikomiError, ArithmeticError, RuntimeError):
    """Gradients, weights or scores with NaN or infinite entries, where the policy is to raise."""


class BadFile(KarikomiError, ValueError):
    """A file that is truncated, altered, malicious, or from a later version."""


class Unavailable(KarikomiError, ImportError):
    """A dependency that is not installed."""


class Unwritable(KarikomiError, OSError):
    """A file or folder that cannot be written: permissions, a full disk."""


def check(where: str, *facts: tuple[object, str, object, object]) -> None:
    """Raise `InvalidArgument` for the first ``(truth, what, got, allowed)`` that is not true."""
    for truth, what, got, allowed in facts:
        if not truth:
            raise InvalidArgument(what, where=where, got=got, allowed=allowed)


def install_hint(extra: str) -> str:
    """Return how to install an optional dependency; until a release that is from a clone.

    >>> install_hint("torch")
    "pip install '.[torch]' in a clone of karikomi"
    """
    return f"pip install '.[{extra}]' in a clone of karikomi"


def check_known(
    name: object, known: Collection[str], what: str, *, where: str | None = None
) -> None:
    """Raise `UnknownName` with the nearest known names unless a name is one of them."""
    if name not in known:
        raise UnknownName(what, where=where, got=repr(name), hint=suggest(str(name), known))


def suggest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Return ``"did you mean 'x'?"`` for the nearest known names, or a list when none is near.

    >>> suggest("limt", ["limit", "every"])
    "did you mean 'limit'?"
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=most, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(candidate) for candidate in near)}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown or 'nothing'}"
