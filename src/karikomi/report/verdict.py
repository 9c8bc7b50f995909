"""Sentences on a compress result, for page and terminal: its budget, its verification, its choices."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from karikomi.report.page import Tile
from karikomi.report.result_checks import named, table
from karikomi.report.wording import amount, change, count, number, percent, score, size

# Differences of accuracies such as 0.975 - 0.97 exceed the budget 0.005 by float rounding alone.
_ROUNDING = 1e-9


def difference(after: Any, before: Any) -> float | None:
    """Return ``after - before``, or None if one of them is missing.

    >>> difference(0.75, 1.0), difference(None, 1.0)
    (-0.25, None)
    """
    last, first = number(after), number(before)
    return None if last is None or first is None else last - first


def before_after(row: Mapping[str, Any], metric: str, of: str = "") -> tuple[str, str, str]:
    """Return text for ``row[of + "before"]``, ``row[of + "after"]`` and the change from one to the other."""
    before, after = row.get(f"{of}before"), row.get(f"{of}after")
    return score(before, metric), score(after, metric), change(difference(after, before), metric)


def metric_tile(result: Mapping[str, Any], when: str) -> Tile:
    """Return the tile of the metric after compression, and before it."""
    metric = named(result["metric"])
    before, after, moved = before_after(result, metric, "metric_")
    return Tile(f"{metric} {when}", after, f"before {before}: {moved}")


def budget_held(result: Mapping[str, Any]) -> bool | None:
    """Return whether the metric got worse by at most ``max_drop`` on validation; None if unknown.

    >>> error = {"goal": "min", "validation_before": 0.41, "validation_after": 0.59, "max_drop": 0.01}
    >>> budget_held(error), budget_held(error | {"goal": "max"})
    (False, True)
    """
    worse = difference(result.get("validation_before"), result.get("validation_after"))
    allowed = number(result.get("max_drop"))
    if worse is None or allowed is None:
        return None
    return (-worse if lower_is_better(result) else worse) <= allowed + _ROUNDING


def lower_is_better(result: Mapping[str, Any]) -> bool:
    """Return whether the metric of a result is an error: its goal is ``"min"``."""
    return result.get("goal") == "min"


def budget_sentence(result: Mapping[str, Any]) -> str:
    """Return a sentence with the budget, the validation split's figures, and the role of the test split."""
    metric = named(result["metric"])
    held = {True: "was held", False: "was NOT held", None: "cannot be judged (values are missing)"}
    before, after, moved = before_after(result, metric, "validation_")
    return (
        f"The budget of {amount(result.get('max_drop'), metric)} {held[budget_held(result)]} on the"
        f" validation split: {before} before, {after} after ({moved}). Every choice was made on that split;"
        " the test split was only measured."
    )


def verified_sentence(result: Mapping[str, Any]) -> str:
    """Return whether the figures are those of the file itself."""
    if result.get("verified") is True:
        return "the file was loaded again and gives the figures shown here"
    return "the file was not shown to give the figures shown here: do not rely on it"


def grain_sentence(result: Mapping[str, Any]) -> str:
    """Return the weight of one test example, or prediction: smaller differences are not significant."""
    examples = number(table(result.get("examples")).get("test"))
    predictions = number(result.get("predictions")) or examples
    if not examples or not predictions or "accuracy" not in named(result["metric"]).lower():
        return ""
    return (
        f"One of the {count(predictions)} test {'examples' if predictions == examples else 'predictions'}"
        f" is worth {100 / predictions:.2f} points of"
        " accuracy."
    )


def candidate_sentences(result: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each stage the chosen candidate, its distance to the floor, and those below it."""
    floor = _floor(result)
    metric, sentences = named(result["metric"]), list[str]()
    for stage in dict.fromkeys(named(candidate.get("stage")) for candidate in tried):
        of_stage = [candidate for candidate in tried if named(candidate.get("stage")) == stage]
        chosen = [item for item in of_stage if item.get("chosen") is True]
        failed = [item for item in of_stage if item.get("passed") is False]
        clauses = [_choice(item, floor, result) for item in chosen] or ["nothing was chosen"]
        if failed:
            below = ", ".join(
                f"{named(failure.get('what'))} ({score(failure.get('validation'), metric)})"
                for failure in failed[:4]
            )
            more = f" and {len(failed) - 4} more" if len(failed) > 4 else ""
            clauses.append(f"{_beyond(result)}: {below}{more}")
        sentences.append(f"{stage}: {'; '.join(clauses)}.")
    return sentences


def floor_sentence(result: Mapping[str, Any]) -> str:
    """Return a sentence with the worst validation value of an accepted candidate."""
    metric, floor, lower = named(result["metric"]), _floor(result), lower_is_better(result)
    if floor is None:
        return f"The {_end(result)} of the search is not known: a value is missing."
    return (
        f"A candidate passes when its validation {metric} is at {'most' if lower else 'least'}"
        f" {score(floor, metric)}:"
        f" {score(result.get('validation_before'), metric)} before, {'plus' if lower else 'less'} the budget of"
        f" {amount(result.get('max_drop'), metric)}."
    )


def clip_sentence(result: Mapping[str, Any]) -> str:
    """Return a sentence with the numbers of clipped and skipped steps."""
    clip = table(result.get("clip"))
    if not clip:
        return ""
    steps, clipped = number(clip.get("steps")), number(clip.get("clipped"))
    share = f" ({percent(clipped / steps)})" if steps and clipped is not None else ""
    return (
        f"{named(clip.get('rule'))} clipped {count(clipped)} of {count(steps)} steps{share} and"
        f" skipped {count(clip.get('skipped'))}."
    )


def load_lines(result: Mapping[str, Any]) -> str:
    """Return the lines of Python that load the file."""
    return f"import karikomi as kk\n\narrays = kk.load({named(result.get('file'), 'model.karikomi')!r})"


def rerun_line(result: Mapping[str, Any]) -> str:
    """Return the command that reproduces the file, quoted for a shell.

    >>> rerun_line({"task": "digits", "max_drop": 0.005, "seed": 0, "file": "runs/x/model.karikomi"})
    'karikomi compress digits --max-drop 0.005 --seed 0 --out runs/x'
    """
    words = ["karikomi", "compress", named(result.get("task"))]
    for option in ("data", "config", "from", "preset"):
        words += [] if result.get(option) is None else [f"--{option}", str(result[option])]
    for name, limit in table(result.get("budgets")).items():
        option = f"--{str(name).replace('_', '-')}"
        words += [] if name == "max_drop" or number(limit) is None else [option, str(limit)]
    words += ["--no-training"] if result.get("training") is False else []
    for option, value in (("--max-drop", result.get("max_drop")), ("--seed", result.get("seed"))):
        words += [] if number(value) is None else [option, str(value)]
    if result.get("file") is not None:
        words += ["--out", PurePath(str(result["file"])).parent.as_posix()]
    return shlex.join(words)


def _floor(result: Mapping[str, Any]) -> float | None:
    budget = number(result.get("max_drop"))
    allowed = -budget if budget is not None and lower_is_better(result) else budget
    return difference(result.get("validation_before"), allowed)


def _end(result: Mapping[str, Any]) -> str:
    return "ceiling" if lower_is_better(result) else "floor"


def _beyond(result: Mapping[str, Any]) -> str:
    return "above the ceiling" if lower_is_better(result) else "below the floor"


def _choice(item: Mapping[str, Any], floor: float | None, result: Mapping[str, Any]) -> str:
    metric, end = named(result["metric"]), _end(result)
    what, value = named(item.get("what")), item.get("validation")
    what += "" if item.get("bytes") is None else f" ({size(item.get('bytes'))})"
    distance = difference(value, floor)
    if distance is None:
        return f"{what} was chosen"
    if abs(distance) <= _ROUNDING:
        return f"{what} was chosen: {score(value, metric)} is the {end} itself"
    where = "above" if distance > 0 else "below"
    return (
        f"{what} was chosen: {score(value, metric)} is {amount(distance, metric)} {where} the {end}"
    )
