"""A suspected cause: where and when, the numbers that it was inferred from, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause whose rule applies to a run.

    `cause`: its key in `karikomi.advising.causes.asking.CAUSES`. `row`: the row at which it begins. `tensors`: the
    suspects, the most likely first. `numbers`: what the rule compared. `what`: one sentence. `advice`: what to do.
    `clip_helps`: whether a limit is part of the cure.
    """

    cause: str
    row: int
    what: str
    advice: str
    tensors: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    clip_helps: bool = False
