"""The table of schedules of other libraries in the docs, each row checked step by step against their formulas.

TF-MOT and JaxPruner do not run with today's frameworks: what their schedules compute is written here in plain Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from torch.ao.pruning import CubicSL as _Cubic

import karikomi as kk
from parity.table_rows import DOCS, table_rows

TARGET = 0.8
"""The share that a distribution gave a tensor: JaxPruner's schedules scale it."""


@dataclass
class Peer:
    """When masks are made, and for which sparsity; `shift`: our step minus theirs."""

    due: Callable[[int], bool]
    sparsity: Callable[[int], float]
    shift: int = 0


def turns(step: int, begin: int, end: int, frequency: int) -> bool:
    return step >= begin and (step <= end or end < 0) and (step - begin) % frequency == 0


def PolynomialDecay(  # noqa: N802
    initial: float, final: float, begin: int, end: int, power: float = 3, frequency: int = 100
) -> Peer:
    def sparsity(step: int) -> float:
        progress = min(1.0, max(0.0, (step - begin) / (end - begin)))
        return (initial - final) * (1 - progress) ** power + final

    return Peer(lambda step: turns(step, begin, end, frequency), sparsity)


def ConstantSparsity(  # noqa: N802
    target: float, begin: int, end_step: int = -1, frequency: int = 100
) -> Peer:
    return Peer(lambda step: turns(step, begin, end_step, frequency), lambda step: target)


def NoUpdateSchedule() -> Peer:  # noqa: N802
    return Peer(lambda step: False, lambda step: TARGET, shift=1)


def OneShotSchedule(target_step: int) -> Peer:  # noqa: N802
    return Peer(lambda step: step == target_step, lambda step: TARGET, shift=1)


def PeriodicSchedule(frequency: int, start: int, end: int) -> Peer:  # noqa: N802
    return Peer(
        lambda step: step % frequency == 0 and start <= step <= end, lambda step: TARGET, shift=1
    )


def PolynomialSchedule(frequency: int, start: int, end: int, power: int = 3) -> Peer:  # noqa: N802
    def sparsity(step: int) -> float:
        progress = float(np.clip(step + 1 - start, 0, end - start)) / (end - start)
        return TARGET * (1.0 - (1.0 - progress) ** power)

    return Peer(PeriodicSchedule(frequency, start, end).due, sparsity, shift=1)


def CubicSL(final: float, init_sl: float, init_t: int, delta_t: int, total_t: int) -> Peer:  # noqa: N802
    def sparsity(step: int) -> float:
        # Of torch, and run: `final` is the level of its sparsifier.
        return _Cubic.sparsity_compute_fn(init_sl, final, step, init_t, delta_t, total_t)

    return Peer(lambda step: init_t <= step <= init_t + delta_t * total_t, sparsity)


PEERS: dict[str, Any] = {
    made.__name__: made
    for made in (
        *(PolynomialDecay, ConstantSparsity, NoUpdateSchedule),
        *(OneShotSchedule, PeriodicSchedule, PolynomialSchedule, CubicSL),
    )
}
TABLE = [
    row.calls for row in table_rows("Schedules of other libraries", DOCS / "pruning-schedules.md")
]
# Theirs goes on forever with the same masks, or is given its masks.
ONCE = {"ConstantSparsity(0.5, 20)", "NoUpdateSchedule()"}


def test_every_schedule_of_theirs_is_there() -> None:
    assert {theirs.partition("(")[0] for theirs, _ in TABLE} == set(PEERS)


@pytest.mark.parametrize(("theirs", "ours"), TABLE)
def test_step_by_step(theirs: str, ours: str) -> None:
    peer: Peer = eval(theirs, PEERS)
    schedule = eval(ours, vars(kk.prune))
    due = [step + peer.shift for step in range(1_200) if peer.due(step)]
    if theirs in ONCE:
        due = due[:1] or [0]
    assert [step for step in range(1_200) if schedule.due(step)] == due
    for step in due:
        assert schedule.sparsity_at(step) == pytest.approx(
            peer.sparsity(step - peer.shift), abs=1e-12
        )
    assert schedule.last == due[-1]


def test_a_falling_sparsity_brings_weights_back_at_zero() -> None:
    rng = np.random.default_rng(0)
    weights, masks = {"w": rng.normal(size=100)}, None
    rule = kk.prune.Gradual(0.2, initial=0.8, steps=(0, 4), every=2, power=1)
    shares = []
    for step in range(6):
        weights, masks = kk.numpy.prune_at(weights, rule, step, masks)
        shares.append(float(1.0 - masks["w"].mean()))
        weights["w"] += 0.01 * masks["w"]
    assert shares == pytest.approx([0.8, 0.8, 0.5, 0.5, 0.2, 0.2])
    assert (weights["w"] != 0).mean() == pytest.approx(0.8)
