"""Penalties: values by hand, slopes by differences, who is penalised, and what they do to a network."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

import karikomi as kk  # noqa: E402
from karikomi import registry, spec  # noqa: E402
from karikomi.errors import InvalidArgument, UnknownName, Unsupported  # noqa: E402

RULES = [
    kk.prune.L1(0.3),
    kk.prune.L2(0.3),
    kk.prune.GroupLasso(0.3),
    kk.prune.GrowingL2(0.3, growth=0.1),
]
NAMES = ["L1", "L2", "GroupLasso", "GrowingL2"]
SHAPES = st.sampled_from([(3, 4), (2, 3, 2, 2), (5, 1), (4,)])
# A difference must not step over zero, where there is no derivative.
ENTRIES = st.floats(0.05, 3.0).flatmap(lambda x: st.sampled_from([x, -x]))


def matrices(entries: Any = ENTRIES) -> st.SearchStrategy[np.ndarray]:
    return SHAPES.flatmap(lambda shape: arrays.arrays(np.float64, shape, elements=entries))


def options(rule: Any, weights: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return what a rule has to be told of one array named ``w``."""
    if isinstance(rule, kk.prune.GroupLasso):
        return {"unit_axes": {"w": 0}}
    if isinstance(rule, kk.prune.GrowingL2):
        kept = np.random.default_rng(seed).random(weights.shape) < 0.5
        return {"masks": {"w": kept}, "step": 7}
    return {}


def by_hand(rule: Any, weights: np.ndarray, given: dict[str, Any]) -> float:
    if isinstance(rule, kk.prune.GroupLasso):
        units = weights.reshape(len(weights), -1)
        norms = [math.hypot(*unit) for unit in units]
        return 0.3 * math.sqrt(units.shape[1]) * sum(norms)
    if isinstance(rule, kk.prune.GrowingL2):
        gone = weights[~given["masks"]["w"]]
        return 0.2 * 0.5 * sum(float(x) ** 2 for x in gone.ravel())
    power = 2 if isinstance(rule, kk.prune.L2) else 1
    return 0.3 * sum(abs(float(x)) ** power for x in weights.ravel())


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@given(weights=matrices(st.floats(-1e3, 1e3)))
def test_the_value_is_the_formula(rule: Any, weights: np.ndarray) -> None:
    told = options(rule, weights)
    value, _ = kk.numpy.penalty({"w": weights}, rule, **told)
    assert math.isclose(value, by_hand(rule, weights, told), rel_tol=1e-12, abs_tol=1e-300)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@given(weights=matrices(), data=st.data())
def test_the_gradient_is_the_slope_of_the_value(rule: Any, weights: np.ndarray, data: Any) -> None:
    told = options(rule, weights)
    place = data.draw(st.integers(0, weights.size - 1))
    _, gradients = kk.numpy.penalty({"w": weights}, rule, **told)
    step, ends = 1e-4, []
    for sign in (1.0, -1.0):
        moved = weights.copy()
        moved.flat[place] += sign * step
        ends.append(kk.numpy.penalty({"w": moved}, rule, **told)[0])
    slope = (ends[0] - ends[1]) / (2 * step)
    assert math.isclose(gradients["w"].flat[place], slope, rel_tol=1e-4, abs_tol=1e-6)


def network() -> Any:
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.InstanceNorm2d(4, affine=True),
        torch.nn.ConvTranspose2d(4, 3, 3),
        torch.nn.ConvTranspose2d(4, 4, 3, groups=2),
        torch.nn.Embedding(5, 4),
        torch.nn.LSTM(4, 4),
        torch.nn.Linear(4, 5),
    )


def test_who_is_penalised() -> None:
    model = network()

    def touched(rule: Any, **given: Any) -> set[str]:
        model.zero_grad()
        kk.torch.penalty(model, rule, **given).backward()
        return {name for name, one in model.named_parameters() if one.grad is not None}

    kernels = {"0.weight", "3.weight", "4.weight", "7.weight"}
    assert touched(kk.prune.L1(1.0)) == kernels
    assert touched(kk.prune.GroupLasso(1.0)) == kernels - {"4.weight"}
    assert touched(kk.prune.ScaleL1(1.0)) == {"1.weight"}
    assert touched(kk.prune.L1(1.0), exclude="0.*") == kernels - {"0.weight"}
    model[0].weight.requires_grad_(False)
    assert touched(kk.prune.L1(1.0), only=["0.*", "7.*"]) == {"7.weight"}
    model[5].weight = model[7].weight
    assert touched(kk.prune.L1(1.0)) == {"3.weight", "4.weight"}
    with pytest.raises(Unsupported, match=r"1.bias: no weight of a Linear or Conv layer"):
        kk.torch.penalty(model, kk.prune.L1(1.0), only="1.bias")


def test_a_transposed_convolution_has_its_units_on_the_second_axis() -> None:
    layer = torch.nn.ConvTranspose2d(3, 2, 2, bias=False)
    units = layer.weight.detach().double().numpy().swapaxes(0, 1).reshape(2, -1)
    expected = math.sqrt(12) * np.linalg.norm(units, axis=1).sum()
    assert kk.torch.penalty(layer, kk.prune.GroupLasso(1.0)).item() == pytest.approx(expected, 1e-6)


def test_tied_layers_and_compiled_modules_count_once() -> None:
    one = torch.nn.Linear(3, 3, bias=False)
    model = torch.nn.Sequential(one, one)
    expected = one.weight.abs().sum().item()
    assert kk.torch.penalty(model, kk.prune.L1(1.0)).item() == pytest.approx(expected, 1e-6)
    compiled = torch.compile(model, backend="eager")
    assert kk.torch.penalty(compiled, kk.prune.L1(1.0), only="0.*").item() == pytest.approx(
        expected, 1e-6
    )


def test_growing_strength_rises_by_steps_to_its_ceiling_also_compiled() -> None:
    # Compiled, 41 / 41 can end below 1.
    rule = kk.prune.GrowingL2(1.0, growth=0.001, every=41, first=3)
    steps = range(50_000)
    expected = [0.0 if t < 3 else min(1.0, 0.001 * (1 + (t - 3) // 41)) for t in steps]
    found = [rule.strength_at(t) for t in steps[::7]]
    np.testing.assert_allclose(found, expected[::7], rtol=1e-12)
    compiled = jax.jit(lambda t: rule.strength_now(t, xp=jnp))(jnp.arange(50_000.0))
    np.testing.assert_allclose(compiled, expected, rtol=1e-6)


def test_a_strength_can_be_a_schedule() -> None:
    rule = kk.prune.L1(kk.schedule.Linear(0.0, 2.0, steps=(0, 10)))
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(-3.0)
    assert [kk.torch.penalty(layer, rule, step=t).item() for t in (0, 5, 99)] == [0.0, 3.0, 6.0]
    traced = jax.jit(lambda t: kk.jax.penalty({"w": jnp.asarray([3.0])}, rule, step=t))
    assert float(traced(jnp.asarray(5))) == 3.0
    assert spec.from_dict(spec.to_dict(rule, "penalty"), "penalty") == rule


def test_all_are_registered_and_come_back_from_plain_values() -> None:
    assert {e.name for e in registry.entries("penalty")} >= {*NAMES, "ScaleL1"}
    for rule in [*RULES, kk.prune.ScaleL1()]:
        assert spec.from_dict(spec.to_dict(rule, "penalty"), "penalty") == rule


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "1", True, None])
@pytest.mark.parametrize("rule", [kk.prune.L1, kk.prune.ScaleL1, kk.prune.GroupLasso])
def test_strengths_out_of_range_are_refused(rule: Any, bad: Any) -> None:
    with pytest.raises(InvalidArgument, match=rf"{rule.__name__}.*; got .*allowed: >= 0"):
        rule(bad)


def test_bad_requests_say_what_is_wrong() -> None:
    layer, masks = torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2, dtype=torch.bool)}
    grow = kk.prune.GrowingL2()
    cases: list[tuple[type, str, Any]] = [
        (InvalidArgument, "not a penalty", lambda: kk.torch.penalty(layer, kk.bound.Clamp(1.0))),
        (InvalidArgument, "needs masks", lambda: kk.torch.penalty(layer, grow)),
        (InvalidArgument, "alike", lambda: kk.torch.penalty(layer, RULES[0], masks=masks)),
        (InvalidArgument, "step", lambda: kk.torch.penalty(layer, RULES[0], step=-1)),
        (InvalidArgument, "step", lambda: kk.torch.penalty(layer, RULES[0], step=1.5)),
        (
            UnknownName,
            "did you mean 'weight'",
            lambda: kk.torch.penalty(layer, RULES[0], only="weigth"),
        ),
        (UnknownName, "mask", lambda: kk.torch.penalty(layer, grow, masks={"w": masks["weight"]})),
        (
            InvalidArgument,
            "float32",
            lambda: kk.torch.penalty(layer, grow, masks={"weight": torch.ones(2, 2)}),
        ),
        (Unsupported, "no scale", lambda: kk.torch.penalty(layer, kk.prune.ScaleL1())),
        (
            InvalidArgument,
            "unit axis",
            lambda: kk.jax.penalty({"w": jnp.ones(2)}, kk.prune.GroupLasso(0.3)),
        ),
        (InvalidArgument, "only=", lambda: kk.jax.penalty({"w": jnp.ones(2)}, kk.prune.ScaleL1())),
        (InvalidArgument, "every", lambda: kk.prune.GrowingL2(every=0)),
        (InvalidArgument, "growth", lambda: kk.prune.GrowingL2(growth=0)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def small_data() -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(256, 8)).astype(np.float32)
    # Two units are enough for this.
    targets = np.tanh(inputs[:, :1] + inputs[:, 1:2]) - np.tanh(inputs[:, 2:3])
    return inputs, targets.astype(np.float32)


def trained(rule: Any, seed: int) -> tuple[np.ndarray, float]:
    """Return the norms of the hidden units, and the loss, after some training with a clip and a bound."""
    torch.manual_seed(seed)
    inputs, targets = map(torch.from_numpy, small_data())
    model = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    handle = kk.torch.attach(
        optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), bound=kk.bound.Clamp(2.0)
    )
    loss = torch.zeros(())
    for _ in range(400):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        total = loss if rule is None else loss + kk.torch.penalty(model, rule, only="0.*")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert handle.last.action != "skipped"
    return model[0].weight.detach().norm(dim=1).numpy(), loss.item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_group_lasso_empties_units_while_the_network_learns(seed: int) -> None:
    free, _ = trained(None, seed)
    sparse, loss = trained(kk.prune.GroupLasso(2e-3), seed)
    _, targets = small_data()
    assert (free < 0.05).sum() == 0
    assert (sparse < 0.05).sum() >= 8
    assert loss < 0.1 * targets.var()


def test_growing_l2_drives_marked_weights_to_zero_and_leaves_the_others() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 20)
    masks = kk.torch.prune_(copy.deepcopy(layer), sparsity=0.5)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    rule = kk.prune.GrowingL2(1.0, growth=0.1, every=2)
    for step in range(60):
        optimizer.zero_grad()
        kk.torch.penalty(layer, rule, step=step, masks=masks).backward()
        optimizer.step()
    kept = masks["weight"]
    assert torch.equal(layer.weight[kept], before[kept])
    assert layer.weight[~kept].abs().max() < 1e-6


@given(weights=matrices(st.floats(-10, 10)), factor=st.floats(0.0, 4.0))
@settings(max_examples=50)
def test_the_lassos_scale_with_weights_and_strength(weights: np.ndarray, factor: float) -> None:
    for rule in (kk.prune.L1, kk.prune.GroupLasso):
        told = options(rule(1.0), weights)
        base, _ = kk.numpy.penalty({"w": weights}, rule(1.0), **told)
        scaled, _ = kk.numpy.penalty({"w": factor * weights}, rule(1.0), **told)
        stronger, _ = kk.numpy.penalty({"w": weights}, rule(factor), **told)
        assert math.isclose(scaled, factor * base, rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(stronger, factor * base, rel_tol=1e-12, abs_tol=1e-300)
