"""Quantizers against their papers' formulas in plain NumPy, and the laws of the grids."""

from __future__ import annotations

import itertools
import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from karikomi import pack
from karikomi.errors import InvalidArgument
from karikomi.quantize import (
    CERWU,
    GPTQ,
    AdaRound,
    AffineGrid,
    Coded,
    OctaveGrid,
    OutputUnits,
    UniformQuantizer,
    kmeans,
    octaves,
)
from karikomi.quantize.code_lengths import CodeLengths, coded_bits, entropy_bits
from karikomi.quantize.error_feedback import Lattice, RoundingProblem
from karikomi.quantize.mixed_widths import mixed_widths
from karikomi.quantize.steps import factor_at, relative_steps
from karikomi.quantize.units import from_rows, to_rows
from karikomi.reconstruction.gptq import rounded, spread_of
from karikomi.reconstruction.least_squares import LeastSquares


def layer(
    seed: int, rows: int = 4, inputs: int = 9, groups: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and the Gram matrix of inputs that are correlated and of many sizes."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(groups, inputs, inputs)) @ random.normal(size=(groups, inputs, 40))
    samples = mixed * random.uniform(0.2, 2.0, size=(groups, inputs, 1))
    return random.normal(size=(rows * groups, inputs)), samples @ samples.swapaxes(1, 2)


def by_the_paper(
    weights: np.ndarray, gram: np.ndarray, step: float, limit: int, damping: float, order: list[int]
) -> np.ndarray:
    """Return the codes of OBQ in a fixed order: the inverse of the inputs left, downdated one by one."""
    damped = gram + damping * np.trace(gram) / len(gram) * np.eye(len(gram))
    inverse, work = np.linalg.inv(damped), weights.copy()
    codes = np.zeros_like(work)
    for j in order:
        codes[:, j] = np.clip(np.rint(work[:, j] / step), -limit, limit)
        error = (work[:, j] - step * codes[:, j]) / inverse[j, j]
        work -= error[:, None] * inverse[j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@settings(max_examples=20)
@given(st.integers(0, 1000), st.booleans(), st.sampled_from([1, 4, 128]))
def test_gptq_is_obq_in_a_fixed_order(seed: int, by_energy: bool, block: int) -> None:
    weights, gram = layer(seed)
    lattice = Lattice(np.full((1, 1), 0.4), -3, 3)
    method = GPTQ(by_energy=by_energy, block=block)
    found = rounded(method, weights, LeastSquares.of(weights, gram), lattice)
    energy = np.argsort(-np.diag(gram[0]), kind="stable")
    order = energy.tolist() if by_energy else list(range(weights.shape[1]))
    assert found.codes.tolist() == by_the_paper(weights, gram[0], 0.4, 3, 0.01, order).tolist()


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_each_group_is_rounded_by_its_own_inputs(seed: int) -> None:
    weights, gram = layer(seed, groups=3)
    scale = np.random.default_rng(seed).uniform(0.2, 0.6, size=(len(weights), 1))
    problem = LeastSquares.of(weights, gram)
    whole = rounded(GPTQ(), weights, problem, Lattice(scale, -7, 7)).codes
    for group in range(3):
        at = slice(4 * group, 4 * group + 4)
        own = LeastSquares.of(weights[at], gram[group : group + 1])
        part = rounded(GPTQ(), weights[at], own, Lattice(scale[at], -7, 7)).codes
        assert np.array_equal(whole[at], part)


def test_rounding_starts_from_the_regression_on_the_present_inputs() -> None:
    """Inputs that came out twice as large call for halves of the weights."""
    weights, gram = layer(3)
    wide, lattice = LeastSquares.of(weights, gram), Lattice(np.full((1, 1), 1e-4), -(2**30), 2**30)
    twice = LeastSquares(4.0 * wide.gram, 2.0 * wide.cross, wide.energy)
    codes = rounded(GPTQ(damping=1e-9), weights, twice, lattice).codes
    np.testing.assert_allclose(1e-4 * codes, 0.5 * weights, atol=1e-3)


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_masked_weights_are_zero_and_the_others_make_up_for_them(seed: int) -> None:
    weights, gram = layer(seed)
    gone = np.random.default_rng(seed).random(weights.shape) < 0.3
    weights[gone] = 0.0
    problem = LeastSquares.of(weights, gram)
    lattice = Lattice(np.full((1, 1), 0.3), 0, 40, np.full((1, 1), 20.0))
    for method in (GPTQ(), CERWU()):
        codes = rounded(method, weights, problem, lattice, gone=gone).codes
        assert (codes[gone] == 20).all() and not lattice.values(codes)[gone].any()


def test_the_price_of_bits_buys_shorter_codes_and_costs_error() -> None:
    weights, gram = layer(5, rows=60, inputs=30)
    problem, lattice = LeastSquares.of(weights, gram), Lattice(np.full((1, 1), 0.3), -99, 99)
    found = [
        rounded(CERWU(exchange=exchange), weights, problem, lattice).codes
        for exchange in (0.0, 0.05, 0.5)
    ]
    assert np.array_equal(found[0], rounded(GPTQ(), weights, problem, lattice).codes)
    bits = [entropy_bits(codes) for codes in found]
    errors = [problem.error(lattice.values(codes)) for codes in found]
    assert bits[0] > bits[1] > bits[2] and errors[0] < errors[1] < errors[2]


def test_an_important_row_pays_for_its_bits() -> None:
    weights, gram = layer(6, rows=2, inputs=400)
    weights[1] = weights[0]
    problem, lattice = LeastSquares.of(weights, np.eye(400)[None]), Lattice(np.ones((1, 1)), -9, 9)
    given = {"importance": np.array([0.1, 10.0])}
    codes = rounded(CERWU(exchange=0.2), weights, problem, lattice, **given).codes
    alone = CERWU(exchange=0.2).alone(weights, lattice, given["importance"])
    nearest = lattice.nearest(weights)
    for found in (codes, alone):
        assert np.abs(found[0]).sum() < 0.8 * np.abs(nearest[0]).sum()
        assert np.mean(found[1] == nearest[1]) > 0.95
        assert (np.abs(found) <= np.abs(nearest)).all()


@pytest.mark.parametrize("seed", range(3))
def test_adaround_takes_the_value_below_or_above_and_errs_less_than_the_nearest(seed: int) -> None:
    weights, gram = layer(seed, rows=20, inputs=30)
    problem, lattice = LeastSquares.of(weights, gram), Lattice(np.full((1, 1), 0.5), -7, 7)
    codes = rounded(AdaRound(damping=1e-6), weights, problem, lattice).codes
    assert set(np.unique(codes - np.floor(weights / 0.5))) == {0, 1}
    nearest = lattice.values(lattice.nearest(weights))
    assert problem.error(lattice.values(codes)) < 0.8 * problem.error(nearest)


def test_adaround_takes_the_steps_of_adam_on_its_formula() -> None:
    torch = pytest.importorskip("torch")
    weights, gram = layer(0, rows=3, inputs=5)
    weights, none = weights[None], np.zeros((1, 3, 5), bool)
    lattice = Lattice(np.full((1, 1), 0.5), -7, 7)
    problem = RoundingProblem(weights, gram, gram, none, lattice, np.ones((1, 3)))
    below = np.floor(weights / 0.5)
    hidden = np.random.default_rng(1).normal(size=weights.shape)
    free = torch.tensor(hidden, requires_grad=True)
    adam = torch.optim.Adam([free], lr=0.3)
    for step in range(1, 11):
        up = (1.2 * torch.sigmoid(free) - 0.1).clamp(0, 1)
        error = 0.5 * (torch.tensor(below) + up) - torch.tensor(weights)
        loss = (error @ torch.tensor(gram) * error).sum() / 20.0
        if step >= 2:  # a fifth of the steps is without the penalty
            beta = 2 + 9 * (1 + math.cos(math.pi * (step / 10 - 0.2) / 0.8))
            loss = loss + 0.7 * (1 - (2 * up - 1).abs() ** beta).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    rounding = AdaRound(steps=10, learning_rate=0.3, penalty=0.7)
    rounding._learn_(hidden, problem, below, np.full(weights.shape, 0.5), 20.0)
    np.testing.assert_allclose(hidden, free.detach().numpy(), rtol=1e-6)


def test_what_compensation_leaves() -> None:
    assert spread_of(np.diag([1.0, 1.0, 1.0])[None], 0.01) == pytest.approx(1.0)
    _, gram = layer(7)
    damped = gram[0] + 0.01 * np.trace(gram[0]) / 9 * np.eye(9)
    order = np.argsort(-np.diag(gram[0]), kind="stable")
    left = []
    for place, j in enumerate(order):
        rest = order[place + 1 :]
        cross = damped[j, rest]
        left.append(damped[j, j] - cross @ np.linalg.solve(damped[np.ix_(rest, rest)], cross))
    assert spread_of(gram, 0.01) == pytest.approx(np.mean(left) / np.mean(np.diag(damped)))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50))
def test_bits_are_those_of_shannon(codes: list[int]) -> None:
    array = np.array(codes)
    shares = [codes.count(code) / len(codes) for code in codes]
    bits = -np.log2(shares).sum()
    assert entropy_bits(array) == pytest.approx(bits, abs=1e-9)
    assert coded_bits(array) == pytest.approx(bits + 8 * len(set(codes)))
    lengths = CodeLengths.measured(array, 3)
    assert (2.0**-lengths.bits).sum() == pytest.approx(1.0)
    assert np.array_equal(lengths.of(np.array([9, -9])), lengths.of(np.array([3, -3])))


@given(st.dictionaries(st.sampled_from("abc"), st.floats(1e-9, 1e9), min_size=1))
def test_a_squared_step_times_the_curvature_is_the_same_everywhere(curvatures: dict) -> None:
    steps = relative_steps(curvatures, dict.fromkeys(curvatures, 1.0))
    products = [steps[name] ** 2 * curvatures[name] for name in curvatures]
    assert products == pytest.approx([1.0] * len(products))


@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 50)), min_size=1, max_size=3),
    st.floats(2.0, 8.0),
)
def test_mixed_widths_are_near_the_best_there_are(tensors: list, mean: float) -> None:
    weighted = {str(n): value for n, (value, _) in enumerate(tensors)}
    sizes = {str(n): 1 for n in range(len(tensors))}
    found = mixed_widths(weighted, sizes, mean, where="")

    def loss(widths: tuple[int, ...]) -> float:
        return sum(
            w / (2 ** (b - 1) - 1) ** 2 for w, b in zip(weighted.values(), widths, strict=True)
        )

    allowed = [
        widths
        for widths in itertools.product(range(2, 9), repeat=len(sizes))
        if sum(widths) <= mean * len(sizes) + 1e-9
    ]
    assert tuple(found.values()) in allowed
    assert loss(tuple(found.values())) == pytest.approx(min(map(loss, allowed)))


@given(st.floats(0.5, 12.0), st.floats(-8.0, 8.0))
def test_the_factor_of_a_rate_is_found(rate: float, shift: float) -> None:
    factor = factor_at(rate, lambda f: max(shift - np.log2(f), 0.0), where="")
    assert shift - np.log2(factor) == pytest.approx(rate, abs=1e-4)


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=6),
        elements=st.floats(-99, 99, width=32),
    ),
    st.integers(2, 8),
    st.sampled_from([None, 1, 2, 4]),
    st.booleans(),
    st.sampled_from([0, 1, None]),
)
def test_affine_grids_err_by_half_a_step_and_keep_zeros(
    array: np.ndarray, bits: int, group: int | None, symmetric: bool, axis: int | None
) -> None:
    units = OutputUnits(axis)
    quantizer = UniformQuantizer(group=group, symmetric=symmetric)
    coded = quantizer.quantize(array, bits, units=units)
    assert coded.shape == array.shape and not coded.decode()[array == 0].any()
    if isinstance(coded.grid, AffineGrid):
        step = from_rows(coded.grid.spread(array.shape)[0], array.shape, units)
        # Rounding the zero point moves an end of the range by half a step at most.
        assert np.all(np.abs(coded.decode() - array) <= step * 1.001 + 1e-30)
        assert np.array_equal(from_rows(to_rows(array, units), array.shape, units), array)
        low, high = coded.codes.min(), coded.codes.max()
        assert 0 <= low and high <= 2**bits - 1


@given(
    hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(0, 2.0**90, width=32)),
    st.sampled_from([1, 3, 16, 64, 256]),
)
def test_octaves_err_by_half_a_ratio(array: np.ndarray, per_octave: int) -> None:
    coded = octaves(array, per_octave=per_octave)
    found, some = coded.decode(), array >= np.finfo(np.float32).tiny
    ratio = found[some].astype(np.float64) / array[some]
    assert np.all(np.abs(np.log2(ratio)) <= 0.5 / per_octave + 1e-6)
    assert not found[array == 0].any() and np.isfinite(found).all()


def test_octaves_are_float32_roots_of_two() -> None:
    for per_octave in (1, 3, 64, 256):
        grid = OctaveGrid(per_octave, -3, 4 * per_octave)
        codes = np.arange(4 * per_octave + 1, dtype=np.uint16)
        wanted = np.exp2(-3 + (codes[1:] - 1.0) / per_octave).astype(np.float32)
        np.testing.assert_array_max_ulp(grid.decode(codes)[1:], wanted, 1)
    largest = octaves(np.float32([np.finfo(np.float32).max, 2.0**-126]), per_octave=2)
    assert np.isfinite(largest.decode()).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: OctaveGrid(0, 0, 1),
        lambda: OctaveGrid(2, -127, 1),
        lambda: OctaveGrid(1, 127, 3),
        lambda: OctaveGrid(2, 0, 2**16),
        lambda: octaves(np.float32([-1.0])),
        lambda: octaves(np.float32([1.0]), per_octave=0),
        lambda: AffineGrid(np.float32([0.0]), np.float32([0]), OutputUnits(), 4),
        lambda: AffineGrid(np.float32([1.0]), np.float32([0.5]), OutputUnits(), 4),
        lambda: AffineGrid(np.float32([1.0]), np.float32([16]), OutputUnits(), 4),
        lambda: AffineGrid(np.float32([1.0]), np.float32([0, 1]), OutputUnits(), 4),
        lambda: AffineGrid(np.float32([1.0]), np.float32([0]), OutputUnits(), 4, 0),
        lambda: Coded(
            np.zeros((2, 4), int), AffineGrid(np.float32([1.0]), np.float32([0]), OutputUnits(0), 4)
        ),
        lambda: Coded(
            np.zeros(4, int), AffineGrid(np.float32([1.0]), np.float32([0]), OutputUnits(1), 4)
        ),
        lambda: Coded(
            np.array([16]), AffineGrid(np.float32([1.0]), np.float32([0]), OutputUnits(), 4)
        ),
        lambda: Coded(np.array([3]), OctaveGrid(1, 0, 2)),
        lambda: kmeans(np.ones(3), importance=np.ones(2)),
        lambda: kmeans(np.ones(3), importance=-np.ones(3)),
        lambda: UniformQuantizer(group=0),
    ],
)
def test_grids_and_arguments_that_do_not_fit_are_refused(make) -> None:
    with pytest.raises(InvalidArgument):
        make()


def test_new_grids_are_packed_and_read_back(tmp_path) -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=(4, 6, 3)).astype(np.float32)
    given = {
        "groups": UniformQuantizer(group=4).quantize(weights, 3, units=OutputUnits(0)),
        "zero points": UniformQuantizer(symmetric=False).quantize(
            weights + 1, 5, units=OutputUnits(1, 2)
        ),
        "one": UniformQuantizer(symmetric=False).quantize(weights, 8, units=OutputUnits()),
        "octaves": octaves(np.abs(weights)),
        "empty": octaves(weights[:0]),
    }
    stored = pack.load_coded(pack.save(given, tmp_path / "grids.karikomi"))
    for name, coded in given.items():
        assert np.array_equal(stored[name].decode(), coded.decode()), name
        assert type(stored[name].grid) is type(coded.grid)


@pytest.mark.parametrize("start", ["linear", "density", "random"])
def test_starts_end_in_means_of_their_clusters(start: str) -> None:
    array = np.random.default_rng(0).laplace(size=3000).astype(np.float32)
    mass = np.random.default_rng(1).exponential(size=array.shape)
    coded = kmeans(array, entries=8, iterations=500, start=start, importance=mass)
    smoothed = mass / mass.mean() + 1e-3
    for code in np.unique(coded.codes):
        own = coded.codes == code
        mean = np.average(array[own].astype(np.float64), weights=smoothed[own])
        assert coded.grid.values[code] == pytest.approx(mean, rel=1e-4)
    assert np.array_equal(
        coded.codes, kmeans(array, entries=8, iterations=500, start=start, importance=mass).codes
    )


def test_important_weights_get_the_nearer_values() -> None:
    array = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    mass = np.where(array > 1.0, 100.0, 1.0)
    plain, weighted = kmeans(array, entries=6), kmeans(array, entries=6, importance=mass)
    errors = [float((mass * (c.decode() - array) ** 2).sum()) for c in (plain, weighted)]
    assert errors[1] < 0.6 * errors[0]


def test_density_starts_where_the_weights_are() -> None:
    array = np.concatenate([np.linspace(0.9, 1.1, 99), [100.0]]).astype(np.float32)
    near = kmeans(array, entries=4, iterations=0, start="density").grid.values
    assert np.count_nonzero(near < 2.0) == 5
