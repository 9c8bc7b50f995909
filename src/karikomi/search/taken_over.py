"""Candidates of another run folder, taken over for other budgets: what was measured once is not measured again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from karikomi.errors import BadFile, InvalidArgument, Unsupported
from karikomi.files import write_bytes
from karikomi.search.lock import read_json

_JOURNAL, _LEDGER, _LATENCY = "journal.jsonl", "spent.json", "latency.json"


def evaluated_by(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return that of the identity of a run which its candidates depend on: no budgets, and no list of what is tried.

    >>> sorted(evaluated_by({"seed": 0, "max_drop": 0.1, "recipe": {"rates": [4.0], "train_epochs": 2}}))
    ['recipe', 'seed']
    """
    recipe = {name: value for name, value in identity["recipe"].items() if name not in _TRIED}
    own = {k: v for k, v in identity.items() if k not in _CHOOSE and not k.startswith("max_")}
    return {**own, "recipe": recipe}


_CHOOSE = ("objective", "integers")
_TRIED = ("widths", "sparsities", "entries", "rates", "learned")
"""Lists of a recipe whose members are in the proposals."""


def take_over(source: Path, target: Path, identity: Mapping[str, Any]) -> None:
    """Give a new run folder the finished candidates of another one, their journal, and the table of latencies.

    `identity`: of the new run. Nothing happens where the new folder has a journal already. Raises `BadFile` where there
    is no run, `InvalidArgument` for the same folder, and `Unsupported` for another network, data or training.
    """
    where = "compress: reuse"
    known = read_json(source / "run.json")
    if known is None:
        raise BadFile("this folder holds no run", where=where, got=str(source))
    if source.resolve() == target.resolve():
        raise InvalidArgument("a run cannot be taken over by itself", where=where, got=str(source))
    # Through JSON, so that what was read compares with what would be written.
    wanted = json.loads(json.dumps(dict(identity)))
    before, now = (flat(evaluated_by(values)) for values in (known, wanted))
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differing:
        first = differing[0]
        raise Unsupported(
            f"the candidates of this folder are of another run; different: {', '.join(differing)}",
            where=where,
            got=f"{first} = {now.get(first)}, there {before.get(first)}",
            allowed="other budgets, presets that train alike",
        )
    if (target / _JOURNAL).exists() or not (source / _JOURNAL).exists():
        return
    journal = (source / _JOURNAL).read_bytes()
    for folder in sorted((source / "candidates").glob("*")):
        # Finished candidates, which the journal names, are never written again: both folders may share the files.
        if folder.name.encode() in journal:
            shutil.copytree(
                folder,
                target / "candidates" / folder.name,
                ignore=shutil.ignore_patterns(".*"),
                copy_function=_linked,
                dirs_exist_ok=True,
            )
    if (source / _LATENCY).exists():
        write_bytes(target / _LATENCY, (source / _LATENCY).read_bytes())
    # Last: a journal names what is there.
    write_bytes(target / _JOURNAL, journal)


def certificates_before(source: Path) -> int:
    """Return how many certificates the examples of another folder served."""
    ledger = read_json(source / _LEDGER)
    return 0 if ledger is None else len(ledger["uses"])


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping whose inner mappings are spread out, by names with dots.

    >>> flat({"a": 1, "b": {"c": [2]}})
    {'a': 1, 'b.c': [2]}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = flat(value) if isinstance(value, Mapping) else None
        found |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return found


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
