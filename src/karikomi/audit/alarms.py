"""Warnings about the figures of an audit, one line each with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIMES = 3.0
"""Ratio to the ordinary drop from which a drop is reported."""

LEAST_DROP = 0.02
LEAST_SHARE = 0.1
LEAST_FAVOUR = 0.25
LEAST_CLASS_DROP, LEAST_CLASS_EXAMPLES = 0.03, 2
LEAST_NOISE_DROP = 0.02
MOST_CHURN = 0.05
LEAST_COSINE = 0.5
MOST_WITHOUT_COSINE = 0.1
ALPHA = 0.01
"""The probability of each kind of alarm by tests, over all its classes or corruptions, where nothing is damaged."""
LEAST_CORRUPTION_DROP = 0.03
LEAST_ALIGNMENT, LEAST_FALL = 0.7, 0.15
LEAST_LAYER_DROP = 0.05
TWICE = 2.0
SURE, LEAST_CALIBRATION_RISE, LEAST_NLL_RATIO = 1e-4, 0.02, 1.5
LEAST_PLACE = 0.4
LEAST_CLASS_COSINE_FALL = 0.2
LEAST_ATTACK_DROP = 0.1


def alarms(result: Mapping[str, Any]) -> list[str]:
    """Return the warnings for the figures of an audit.

    A class is named when it lost at least 3 points, more than 2 examples, and at least 3 times the average or the
    median loss of the other classes. (Relative to the mean of all, one of two could never be named.)

    >>> alarms({"classes": [{"class": "8", "examples": 40, "before": 1.0, "after": 0.5},
    ...                     {"class": "9", "examples": 40, "before": 1.0, "after": 1.0}]})
    ['class 8 lost 50.0 points, 20 of 40 examples (the other classes lost 0.0 on average)']
    """
    return [
        *_nonfinite(result),
        *_drop(result),
        *_classes(result.get("classes") or []),
        *_noise(result),
        *_churn(result),
        *_gradients(result.get("gradient_agreement") or {}),
        *_slices(result),
        *_corruptions(result),
        *_layers(result),
        *_calibration(result.get("calibration") or {}),
        *_explanation(result.get("explanation") or {}),
        *_attack(result.get("attack") or {}),
    ]


def _nonfinite(result: Mapping[str, Any]) -> list[str]:
    counts = result.get("nonfinite") or [0, 0]
    return [
        f"{result[which]} has non-finite outputs for {count} examples"
        for which, count in zip(("before", "after"), counts, strict=True)
        if count
    ]


def _drop(result: Mapping[str, Any]) -> list[str]:
    """Name a drop that is large for certain: all of the interval of an accuracy lies beyond 2 points, that of any other
    metric beyond 0, and the drop is a tenth of the metric before.
    """
    found = result.get("outcomes") or {}
    if not found:
        return _other_drop(result)
    low, high = found.get("drop_interval") or (0.0, 0.0)
    if low <= LEAST_DROP:
        return []
    return [
        f"the accuracy drops by {100 * found['drop']:.1f} points (95 %: {100 * low:.1f} to"
        f" {100 * high:.1f}), {100 * found['negative_flips']:.1f} % of the examples were lost"
    ]


def _other_drop(result: Mapping[str, Any]) -> list[str]:
    interval, before, drop = (result.get(key) for key in ("drop_interval", "metric_before", "drop"))
    if not interval or before is None or drop is None or interval[0] <= 0.0:
        return []
    if drop < LEAST_SHARE * abs(before):
        return []
    return [
        f"the {result.get('metric')} gets worse by {drop:.4g} (95 %: {interval[0]:.4g} to {interval[1]:.4g}):"
        f" {before:.4g} -> {result['metric_after']:.4g}"
    ]


def _classes(classes: list[Mapping[str, Any]]) -> list[str]:
    drops = [label["before"] - label["after"] for label in classes]
    warnings = []
    total = sum(label["examples"] for label in classes)
    for place, (label, drop) in enumerate(zip(classes, drops, strict=True)):
        others = sorted(drops[:place] + drops[place + 1 :])
        mean = sum(others) / max(len(others), 1)
        # Of two classes that changed places among three, one would hide the other in a mean.
        usual = min(mean, others[(len(others) - 1) // 2]) if others else 0.0
        examples = round(drop * label["examples"])
        if (
            drop >= LEAST_CLASS_DROP
            and examples > LEAST_CLASS_EXAMPLES
            and drop >= TIMES * max(usual, 0.0)
            and label.get("p", 0.0) <= ALPHA
        ):
            warnings.append(
                f"class {label['class']} lost {100 * drop:.1f} points, {examples} of"
                f" {label['examples']} examples{_became(label)} (the other classes lost"
                f" {_plus(100 * mean):.1f} on average)"
            )
    return warnings or _favoured(classes, total)


def _became(label: Mapping[str, Any]) -> str:
    count = label.get("became_examples", 0)
    most = count > LEAST_CLASS_EXAMPLES and 2 * count >= label.get("lost", 0)
    # -1 stands for outputs that are not a number.
    became = "no class" if label.get("became") == "-1" else f"class {label.get('became')}"
    return f", {count} of them to {became}" if most else ""


def _favoured(classes: list[Mapping[str, Any]], total: int) -> list[str]:
    """Name the class that is predicted much more often than before, where no class alone pays for it."""
    known = [label for label in classes if label.get("predicted_p", 1.0) <= ALPHA]
    found = []
    for label in known:
        before, after = label["predicted"]
        # By its own size too: of very many classes each is rare.
        most = max(before, label["examples"])
        if after - before >= max(LEAST_DROP * total, LEAST_FAVOUR * most):
            found.append(
                f"class {label['class']} is predicted for {after} of {total} examples, before for {before}"
                f" ({label['examples']} are of it)"
            )
    return found


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


def _slices(result: Mapping[str, Any]) -> list[str]:
    warnings, accuracy = [], result.get("metric") == "accuracy"
    for row in result.get("slices") or []:
        if row["before"] is None:
            continue
        drop, others = row["drop"], result["examples"] - row["examples"]
        total = (result.get("drop") or 0.0) * result["examples"]
        # What all other examples lose as well names no slice.
        elsewhere = (total - drop * row["examples"]) / others if others > 0 else 0.0
        least = LEAST_CLASS_DROP if accuracy else LEAST_SHARE * abs(row["before"])
        if row["p"] <= ALPHA and drop >= max(least, TWICE * elsewhere):
            counts = f"{row['lost']} of {row['examples']} examples"
            said = (
                f"lost {100 * drop:.1f} points: {counts}, {row['gained']} gained"
                if accuracy
                else f"got worse by {drop:.4g} ({result.get('metric')}): {counts}, {row['gained']} got better"
            )
            warnings.append(f"slice {row['slice']} {said} (p = {row['p']:.2g})")
    return warnings


def _corruptions(result: Mapping[str, Any]) -> list[str]:
    clean = result.get("drop")
    found = result.get("corruptions") or {}
    if clean is None:
        return []
    warnings = []
    for row in found.get("rows", []):
        drop = row["drop"]
        if drop is None or row["p"] is None or row["p"] > ALPHA:
            continue
        # Of an accuracy in points; of any other metric, more than the clean drop by its own size.
        least = LEAST_CORRUPTION_DROP if result.get("metric") == "accuracy" else abs(clean)
        if drop - clean > least:
            worse = "drops by" if result.get("goal", "max") == "max" else "gets worse by"
            warnings.append(
                f"under {row['corruption']} the {result.get('metric')} {worse} {drop:.4g} on average"
                f" (clean {clean:.4g}, p = {row['p']:.2g})"
            )
    return warnings


def _layers(result: Mapping[str, Any]) -> list[str]:
    """Name the layer that costs most alone, or the first whose outputs are unlike the original's."""
    rows, drop = result.get("layers") or [], result.get("drop")
    known = [row for row in rows if row["alone"] is not None]
    if drop is not None and len(known) == len(rows) > 1:
        worst = max(known, key=lambda row: row["alone"])
        others = max(row["alone"] for row in known if row is not worst)
        least = LEAST_LAYER_DROP if result.get("metric") == "accuracy" else abs(drop) / TWICE
        if worst["alone"] > max(least, drop / TWICE, TIMES * others) and _is_certain(result):
            return [
                f"layer {worst['layer']} alone costs {worst['alone']:.4g} of the {result.get('metric')}"
                f" (any other at most {max(others, 0.0):.4g})"
            ]
        return []
    highest = 1.0
    for row in rows:
        value = row["cka"]
        if value is None:
            continue
        if value < LEAST_ALIGNMENT and value < highest - LEAST_FALL:
            return [
                f"layer {row['layer']} is the first whose outputs are unlike those before: alignment"
                f" {value:.2f} (the layers up to it {highest:.2f} and more)"
            ]
        highest = min(highest, value)
    return []


def _is_certain(result: Mapping[str, Any]) -> bool:
    """Return whether anything was lost beyond chance: without it no layer is to blame."""
    found = result.get("outcomes") or result
    interval = found.get("drop_interval")
    return interval is None or interval[0] > 0.0


def _calibration(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    rise = found["ece_after"] - found["ece_before"]
    longer = found["nll_after"] / max(found["nll_before"], 1e-9)
    if found["nll_p"] > SURE or (rise < LEAST_CALIBRATION_RISE and longer < LEAST_NLL_RATIO):
        return []
    return [
        f"the probabilities say less how often the network is right: calibration error"
        f" {100 * found['ece_before']:.1f} -> {100 * found['ece_after']:.1f} points, negative log"
        f" likelihood {found['nll_before']:.3f} -> {found['nll_after']:.3f}"
    ]


def _explanation(found: Mapping[str, Any]) -> list[str]:
    warnings = []
    cosine = (found.get("measures") or {}).get("cosine") or {}
    if cosine.get("place") is not None and cosine["place"] < LEAST_PLACE:
        warnings.append(
            f"the networks look at different inputs: attributions agree by {cosine['networks']:.2f}"
            f" (unrelated networks {cosine['floor']:.2f}, the method itself {cosine['ceiling']:.2f})"
        )
    for row in found.get("classes") or []:
        if row["p"] <= ALPHA and row["others"] - row["cosine"] >= LEAST_CLASS_COSINE_FALL:
            warnings.append(
                f"for class {row['class']} the networks look at different inputs: attributions agree by"
                f" {row['cosine']:.2f} (other classes {row['others']:.2f}, p = {row['p']:.2g})"
            )
    return warnings


def _attack(found: Mapping[str, Any]) -> list[str]:
    if not found or not 0 <= found["clean_before"] <= 1:
        return []
    more = (found["before"] - found["worst"]) - (found["clean_before"] - found["clean_after"])
    if more < LEAST_ATTACK_DROP:
        return []
    return [
        f"attacks within {found['epsilon']:.4f} of the range cost {100 * more:.1f} points more than"
        f" before ({100 * found['before']:.1f} % -> {100 * found['worst']:.1f} % right under attack)"
    ]


def _plus(value: float) -> float:
    # Otherwise a difference that rounds to zero would be printed as "-0.0".
    return 0.0 if abs(value) < 0.05 else value
