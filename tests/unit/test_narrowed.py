"""Codes as integer kernels take them: what fits is kept, what does not errs least."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from karikomi.quantize import Codebook, Coded, UniformGrid, uniform
from karikomi.quantize.nearest import narrowed

CODES = arrays(
    np.int16, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(-600, 600)
)


@settings(max_examples=60)
@given(
    codes=CODES, axis=st.sampled_from([0, 1]), whole=st.booleans(), bits=st.sampled_from([4, 7, 8])
)
def test_units_that_fit_are_kept_and_others_err_least(
    codes: np.ndarray, axis: int, whole: bool, bits: int
) -> None:
    units, limit = codes.shape[axis], 2 ** (bits - 1) - 1
    scale = np.float32([0.25]) if whole else np.linspace(0.5, 2, units, dtype=np.float32)
    wide = Coded(codes, UniformGrid(scale, None if whole else axis, 16))
    found = narrowed(wide, bits=bits, axis=axis)
    assert found.grid.axis == axis and found.grid.bits == bits and found.codes.dtype == np.int8
    rows, kept = np.moveaxis(codes, axis, 0), np.moveaxis(found.codes, axis, 0)
    fits = np.abs(rows).max(1) <= limit
    assert np.array_equal(kept[fits], rows[fits])
    values = wide.decode()
    assert np.array_equal(
        found.decode().take(np.flatnonzero(fits), axis), values.take(np.flatnonzero(fits), axis)
    )

    def errors(coded: Coded) -> np.ndarray:
        return np.square(coded.decode().astype(float) - values).sum(1 - axis)

    clipped = Coded(
        np.clip(codes, -limit, limit), UniformGrid(np.broadcast_to(scale, units).copy(), axis, bits)
    )
    for other in (uniform(values, bits=bits, axis=axis), clipped):
        assert np.all(errors(found) <= errors(other) + 1e-9)


@pytest.mark.parametrize(
    "grid",
    [
        Codebook(np.float32([0, *np.linspace(-1, 1, 15)])),
        UniformGrid(np.linspace(0.1, 0.4, 6, dtype=np.float32), 1, 8),
        UniformGrid(np.linspace(0.1, 0.4, 12, dtype=np.float32), 1, 8, groups=2),
    ],
)
def test_scales_that_are_not_of_the_units_become_theirs(grid: object) -> None:
    codes = np.arange(24).reshape(4, 6) % 16
    coded = Coded(codes.astype(np.uint8 if isinstance(grid, Codebook) else np.int8), grid)  # type: ignore[arg-type]
    found = narrowed(coded)
    assert found.grid.numbers.shape == (4,) and found.grid.axis == 0
    assert np.abs(found.decode() - coded.decode()).max() <= np.abs(coded.decode()).max() / 127
