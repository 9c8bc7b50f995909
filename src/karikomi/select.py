"""Selection of tensors by names and globs, never by position or rank."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TypeVar

from karikomi.errors import UnknownName, check, suggest

Value = TypeVar("Value")

_COMMON = ("weight", "kernel")

NOT_SELECTED = "not selected"
"""Why a transform left a tensor alone that `only` does not match, or `exclude` does."""


class TiedNames(list[str]):
    """Names of tensors, and `others`: every further name of one of them -> its name here."""

    def __init__(self, names: Iterable[str], others: Mapping[str, str]) -> None:
        super().__init__(names)
        self.others = dict(others)


def select(
    names: Iterable[str],
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    where: str = "select",
) -> list[str]:
    """Return the names that match a glob of `only` (default: all) and none of `exclude`, in order.

    A pattern that matches nothing raises `UnknownName` with the nearest names, so that a typing
    mistake never selects nothing in silence. Raises `InvalidArgument` for an argument without patterns.

    >>> select(["conv.weight", "conv.bias", "head.weight"], only="*.weight", exclude="head.*")
    ['conv.weight']
    """
    known = list(names)
    wanted, unwanted = _patterns(only, f"{where}: only"), _patterns(exclude, f"{where}: exclude")
    if not known:
        raise UnknownName("there is no tensor to select from", where=where)
    kept = set(known) if only is None else _matching(known, wanted, where=where)
    dropped = _matching(known, unwanted, where=where)
    chosen = [name for name in known if name in kept and name not in dropped]
    if not chosen:
        given = {"only": only, "exclude": exclude}
        said = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        raise UnknownName("the selection leaves no tensor", where=where, got=said)
    return chosen


def outright(names: Iterable[str], only: str | Sequence[str] | None) -> set[str]:
    """Return the names that a pattern of `only` spells out: what is left alone by default is meant then.

    A pattern spells a name out if it is that name, or if its last part (after the last dot or slash) matches the
    last part of the name and is more than a wildcard. ``weight`` and ``kernel``, which most tensors are called, are
    spelled out by a whole name alone, and a bias by a pattern that contains "bias".

    >>> names = ["fc.weight", "fc.bias", "norm.weight", "scan.decay"]
    >>> sorted(outright(names, "*.bias")), outright(names, "fc.*"), outright(names, "*.weight")
    (['fc.bias'], set(), set())
    >>> sorted(outright(names, ["norm.weight", "*decay"]))
    ['norm.weight', 'scan.decay']
    """
    patterns = _patterns(only, "only")
    return {n for n in names if any(n == p or _spells_out(p, n) for p in patterns)}


def _spells_out(pattern: str, name: str) -> bool:
    last, leaf = (re.split(r"[./]", text)[-1] for text in (pattern, name))
    anywhere = pattern.startswith("*") or last != pattern or leaf == name
    plain = last.strip("*?")
    return (
        anywhere
        and len(plain) > 1
        and leaf not in _COMMON
        and ("bias" in plain or "bias" not in leaf)
        and fnmatch.fnmatchcase(leaf, last)
        and fnmatch.fnmatchcase(name, pattern)
    )


def _patterns(given: str | Sequence[str] | None, where: str) -> list[str]:
    if given is None:
        return []
    if isinstance(given, str):
        return [given]
    # Not any iterable: an iterator yields its patterns only once.
    good = isinstance(given, Sequence | Set) and all(isinstance(item, str) for item in given)
    allowed = "a string or a sequence of strings"
    check(where, (good, "names are selected by globs", repr(given)[:80], allowed))
    return list(given)


def _matching(names: list[str], patterns: Iterable[str], *, where: str) -> set[str]:
    matching: set[str] = set()
    for pattern in patterns:
        # An exact name is found even where it holds the characters of a glob.
        matched = [n for n in names if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not matched:
            raise UnknownName(
                "the pattern matches no tensor",
                where=where,
                got=repr(pattern),
                hint=suggest(pattern, names),
            )
        matching.update(matched)
    return matching


def spread(
    argument: str, given: Mapping[str, Value] | None, names: Iterable[str], *, where: str
) -> dict[str, Value]:
    """Return name -> value for values given by name or glob.

    A name takes precedence over a glob, and an earlier glob over a later one. `argument`: the name of the
    mapping in errors. Raises `InvalidArgument` for no mapping, `UnknownName` for a pattern without a tensor.

    >>> spread("unit_axes", {"*kernel": -1, "embed.kernel": 0}, ["embed.kernel", "head.kernel"], where="")
    {'embed.kernel': 0, 'head.kernel': -1}
    """
    what, allowed = f"{argument} go by the names of tensors", "such as {'*kernel': -1}"
    check(where, (isinstance(given, Mapping | None), what, repr(given), allowed))
    known = list(names)
    values: dict[str, Value] = {}
    for pattern, value in (given or {}).items():
        for name in _matching(known, [str(pattern)], where=f"{where} ({argument})"):
            if name == pattern:
                values[name] = value
            else:
                values.setdefault(name, value)
    return {name: values[name] for name in known if name in values}
