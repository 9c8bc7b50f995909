"""The answer of a sweep: which setting, which others are within noise, what diverges, and how many seeds a claim needs.

Everything is decided on the validation metric, over the same seeds for every setting:

1. Settings that diverge in more runs than the fewest do are left out, with Wilson's interval.
2. The best is that of the highest mean. Of the settings whose mean paired difference from it is at most one standard
   error, the loosest is chosen: no clip before limits, high limits before low ones, limits before rules, no bound
   before one.
3. A setting is worse if a paired t test against the best has p < 0.05 after Holm's adjustment, else within noise.

One standard error: Breiman, Friedman, Olshen and Stone 1984, Classification and Regression Trees, section 3.4.3, here
of paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from karikomi.search.grid_noise import Difference, adjusted
from karikomi.tasks import Task

ALPHA = 0.05


@dataclass(slots=True)
class SweepGroup:
    """The points of one sparsity and one size of grid, which compete with each other.

    `places`: in the list of all points. `best`, `chosen`: None where every run diverged.
    """

    points: Sequence[Mapping[str, Any]]
    places: Sequence[int]
    sign: float
    best: int | None = None
    chosen: int | None = None
    differences: dict[int, Difference] = field(default_factory=dict)
    worse: list[int] = field(default_factory=list)
    noise: list[int] = field(default_factory=list)
    diverging: list[int] = field(default_factory=list)

    @property
    def seeds(self) -> int:
        """Runs of each setting."""
        return len(self.points[self.places[0]]["scores"])

    def scores(self, place: int) -> list[float | None]:
        """Return the validation metric of each seed, higher being better."""
        values = self.points[place]["scores"]
        return [None if value is None else self.sign * value for value in values]

    def mean(self, place: int) -> float:
        """Return the mean of the finished runs, higher being better; minus infinity without any."""
        known = [value for value in self.scores(place) if value is not None]
        return math.fsum(known) / len(known) if known else -math.inf

    def rival(self) -> int | None:
        """Return the setting within noise that is farthest from the best: more seeds tell it apart first."""
        apart = [p for p in self.noise if p != self.best and self.differences[p].mean > 0]
        return max(apart, key=lambda p: self.differences[p].mean, default=None)

    def verdict(self, place: int) -> str:
        """Return one word, or two, for a point."""
        if place == self.chosen:
            return "chosen"
        if place in self.diverging:
            return "diverges"
        if place in self.worse:
            return "worse"
        return "undecided" if self.seeds == 1 else "within noise"

    def as_dict(self) -> dict[str, Any]:
        """Return the decision as plain values; settings are places in the list of points."""
        rival = self.rival()
        apart = None if rival is None else self.differences[rival]
        first = self.points[self.places[0]]
        return {
            "sparsity": first["sparsity"],
            "bits": first["bits"],
            "seeds": self.seeds,
            "best": self.best,
            "chosen": self.chosen,
            "within_noise": self.noise,
            "worse": self.worse,
            "diverging": self.diverging,
            "rival": rival,
            "shows": None if apart is None else apart.shows(),
            "seeds_needed": None if apart is None else apart.needed(),
        }


def groups_of(task: Task, points: Sequence[Mapping[str, Any]]) -> list[SweepGroup]:
    """Return the decided groups of points, in the order of the points."""
    sign = 1.0 if task.direction == "max" else -1.0
    members: dict[tuple[Any, Any], list[int]] = {}
    for place, point in enumerate(points):
        members.setdefault((point["sparsity"], point["bits"]), []).append(place)
    return [decided(SweepGroup(points, places, sign)) for places in members.values()]


def decided(group: SweepGroup) -> SweepGroup:
    """Return a group with its best, its chosen, and what is worse, within noise or diverging."""
    lost = {place: group.points[place]["diverged"] for place in group.places}
    fewest = min(lost.values())
    group.diverging = [place for place in group.places if lost[place] > fewest]
    able = [p for p in group.places if lost[p] == fewest and group.mean(p) > -math.inf]
    if not able:
        group.diverging = [*group.places]
        return group
    best = group.best = max(able, key=lambda place: group.mean(place))
    found = {p: Difference.of(group.scores(best), group.scores(p)) for p in able if p != best}
    group.differences = {p: difference for p, difference in found.items() if difference is not None}
    group.worse = _worse(group.differences)
    group.noise = [p for p in able if p not in group.worse]
    near = [p for p, d in group.differences.items() if d.mean <= (d.error or 0.0)]
    group.chosen = max([best, *near], key=lambda p: (*looseness(group.points[p]), group.mean(p)))
    return group


def looseness(point: Mapping[str, Any]) -> tuple[float, bool]:
    """Return what settings are sorted by, from strict to loose: rules, limits, no clip; bounds before none."""
    limit = math.inf if point["limit"] is None else point["limit"]
    return (-1.0 if point["rule"] is not None else limit), point["bound"] is None


def bounds_of(group: SweepGroup) -> list[dict[str, Any]]:
    """Return whether each bound helps: against the same clip and rate without one, at those of the chosen setting."""
    if group.chosen is None:
        return []
    at = {key: group.points[group.chosen][key] for key in ("limit", "rule", "rate")}
    same = [p for p in group.places if all(group.points[p][k] == v for k, v in at.items())]
    free = next((p for p in same if group.points[p]["bound"] is None), None)
    found = []
    for place in same if free is not None else ():
        if place == free or free is None:
            continue
        difference = Difference.of(group.scores(place), group.scores(free))
        found.append(
            {
                "bound": group.points[place]["bound"],
                "place": place,
                "without": free,
                "gain": None if difference is None else difference.mean,
                "p": None if difference is None else difference.p,
                "verdict": _helps(difference, group.points[place], group.points[free]),
            }
        )
    return found


def _helps(difference: Difference | None, bound: Mapping[str, Any], free: Mapping[str, Any]) -> str:
    if bound["diverged"] != free["diverged"]:
        return "helps" if bound["diverged"] < free["diverged"] else "hurts"
    if difference is None or difference.p is None:
        return "undecided"
    if difference.p >= ALPHA:
        return "within noise"
    return "helps" if difference.mean > 0 else "hurts"


def _worse(differences: Mapping[int, Difference]) -> list[int]:
    tested = {place: d.p for place, d in differences.items() if d.p is not None}
    ps = adjusted([*tested.values()])
    return [
        place
        for place, p in zip(tested, ps, strict=True)
        if p < ALPHA and differences[place].mean > 0
    ]
