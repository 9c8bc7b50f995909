"""From the runs of a sweep to its points: spread over seeds, what diverged, the front of metric and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from karikomi.search.driver import front
from karikomi.search.grid_noise import wilson
from karikomi.search.grid_setting import AXES, Setting
from karikomi.search.grid_timing import AloneTimes
from karikomi.tasks import Task

Runs = Mapping[Setting, Mapping[str, Any]]
_OF_RESULT = ("validation", "accuracy", "train", "gap", "bytes")
_OF_RUN = ("loss", "clipped", "skipped")


def points_of(task: Task, runs: Runs, times: AloneTimes | None = None) -> list[dict[str, Any]]:
    """Return one dict per point of the grid: its values of `AXES`, and figures over its finished runs.

    Each figure has ``mean``, ``min`` and ``max``; ``scores`` has the validation metric of each seed, None of one that
    diverged. ``front``: whether no other point has a better mean validation metric and fewer bytes.
    """
    members: dict[tuple[Any, ...], list[tuple[Setting, Mapping[str, Any], int]]] = {}
    for setting, facts in runs.items():
        for place, at in enumerate(setting.points()):
            members.setdefault(at, []).append((setting, facts, place))
    points = [_point(dict(zip(AXES, at, strict=True)), own, times) for at, own in members.items()]
    _mark_front(task, points)
    return points


def with_target(
    points: list[dict[str, Any]], runs: Runs, reached: Callable[[float], bool], batches: int
) -> list[dict[str, Any]]:
    """Return the points with the epochs until the validation metric `reached` a target, and the seconds of their steps.

    Of the runs that reach it, ``of_runs`` being all: seconds are `batches` steps an epoch of the time of a step alone.
    """
    found = []
    for point in points:
        own = [facts for at, facts in runs.items() if _at(point) in {p[:-1] for p in at.points()}]
        epochs = [epoch for facts in own if (epoch := _first(facts["epochs"], reached)) is not None]
        took, ms = spread(epochs), (point["ms_per_step"] or {}).get("mean")
        seconds = {
            k: None if v is None or ms is None else v * batches * ms / 1e3 for k, v in took.items()
        }
        reach = {"epochs_to_target": took, "seconds_to_target": seconds}
        found.append({**point, **reach, "reached_target": len(epochs)})
    return found


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean, lowest and highest of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "min": None, "max": None}
    return {"mean": statistics.fmean(known), "min": min(known), "max": max(known)}


def _point(
    at: dict[str, Any],
    own: Sequence[tuple[Setting, Mapping[str, Any], int]],
    times: AloneTimes | None,
) -> dict[str, Any]:
    finished = [(s, facts, facts["results"][k]) for s, facts, k in own if facts["diverged"] is None]
    lost = len(own) - len(finished)
    scores = [
        None if facts["diverged"] is not None else facts["results"][k]["validation"]
        for _, facts, k in own
    ]
    dense: Mapping[str, Any] = {} if times is None else times.dense()
    known = [facts for _, facts, _ in finished]
    forms = [facts["shapes"] for facts in known]
    return {
        **at,
        "runs": len(finished),
        "diverged": lost,
        "diverged_interval": list(wilson(lost, len(own))),
        "scores": scores,
        **{key: spread([result[key] for *_, result in finished]) for key in _OF_RESULT},
        **{key: spread([facts[key] for facts in known]) for key in _OF_RUN},
        **{
            key: spread([dense.get(key) if f[key] is None else f[key] for f in known])
            for key in ("macs", "parameters")
        },
        "ms": spread([times.latency(form) for form in forms] if times is not None else []),
        "ms_per_step": None if times is None else dict(times.step(own[0][0])),
    }


def _mark_front(task: Task, points: Sequence[dict[str, Any]]) -> None:
    sign = -1.0 if task.direction == "max" else 1.0
    seen = [p for p in points if p["validation"]["mean"] is not None and not p["diverged"]]
    best = front(seen, lambda p: (sign * p["validation"]["mean"], p["bytes"]["mean"]))
    for point in points:
        point["front"] = any(point is other for other in best)


def _at(point: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(point[axis] for axis in AXES[:-1])


def _first(epochs: Sequence[float], reached: Callable[[float], bool]) -> int | None:
    return next((n for n, value in enumerate(epochs, start=1) if reached(value)), None)
