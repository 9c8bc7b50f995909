"""Strict JSON and the checks of a file's claims: what is malformed, unknown or of a later version is refused."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from karikomi.errors import BadFile

VERSION = (1, 3)
"""The latest version that is read, and the one that is written."""

Version = tuple[int, int]


def parse_json(data: bytes, where: str) -> Any:
    """Return JSON of objects, lists, text and integers; duplicate keys and floats are refused."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_refuse,
        )
    except (ValueError, RecursionError) as error:
        raise BadFile(f"malformed JSON ({str(error)[:80]})", where=where) from error


def check_version(version: list, where: str) -> Version:
    """Return a version, or raise `BadFile` for a major one that is not this one."""
    require(len(version) == 2 and all(map(natural, version)), "malformed version", where, version)
    if version[0] != VERSION[0]:
        raise BadFile(
            "the file has another major version",
            where=where,
            got=str(version[0])[:80],
            allowed=VERSION[0],
            hint="upgrade karikomi",
        )
    return version[0], version[1]


def require_known(
    unknown: Collection[Any], fact: str, version: Version, where: str, hint: str | None = None
) -> None:
    """Raise `BadFile` with `fact` where anything is unknown; a later minor version may define it."""
    if not unknown:
        return
    if version > VERSION:
        fact = f"the file is from a later version, {version[0]}.{version[1]}: {fact}"
        hint = "upgrade karikomi"
    got = sorted(map(repr, unknown))[:5]
    raise BadFile(fact, where=where, got=", ".join(got)[:80], hint=hint)


def require(truth: bool, fact: str, where: str, got: object = None) -> None:
    """Raise `BadFile` with `fact` unless `truth`."""
    if not truth:
        raise BadFile(fact, where=where, got=None if got is None else repr(got)[:80])


def natural(value: object) -> bool:
    """Return whether a value is an integer >= 0, and no bool."""
    return type(value) is int and value >= 0


def listed(value: Any, where: str) -> list:
    """Return a value that must be a list."""
    require(isinstance(value, list), "a list is missing in the manifest", where)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _refuse(token: str) -> Any:
    raise ValueError(f"the number {token[:20]} is not an integer")
