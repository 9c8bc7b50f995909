"""Quantize the weights of a model to a rate in bits per number, reached by one factor of all steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from keras import layers

from karikomi.keras.facts.layer_calls import steady
from karikomi.keras.layers import codes
from karikomi.keras.layers.unit_axes import Weight
from karikomi.keras.quantization import compensated
from karikomi.keras.quantization.curvature import squared_gradients
from karikomi.keras.reconstruction.calibration import Regressions
from karikomi.quantize import Coded
from karikomi.quantize.code_lengths import coded_bits
from karikomi.quantize.step_search import StepSearch, narrowed, nearest
from karikomi.reconstruction.gptq import Rounder, spread_of

PASSES, NEAR = 3, 0.02
"""A rate is met within two hundredths, or after so many passes over all layers."""


def round_at_rate_(
    model: Any,
    weights: Mapping[str, Weight],
    vectors: Mapping[str, Coded],
    rate: float,
    method: Rounder | None,
    data: Iterable[Any] | None,
    *,
    seed: int,
    progress: bool,
    where: str,
) -> tuple[dict[str, Coded], dict[str, str]]:
    """Round variables in place to grids of one step each; returns as `compensated.round_`.

    `vectors`: the codes of what else there is, which count. `method`: what compensates errors; without one the
    codes are the nearest. Steps are ``factor / sqrt(curvature)``, with data; without it they are the same part of
    each weight's deviation.
    """
    dense = {n: codes.floats_of(i.variable) for n, i in weights.items()}
    curvature: dict[str, np.ndarray] = {}
    if data is not None:
        options: dict[str, Any] = {"seed": seed, "progress": progress, "where": where}
        with steady(model):
            curvature = squared_gradients(model, weights, data, **options)
    spreads = (
        {} if method is None or data is None else _spreads(model, weights, data, method, where)
    )
    search = StepSearch(
        dense.items(),
        curvature,
        spreads,
        [n for n, i in weights.items() if type(i.layer) is layers.Embedding],
        fixed=sum(coded_bits(item.codes) for item in vectors.values()),
        numbers=sum(item.codes.size for item in vectors.values())
        + sum(a.size for a in dense.values()),
        seed=seed,
    )
    factor, notes = search.factor_at(rate, where=where), dict[str, str]()
    found: dict[str, Coded] = {}
    grids = search.grids(factor)
    for number in range(PASSES):
        if number:
            factor *= search.correction(factor, search.rate_of(found) - rate)
            grids = search.grids(factor)
            for name, item in weights.items():
                item.variable.assign(dense[name])
        found = {name: nearest(array, grids[name]) for name, array in dense.items()}
        if method is None or data is None:
            for name, item in weights.items():
                codes.assign(item.variable, found[name])
            break
        found, notes = compensated.round_(
            model,
            weights,
            found,
            method,
            data,
            curvature=curvature,
            progress=progress,
            where=where,
        )
        if abs(search.rate_of(found) - rate) <= NEAR * rate:
            break
    return {name: narrowed(item) for name, item in found.items()}, notes


def _spreads(
    model: Any, weights: Mapping[str, Weight], data: Iterable[Any], method: Rounder, where: str
) -> dict[str, float]:
    """Return path -> the part of the rounding errors' energy that compensation leaves, in (0, 1]."""
    with steady(model):
        sums = Regressions(model, weights, data, where=f"{where}: data")
        return {
            name: spread_of(sums.problem(name).gram, method.damping, where=f"{where}: {name}")
            for name in sums.order
        }
