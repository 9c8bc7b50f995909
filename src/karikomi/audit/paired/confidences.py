"""Whether a network's probabilities say how often it is right: debiased calibration error, and paired likelihoods."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

BINS = 15
LEAST = 30
REDRAWS = 1_000


def log_likelihoods(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the log probability of each target under a softmax of its outputs (n, classes), float64 (n,).

    >>> np.exp(log_likelihoods(np.log([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]))).round(3).tolist()
    [0.9, 0.2]
    """
    wide = outputs.astype(np.float64)
    peak = wide.max(axis=1, keepdims=True)
    total = peak[:, 0] + np.log(np.exp(wide - peak).sum(axis=1))
    return wide[np.arange(len(wide)), targets] - total


def confidences(outputs: np.ndarray) -> np.ndarray:
    """Return the largest probability of each example, float64 (n,)."""
    wide = outputs.astype(np.float64)
    return 1.0 / np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)


def calibration_error(
    confidence: np.ndarray, right: np.ndarray, *, bins: int = BINS, seed: int = 0
) -> dict[str, float]:
    """Return the expected calibration error, plain and debiased.

    ``ECE = sum_b n_b / n |mean confidence - share right|`` over `bins` bins with equally many examples. The plain one
    grows as n falls; debiased: ``2 ECE - mean of ECE over 1,000 redraws of the shares``, each normal with its own
    variance, and at least 0.

    >>> ready = np.linspace(0.05, 0.95, 2000)
    >>> right = np.random.default_rng(0).random(2000) < ready
    >>> error = calibration_error(ready, right)
    >>> error["ece"] > error["debiased"], error["debiased"] < 0.02
    (True, True)

    Source: Kumar, Liang and Ma 2019, Verified Uncertainty Calibration.
    """
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part) > 1]
    if not parts:
        return {"ece": float("nan"), "debiased": float("nan")}
    sizes = np.array([len(part) for part in parts])
    weights = sizes / sizes.sum()
    sure = np.array([confidence[part].mean() for part in parts])
    share = np.array([right[part].mean() for part in parts])
    plain = float(weights @ np.abs(sure - share))
    spread = np.sqrt(share * (1.0 - share) / sizes)
    drawn = share + spread * np.random.default_rng(seed).standard_normal((REDRAWS, len(parts)))
    expected = float((np.abs(sure - drawn) @ weights).mean())
    return {"ece": plain, "debiased": max(2.0 * plain - expected, 0.0)}


def compared(
    before: np.ndarray,
    after: np.ndarray,
    targets: np.ndarray,
    *,
    sources: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Return the calibration of two networks by their outputs (n, classes), and a paired test of their likelihoods.

    ``nll_p``: the probability of a rise of the mean negative log likelihood as large as this if there were none; a
    paired normal test over examples. Calibration errors have no such test: they are shown, not judged. Examples with
    non-finite outputs are left out; None with fewer than 30 others. `sources`: where several rows come from one
    example (pixels, tokens), the example of each: the test is of the sums of the examples.
    """
    finite = np.isfinite(before).all(axis=1) & np.isfinite(after).all(axis=1)
    if finite.sum() < LEAST:
        return None
    pair, targets = (before[finite], after[finite]), targets[finite]
    rows: dict[str, Any] = {"examples": int(finite.sum())}
    gains = [log_likelihoods(outputs, targets) for outputs in pair]
    for name, outputs, gain in zip(("before", "after"), pair, gains, strict=True):
        sure, right = confidences(outputs), outputs.argmax(axis=1) == targets
        error = calibration_error(sure, right, seed=seed)
        rows |= {f"ece_{name}": error["debiased"], f"ece_plain_{name}": error["ece"]}
        rows |= {f"nll_{name}": float(-gain.mean()), f"confidence_{name}": float(sure.mean())}
    worse = gains[0] - gains[1]
    if sources is not None:
        _, places = np.unique(sources[finite], return_inverse=True)
        worse = np.bincount(places, weights=worse)
    error = worse.std(ddof=1) / np.sqrt(len(worse)) if len(worse) > 1 else 0.0
    p = float(special.ndtr(-worse.mean() / error)) if error > 0 else 0.5
    return {**rows, "nll_p": p}
