"""Gradients that are too small: vanishing with depth, or near the epsilon of the optimizer."""

from __future__ import annotations

import math

import numpy as np

from karikomi.advising.causes.finding import Finding
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals

VANISHED = 1e-2
"""The gradient per entry of the first layers over that of the last ones, below which it has vanished."""

EPS_TIMES = 10.0


def vanishing(run: Recorded, signals: Signals) -> Finding | None:
    """Gradients of the first layers are under a hundredth of those of the last ones, and the loss hardly falls."""
    sizes = run.facts.get("sizes")
    if not run.measured("gradients") or not isinstance(sizes, dict) or len(run) < 50:
        return None
    places = [p for p, name in enumerate(run.names) if _is_layer(name, sizes)]
    if len(places) < 3:
        return None
    logs = signals.coarse["gradients"][:, places]
    logs = logs - np.log([float(sizes[run.names[place]]) for place in places]) / run.order
    tail = logs[len(logs) // 4 :]
    third = max(len(places) // 3, 1)
    with np.errstate(invalid="ignore"):
        early, late = (np.nanmedian(tail[:, some]) for some in (slice(third), slice(-third, None)))
    ratio = float(early - late)
    if not ratio < math.log(VANISHED):
        return None
    usual = np.nanmedian(tail, axis=0)
    falls = float(np.mean(np.diff(usual) > 0))
    improved = _improvement(signals) if run.has("loss") else 0.0
    if falls < 0.5 or improved > 0.5:
        return None
    least = places[int(np.nanargmin(usual))]
    return Finding(
        "vanishing",
        0,
        f"Gradients of the first layers are {math.exp(ratio):.2g} times those of the last ones per entry, throughout "
        "the run: they vanish on the way, and the first layers do not train.",
        "Use residual connections, another activation, normalisation or a scaled initialisation; a "
        "limit only makes gradients smaller. A bound that keeps weights at unit scale may help "
        "(kk.bound.UnitNorm, kk.bound.SpectralCap): `karikomi sweep TASK --bound 'UnitNorm(1.0)'` trains with and "
        "without it and says whether it helps.",
        tensors=(run.names[least],),
        numbers={"first_over_last": math.exp(ratio), "layers_in_order": falls},
    )


def near_epsilon(run: Recorded, signals: Signals) -> Finding | None:
    """Gradients per entry are below ten times Adam's epsilon, so that it hardly moves the weights."""
    eps, sizes = run.facts.get("eps"), run.facts.get("sizes")
    if run.adaptive is not True or not isinstance(eps, int | float) or not isinstance(sizes, dict):
        return None
    if not run.measured("gradients"):
        return None
    counts = np.array([float(sizes.get(name) or 1) for name in run.names])
    factor = run.columns["factor"]
    clip = math.log(max(float(np.nanmedian(factor)), 1e-30)) if run.has("factor") else 0.0
    tail = signals.coarse["gradients"][-max(len(signals.coarse["gradients"]) // 4, 1) :]
    with np.errstate(invalid="ignore"):
        size = np.nanmedian(tail, axis=0) - np.log(counts) / run.order + clip
    small = size < math.log(EPS_TIMES * float(eps))
    if float(np.mean(small)) < 0.5:
        return None
    place = int(np.nanargmin(size))
    return Finding(
        "near_epsilon",
        int(0.75 * len(run)),
        f"After the clip, gradients per entry are about {math.exp(float(np.nanmedian(size))):.2g}, and Adam's epsilon "
        f"is {eps:g}: it divides by epsilon and hardly moves {np.mean(small):.0%} of the tensors.",
        "Lower eps (1e-15), or raise the limit: under Adam a small limit makes nothing but eps larger.",
        tensors=(run.names[place],),
        numbers={"gradient_per_entry": math.exp(float(np.nanmedian(size))), "eps": float(eps)},
        clip_helps=True,
    )


def _is_layer(name: str, sizes: dict[str, int]) -> bool:
    """Return whether a tensor is a matrix of a layer, as far as name and size tell."""
    last = name.split(".")[-1].lower()
    norm = any(word in name.lower() for word in ("norm", ".bn", "ln_", "embed"))
    return not last.startswith(("bias", "beta", "gamma")) and not norm and sizes.get(name, 0) > 16


def _improvement(signals: Signals) -> float:
    """Return the share of the loss that was gained: 0 for a loss that stands."""
    quarter = max(len(signals.loss) // 8, 1)
    first, last = np.median(signals.loss[:quarter]), np.median(signals.loss[-quarter:])
    return 1.0 - math.exp(min(float(last - first), 0.0))
