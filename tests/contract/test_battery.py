"""Every clip against a hard run: bad steps, stops, other scales, zeros, wrong arguments.

In NumPy, through the conduct that all frameworks share; what is measured is drawn, not computed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import numpy as np
import pytest

import karikomi as kk
from contract.deciding import judge
from contract.rows import EAGER, ROWS, VARIANTS
from depth import examples, turns
from karikomi import schedule
from karikomi.errors import InvalidArgument
from karikomi.rules import decide
from karikomi.rules.checkpoint import from_plain, to_plain
from karikomi.rules.stages import alone

STEPS = examples(300, full=1_000)
LATE = STEPS * 7 // 10
NAMES = ("a", "b", "c")
RULES = [row.rule for row in [*ROWS, *VARIANTS, *EAGER] if row.kind == "clip"]
RULES += [
    kk.clip.EMARatio(per="tensor"),
    kk.clip.SkipSpikes(3.0),
    kk.clip.AutoClip(50.0, window=64),
    kk.clip.SPAM(),
]
LEARNING = [rule for rule in RULES if rule.init(np.zeros(1), xp=np)]
ROW_OF = {type(row.rule): row for row in ROWS}


@functools.cache
def series(seed: int = 0, steps: int = STEPS) -> np.ndarray:
    """Return norms of three tensors with drift, heavy tails and spikes."""
    generator = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(generator.normal(0.0, 0.02, (steps, 1)), axis=0))
    norms = drift * np.exp(generator.normal(0.0, 0.3, (steps, 3))) * [1.0, 0.1, 3.0]
    spikes = generator.random((steps, 1)) < 0.02
    return np.where(spikes, norms * generator.uniform(5.0, 200.0, (steps, 1)), norms)


def facts(rule: Any) -> dict[str, np.ndarray]:
    known = {"weights": np.array([1.0, 1e-5, 20.0]), "sizes": np.array([9.0, 1.0, 40.0])}
    return {key: value for key, value in known.items() if key in rule.needs}


def run(
    rule: Any, norms: Any, state: Any = None, *, absent: Any = ()
) -> tuple[list[bytes], list[dict]]:
    """Return what apply is told after each step, and the states."""
    norms = np.asarray(norms)
    state = decide.begin(rule, norms[0], xp=np) if state is None else state
    verdicts, states = [], []
    for step, row in enumerate(norms):
        present = np.array([place not in absent or step % 3 == 0 for place in range(3)])
        verdict, state = judge(
            rule,
            np.where(present, row, 0.0),
            state,
            present=present,
            xp=np,
            facts=facts(rule),
        )
        limit = verdict.factor if verdict.limit is None else verdict.limit
        verdicts.append(verdict.factor.tobytes() + limit.tobytes() + bytes([bool(verdict.skip)]))
        states.append(state)
    return verdicts, states


@functools.cache
def undisturbed(rule: Any, seed: int = 0, steps: int = STEPS) -> tuple[list[bytes], list[dict]]:
    return run(rule, series(seed, steps))


def same(one: dict, other: dict, *, but: tuple[str, ...] = ()) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[key], other[key]) for key in one if key not in but
    )


def rules(chosen: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rule", chosen, ids=lambda rule: type(rule).__name__)


BAD = [
    (place, tensor, entry)
    for place in (0, 1, 24, 63, LATE, STEPS - 1)
    for tensor in range(3)
    for entry in (math.nan, math.inf)
]


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (rule, bad)
        for rule in RULES
        for bad in turns(BAD, rule, full=False, most=examples(1, full=6))
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_bad_step_anywhere_leaves_the_others_as_without_it(
    rule: Any, bad: tuple[int, int, float]
) -> None:
    place, tensor, entry = bad
    norms = np.insert(series(), place, series()[place], axis=0)
    norms[place, tensor] = entry
    verdicts, states = undisturbed(rule)
    # What came before is the same run; so start there.
    found, after = run(rule, norms[place:], states[place - 1] if place else None)
    assert found[0][-1] == 1 and found[1:] == verdicts[place:]
    assert same(after[-1], states[-1], but=("attempted", "skipped_in_a_row"))


@rules(RULES)
def test_a_run_resumed_from_a_file_is_the_same_run(rule: Any) -> None:
    stages = [alone(rule, NAMES)]
    verdicts, states = undisturbed(rule)
    for stop in turns([0, 24, 63, LATE], rule, most=2):
        text = json.dumps(to_plain(stages, states[stop]), allow_nan=False)
        found, after = run(rule, series()[stop + 1 :], from_plain(stages, json.loads(text)))
        assert found == verdicts[stop + 1 :]
        assert same(after[-1], states[-1])


@pytest.mark.parametrize(
    ("rule", "power"),
    [(rule, power) for rule in RULES for power in turns([-40, 60], rule)],
    ids=lambda value: type(value).__name__,
)
def test_the_scale_of_norms_and_limits_changes_nothing_else(rule: Any, power: int) -> None:
    scale, row = 2.0**power, ROW_OF[type(rule)]
    names = () if row.unitless else row.in_norms
    changed = {key: getattr(rule, key) * scale for key in names if hasattr(rule, key)}
    scaled = dataclasses.replace(rule, **changed)
    norms = series(1, STEPS) * (1.0 if row.unitless else scale)
    found, states = run(scaled, norms)
    verdicts, expected = undisturbed(rule, 1, STEPS)
    # A limit between the edges of a log histogram goes through exp: the same to rounding only.
    exact = not isinstance(rule, kk.clip.Recommended)
    if exact and rule.scope is not kk.rule.Scope.ELEMENT:
        assert found == verdicts
    elif not exact:
        pairs = zip(found, verdicts, strict=True)
        factors = [[np.frombuffer(verdict[:24]) for verdict in pair] for pair in pairs]
        np.testing.assert_allclose(*np.moveaxis(np.array(factors), 1, 0), rtol=1e-12)
    in_norms = {"ring", "first", "smallest", "largest", "mean", "sd", "gamma", "bound"}
    in_norms |= set() if exact else {"limit", "median"}
    for key, value in expected[-1].items():
        wanted = value * scale if key.removeprefix(decide.PREFIX) in in_norms else value
        np.testing.assert_allclose(states[-1][key], wanted, rtol=0 if exact else 1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("rule", "start"),
    [(rule, start) for rule in RULES for start in turns([0, 150], rule)],
    ids=lambda value: type(value).__name__,
)
def test_zero_gradients_for_a_while_change_nothing(rule: Any, start: int) -> None:
    norms = np.insert(series(2), [start] * 150, 0.0, axis=0)
    zeros, states = run(rule, norms[start : start + 150], _state_at(rule, start))
    assert all(verdict == zeros[0] for verdict in zeros) or rule.scope is kk.rule.Scope.ELEMENT
    after, _ = run(rule, norms[start + 150 :], states[-1])
    without = undisturbed(rule, 2)[0][start:]
    if not isinstance(rule, kk.clip.SPAM):  # it counts steps of the mean square, which saw them
        assert after == without
    factors = [np.frombuffer(verdict[:24]) for verdict in after]
    assert all((factor > 0).all() for factor in factors)


def _state_at(rule: Any, step: int) -> Any:
    return undisturbed(rule, 2)[1][step - 1] if step else None


@rules(RULES)
def test_a_run_of_zeros_alone_clips_nothing(rule: Any) -> None:
    state, present = decide.begin(rule, np.zeros(3), xp=np), np.full(3, True)
    for _ in range(150):
        verdict, state = judge(rule, np.zeros(3), state, present=present, xp=np, facts=facts(rule))
        assert verdict.factor.tolist() == [1.0] * 3 and not verdict.skip


@rules(LEARNING)
def test_the_state_stays_finite_and_of_constant_size(rule: Any) -> None:
    wild = series(3) * np.where(np.arange(STEPS) % 7 == 0, 1e30, 1e-30)[:, None]
    for norms, dtype in ((wild, np.float64), (series(3).astype(np.float32), np.float32)):
        _, states = run(rule, norms)
        shapes = [{key: np.shape(value) for key, value in state.items()} for state in states]
        assert all(shape == shapes[0] for shape in shapes)
        inner = [v for k, v in states[-1].items() if k.startswith(decide.PREFIX)]
        assert inner and all(np.isfinite(value).all() for value in inner)
        assert {value.dtype for value in inner} == {np.dtype(dtype)}
        assert len(json.dumps(to_plain([alone(rule, NAMES)], states[-1]))) < 60_000


# SPAM counts the steps of its warm-up; without one it has nothing to learn.
@rules([rule for rule in LEARNING if getattr(rule, "warmup", 1) != 0])
def test_it_learns(rule: Any) -> None:
    fresh = decide.begin(rule, np.zeros(3), xp=np)
    _, states = undisturbed(rule)
    assert not same(fresh, states[-1], but=decide.COUNTERS)


@rules(LEARNING)
def test_an_absent_tensor_neither_counts_nor_teaches(rule: Any) -> None:
    if rule.scope is kk.rule.Scope.GLOBAL:
        lone = series(4).copy()
        lone[:, 1] = 0.0
        found, states = run(rule, series(4), absent=(1,))
        third = np.arange(STEPS) % 3 == 0
        lone[third] = series(4)[third]
        expected, wanted = run(rule, lone)
        assert same(states[-1], wanted[-1])
        return
    _, states = run(rule, series(4), absent=(1,))
    held = [v[1] for s in states for k, v in s.items() if k.startswith(decide.PREFIX)]
    width = len(states[0]) - len(decide.COUNTERS)
    for step in range(1, STEPS):
        if step % 3:
            now, before = held[step * width :][:width], held[(step - 1) * width :][:width]
            assert now == before


@pytest.mark.parametrize("bad", [-1, -0.5, math.nan, "1", None, [1.0], -math.inf])
@rules([row.rule for row in ROWS if row.kind == "clip"])
def test_wrong_arguments_are_refused(rule: Any, bad: Any) -> None:
    name = type(rule).__name__
    for field in dataclasses.fields(rule):
        with pytest.raises(InvalidArgument, match=f"^{name}") as refused:
            dataclasses.replace(rule, **{field.name: bad})
        assert "\n" not in str(refused.value) and "got" in str(refused.value)


ZERO_IS_FINE = {
    ("AutoClip", "percentile"),
    ("Quantile", "quantile"),
    ("AdaptiveQuantile", "quantile"),
    ("ZClip", "alpha"),
    ("AdaGC", "beta"),
    ("EMARatio", "beta"),
    ("SPAM", "warmup"),
}


@rules([row.rule for row in ROWS if row.kind == "clip"])
def test_zero_is_refused_where_it_means_nothing(rule: Any) -> None:
    for field in dataclasses.fields(rule):
        if (type(rule).__name__, field.name) in ZERO_IS_FINE:
            dataclasses.replace(rule, **{field.name: 0})
            continue
        with pytest.raises(InvalidArgument):
            dataclasses.replace(rule, **{field.name: 0})


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (kk.clip.AutoClip, {"percentile": 100.1}),
        (kk.clip.AutoClip, {"window": 2.5}),
        (kk.clip.AdaptiveQuantile, {"quantile": 1.5}),
        (kk.clip.ByNorm, {"limit": 1.0, "per": "layer"}),
        (kk.clip.AGC, {"unit": "torch"}),
        (kk.clip.ZClip, {"to": "median"}),
        (kk.clip.ZClip, {"alpha": 1.0}),
        (kk.clip.ZClip, {"clip_factor": 1.1}),
        (kk.clip.AdaGC, {"ratio": 0.99}),
        (kk.clip.AdaGC, {"ratio": schedule.Linear(2.0, 0.5, steps=(0, 9))}),
        (kk.clip.AdaGC, {"beta": 1.0}),
        (kk.clip.AdaGC, {"warmup": True}),
        (kk.clip.Quantile, {"quantile": 1.5}),
        (kk.clip.Quantile, {"window": 10, "warmup": 11}),
        (kk.clip.EMARatio, {"per": "layer"}),
        (kk.clip.EMARatio, {"learn": "both"}),
        (kk.clip.Smooth, {"limit": 1.0, "per": "element"}),
        (kk.clip.Normalize, {"gamma": math.inf}),
        (kk.clip.AGC, {"eps": math.inf}),
        (kk.clip.SkipSpikes, {"window": 1}),
        (kk.clip.SkipSpikes, {"window": 64, "warmup": 65}),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused(make: Any, arguments: dict) -> None:
    with pytest.raises(InvalidArgument, match=f"^{make.__name__}.*allowed"):
        make(**arguments)


MEASURING = [
    kk.clip.AGC(math.inf),
    kk.clip.AutoClip(100.0),
    kk.clip.ZClip(math.inf),
    kk.clip.AdaptiveQuantile(math.inf),
    kk.clip.AdaGC(math.inf, limit=math.inf),
    kk.clip.EMARatio(math.inf),
    kk.clip.EMARatio(math.inf, per="tensor", learn="raw"),
    kk.clip.SPAM(math.inf),
    kk.clip.BlockRMS(math.inf),
    kk.clip.StableAdamW(math.inf),
    kk.clip.Smooth(math.inf),
    kk.clip.Normalize(math.inf),
    kk.clip.SkipSpikes(math.inf),
    kk.clip.SkipLarge(math.inf),
]


@rules(MEASURING)
def test_an_infinite_limit_measures_only(rule: Any) -> None:
    state, present = decide.begin(rule, np.zeros(3), xp=np), np.full(3, True)
    for norms in np.concatenate([np.full((100, 3), 2.0), series(5)]):
        verdict, state = judge(rule, norms, state, present=present, xp=np, facts=facts(rule))
        assert verdict.factor.tolist() == [1.0] * 3 and not verdict.skip
        assert verdict.limit is None or np.isinf(verdict.limit).all()


SCHEDULED = [
    (kk.clip.AGC, {}),
    (kk.clip.ZClip, {}),
    (kk.clip.AdaGC, {"warmup": 5}),
    (kk.clip.EMARatio, {}),
    (kk.clip.SPAM, {}),
    (kk.clip.BlockRMS, {}),
    (kk.clip.StableAdamW, {}),
    (kk.clip.Smooth, {}),
    (kk.clip.Normalize, {}),
    (kk.clip.SkipSpikes, {}),
    (kk.clip.SkipLarge, {}),
]


@pytest.mark.parametrize(("make", "options"), SCHEDULED, ids=str)
def test_every_first_argument_may_be_a_schedule(make: Any, options: dict) -> None:
    plan = schedule.Linear(1.2, 4.0, steps=(100, LATE))
    found, states = run(make(plan, **options), series(6))
    early, _ = run(make(1.2, **options), series(6)[:101])
    assert found[:101] == early
    late, _ = run(make(4.0, **options), series(6)[LATE:], states[LATE - 1])
    assert found[LATE:] == late
    assert found != run(make(1.2, **options), series(6))[0]


def test_a_new_scale_is_not_skipped_for_ever() -> None:
    rule = kk.clip.SkipSpikes(patience=16)
    generator = np.random.default_rng(7)
    norms = np.exp(generator.normal(0.0, 0.1, (600, 3)))
    norms[200:] *= 10.0
    skipped = [verdict[-1] == 1 for verdict in run(rule, norms)[0]]
    assert not any(skipped[:200]) and all(skipped[200:216]) and not skipped[216]
    assert not any(skipped[320:])
    patient = run(kk.clip.SkipSpikes(patience=100_000), norms)[0]
    assert all(verdict[-1] == 1 for verdict in patient[200:])
