"""Norms of any order: rules by 1-norms, 3-norms and largest entries, in all frameworks, and norms from elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import karikomi as kk
from contract.frameworks import FRAMEWORKS, SHAPES, UNIT_AXES
from contract.row import Row, units
from depth import examples
from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.rules.decide import begin, decide_stage
from karikomi.rules.stages import Kind, alone, stages
from karikomi.torch.distributed import collectives
from karikomi.torch.numerics.orders import norms_of, unit_norms_of

ORDERS = [1.0, 1.5, 2.0, 3.0, 4.0, 7.5, math.inf]
EAGER = ["numpy", "torch_module", "torch_attach", "jax", "keras on torch", "tensorflow"]


def size(array: np.ndarray, order: float) -> float:
    """Return a norm in the widest float that there is, in units of a power of two."""
    wide = np.abs(array).astype(np.longdouble).ravel()
    largest = float(np.max(wide, initial=0.0))
    if math.isinf(order) or largest == 0.0:
        return largest
    unit = np.longdouble(2.0) ** math.frexp(largest)[1]
    return float(np.sum((wide / unit) ** order) ** (1 / np.longdouble(order)) * unit)


def shrunk(array: np.ndarray, norm: float) -> np.ndarray:
    return array / norm if norm > 1.0 else array


def expected(arrays: dict[str, np.ndarray], rule: Any) -> dict[str, np.ndarray]:
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    if isinstance(rule, kk.clip.ByGlobalNorm):
        joint = size(np.concatenate([a.ravel() for a in wide.values()]), rule.norm)
        return {name: shrunk(array, joint) for name, array in wide.items()}
    if rule.per == "tensor":
        return {name: shrunk(array, size(array, rule.norm)) for name, array in wide.items()}
    for name, array in wide.items():
        for unit in units(array, UNIT_AXES[name]) if name in UNIT_AXES else [array]:
            unit[...] = shrunk(unit, size(unit, rule.norm))
    return wide


RULES = st.one_of(
    st.builds(lambda p: kk.clip.ByGlobalNorm(1.0, norm=p), st.sampled_from(ORDERS)),
    st.builds(
        lambda p, per: kk.clip.ByNorm(1.0, norm=p, per=per),
        st.sampled_from(ORDERS),
        st.sampled_from(["tensor", "unit"]),
    ),
)


@settings(max_examples=examples(25, full=200))
@given(
    rule=RULES,
    framework=st.sampled_from([name for name in EAGER if name in FRAMEWORKS]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    power=st.sampled_from([-100, -3, 0, 3, 100]),
    seed=st.integers(0, 99),
)
def test_every_framework_clips_by_the_order_that_is_asked_for(
    rule: Any, framework: str, dtype: type, power: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    scale = 2.0 ** (power if dtype is not np.float16 else power // 10)
    tensors = {n: generator.normal(0.0, scale, s).astype(dtype) for n, s in SHAPES.items()}
    wanted = expected(tensors, rule)
    row = Row(rule=rule, reference=lambda arrays, axes: arrays)
    found, outcome, _ = FRAMEWORKS[framework](row, tensors)
    tolerance = {np.float16: 2e-3, np.float32: 2e-6, np.float64: 1e-12}[dtype]
    for name, array in found.items():
        assert array is not None and array.dtype == dtype
        tiny = float(np.finfo(dtype).smallest_subnormal) * 2
        np.testing.assert_allclose(array, wanted[name], rtol=tolerance, atol=tiny)
    every = np.concatenate([array.astype(np.float64).ravel() for array in tensors.values()])
    assert outcome.pre == pytest.approx(size(every, rule.norm), rel=2e-6)


HARD = {
    "no entry": torch.zeros(0),
    "zeros": torch.zeros(5),
    "a number": torch.tensor(-3.0),
    "many blocks": torch.linspace(-1.0, 2.0, 100_001),
    "constants": torch.full((100_000,), 0.1),
    "cubes that overflow": torch.full((70_000,), 1e30),
    "cubes that vanish": torch.full((70_000,), -1e-30),
    "half precision": torch.full((300_000,), 6e4, dtype=torch.float16),
    "bfloat16": torch.linspace(-3.0, 1.0, 1_000).bfloat16(),
    "squares that overflow float64": torch.full((5,), 1e300, dtype=torch.float64),
    "complex": torch.linspace(-1.0, 1.0, 6).to(torch.complex64) * (3 + 4j),
    "transposed": torch.linspace(-1.0, 1.0, 12).reshape(3, 4).t(),
    "strided": torch.linspace(-1.0, 1.0, 12).reshape(3, 4)[:, ::2],
    "an infinity": torch.tensor([1.0, -math.inf]),
    "NaN": torch.cat([torch.ones(40_000), torch.tensor([math.nan])]),
    "NaN first": torch.tensor([math.nan, 5.0]),
}


@pytest.mark.parametrize("order", [1.0, 1.5, 3.0, 4.0, 40.0, math.inf])
def test_torch_measures_hard_tensors_of_every_kind(order: float) -> None:
    found = norms_of(list(HARD.values()), order)
    for (name, tensor), number in zip(HARD.items(), found, strict=True):
        wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()
        if not np.isfinite(wide).all():
            assert not math.isfinite(number), name
            continue
        assert number == pytest.approx(size(wide, order), rel=5e-6), name
    together = norms_of(list(HARD.values())[::-1], order)[::-1]
    np.testing.assert_array_equal(together, found)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, -9.0, 9.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_largest_entry_is_found_in_tensors_of_every_size(
    dtype: torch.dtype, bad: float
) -> None:
    # Small ones are measured together, large ones in parts, and a few of them one by one.
    part = 393_216 // dtype.itemsize
    sizes = [0, 1, 5, *[1_000] * 40, 1_024, 1_025, 32_768, 32_769, part, 2 * part + 1]
    tensors = [torch.full((size,), 0.5, dtype=dtype) for size in sizes]
    for tensor in tensors:
        tensor[:1] = -0.5
    entries = [(2, 4), (30, 17), (42, 999), (43, 1_023), (44, 0), (45, 3), (46, 32_768)]
    for place, entry in [*entries, (47, part - 1), (48, part), (48, 2 * part)]:
        tensors[place][entry] = bad
        found = norms_of(tensors, math.inf)
        expected = [float(tensor.abs().max()) if len(tensor) else 0.0 for tensor in tensors]
        assert np.array_equal(found, expected, equal_nan=True)
        assert found[1] == 0.5 and not found[place] == 0.5
        assert np.array_equal(norms_of(tensors[place:], math.inf), expected[place:], equal_nan=True)


@settings(max_examples=examples(40, full=400))
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    count=st.sampled_from([1, 3, 40]),
    scale=st.sampled_from([2.0**-140, 2.0**-20, 1.0, 2.0**120]),
    sign=st.sampled_from([-1.0, 0.0, 1.0]),
    layout=st.sampled_from(
        ["row", "table", "strided", "transposed", "needs a gradient", "negated"]
    ),
    seed=st.integers(0, 99),
)
def test_the_largest_entry_is_exact_for_tensors_of_any_layout(
    dtype: torch.dtype, count: int, scale: float, sign: float, layout: str, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(count):
        entries = torch.randn(6, 10, generator=draw, dtype=torch.float64) * scale
        entries = (entries.abs() * sign if sign else entries).to(dtype)
        changed = {"row": entries.reshape(-1), "strided": entries[:, ::2]}
        changed |= {"transposed": entries.t(), "needs a gradient": entries.clone().requires_grad_()}
        changed["negated"] = torch.complex(entries.float(), entries.float()).conj().imag
        tensors.append(changed.get(layout, entries))
    expected = [float(tensor.detach().double().abs().max()) for tensor in tensors]
    assert norms_of(tensors, math.inf).tolist() == expected


def test_units_along_several_axes_are_measured_in_their_order() -> None:
    tensor = torch.linspace(-1.0, 2.0, 24).reshape(2, 3, 4)
    found = unit_norms_of(tensor, (0, 2), 3.0).reshape(2, 4)
    np.testing.assert_allclose(found, (tensor.abs() ** 3).sum(1) ** (1 / 3), rtol=1e-6)
    assert unit_norms_of(torch.zeros(0, 3), 1, 1.0).tolist() == [0.0, 0.0, 0.0]
    assert unit_norms_of(torch.tensor([[3.0, -9.0]]), 0, math.inf).tolist() == [9.0]
    waves = torch.tensor([[3.0 + 4.0j, 0.0], [1.0j, -2.0]])
    assert unit_norms_of(waves, 0, 1.0).tolist() == [5.0, 3.0]
    assert unit_norms_of(waves, 0, math.inf).tolist() == [5.0, 2.0]


@pytest.mark.parametrize("order", [0.5, 0, -1, math.nan, -math.inf, "2", "Inf", None, True, [2]])
def test_what_is_no_norm_is_refused(order: Any) -> None:
    for make in (kk.clip.ByGlobalNorm, kk.clip.ByNorm, kk.bound.MaxNorm):
        with pytest.raises(InvalidArgument, match=f"{make.__name__}.*norm is out of range"):
            make(1.0, norm=order)
    assert kk.clip.ByNorm(1.0, norm="inf").norm == math.inf


def model(*, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).to(dtype)
    for parameter in layers.parameters():
        parameter.grad = torch.randn_like(parameter) * scale
    return layers


def gradients(layers: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in layers.parameters() if p.grad is not None]


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", [1, 1.5, 2, 3, 4, math.inf, "inf"])
def test_the_same_as_torch(order: Any, dtype: torch.dtype, foreach: bool | None) -> None:
    ours, theirs = model(dtype=dtype), model(dtype=dtype)
    total = torch.nn.utils.clip_grad_norm_(
        theirs.parameters(), 0.5, norm_type=order, foreach=foreach
    )
    outcome, _ = kk.torch.clip_(ours, kk.clip.ByGlobalNorm(0.5, norm=order))
    rough = 2e-2 if dtype is torch.bfloat16 else 1e-5
    assert outcome.pre == pytest.approx(float(total), rel=rough)
    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=rough, atol=1e-7)


@pytest.mark.parametrize("order", [1.0, 3.0, math.inf])
@pytest.mark.parametrize("policy", ["skip", "zero", "pass", "raise"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_is_noticed_by_every_order(bad: float, policy: str, order: float) -> None:
    layers = model()
    layers[0].bias.grad[2] = bad
    rule = kk.clip.ByGlobalNorm(1.0, norm=order)
    if policy == "raise":
        with pytest.raises(NonFinite, match=r"0\.bias"):
            kk.torch.clip_(layers, rule, nonfinite=policy)
        return
    outcome, _ = kk.torch.clip_(layers, rule, nonfinite=policy)
    assert outcome.nonfinite == ("0.bias",)
    assert outcome.action == {"skip": "skipped", "zero": "zeroed", "pass": "passed"}[policy]
    assert (layers[0].bias.grad is None) == (policy == "skip")


def test_an_outcome_is_in_units_of_its_order() -> None:
    grads = {"a": np.array([3.0, -4.0]), "b": np.array([5.0])}
    _, outcome, _ = kk.numpy.clip(grads, kk.clip.ByGlobalNorm(6.0, norm=1))
    assert (outcome.pre, outcome.post, outcome.factor) == (12.0, 6.0, 0.5)
    assert outcome.top(1) == [("a", pytest.approx(7 / 12))]
    _, outcome, _ = kk.numpy.clip(grads, kk.clip.ByGlobalNorm(2.5, norm=math.inf))
    assert str(outcome) == "pre 5 -> post 2.5 x0.5 clipped; top: b 5"
    rule = kk.clip.Chain(kk.clip.ByGlobalNorm(6.0, norm=1), kk.clip.ByGlobalNorm(1.0))
    _, outcome, _ = kk.numpy.clip(grads, rule)
    assert outcome.pre == pytest.approx(math.sqrt(50) / 2) and outcome.post == pytest.approx(1.0)
    assert outcome.factor == pytest.approx(1.0 / math.sqrt(50))


def test_rules_of_one_order_share_a_measurement_and_others_do_not() -> None:
    one, three = kk.clip.ByNorm(1.0, norm=1), kk.clip.ByGlobalNorm(1.0, norm=3)
    plan = stages(kk.clip.Chain(one, kk.clip.ByGlobalNorm(1.0, norm=1), three), ["a", "b"])
    assert [(stage.order, len(stage.parts)) for stage in plan] == [(1.0, 2), (3.0, 1)]
    rule = kk.clip.Groups({"a": kk.clip.ByValue(1.0)}, default=three)
    (stage,) = stages(rule, ["a", "b"])
    assert stage.order == 3.0 and stage.kinds == (Kind.PEAK, Kind.NORM)
    units_first = stages(kk.clip.Chain(kk.clip.ByNorm(1.0, norm=3, per="unit"), three), ["a"])
    assert [stage.kinds for stage in units_first] == [(Kind.UNITS,)]


def test_a_rule_is_shown_by_what_is_not_its_default() -> None:
    assert repr(kk.clip.ByGlobalNorm(1.0)) == "ByGlobalNorm(limit=1.0)"
    assert repr(kk.clip.ByNorm(1.0, norm=1)) == "ByNorm(limit=1.0, norm=1.0)"


def test_tied_largest_entries_are_one_norm() -> None:
    rule = kk.clip.ByGlobalNorm(1.0, norm=math.inf)
    stage = alone(rule, ["a", "b"])
    norms = np.array([4.0, 4.0])
    state = begin(rule, norms, xp=np)
    decision, _ = decide_stage(stage, norms, state, present=np.array([True, True]), xp=np)
    assert decision.factor.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("order", [1.0, 2.0, 2.5, math.inf])
def test_ranks_add_up_by_order(order: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, one after another: what either gave is added to, or compared with, that of the other."""
    parts = [np.array([3.0, 1e200, 5.0]), np.array([4.0, 1e200, 1.0])]
    peaks, present = np.array([False, False, True]), np.array([True, False, True])

    def joined(groups: Any, numbers: np.ndarray, operation: str) -> np.ndarray:
        sent[-1].append(numbers)
        place = len(sent[-1]) - 1
        if len(sent) == 1:
            return numbers
        return (np.add if operation == "SUM" else np.maximum)(numbers, sent[0][place])

    monkeypatch.setattr(collectives, "_all_reduced", joined)
    sent: list[list[np.ndarray]] = []
    ones = np.ones(3)
    # A scale that all ranks share comes from the first reduction.
    for part in [parts[1], parts[0]]:
        sent.append([])
        found, there = collectives.reduced((), part, present, ones, peaks, order)
        sent = sent[:1]
    if order in (1.0, 2.0, math.inf):
        wanted = [size(np.array([3.0, 4.0]), order), size(np.array([1e200] * 2), order), 5.0]
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert there.tolist() == [True, False, True] and found[2] == 5.0


class TestGivenNorm:
    """A norm that was computed elsewhere."""

    def test_the_same_as_torch(self) -> None:
        ours, theirs = model(), model()
        total = torch.nn.utils.get_total_norm(gradients(theirs), 3.0)
        torch.nn.utils.clip_grads_with_norm_(theirs.parameters(), 0.5, total)
        rule = kk.clip.ByGlobalNorm(torch.tensor(0.5), norm=3)
        outcome, state = kk.torch.clip_(ours, rule, total_norm=total)
        assert outcome.pre == pytest.approx(float(total)) and outcome.post == pytest.approx(0.5)
        for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
        # The state goes on where the norm is measured here.
        _, state = kk.torch.clip_(ours, rule, state)
        assert state["attempted"] == 2

    def test_a_rule_learns_from_it_as_from_its_own(self) -> None:
        rule, states = kk.clip.ZClip(warmup=2), [None, None]
        for _ in range(3):
            layers = model()
            norm = kk.torch.clip_(layers, kk.clip.ByGlobalNorm(math.inf))[0].pre
            _, states[0] = kk.torch.clip_(model(), rule, states[0])
            _, states[1] = kk.torch.clip_(model(), rule, states[1], total_norm=norm)
        assert states[0] == states[1]

    def test_a_bad_norm_follows_the_policy(self) -> None:
        layers, rule = model(), kk.clip.ByGlobalNorm(1.0)
        outcome, _ = kk.torch.clip_(layers, rule, total_norm=math.nan)
        assert outcome.skipped and not gradients(layers)
        layers = model()
        kk.torch.clip_(layers, rule, total_norm=math.inf, nonfinite="zero")
        assert not any(gradient.any() for gradient in gradients(layers))
        with pytest.raises(NonFinite, match="given norm"):
            kk.torch.clip_(layers, rule, total_norm=math.inf, nonfinite="raise")

    def test_there_need_be_no_gradient_on_this_rank(self) -> None:
        outcome, _ = kk.torch.clip_(torch.nn.Linear(2, 2), kk.clip.ByGlobalNorm(1.0), total_norm=4)
        assert outcome.factor == 0.25

    def test_what_it_cannot_decide_is_refused(self) -> None:
        for rule in (kk.clip.ByNorm(1.0), kk.clip.Chain(kk.clip.ByGlobalNorm(1.0))):
            with pytest.raises(Unsupported, match="not decided from one joint norm"):
                kk.torch.clip_(model(), rule, total_norm=1.0)
        for bad in (-1.0, torch.ones(2), "large"):
            with pytest.raises(InvalidArgument, match=r"torch\.clip_"):
                kk.torch.clip_(model(), kk.clip.ByGlobalNorm(1.0), total_norm=bad)


def test_without_a_parameter_it_warns_and_measures_zero_as_torch_does() -> None:
    with pytest.warns(UserWarning, match="empty generator"):
        assert float(torch.nn.utils.clip_grad_norm_((p for p in ()), 1.0)) == 0.0
    for nothing in (iter([]), [], torch.nn.ReLU()):
        with pytest.warns(UserWarning, match="no parameter"):
            outcome, state = kk.torch.clip_(nothing, kk.clip.ByGlobalNorm(1.0))
        assert (outcome.pre, outcome.factor, outcome.action, state) == (0.0, 1.0, "kept", {})
    outcome, state = kk.torch.clip_(model(), kk.clip.ByGlobalNorm(1.0), state)
    assert state["attempted"] == 1


@pytest.mark.parametrize("make", [np.float32, np.array, torch.tensor, lambda x: torch.tensor([x])])
def test_a_limit_may_be_an_array_of_one_number(make: Any) -> None:
    assert kk.clip.ByGlobalNorm(make(0.5)) == kk.clip.ByGlobalNorm(0.5)
    assert kk.clip.ByValue(make(2)).limit == 2
    with pytest.raises(InvalidArgument, match="must be positive"):
        kk.clip.ByNorm(make(-0.5))
    with pytest.raises(InvalidArgument, match="one number"):
        kk.bound.Clamp(np.ones(2))


def test_a_limit_may_be_traced() -> None:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    tx = optax.inject_hyperparams(lambda limit: kk.jax.clip(kk.clip.ByGlobalNorm(limit)))(limit=2.0)
    grads = {"w": jax.numpy.full((4,), 10.0)}
    state = tx.init(grads)
    step = jax.jit(tx.update)
    updates, state = step(grads, state)
    assert updates["w"].tolist() == [1.0] * 4
    state.hyperparams["limit"] = jax.numpy.asarray(4.0)
    assert step(grads, state)[0]["w"].tolist() == [2.0] * 4
