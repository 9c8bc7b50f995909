"""Descriptions of the numbers in a state as plain data, which a checkpoint contains, and outcomes made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from karikomi.rule import Array
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import Stage

Description = Mapping[str, Any]
"""A stage: ``names`` of tensors, ``counts`` of their numbers, which are ``peaks``, and its ``rules``."""


def described(plan: Sequence[Stage]) -> list[dict[str, Any]]:
    """Return a JSON-serializable description of the stages of a plan, as needed to read their numbers.

    The order of norms is in it where it is not 2, so that states of earlier versions have the same description.
    """
    return [
        {
            "names": list(stage.names),
            "counts": list(stage.counts),
            "peaks": sorted(stage.peaks),
            "rules": [type(part.rule).__name__ for part in stage.parts],
            **({} if stage.order == 2.0 else {"order": stage.order}),
        }
        for stage in plan
    ]


def as_bytes(stages: Sequence[Description]) -> np.ndarray:
    """Return descriptions as an array of uint8, which can be stored with other arrays."""
    return np.frombuffer(json.dumps(list(stages)).encode(), np.uint8)


def from_bytes(entries: Any) -> list[dict[str, Any]]:
    """Return the descriptions that `as_bytes` wrote."""
    return json.loads(np.asarray(entries, np.uint8).tobytes())


def owners(stage: Description) -> tuple[str, ...]:
    """Return the name of the tensor of each number."""
    pairs = zip(stage["names"], stage["counts"], strict=True)
    return tuple(name for name, count in pairs for _ in range(count))


def last_outcome(stages: Sequence[Description], numbers: Iterable[Any], skipped: Array) -> Outcome:
    """Return the outcome of the last of these stages, with those of the stages before it.

    `numbers`: of each stage before and after the step; NumPy arrays where they are known.
    """
    outcomes: list[Outcome] = []
    zeroed = False
    for stage, (norms, after) in zip(stages, numbers, strict=True):
        if isinstance(norms, np.ndarray) and not np.asarray(skipped):
            zeroed = zeroed or bool(np.any(~np.isfinite(norms) & np.isfinite(after)))
        outcomes.append(
            Outcome(
                names=owners(stage),
                norms=norms,
                after=after,
                skipped=skipped,
                element_wise=len(stage["peaks"]) == len(stage["names"]),
                nonfinite_policy="zero" if zeroed else "skip",
                peaks=frozenset(stage["peaks"]),
                earlier=tuple(outcomes),
                order=stage.get("order", 2.0),
            )
        )
    return outcomes[-1]
