"""Bounds by projection: the nearest point of each set, in all frameworks, against the reference and optax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import karikomi as kk
from contract.namespaces import load_quietly
from depth import examples
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported
from karikomi.functional.projections import nearest_points
from karikomi.spec import from_dict, to_dict
from karikomi.torch.numerics.library import TorchLibrary

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 3, 4)}
AXES = {"a": 0, "b": 0, "c": (0, 2)}
NORMAL = np.linspace(-1.0, 2.0, 12).reshape(4, 3)
RULES = [
    kk.bound.Box(-0.2, 0.3),
    kk.bound.Box({"a": NORMAL}, {"b": 0.5, "*": 9.0}),
    kk.bound.Box(high=np.array([0.1])),
    kk.bound.L1Ball(1.5),
    kk.bound.L1Ball(1.5, per="unit"),
    kk.bound.L1Ball(1.5, per="global"),
    kk.bound.L1Ball(9.0, sphere=True),
    kk.bound.L1Ball(kk.schedule.Linear(2.0, 1.0, steps=(0, 4))),
    kk.bound.Simplex(),
    kk.bound.Simplex(0.3, per="unit"),
    kk.bound.Simplex(2.0, per="global"),
    kk.bound.HalfSpace(1.0, -1.0),
    kk.bound.HalfSpace({"a": NORMAL, "b": 2.0}, 0.3, per="global"),
    kk.bound.HalfSpace(-1.0, 0.5, equal=True),
    kk.bound.MinMaxNorm(1.0, 2.0),
    kk.bound.MinMaxNorm(1.0, 1.5, per="global"),
    kk.bound.MaxNorm(1.0, per="global"),
    kk.bound.MaxNorm(1.0, norm=1),
    kk.bound.MaxNorm(1.0, norm=3, per="tensor"),
    kk.bound.UnitNorm(2.0, per="global"),
]


class Weights(torch.nn.Module):
    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name, array in arrays.items():
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(array.copy())))

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: p.detach().numpy().copy() for name, p in self.named_parameters()}


def drawn(seed: int, dtype: type, scale: float = 1.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {n: generator.normal(0.0, scale, shape).astype(dtype) for n, shape in SHAPES.items()}


def close(found: Any, wanted: Any, **tolerance: float) -> None:
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, err_msg=name, **tolerance)


@settings(max_examples=examples(40, full=400))
@given(
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([np.float32, np.float64]),
    power=st.sampled_from([-90, -4, 0, 0, 4, 90]),
    seed=st.integers(0, 99),
)
def test_torch_finds_the_points_of_the_reference_and_stays_there(
    rule: Any, dtype: type, power: int, seed: int
) -> None:
    arrays = drawn(seed, dtype, 2.0**power)
    wanted, expected, _ = kk.numpy.bound(arrays, rule, unit_axes=AXES)
    module = Weights(arrays)
    outcome, state = kk.torch.bound_(module, rule, unit_axes=AXES)
    rough = {np.float32: 2e-6, np.float64: 1e-9}[dtype]
    top = max(float(np.abs(array).max()) for array in [*arrays.values(), *wanted.values()])
    close(module.arrays(), wanted, rtol=rough, atol=rough * top)
    assert outcome.pre == pytest.approx(expected.pre, rel=1e-5, abs=1e-9)
    assert outcome.left_alone == expected.left_alone
    before = module.arrays()
    again, _ = kk.torch.bound_(module, rule, state, unit_axes=AXES)
    if not isinstance(getattr(rule, "limit", None), kk.schedule.Linear):
        assert not again.engaged or power > 4
        if power <= 4:
            close(module.arrays(), before, rtol=0.0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_jax_finds_the_points_of_the_reference(rule: Any) -> None:
    jax = load_quietly("jax")
    arrays = drawn(1, np.float32)
    wanted, expected, _ = kk.numpy.bound(arrays, rule, unit_axes=AXES)
    found, outcome, _ = kk.jax.project(
        jax.tree.map(jax.numpy.asarray, arrays), rule, unit_axes=AXES
    )
    close(found, wanted, rtol=1e-5, atol=2e-6)
    assert outcome.pre == pytest.approx(expected.pre, rel=1e-5)
    assert outcome.share_at_bound == pytest.approx(expected.share_at_bound)


def test_a_compiled_transform_keeps_weights_on_the_ball() -> None:
    jax, optax = load_quietly("jax"), load_quietly("optax")
    tx = optax.chain(optax.sgd(0.1), kk.jax.bound(kk.bound.L1Ball(1.0), only="b"))
    params = {name: jax.numpy.asarray(array) for name, array in drawn(2, np.float32).items()}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert float(abs(moved["b"]).sum()) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(moved["a"], 0.9 * params["a"], rtol=1e-6)


OPTAX = {
    "projection_box": (
        kk.bound.Box(-0.2, 0.3),
        ({n: -0.2 for n in SHAPES}, {n: 0.3 for n in SHAPES}),
    ),
    "projection_hypercube": (kk.bound.Box(0.0, 1.0), ()),
    "projection_non_negative": (kk.bound.NonNegative(), ()),
    "projection_l1_ball": (kk.bound.L1Ball(1.5, per="global"), (1.5,)),
    "projection_l1_sphere": (kk.bound.L1Ball(90.0, per="global", sphere=True), (90.0,)),
    "projection_l2_ball": (kk.bound.MaxNorm(2.0, per="global"), (2.0,)),
    "projection_l2_sphere": (kk.bound.UnitNorm(9.0, per="global"), (9.0,)),
    "projection_linf_ball": (kk.bound.Clamp(0.5), (0.5,)),
    "projection_simplex": (kk.bound.Simplex(2.0, per="global"), (2.0,)),
}


def test_the_same_as_the_projections_of_optax() -> None:
    jax, optax = load_quietly("jax"), load_quietly("optax")
    params = {name: jax.numpy.asarray(array) for name, array in drawn(3, np.float32).items()}
    slope = {name: jax.numpy.asarray(array) for name, array in drawn(4, np.float32).items()}
    plane = {name: np.asarray(array) for name, array in slope.items()}
    cases = dict(OPTAX)
    for name, equal in (("projection_halfspace", False), ("projection_hyperplane", True)):
        rule = kk.bound.HalfSpace(plane, -0.5, per="global", equal=equal)
        cases[name] = (rule, (slope, -0.5))
    for name, (rule, given_to_optax) in cases.items():
        project = getattr(optax.projections, name)
        if name == "projection_hypercube":  # which optax 0.2.8 has for single arrays only
            theirs = jax.tree.map(project, params)
        else:
            theirs = project(params, *given_to_optax)
        ours, _, _ = kk.jax.project(params, rule, only="*")
        close(ours, {n: np.asarray(array) for n, array in theirs.items()}, rtol=2e-5, atol=2e-6)
    public = {n for n in dir(optax.projections) if n.startswith("projection_")}
    assert public - {"projection_vector"} == set(cases)  # that is onto a line, and no bound


def test_keras_constrains_by_the_same_points() -> None:
    keras = load_quietly("keras")
    kernel = drawn(5, np.float32)["a"]
    for rule, axis in [
        (kk.bound.Box(-0.2, NORMAL + 1.0), None),
        (kk.bound.L1Ball(1.0, per="unit"), -1),
        (kk.bound.Simplex(), None),
        (kk.bound.HalfSpace(NORMAL, -0.5), None),
        (kk.bound.MinMaxNorm(1.5, 2.0, rate=0.5), -1),
    ]:
        constraint = kk.keras.Bound(rule, unit_axis=axis)
        found = keras.ops.convert_to_numpy(constraint(keras.ops.convert_to_tensor(kernel)))
        axes = None if axis is None else {"w": axis}
        wanted = kk.numpy.bound({"w": kernel}, rule, unit_axes=axes)[0]["w"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        again = kk.keras.Bound.from_config(constraint.get_config())
        assert again.rule == rule and again.unit_axis == axis
    for rule in (kk.bound.MaxNorm(1.0, per="global"), kk.bound.Box({"kernel": 0.0})):
        with pytest.raises(Unsupported, match="one weight, whose name"):
            kk.keras.Bound(rule)


def test_the_same_as_min_max_norm_of_keras() -> None:
    keras = load_quietly("keras")
    kernel = drawn(6, np.float32)["a"]
    for rate in (1.0, 0.25):
        theirs = keras.constraints.MinMaxNorm(1.0, 1.5, rate=rate, axis=0)
        wanted = keras.ops.convert_to_numpy(theirs(keras.ops.convert_to_tensor(kernel)))
        rule = kk.bound.MinMaxNorm(1.0, 1.5, rate=rate)
        found = kk.numpy.bound({"w": kernel}, rule, unit_axes={"w": 1})[0]["w"]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@settings(max_examples=examples(30, full=300))
@given(
    seed=st.integers(0, 999),
    size=st.integers(1, 40),
    total=st.sampled_from([1e-6, 0.3, 1.0, 50.0]),
    ties=st.booleans(),
)
def test_nothing_in_the_set_is_nearer(seed: int, size: int, total: float, ties: bool) -> None:
    """Optimality: the difference to any point of the set makes no acute angle with the way that was moved."""
    generator = np.random.default_rng(seed)
    vector = generator.normal(0.0, 1.0, size)
    vector = np.round(vector) if ties else vector
    for rule, points in [
        (kk.bound.Simplex(total), total * generator.dirichlet(np.ones(size), 20)),
        (
            kk.bound.L1Ball(total),
            total * generator.dirichlet(np.ones(size), 20) * generator.choice([-1, 1], (20, size)),
        ),
    ]:
        found = kk.numpy.bound({"w": vector}, rule)[0]["w"]
        library = TorchLibrary(torch.device("cpu"))
        weights = {"w": torch.from_numpy(vector)}
        other = nearest_points(rule, weights, {}, attempted=torch.tensor(0), library=library)["w"]
        np.testing.assert_allclose(other.numpy(), found, rtol=1e-9, atol=1e-12)
        assert np.abs(found).sum() <= total * (1 + 1e-5)
        assert np.all((points - found) @ (vector - found) <= 1e-5 * (1.0 + total) * size)


def test_long_float32_sums_keep_the_total() -> None:
    generator = np.random.default_rng(0)
    row = torch.from_numpy(generator.random(300_000).astype(np.float32))
    module = Weights({"w": row.numpy()})
    kk.torch.bound_(module, kk.bound.Simplex(1_000.0))
    assert float(module.w.detach().double().sum()) == pytest.approx(1_000.0, rel=1e-6)
    jax = load_quietly("jax")
    found, _, _ = kk.jax.project({"w": jax.numpy.asarray(row.numpy())}, kk.bound.Simplex(1_000.0))
    assert float(np.asarray(found["w"], np.float64).sum()) == pytest.approx(1_000.0, rel=1e-5)


def test_arrays_of_ends_hold_entry_by_entry_through_attach() -> None:
    layer = torch.nn.Linear(3, 2)
    low = layer.weight.detach().clone() - 0.01
    rule = kk.bound.Box({"weight": low}, {"bias": 0.1})
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    handle = kk.torch.attach(optimizer, layer, bound=rule)
    for _ in range(2):
        optimizer.zero_grad()
        (layer.weight.sum() - layer.bias.sum()).backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), low)
    assert layer.bias.detach().max() == pytest.approx(0.1)
    assert handle.last_bound is not None and handle.last_bound.engaged


def test_rules_are_equal_by_numbers_and_shape() -> None:
    row, column = np.zeros((1, 2)), np.zeros((2, 1))
    assert kk.bound.Box(row) == kk.bound.Box(row.copy()) != kk.bound.Box(row + 1)
    assert kk.bound.Box(row) != kk.bound.Box(column)
    assert len({kk.bound.Box(row), kk.bound.Box(row.copy()), kk.bound.Box(column)}) == 2


def test_ends_and_normals_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="lower or an upper end"):
        kk.bound.Box()
    with pytest.raises(InvalidArgument, match="lower end is above"):
        kk.bound.Box(1.0, 0.0)
    with pytest.raises(InvalidArgument, match="lower end is above"):
        kk.numpy.bound({"w": np.zeros(2)}, kk.bound.Box({"w": np.array([0.0, 2.0])}, 1.0))
    for bad in ("1", math.nan, [math.nan], object(), {"w": None}):
        with pytest.raises(InvalidArgument):
            kk.bound.Box(bad)
    with pytest.raises(InvalidArgument, match=r"Box: w.*got \(3,\)"):
        kk.numpy.bound({"w": np.zeros(2)}, kk.bound.Box(np.zeros(3)))
    for bound in (kk.numpy.bound, lambda arrays, rule: kk.torch.bound_(Weights(arrays), rule)):
        with pytest.raises(UnknownName, match="no tensor"):
            bound({"w": np.zeros(2)}, kk.bound.Box({"v*": 0.0}))
        with pytest.raises(NonFinite):
            bound({"w": np.array([1.0, math.nan])}, kk.bound.L1Ball(1.0))
    for normal in (0.0, None):
        with pytest.raises(InvalidArgument, match="not zero"):
            kk.bound.HalfSpace(normal, 1.0)
    with pytest.raises(InvalidArgument, match="offset"):
        kk.bound.HalfSpace(1.0, math.inf)
    with pytest.raises(InvalidArgument, match="'tensor', 'global'"):
        kk.bound.HalfSpace(1.0, 1.0, per="unit")
    with pytest.raises(InvalidArgument, match="low is above high"):
        kk.bound.MinMaxNorm(2.0, 1.0)
    with pytest.raises(InvalidArgument, match="flag"):
        kk.bound.L1Ball(1.0, sphere=1)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_are_data(rule: Any) -> None:
    again = from_dict(to_dict(rule, "bound"), "bound")
    assert again == rule and hash(again) == hash(rule)


def test_empty_and_zero_weights_are_left() -> None:
    arrays = {"w": np.zeros((0, 3)), "v": np.zeros(3)}
    for rule in (kk.bound.L1Ball(1.0), kk.bound.Box(-1.0, 1.0), kk.bound.L1Ball(1.0, sphere=True)):
        module = Weights(arrays)
        outcome, _ = kk.torch.bound_(module, rule)
        assert not outcome.engaged and not module.arrays()["v"].any()
    module = Weights({"w": np.zeros((0, 3))})
    assert not kk.torch.bound_(module, kk.bound.Simplex())[0].engaged


def test_chosen_axes_take_the_place_of_the_layers() -> None:
    layer = torch.nn.Conv2d(3, 4, 2)
    before = layer.weight.detach().clone()
    kk.torch.bound_(layer, kk.bound.MaxNorm(0.1), unit_axes={"weight": (0, 1)})
    sizes = layer.weight.detach().flatten(2).norm(dim=2)
    torch.testing.assert_close(sizes, before.flatten(2).norm(dim=2).clamp(max=0.1))
    with pytest.raises(InvalidArgument, match="no such axis"):
        kk.torch.bound_(layer, kk.bound.MaxNorm(0.1), unit_axes={"weight": 4})
    with pytest.raises(Unsupported, match="one axis of units"):
        kk.torch.bound_(layer, kk.bound.SpectralCap(0.1), unit_axes={"weight": (0, 1)})


def test_what_a_box_names_is_bounded_though_it_is_a_gain() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    kk.torch.bound_(layers, kk.bound.Box({"1.weight": -0.5}, {"1.weight": 0.5}))
    assert layers[1].weight.tolist() == [0.5, 0.5]
    outcome, _ = kk.torch.bound_(layers, kk.bound.Box(-9.0, 0.25))
    assert layers[1].weight.tolist() == [0.5, 0.5] and "1.weight" in outcome.left_alone
