"""The search of a rate on host arrays: steps by curvature, spreads and rows, bits of the codes, the narrowest grid."""

from __future__ import annotations

import numpy as np
import pytest

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.quantize import GPTQ, Coded, UniformGrid
from karikomi.quantize.method import Method
from karikomi.quantize.step_search import StepSearch, narrowed, nearest

RNG = np.random.default_rng(2)
A, B = RNG.normal(size=(40, 30)), RNG.laplace(size=(20, 50))
CURVATURE = {"a": np.ones(A.shape), "b": np.full(B.shape, 100.0)}


def step(search: StepSearch, name: str, factor: float = 1.0) -> float:
    return float(search.grids(factor)[name].scale[0])


def test_steps_follow_curvature_and_what_compensation_leaves() -> None:
    options = {"fixed": 0.0, "numbers": A.size + B.size}
    search = StepSearch({"a": A, "b": B}.items(), CURVATURE, **options)
    assert step(search, "a") / step(search, "b") == pytest.approx(10.0)
    spread = StepSearch({"a": A, "b": B}.items(), CURVATURE, {"b": 0.25}, **options)
    assert step(spread, "a") / step(spread, "b") == pytest.approx(5.0)
    assert step(search, "a", 3.0) == pytest.approx(3.0 * step(search, "a"))
    # Without curvature: the same part of the deviation.
    plain = StepSearch({"a": A, "b": B}.items(), {}, **options)
    assert step(plain, "a") / step(plain, "b") == pytest.approx(A.std() / B.std(), rel=0.05)


def test_rows_of_an_embedding_have_steps_of_their_own() -> None:
    curvature = {"a": np.repeat(np.array([1.0] * 39 + [1600.0])[:, None], 30, axis=1)}
    search = StepSearch({"a": A}.items(), curvature, by_rows={"a"}, fixed=0.0, numbers=A.size)
    scale = search.grids(0.1)["a"].scale
    assert scale.shape == (40,) and len(set(scale[:39])) == 1
    assert scale[0] / scale[39] >= 8.0


@pytest.mark.parametrize("rate", [1.0, 2.5, 6.0])
def test_the_codes_have_the_rate_with_all_that_is_coded(rate: float) -> None:
    search = StepSearch(
        {"a": A, "b": B}.items(), CURVATURE, fixed=400.0, numbers=A.size + B.size + 50
    )
    factor = search.factor_at(rate, where="test")
    grids = search.grids(factor)
    coded = {name: nearest(array, grids[name]) for name, array in (("a", A), ("b", B))}
    bits = 400.0
    for tensor in coded.values():
        counts = np.unique(tensor.codes, return_counts=True)[1].astype(float)
        bits += (counts * np.log2(counts.sum() / counts)).sum() + 8 * counts.size
    assert bits / (A.size + B.size + 50) == pytest.approx(rate, rel=0.01)
    assert search.rate_of(coded) == pytest.approx(rate, rel=0.01)
    # A factor with too many bits gets larger.
    assert search.correction(factor, 0.5) > 1.0 > search.correction(factor, -0.5)
    for tensor in coded.values():
        small = narrowed(tensor)
        assert (
            np.array_equal(small.decode(), tensor.decode()) and small.grid.bits <= tensor.grid.bits
        )
        assert 2 ** (small.grid.bits - 2) <= max(np.abs(tensor.codes).max(), 1)
    with pytest.raises(Unsupported, match="out of reach"):
        search.factor_at(0.01, where="test")


def test_grids_cover_twice_the_range_and_sixteen_bits_at_most() -> None:
    search = StepSearch({"a": A}.items(), {}, fixed=0.0, numbers=A.size)
    for factor in (2.0**-30, 0.01, 1.0, 2.0**20):
        grid = search.grids(factor)["a"]
        assert 2 <= grid.bits <= 16 and grid.scale[0] >= np.finfo(np.float32).tiny
        assert np.abs(A).max() <= grid.limit * grid.scale[0] * (1 + 1e-6) * (
            1 if grid.bits == 16 else 0.6
        )


def test_a_method_is_the_quantizer_for_the_size_with_its_options() -> None:
    sizes = {"bits": None, "entries": None, "rate": 2.5}
    found = Method.of(None, sizes, data=True, where="x")
    assert (found.rate, found.size, found.compensates) == (2.5, 0, True)
    assert not Method.of(None, sizes, where="x").compensates
    given = GPTQ(damping=0.5)
    assert (
        Method.of(given, {**sizes, "rate": None, "bits": 3}, data=True, where="x").quantizer
        is given
    )
    for bad in (17.0, -1.0, "2"):
        with pytest.raises(InvalidArgument, match="rate out of range"):
            Method.of(None, {**sizes, "rate": bad}, where="x")
    with pytest.raises(InvalidArgument, match="takes entries"):
        Method.of("kmeans", sizes, where="x")
    with pytest.raises(InvalidArgument, match="needs data"):
        Method.of("gptq", sizes, where="x")


def test_the_nearest_codes_stay_on_the_grid() -> None:
    grid = UniformGrid(np.float32([1.0, 0.5]), 0, 3)
    found = nearest(np.array([[0.4, -9.0], [0.3, 9.0]]), grid)
    assert isinstance(found, Coded) and found.codes.tolist() == [[0, -3], [1, 3]]
