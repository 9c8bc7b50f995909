"""The protocol of pruning schedules: when masks change, how much is pruned, and what is regrown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune.allocations.allocation import Allocation, as_allocation, check_sparsity
from karikomi.prune.pattern import Pattern, as_pattern
from karikomi.prune.scores.score import Score, as_score
from karikomi.schedule import is_number, whole, whole_from


class PruningSchedule:
    """When how much is pruned, and what is regrown. A new schedule is a subclass with these members.

    Fields: `sparsity` (the final share that is zero, in [0, 1)), `score` (a registered name or a
    `Score`), `allocation` (a registered name or an `Allocator`; none: global for single weights, uniform for other
    patterns), `pattern` (a registered name or a `Pattern`), `only` and `exclude` (globs over parameter
    names). Steps are attempted optimizer steps, counted from 1; what is due at step 0 is done after
    the first one. What is due at a step that was skipped is done after the next one that is taken.
    """

    __slots__ = ()

    sparsity: float
    score: str | Score
    allocation: Allocation | None
    pattern: str | Pattern
    only: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...] | None
    seed: int
    """Of what comes back by ``noise``; no other schedule has one."""

    def due(self, step: int) -> bool:
        """Return whether masks change at `step`."""
        raise NotImplementedError

    def sparsity_at(self, step: int) -> float:
        """Return the share that is to be zero at `step`; it never falls, unless masks are made `from_all`."""
        raise NotImplementedError

    @property
    def last(self) -> int:
        """The last step at which masks may change."""
        raise NotImplementedError

    def scored_by(self) -> Score:
        """Return the score as an object."""
        return as_score(self.score)

    @property
    def pattern_says(self) -> bool:
        """Whether the pattern itself determines how much is pruned."""
        return as_pattern(self.pattern).fixed_share

    @property
    def from_all(self) -> bool:
        """Whether masks are made from all weights each time, and not from those that earlier ones left."""
        return False

    @property
    def rewinds_to(self) -> int | None:
        """The step whose weights return after masks have changed, if any do."""
        return None

    @property
    def regrows_by(self) -> str | None:
        """The fact (``noise`` or ``gradient``) by which as many weights come back as are dropped, if any do.

        Dropped are the smallest of each tensor, and the first masks alone are made by the score.
        """
        return None

    def drop_at(self, step: int) -> float:
        """Return the share of the kept weights of each tensor that is dropped and replaced at `step`."""
        return 0.0


Timetable = PruningSchedule
"""Alias of `PruningSchedule`."""


def check_fields(schedule: Any, *, where: str) -> None:
    """Raise `InvalidArgument` unless this is a schedule with all fields, `UnknownName` for an unregistered name."""
    if not isinstance(schedule, PruningSchedule):
        raise InvalidArgument(
            "not a schedule",
            where=where,
            got=repr(schedule)[:80],
            allowed="such as kk.prune.Gradual",
        )
    fields = ("sparsity", "score", "allocation", "pattern", "only", "exclude")
    if missing := [field for field in fields if not hasattr(schedule, field)]:
        raise InvalidArgument(
            "a schedule has all fields of PruningSchedule",
            where=f"{where}: {type(schedule).__name__}",
            got=f"no {', '.join(missing)}",
            allowed=", ".join(fields),
        )
    _check_names(schedule)


def settle(schedule: Any, *, shares: tuple[str, ...], numbers_from: Mapping[str, int]) -> None:
    """Check the fields of a schedule, and store plain Python numbers, so that it can be written down.

    `shares`: fields in [0, 1). `numbers_from`: field of whole numbers -> the least of them. Raises
    `InvalidArgument`, or `UnknownName` for a name that is not registered.
    """
    where = type(schedule).__name__
    for field in shares:
        share = getattr(schedule, field)
        if is_number(share):
            object.__setattr__(schedule, field, float(share))
        check_sparsity(getattr(schedule, field), where=f"{where}.{field}")
    for field, least in numbers_from.items():
        text, place = "not a whole number of steps", f"{where}.{field}"
        number = whole_from(least, getattr(schedule, field), text, where=place)
        object.__setattr__(schedule, field, number)
    for field in ("only", "exclude"):
        object.__setattr__(schedule, field, _globs(getattr(schedule, field), f"{where}.{field}"))
    _check_names(schedule)


def settle_span(schedule: Any) -> None:
    """Check ``steps=(first, last)`` of a schedule that prunes several times, and that its pattern allows several."""
    where = type(schedule).__name__
    span = tuple(schedule.steps) if isinstance(schedule.steps, tuple | list) else ()
    ends = tuple(map(whole, span))
    if len(ends) != 2 or None in ends or not 0 <= ends[0] < ends[1]:  # type: ignore[operator]
        raise InvalidArgument(
            "steps are two whole numbers of steps",
            where=where,
            got=f"steps={schedule.steps!r}",
            allowed="0 <= first < last",
        )
    object.__setattr__(schedule, "steps", ends)
    if as_pattern(schedule.pattern).fixed_share:
        raise InvalidArgument(
            "the pattern determines how much is removed, at once",
            where=f"{where}.pattern",
            got=schedule.pattern,
            hint="OneShot(NofM(...).sparsity, pattern=NofM(...))",
        )


def _check_names(schedule: PruningSchedule) -> None:
    where = type(schedule).__name__
    schedule.scored_by()
    as_pattern(schedule.pattern)
    if schedule.allocation is not None:
        as_allocation(schedule.allocation)
    for field in ("only", "exclude"):
        _globs(getattr(schedule, field), f"{where}.{field}")


def _globs(given: Any, where: str) -> str | tuple[str, ...] | None:
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, list | tuple) and all(isinstance(item, str) for item in given):
        return tuple(given)
    raise InvalidArgument("globs over names are strings", where=where, got=repr(given))


def step_of(schedule: PruningSchedule, step: int, *, where: str) -> int:
    """Return the step as a Python number; raises for another value, or a schedule of more than masks."""
    check_fields(schedule, where=where)
    number = whole_from(0, step, "a step is a whole number", where=f"{where}: step")
    if schedule.regrows_by is not None or schedule.rewinds_to is not None:
        raise Unsupported(
            f"{type(schedule).__name__} brings weights back, and with them what an optimizer holds",
            where=where,
            allowed="OneShot, Gradual, Iterative without rewind",
            hint="kk.torch.attach has the others",
        )
    return number
