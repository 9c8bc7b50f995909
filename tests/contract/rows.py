"""THE list of rules under contract: a new clip joins all laws with one `Row` here, nothing else.

A new bound joins them with one in `bound_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

import karikomi as kk
from contract.bound_rows import BOUND_ROWS
from contract.probe import TensorEMA
from contract.row import Arrays, Axes, Reference, Row, clamped, joint, largest, norm, shrunk, units


def _alone(arrays: Arrays, axes: Axes) -> Arrays:
    return arrays


def _rms(array: np.ndarray) -> float:
    return norm(array) / math.sqrt(max(array.size, 1))


def _of_unit_weights(arrays: Arrays, axes: Axes) -> list[tuple[np.ndarray, float]]:
    """Return every unit, a tensor without units being one, and the norm of its weights if all are 1."""
    pairs = zip(arrays, axes, strict=True)
    parts = [u for a, axis in pairs for u in ([a] if axis is None else units(a, axis))]
    return [(part, math.sqrt(part.size)) for part in parts]


def _agc(limit: float) -> Reference:
    def reference(arrays: Arrays, axes: Axes) -> Arrays:
        changed = [np.array(array, dtype=np.float64) for array in arrays]
        for unit, weight in _of_unit_weights(changed, axes):
            unit[...] = shrunk(unit, norm(unit), limit * max(weight, 1e-3))
        return changed

    return reference


def _joint_to(limit: Callable[[float], float]) -> Reference:
    """Return the reference of a rule whose limit follows from the joint norm."""

    def reference(arrays: Arrays, axes: Axes) -> Arrays:
        size = joint(arrays)
        return [shrunk(array, size, limit(size)) for array in arrays]

    return reference


def _to_joint(arrays: Arrays, limit: float = 1.0) -> Arrays:
    size = joint(arrays)
    return [shrunk(array, size, limit) for array in arrays]


def _but_scalars(arrays: Arrays, change: Callable[[Arrays], Arrays]) -> Arrays:
    changed = iter(change([array for array in arrays if array.ndim]))
    return [next(changed) if array.ndim else array for array in arrays]


# Median and mean 1, standard deviation 0.5.
USUAL = (0.5, 1.5, 1.0 - 0.5 * math.sqrt(2.0), 1.0, 1.0 + 0.5 * math.sqrt(2.0), 1.0)

ROWS = [
    Row(
        rule=kk.clip.ByValue(1.0),
        reference=lambda arrays, axes: clamped(arrays, 1.0),
        bound=lambda arrays, axes: largest(arrays) / 1.0,
        idempotent=True,
    ),
    Row(
        rule=kk.clip.ByNorm(1.0),
        reference=lambda arrays, axes: [shrunk(array, norm(array), 1.0) for array in arrays],
        bound=lambda arrays, axes: max(norm(array) for array in arrays) / 1.0,
    ),
    Row(
        rule=kk.clip.ByGlobalNorm(1.0),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
    ),
    Row(
        rule=kk.clip.AGC(0.5),
        unitless=True,
        reference=_agc(0.5),
        bound=lambda arrays, axes: max(
            norm(unit) / (0.5 * max(weight, 1e-3))
            for unit, weight in _of_unit_weights(arrays, axes)
        ),
    ),
    Row(
        rule=kk.clip.AutoClip(50.0),
        reference=_joint_to(lambda size: float(np.median([*USUAL, *([size] if size else [])]))),
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        taught=USUAL,
    ),
    Row(
        rule=kk.clip.ZClip(1.0, warmup=6),
        reference=_joint_to(lambda size: 1.0 + 0.25 / (size - 1.0) if size > 1.5 else size),
        bound=lambda arrays, axes: joint(arrays) / 1.5,
        taught=USUAL,
    ),
    Row(
        rule=kk.clip.AdaGC(),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
    ),
    Row(
        rule=kk.clip.Quantile(0.5, window=6, warmup=6),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        taught=USUAL,
    ),
    Row(
        rule=kk.clip.AdaptiveQuantile(1.0),
        in_norms=("start", "least", "most"),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
    ),
    Row(
        rule=kk.clip.Recommended(least=1.0, most=1.0, warmup=6),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        taught=(1.0,) * 6,
    ),
    Row(
        rule=kk.clip.EMARatio(2.0, beta=0.5),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        taught=(0.5,) * 4,
    ),
    # In units of sqrt(4) an entry of 1 is 0.5, the root of the threshold.
    Row(
        rule=kk.clip.SPAM(0.25, warmup=0),
        unitless=True,
        reference=lambda arrays, axes: clamped(arrays, 1.0),
        bound=lambda arrays, axes: largest(arrays) / 1.0,
        idempotent=True,
        moments=4.0,
    ),
    Row(
        rule=kk.clip.BlockRMS(1.0),
        reference=lambda arrays, axes: [shrunk(array, _rms(array), 1.0) for array in arrays],
        bound=lambda arrays, axes: max(_rms(array) for array in arrays) / 1.0,
    ),
    Row(rule=kk.clip.StableAdamW(1.0), reference=_alone, unitless=True),
    Row(
        rule=kk.clip.Smooth(1.0),
        reference=lambda arrays, axes: [array / (joint(arrays) + 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        always=True,
    ),
    Row(
        rule=kk.clip.Normalize(1.0),
        in_norms=("limit", "gamma"),
        reference=lambda arrays, axes: [array / (joint(arrays) + 0.01) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        always=True,
    ),
    # It scales nothing; what it skips is tested by itself.
    Row(rule=kk.clip.SkipSpikes(window=8, warmup=6), reference=_alone, taught=USUAL),
    Row(rule=kk.clip.SkipLarge(1.0), reference=_alone),
    *BOUND_ROWS,
]
PROBES = [
    Row(
        rule=TensorEMA(1.0),
        reference=lambda arrays, axes: [shrunk(array, norm(array), 1.0) for array in arrays],
        bound=lambda arrays, axes: max(norm(array) for array in arrays) / 1.0,
    )
]
# The rules that also have a scope of their own per tensor.
VARIANTS = [
    Row(
        rule=kk.clip.Smooth(1.0, per="tensor"),
        reference=lambda arrays, axes: [array / (norm(array) + 1.0) for array in arrays],
        bound=lambda arrays, axes: max(norm(array) for array in arrays) / 1.0,
        always=True,
    ),
    Row(
        rule=kk.clip.Normalize(1.0, per="tensor"),
        reference=lambda arrays, axes: [array / (norm(array) + 0.01) for array in arrays],
        bound=lambda arrays, axes: max(norm(array) for array in arrays) / 1.0,
        always=True,
    ),
]
# Rules that learn, with so short a memory that a few steps lead through all of their branches.
EAGER = [
    Row(rule=rule, reference=_alone)
    for rule in (
        kk.clip.AutoClip(30.0, window=3),
        kk.clip.AutoClip(100.0, window=1),
        kk.clip.ZClip(0.5, alpha=0.5, warmup=2, clip_factor=0.9),
        kk.clip.ZClip(0.5, alpha=0.5, warmup=2, to="mean", skip_update_on_spike=True),
        kk.clip.AdaGC(1.5, beta=0.5, limit=4.0, warmup=2),
        kk.clip.Quantile(0.3, window=3, warmup=1),
        kk.clip.Recommended(2.0, least=1.5, most=2.0, warmup=2, every=3),
        kk.clip.EMARatio(1.5, beta=0.5, per="tensor"),
        kk.clip.EMARatio(1.5, beta=0.5, per="tensor", learn="raw"),
        kk.clip.SPAM(4.0, warmup=2),
        kk.clip.SkipSpikes(1.0, window=3, warmup=2, patience=1),
    )
]
# Rules made of rules, which decide nothing by themselves; their own laws are in tests/unit/test_compose.py.
COMPOSED = [
    Row(
        rule=kk.clip.Chain(kk.clip.ByNorm(1.0), kk.clip.ByGlobalNorm(1.5)),
        reference=lambda arrays, axes: _to_joint([shrunk(a, norm(a), 1.0) for a in arrays], 1.5),
        bound=lambda arrays, axes: max(joint(arrays) / 1.5, *map(norm, arrays)),
    ),
    # Leaves alone what is a single number, and so the gain by itself.
    Row(
        rule=kk.clip.Groups(
            [(lambda name: name == "gain", None)], default=kk.clip.ByGlobalNorm(1.0)
        ),
        reference=lambda arrays, axes: _but_scalars(arrays, _to_joint),
        bound=lambda arrays, axes: joint([a for a in arrays if a.ndim]) / 1.0,
    ),
]
# Why the laws about what a framework does to tensors leave a rule out.
_NEAREST = (
    "measured and applied as Box is; its nearest points are in tests/unit/test_projections.py"
)
ELSEWHERE = {
    **dict.fromkeys(("L1Ball", "Simplex", "HalfSpace"), _NEAREST),
    **dict.fromkeys(
        ("SkipSpikes", "SkipLarge"),
        "scales nothing; what it skips is in tests/parity and tests/unit",
    ),
    "StableAdamW": "judges gradients but scales the update that an Adam makes of them, while these laws "
    "have one set of tensors; tests/unit/test_attach_ways.py holds it to the paper's algorithm",
}

DECIDING = [*ROWS, *VARIANTS, *PROBES]
EVERY = [row for row in [*DECIDING, *COMPOSED] if str(row) not in ELSEWHERE]
CLIPS = [row for row in EVERY if row.kind == "clip"]
LIMITED = [row for row in ROWS if row in EVERY and row.limited]
