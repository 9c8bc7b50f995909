"""The state of a clipped optimizer in a file, matched by the names of variables, else by their places.

Keras renames layers freely (``dense_1``), so that a changed name must not lose the state.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.clipping.named_clip import LAST, MOMENT, is_of_rule
from karikomi.keras.internals import stored_value
from karikomi.rules.checkpoint import from_plain, to_plain
from karikomi.rules.stages import Stage

NAMES, ITERATION = "names", "iteration"
BOUND, ACCUMULATED = "bound.", "accumulated."
"""Prefixes of entries: the state of a bound, and accumulated gradients."""
BOUNDED = "bounded"


def warn_unread(name: str, why: str, *, built: bool) -> None:
    """Warn as Keras does that an optimizer of this name does not read a file; `why`: if it is `built`."""
    why = why if built else "it has not been built yet"
    text = f"karikomi: skipping variable loading for optimizer '{name}', because {why}"
    warnings.warn(text, stacklevel=3)


def to_store(
    store: Any, entries: Mapping[str, Any], names: Sequence[str], bound: Stage | None
) -> None:
    """Write entries, the names of their variables, and the places of those that a bound affects."""
    store[NAMES] = np.frombuffer(json.dumps(list(names)).encode(), np.uint8)
    if bound is not None:
        store[BOUNDED] = np.array([place for place, n in enumerate(names) if n in bound.names])
    for key, variable in entries.items():
        store[_in_file(key, names)] = _of_all_replicas(variable)


def from_store(
    store: Any,
    entries: Mapping[str, Any],
    names: Sequence[str],
    plan: Sequence[Stage],
    bound: Stage | None,
    *,
    where: str,
) -> dict[str, np.ndarray]:
    """Return the values of entries that `to_store` wrote, perhaps for variables in another order."""
    keys = set(store.keys())
    missing = sorted(key for key in entries if _in_file(key, names) not in keys)
    if missing:
        raise InvalidArgument(
            "this file is of another rule", where=where, got=sorted(keys)[:8], allowed=missing[:5]
        )
    before = _names(store, names, where)
    if bound is not None:
        _check_bounded(store, bound, before, where)
    found = {key: np.asarray(store[_in_file(key, before)]) for key in entries}
    stages_by_prefix = {"": plan} | ({BOUND: [bound]} if bound is not None else {})
    for prefix, stages in stages_by_prefix.items():
        rules = _rules(found, prefix, stages, before)
        found |= {prefix + key: value for key, value in rules.items()}
        for place, stage in enumerate(stages):
            key = prefix + (f"{LAST}{place}" if not prefix else LAST)
            found[key] = found[key][:, _columns(stage, before)]
    return found


def _of_all_replicas(variable: Any) -> np.ndarray:
    """Return the value of a variable; of one whose copies on the replicas differ, their mean.

    Sums that wait for an update are added up over the replicas, each of which starts with what was saved.
    """
    copies = getattr(stored_value(variable), "values", None)
    mine = on_host(variable)
    if not isinstance(copies, tuple) or mine.dtype.kind != "f":
        return mine
    values = [np.asarray(copy) for copy in copies]
    same = all(np.array_equal(mine, value, equal_nan=True) for value in values)
    return mine if same else np.mean(values, axis=0, dtype=np.float64).astype(mine.dtype)


def _check_bounded(store: Any, bound: Stage, before: list[str], where: str) -> None:
    """Raise `InvalidArgument` for the state of a bound of other variables; each has columns in it."""
    # Versions that spared no gains wrote no places.
    places = np.asarray(store[BOUNDED]).tolist() if BOUNDED in set(store.keys()) else []
    then = {before[place] for place in places}
    fits = then == set(bound.names) if places else store[BOUND + LAST].shape[1] == len(bound.owners)
    if not fits:
        raise InvalidArgument(
            "this file is of a bound on other variables",
            where=where,
            got=", ".join(sorted(then)[:3]) or "gains of normalisation layers too",
            allowed=", ".join(sorted(set(bound.names))[:3]),
            hint="select the same ones by only= and exclude=; only='*' takes all, as earlier versions did",
        )


def _in_file(key: str, names: Sequence[str]) -> str:
    """Return a key without the slashes of a path, which are folders in a file."""
    for prefix in (MOMENT, ACCUMULATED):
        if key.startswith(prefix):
            return f"{prefix}{list(names).index(key.removeprefix(prefix))}"
    return key


def _names(store: Any, names: Sequence[str], where: str) -> list[str]:
    before: list[str] = json.loads(np.asarray(store[NAMES], np.uint8).tobytes())
    if set(before) == set(names):
        return before
    if len(before) != len(names):
        raise InvalidArgument(
            "this file is of other variables",
            where=where,
            got=f"{len(before)} of them, such as {before[0]}",
            allowed=f"{len(names)}, such as {names[0]}",
        )
    return list(names)


def _rules(
    found: Mapping[str, np.ndarray], prefix: str, stages: Sequence[Stage], before: Sequence[str]
) -> dict[str, np.ndarray]:
    own = {
        key[len(prefix) :]: value
        for key, value in found.items()
        if key.startswith(prefix) and is_of_rule(key[len(prefix) :])
    }
    plain: dict[str, Any] = to_plain(stages, own)
    for key in plain.keys() - own.keys():
        place = int(key.partition(".")[2] or 0)
        plain[key] = _owners(stages[place], before)
    return from_plain(stages, plain)


def _owners(stage: Stage, before: Sequence[str]) -> list[str]:
    counts = {name: stage.owners.count(name) for name in stage.owners}
    return [name for name in before if name in counts for _ in range(counts[name])]


def _columns(stage: Stage, before: Sequence[str]) -> list[int]:
    starts: dict[str, list[int]] = {}
    for place, name in enumerate(_owners(stage, before)):
        starts.setdefault(name, []).append(place)
    return [place for name in dict.fromkeys(stage.owners) for place in starts[name]]
