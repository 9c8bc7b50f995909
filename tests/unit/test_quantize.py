"""Quantizers: their error bounds, their determinism, and what they refuse."""

from __future__ import annotations

import time

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from karikomi.errors import InvalidArgument, NonFinite
from karikomi.quantize import Codebook, Coded, UniformGrid, kmeans, uniform

finite = st.floats(-(2.0**99), 2.0**99, width=32)
weights = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9), elements=finite
)


@given(weights, st.integers(2, 16), st.booleans())
def test_uniform_errs_by_half_a_step_at_most(array, bits, per_channel):
    axis = 0 if per_channel else None
    coded = uniform(array, bits=bits, axis=axis)
    assert isinstance(coded.grid, UniformGrid)
    shape = (-1,) + (1,) * (array.ndim - 1) if per_channel else (1,) * array.ndim
    step = coded.grid.scale.reshape(shape).astype(np.float64)
    error = np.abs(coded.codes * step - array)
    # The scale itself is rounded to float32, so the largest weight may miss by 2**-24 of itself.
    assert np.all(error <= step / 2 + np.abs(array) * 2.0**-23)
    assert np.array_equal(coded.decode(), (coded.codes * step.astype(np.float32)))
    assert coded.decode().dtype == np.float32 and coded.shape == array.shape


@given(weights, st.integers(2, 8))
def test_uniform_of_its_own_result_is_the_same(array, bits):
    once = uniform(array, bits=bits)
    twice = uniform(once.decode(), bits=bits)
    assert np.array_equal(once.codes, twice.codes) or bits < 4 or np.abs(array).max() < 1e-30


def test_uniform_rounds_half_to_even():
    coded = uniform(np.float32([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]), axis=None)
    assert coded.codes.tolist() == [127, 0, 2, 2, 0, -2]


def test_uniform_scales_each_index_of_the_axis():
    array = np.float32([[1, 2, 0], [4, 254, 0]])
    assert uniform(array, axis=1).grid.scale.tolist() == pytest.approx([4 / 127, 2, 1])
    assert uniform(array, axis=-1).grid.axis == 1
    assert uniform(np.float32(5.0), axis=None).decode() == 5.0


@given(st.sampled_from([(4, 3, 2), (6, 1), (2, 0, 3), (0, 5)]), st.sampled_from([1, 2]))
def test_groups_are_parts_of_the_first_axis(shape, groups):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    coded = uniform(array, bits=4, axis=1, groups=groups)
    parts = [uniform(part, bits=4, axis=1) for part in np.split(array, groups)]
    assert np.array_equal(coded.grid.scale, np.concatenate([part.grid.scale for part in parts]))
    assert np.array_equal(coded.codes, np.concatenate([part.codes for part in parts]))
    assert np.array_equal(coded.decode(), np.concatenate([part.decode() for part in parts]))


@pytest.mark.parametrize(("axis", "groups"), [(1, 3), (1, 0), (1, 2.0), (0, 2), (None, 2)])
def test_groups_that_do_not_fit_are_refused(axis, groups):
    with pytest.raises(InvalidArgument, match="groups out of range"):
        uniform(np.ones((4, 3)), axis=axis, groups=groups)


def test_uniform_survives_subnormal_weights():
    coded = uniform(np.float32([1e-44, 0.0]), axis=None)
    assert coded.grid.scale[0] >= np.finfo(np.float32).tiny


@given(weights, st.integers(1, 20))
def test_kmeans_keeps_zeros_and_takes_the_nearest_value(array, entries):
    coded = kmeans(array, entries=entries)
    values = coded.grid.values
    assert values.size <= entries + 1 and np.all(np.diff(values[1:]) > 0)
    assert np.array_equal(coded.codes == 0, array == 0)
    assert np.array_equal(coded.decode() == 0, array == 0)
    kept = array[array != 0].astype(np.float64)
    if kept.size:
        distance = np.abs(kept[:, None] - values[1:].astype(np.float64))
        mine = np.abs(kept - coded.decode()[array != 0])
        assert np.all(mine <= distance.min(axis=1) * (1 + 1e-12))
        assert set(np.unique(coded.codes)) >= set(range(1, values.size))


@given(weights)
def test_kmeans_is_exact_where_entries_suffice(array):
    coded = kmeans(array, entries=max(1, np.unique(array).size))
    assert np.array_equal(coded.decode(), array)


def test_kmeans_centroids_are_means_and_beat_the_start():
    array = np.random.default_rng(0).laplace(size=20_000).astype(np.float32)
    start = kmeans(array, entries=16, iterations=0)
    coded = kmeans(array, entries=16, iterations=500)
    for code in np.unique(coded.codes):
        own = array[coded.codes == code].astype(np.float64)
        assert coded.grid.values[code] == pytest.approx(own.mean(), rel=1e-5)
    assert np.square(coded.decode() - array).sum() < np.square(start.decode() - array).sum()
    # Linear initialisation: without iterations the values are evenly spaced.
    assert np.allclose(np.diff(start.grid.values[1:], n=2), 0, atol=2.5)


def test_kmeans_starts_evenly_spaced():
    array = np.linspace(-4, 5, 91, dtype=np.float32)
    assert kmeans(array, entries=4, iterations=0).grid.values.tolist() == [0, -4, -1, 2, 5]


@pytest.mark.parametrize(
    ("array", "entries", "iterations"),
    [
        ([-1, 1, -1, 1], 1, 30),
        ([-1, 1, 0, -1, 1], 1, 30),
        ([-2, -1e-30, 1e-30, 2], 3, 30),
        ([-2, 1e-30, 2e-30, 3e-30, 2], 3, 0),
        ([-1e-44, 1e-44], 1, 30),
        ([-1, 1e-45, 1], 1, 1),
    ],
)
def test_kmeans_never_turns_a_weight_into_zero(array, entries, iterations):
    """A centroid at zero would prune, behind the back of every mask, what pruning has left."""
    array = np.float32(array)
    coded = kmeans(array, entries=entries, iterations=iterations)
    smallest = np.finfo(np.float32).tiny
    assert np.array_equal(coded.decode() == 0, array == 0)
    assert np.all(np.abs(coded.grid.values[1:]) >= smallest)
    # As near to zero as it gets: the error is that of the centroid at zero.
    middle = np.abs(coded.grid.values[1:]).min()
    assert middle == smallest
    again = kmeans(array, entries=entries, iterations=iterations)
    assert again.grid.values.tobytes() == coded.grid.values.tobytes()


def test_kmeans_is_fast_and_deterministic():
    array = np.random.default_rng(1).normal(size=400_000).astype(np.float32)
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        coded = kmeans(array, entries=32)
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.5
    assert coded.codes.tobytes() == kmeans(array.copy(), entries=32).codes.tobytes()


def test_kmeans_of_zeros_has_the_zero_only():
    coded = kmeans(np.zeros((2, 3)))
    assert coded.grid.values.tolist() == [0.0] and not coded.codes.any()


@pytest.mark.parametrize("quantize", [uniform, kmeans])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_non_finite_weights_are_named(quantize, bad):
    with pytest.raises(NonFinite, match=r"^fc1\.weight: .*1 of 3"):
        quantize(np.array([0.0, bad, 1.0]), name="fc1.weight")


@pytest.mark.parametrize("quantize", [uniform, kmeans])
def test_weights_must_be_numbers(quantize):
    for bad in (np.array(["a"]), np.ones(2, complex), np.array([None])):
        with pytest.raises(InvalidArgument, match="real numbers"):
            quantize(bad)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: uniform(w, bits=1),
        lambda w: uniform(w, bits=17),
        lambda w: uniform(w, bits=True),
        lambda w: uniform(w, bits=8.0),
        lambda w: uniform(w, axis=1),
        lambda w: uniform(w, axis=-2),
        lambda w: uniform(w[0], axis=0),
        lambda w: kmeans(w, entries=0),
        lambda w: kmeans(w, entries=65536),
        lambda w: kmeans(w, entries=4.0),
        lambda w: kmeans(w, iterations=-1),
    ],
)
def test_arguments_out_of_range_are_refused(call):
    with pytest.raises(InvalidArgument, match="out of range"):
        call(np.ones(3, np.float32))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-40])
def test_bad_scales_are_refused(scale):
    with pytest.raises(InvalidArgument, match="scale"):
        UniformGrid(np.float32([scale]), None, 8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformGrid(np.ones(2, np.float32), None, 8),
        lambda: UniformGrid(np.ones(2, np.float64), 0, 8),
        lambda: UniformGrid(np.ones((1, 1), np.float32), 0, 8),
        lambda: UniformGrid(np.ones(1, np.float32), -1, 8),
        lambda: UniformGrid(np.ones(1, np.float32), True, 8),
        lambda: UniformGrid(np.ones(1, np.float32), None, 33),
        lambda: UniformGrid(np.ones(1, np.float32), None, 8, 2),
        lambda: UniformGrid(np.ones(2, np.float32), 0, 8, 2),
        lambda: UniformGrid(np.ones(2, np.float32), 1, 8, 0),
        lambda: Coded(np.zeros((3, 1), int), UniformGrid(np.ones(2, np.float32), 1, 8, 2)),
        lambda: Coded(np.zeros((4, 2), int), UniformGrid(np.ones(2, np.float32), 1, 8, 2)),
        lambda: Codebook(np.float32([])),
        lambda: Codebook(np.float32([1.0])),
        lambda: Codebook(np.float32([-0.0])),
        lambda: Codebook(np.float32([0.0, np.nan])),
        lambda: Codebook(np.zeros(65537, np.float32)),
        lambda: Coded(np.zeros(2), Codebook(np.float32([0]))),
        lambda: Coded([0], Codebook(np.float32([0]))),
        lambda: Coded(np.zeros(2, int), "grid"),
        lambda: Coded(np.array([1]), Codebook(np.float32([0]))),
        lambda: Coded(np.array([-1]), Codebook(np.float32([0]))),
        lambda: Coded(np.array([-128]), UniformGrid(np.float32([1]), None, 8)),
        lambda: Coded(np.zeros(3, int), UniformGrid(np.ones(2, np.float32), 0, 8)),
        lambda: Coded(np.zeros(3, int), UniformGrid(np.ones(3, np.float32), 1, 8)),
    ],
)
def test_grids_and_codes_that_do_not_fit_are_refused(make):
    with pytest.raises(InvalidArgument):
        make()
