"""Warnings about the figures of an audit, one line each with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIMES = 3.0
"""Ratio to the ordinary drop from which a drop is reported."""

LEAST_CLASS_DROP, LEAST_CLASS_EXAMPLES = 0.01, 2
LEAST_NOISE_DROP = 0.02
MOST_CHURN = 0.05
LEAST_COSINE = 0.5
MOST_WITHOUT_COSINE = 0.1


def alarms(result: Mapping[str, Any]) -> list[str]:
    """Return the warnings for the figures of an audit.

    A class is named when it lost at least 1 point, more than 2 examples, and at least 3 times the average
    loss of the other classes. (Relative to the mean of all, one of two could never be named.)

    >>> alarms({"classes": [{"class": "8", "examples": 40, "before": 1.0, "after": 0.5},
    ...                     {"class": "9", "examples": 40, "before": 1.0, "after": 1.0}]})
    ['class 8 lost 50.0 points, 20 of 40 examples (the other classes lost 0.0 on average)']
    """
    return [
        *_scope(result),
        *_nonfinite(result),
        *_classes(result.get("classes") or []),
        *_noise(result),
        *_churn(result),
        *_gradients(result.get("gradient_agreement") or {}),
    ]


def _scope(result: Mapping[str, Any]) -> list[str]:
    warnings = []
    if result.get("metric", "accuracy") != "accuracy":
        warnings.append(
            f"the metric is {result['metric']}: classes and changed predictions are compared"
            " for accuracy only"
        )
    if "noise" in result and not result["noise"]:
        warnings.append(
            "the inputs are not floats, or several arrays: noise and input gradients were left out"
        )
    return warnings


def _nonfinite(result: Mapping[str, Any]) -> list[str]:
    counts = result.get("nonfinite") or [0, 0]
    return [
        f"{result[which]} has non-finite outputs for {count} examples"
        for which, count in zip(("before", "after"), counts, strict=True)
        if count
    ]


def _classes(classes: list[Mapping[str, Any]]) -> list[str]:
    drops = [label["before"] - label["after"] for label in classes]
    warnings = []
    for label, drop in zip(classes, drops, strict=True):
        others = (sum(drops) - drop) / max(len(drops) - 1, 1)
        examples = round(drop * label["examples"])
        if (
            drop >= LEAST_CLASS_DROP
            and examples > LEAST_CLASS_EXAMPLES
            and drop >= TIMES * max(others, 0.0)
        ):
            warnings.append(
                f"class {label['class']} lost {100 * drop:.1f} points, {examples} of"
                f" {label['examples']} examples (the other classes lost {_plus(100 * others):.1f} on"
                " average)"
            )
    return warnings


def _noise(result: Mapping[str, Any]) -> list[str]:
    rows = [row for row in result.get("noise") or [] if None not in row.values()]
    if result.get("metric") != "accuracy" or not rows:
        return []
    clean = result["metric_before"] - result["metric_after"]
    worst = max(rows, key=lambda row: row["before"] - row["after"])
    drop = worst["before"] - worst["after"]
    if drop < TIMES * max(clean, 0.0) or drop - clean < LEAST_NOISE_DROP:
        return []
    return [
        f"under noise of {worst['sigma']:g} standard deviations the drop is {100 * drop:.1f}"
        f" points (without noise {_plus(100 * clean):.1f})"
    ]


def _churn(result: Mapping[str, Any]) -> list[str]:
    agreement = result.get("agreement")
    if agreement is None or 1 - agreement < MOST_CHURN:
        return []
    drop = abs(result["metric_before"] - result["metric_after"])
    if 1 - agreement < TIMES * drop:
        return []
    return [
        f"{100 * (1 - agreement):.1f} % of the predictions changed, although the accuracy moved by"
        f" {100 * drop:.1f} points only"
    ]


def _gradients(agreement: Mapping[str, Any]) -> list[str]:
    if not agreement:
        return []
    warnings = []
    median, examples = agreement["median_cosine"], agreement["examples"]
    without = agreement["zero_gradients"] + agreement["nonfinite_gradients"]
    if median is not None and median < LEAST_COSINE:
        warnings.append(
            f"the input gradients differ in direction: their median cosine is {median:.2f}"
            f" over {examples - without} examples"
        )
    if without > MOST_WITHOUT_COSINE * examples:
        warnings.append(
            f"{without} of {examples} examples have no gradient cosine"
            f" ({agreement['zero_gradients']} zero, {agreement['nonfinite_gradients']} non-finite)"
        )
    return warnings


def _plus(value: float) -> float:
    # Otherwise a difference that rounds to zero would be printed as "-0.0".
    return 0.0 if abs(value) < 0.05 else value
