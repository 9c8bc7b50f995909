"""One small network, its batches and its rules, and how it is trained in plain NumPy: the reference.

Every 17th batch is a spike and one has a NaN, so that every rule has something to do and to skip.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import karikomi as kk

STEPS = 200
UNIT_AXES = {"hidden.kernel": 1, "head.kernel": 1}
CASES: dict[str, tuple[Any, Any]] = {
    "ByGlobalNorm": (kk.clip.ByGlobalNorm(0.5), None),
    "ByNorm": (kk.clip.ByNorm(0.3), None),
    "ByValue": (kk.clip.ByValue(0.05), None),
    "AGC": (kk.clip.AGC(0.05), kk.bound.MaxNorm(0.9)),
    "AutoClip": (kk.clip.AutoClip(25, window=32), kk.bound.Clamp(0.6)),
    "ZClip": (kk.clip.ZClip(2.0, warmup=10), None),
    "AdaGC": (kk.clip.AdaGC(warmup=5), None),
    "Quantile": (kk.clip.Quantile(0.6, window=16, warmup=8), None),
    "SkipSpikes": (kk.clip.SkipSpikes(3.0, warmup=8, window=32), None),
    "Chain": (kk.clip.Chain(kk.clip.ByValue(0.2), kk.clip.EMARatio(1.5)), kk.bound.UnitNorm()),
    "schedule": (kk.clip.ByGlobalNorm(kk.schedule.Linear(1.0, 0.1, steps=(0, 150))), None),
}
# Frameworks keep learning rates in float32: ones that every float can say.
LEARNING_RATE = {"sgd": 0.0625, "adam": 2.0**-8}
BETAS, EPSILON = (0.9, 0.999), 1e-7
# How near to the reference an optimizer and a dtype end.
SETTINGS = {("sgd", "float64"): 1e-8, ("adam", "float32"): 1e-3}

Weights = dict[str, np.ndarray]


def weights(dtype: str) -> Weights:
    """Return the weights that every framework begins with, kernels as (inputs, outputs)."""
    generator = np.random.default_rng(0)
    shapes = {"hidden.kernel": (6, 8), "hidden.bias": 8, "head.kernel": (8, 3), "head.bias": 3}
    return {n: generator.normal(0.0, 0.4, shape).astype(dtype) for n, shape in shapes.items()}


def batches(dtype: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return inputs and targets of every step."""
    generator = np.random.default_rng(1)
    made = []
    for step in range(STEPS):
        inputs = generator.normal(size=(16, 6))
        targets = np.sin(inputs[:, :3]) * (40.0 if step % 17 == 16 else 1.0)
        if step == 50:
            targets[3, 1] = np.nan
        made.append((inputs.astype(dtype), targets.astype(dtype)))
    return made


def gradients(own: Weights, inputs: np.ndarray, targets: np.ndarray) -> Weights:
    """Return the gradients of the mean squared error, by hand."""
    hidden = np.tanh(inputs @ own["hidden.kernel"] + own["hidden.bias"])
    found = hidden @ own["head.kernel"] + own["head.bias"]
    back = 2.0 * (found - targets) / targets.size
    inner = (back @ own["head.kernel"].T) * (1.0 - hidden**2)
    return {
        "hidden.kernel": inputs.T @ inner,
        "hidden.bias": inner.sum(0),
        "head.kernel": hidden.T @ back,
        "head.bias": back.sum(0),
    }


def train(case: str, kind: str, dtype: str) -> Weights:
    """Return the weights after all steps of plain NumPy."""
    rule, bound = CASES[case]
    own, states, step = weights(dtype), (None, None), 0
    moments = {n: (np.zeros_like(a), np.zeros_like(a)) for n, a in own.items()}
    for inputs, targets in batches(dtype):
        grads, outcome, after = kk.numpy.clip(
            gradients(own, inputs, targets), rule, states[0], weights=own, unit_axes=UNIT_AXES
        )
        states = (after, states[1])
        if outcome.action == "skipped":
            continue
        step += 1
        for name, grad in grads.items():
            own[name] = own[name] - _update(kind, grad, moments, name, step).astype(dtype)
        if bound is not None:
            axes = {} if isinstance(bound, kk.bound.Clamp) else UNIT_AXES
            own, _, kept = kk.numpy.bound(own, bound, states[1], unit_axes=axes)
            states = (after, kept)
    return own


def _update(kind: str, grad: np.ndarray, moments: dict, name: str, step: int) -> np.ndarray:
    if kind == "sgd":
        return LEARNING_RATE["sgd"] * grad
    first, second = moments[name]
    first = BETAS[0] * first + (1.0 - BETAS[0]) * grad
    second = BETAS[1] * second + (1.0 - BETAS[1]) * grad**2
    moments[name] = (first, second)
    corrected = first / (1.0 - BETAS[0] ** step)
    root = np.sqrt(second / (1.0 - BETAS[1] ** step))
    return LEARNING_RATE["adam"] * corrected / (root + EPSILON)


def assert_close(found: Weights, case: str, kind: str, dtype: str) -> None:
    expected = train(case, kind, dtype)
    for name, array in expected.items():
        assert found[name].dtype == np.dtype(dtype)
        distance = float(np.abs(found[name] - array).max())
        assert distance <= SETTINGS[kind, dtype], (name, distance)
    start = weights(dtype)
    assert any(np.abs(array - start[name]).max() > 0.05 for name, array in expected.items())
