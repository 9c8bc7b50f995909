"""The answer of a sweep in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.search.grid_answer import SweepGroup, bounds_of, looseness
from karikomi.search.grid_noise import SIGN_FLIP_SEEDS
from karikomi.tasks import Task
from karikomi.tasks.metrics import is_share

ALWAYS = 0.95
_MOST = 6


def answer_of(
    task: Task, points: Sequence[Mapping[str, Any]], groups: Sequence[SweepGroup]
) -> dict[str, Any]:
    """Return the answer: ``sentences`` for people, and the decisions of each group as plain values."""
    sentences: list[str] = []
    decisions = []
    several = len(groups) > 1
    for group in groups:
        own = account(task, group)
        label = group_label(points[group.places[0]]) if several else ""
        sentences += [f"{label}: {own[0]}" if label else f"{own[0][0].upper()}{own[0][1:]}"]
        sentences += own[1:]
        decisions.append({**group.as_dict(), "bounds": bounds_of(group), "sentences": own})
    if any(1 < group.seeds < SIGN_FLIP_SEEDS and group.differences for group in groups):
        sentences.append(
            f"Below {SIGN_FLIP_SEEDS} seeds the tests rest on differences being normal: none without that reaches 5 %."
        )
    return {"sentences": [*dict.fromkeys(sentences)], "groups": decisions}


def account(task: Task, group: SweepGroup) -> list[str]:
    """Return the sentences of one group; the first has the chosen setting."""
    if group.chosen is None or group.best is None:
        return [f"every setting diverged in all of its {_runs(group.seeds)}"]
    found = [f"{_headline(task, group)}. {_values(task, group)}"]
    found += [_noise(task, group), _seeds(task, group)]
    found += [_diverging(group, place) for place in group.diverging]
    found += [_bound(task, item, group) for item in bounds_of(group)]
    found += _always_met(group) + _edge(group)
    return [text for text in found if text]


def setting_name(point: Mapping[str, Any]) -> str:
    """Return the clip, bound and rate of a point.

    >>> setting_name({"limit": None, "rule": None, "bound": "MaxNorm(2.0)", "rate": None})
    'no clip, bound MaxNorm(2.0)'
    """
    clip = "no clip" if point["limit"] is None else f"limit {point['limit']:g}"
    parts = [clip if point["rule"] is None else point["rule"]]
    parts += [] if point["bound"] is None else [f"bound {point['bound']}"]
    parts += [] if point["rate"] is None else [f"rate {point['rate']:g}"]
    return ", ".join(parts)


def group_label(point: Mapping[str, Any]) -> str:
    """Return the sparsity and bits of a point."""
    bits = "" if point["bits"] is None else f", {point['bits']} bits"
    return f"sparsity {100 * point['sparsity']:.6g} %{bits}"


def _headline(task: Task, group: SweepGroup) -> str:
    name, best = (setting_name(group.points[p]) for p in (group.chosen or 0, group.best or 0))
    if group.seeds == 1:
        shared = "" if name == best else f", as {best} has, and is looser"
        return f"{name} has the best validation {task.metric_name}{shared}"
    if group.chosen != group.best:
        return f"{name} (the loosest within one standard error of the best, {best})"
    if not group.differences:
        return f"{name} (no other setting to compare it with)"
    loosest = max(looseness(group.points[p]) for p in group.places)
    if looseness(group.points[group.chosen or 0]) == loosest:
        return f"{name} (the best, and no other is looser)"
    return f"{name} (the best; nothing looser is within one standard error of it)"


def _values(task: Task, group: SweepGroup) -> str:
    point = group.points[group.chosen or 0]
    metric, of = task.metric_name, f"mean of {_runs(point['runs'])}"
    validation, test = (_score(point[key]["mean"], metric) for key in ("validation", "accuracy"))
    return f"On the validation split {metric} {validation}, on the test split {test}, {of}."


def _noise(task: Task, group: SweepGroup) -> str:
    if group.seeds == 1:
        return ""
    near = [p for p in group.noise if p != group.chosen]
    parts = []
    if near:
        verb = "is" if len(near) == 1 else "are"
        names = _range(group, [*near, *([] if group.chosen is None else [group.chosen])])
        alone = _names(group, near)
        parts.append(f"{names or alone} {'are' if names else verb} within noise")
    if group.worse:
        worse = [
            f"{setting_name(group.points[p])} (by {_amount(group.differences[p].mean, task.metric_name)})"
            for p in group.worse
        ]
        parts.append(f"worse: {_listed(worse)}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _seeds(task: Task, group: SweepGroup) -> str:
    if group.seeds == 1:
        return (
            "Too few seeds: one shows no noise, so nothing is claimed; two give a standard error, "
            f"{SIGN_FLIP_SEEDS} a test without assumptions."
        )
    rival = group.rival()
    if rival is None:
        return ""
    apart, metric = group.differences[rival], task.metric_name
    name, needed = setting_name(group.points[rival]), apart.needed()
    text = (
        f"{group.seeds} seeds are too few to tell {name} from the best: it is {_amount(apart.mean, metric)} behind, "
        f"and so many show {_amount(apart.shows() or 0.0, metric)}"
    )
    text += f"; about {needed:,} seeds are needed" if needed is not None else ""
    return f"{text}."


def _diverging(group: SweepGroup, place: int) -> str:
    point = group.points[place]
    low, high = (f"{100 * end:.0f}" for end in point["diverged_interval"])
    total = point["runs"] + point["diverged"]
    name = setting_name(point)
    times = f"{point['diverged']} of {_runs(total)}"
    return f"{name[0].upper()}{name[1:]} diverges in {times} (Wilson {low} to {high} %)."


def _bound(task: Task, item: Mapping[str, Any], group: SweepGroup) -> str:
    words = {"helps": "helps", "hurts": "makes it worse"}
    words |= {"within noise": "changes nothing beyond noise", "undecided": "cannot be judged"}
    place, free = group.points[item["place"]], group.points[item["without"]]
    text = f"Bound {item['bound']} {words[item['verdict']]}"
    if place["diverged"] != free["diverged"]:
        return f"{text}: {place['diverged']} runs diverge with it, {free['diverged']} without."
    if item["gain"] is None:
        return f"{text}."
    sign = "+" if item["gain"] >= 0 else "-"
    p = "" if item["p"] is None else f" (p = {item['p']:.2g})"
    return f"{text}: {sign}{_amount(item['gain'], task.metric_name)} of the validation split{p}."


def _always_met(group: SweepGroup) -> list[str]:
    if len({group.points[p]["rate"] for p in group.places}) > 1:
        return []
    met = [
        p
        for p in group.places
        if group.points[p]["limit"] and (group.points[p]["clipped"]["mean"] or 0.0) >= ALWAYS
    ]
    if not met:
        return []
    names = _names(group, met)
    return [
        f"{names[0].upper()}{names[1:]}: met in at least {100 * ALWAYS:g} % of the steps, so the learning rate is what "
        "is being tuned (the training is AdamW's, which cancels a constant factor): try several with --rates."
    ]


def _edge(group: SweepGroup) -> list[str]:
    rates = sorted({group.points[p]["rate"] for p in group.places} - {None})
    chosen = group.points[group.chosen or 0]["rate"]
    if len(rates) < 2 or chosen not in (rates[0], rates[-1]):
        return []
    end = "lowest" if chosen == rates[0] else "highest"
    return [f"The rate of the chosen setting, {chosen:g}, is the {end} that was tried."]


def _range(group: SweepGroup, places: Sequence[int]) -> str:
    """Return ``0.1 to 10`` where the points are neighbours of an axis of limits alone, else nothing."""
    every = [group.points[p] for p in group.places]
    plain = {(point["rule"], point["bound"], point["rate"]) for point in every}
    if len(plain) > 1 or len(places) < 2:
        return ""
    order = sorted(group.places, key=lambda p: every_limit(group.points[p]))
    at = sorted(order.index(p) for p in places)
    if at != list(range(at[0], at[-1] + 1)):
        return ""
    ends = [group.points[order[k]]["limit"] for k in (at[0], at[-1])]
    first, last = ("no clip" if end is None else f"{end:g}" for end in ends)
    return f"{first} to {last}"


def every_limit(point: Mapping[str, Any]) -> float:
    """Return the limit of a point; infinity for none."""
    return float("inf") if point["limit"] is None else point["limit"]


def _names(group: SweepGroup, places: Sequence[int]) -> str:
    return _listed([setting_name(group.points[p]) for p in places])


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _MOST} others" if len(texts) > _MOST else ""
    return (
        "; ".join(texts[:_MOST]) + more
        if any("," in t for t in texts)
        else (", ".join(texts[:_MOST]) + more)
    )


def _runs(n: int) -> str:
    return "1 run" if n == 1 else f"{n} runs"


def _score(value: float, metric: str) -> str:
    return f"{100 * value:.2f} %" if is_share(metric) else f"{value:.4g}"


def _amount(value: float, metric: str) -> str:
    return f"{100 * abs(value):.2f} points" if is_share(metric) else f"{abs(value):.3g}"
