"""Rule x framework x law, for finite tensors."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.frameworks import (
    EAGER,
    FLUSHING,
    FRAMEWORKS,
    SHAPES,
    SLOW,
    UNIT_AXES,
    Apply,
    Tensors,
    serves,
    torch_parameters,
)
from contract.row import Row, norm
from contract.rows import CLIPS, EVERY, LIMITED
from depth import FULL, examples, turns
from karikomi.errors import InvalidArgument

Arrays = dict[str, np.ndarray]
DTYPES = [np.float16, np.float32, np.float64]
ROUNDING = {np.float64: 1e-12, np.float32: 1e-6}
# Of the largest entries: all of float32, and of float64 as much as leaves the joint norm finite.
EXPONENTS = {np.float64: (-1020, 1020), np.float32: (-140, 128)}


def cases(
    rows: list[Row],
    *,
    but: frozenset[str] = frozenset(),
    dtypes: Iterable[type] | None = None,
    every: bool = False,
) -> Callable[[Callable], Callable]:
    """Parametrize over rule x framework, wherever the rule can be met, and over `dtypes` if given.

    Where a framework is slow to begin (`SLOW`) a law meets one of so many rules, other laws others, in one of the
    dtypes; with `every` all rules, once compiled or eager, and half in a `tf.function`; in a full run all.
    """

    def parametrized(law: Callable) -> Callable:
        turn = {name: zlib.crc32(f"{law.__name__} {name}".encode()) for name in FRAMEWORKS}

        def met(name: str, place: int, row: Row) -> bool:
            if FULL or (every and (name not in EAGER or row.kind == "bound")):
                return FULL or name != "tf.function" or place % 2 == 0
            return (place + turn[name]) % min(SLOW.get(name, 1), len(rows)) == 0

        pairs = [
            (name, apply, row)
            for name, apply in FRAMEWORKS.items()
            if name not in but
            for place, row in enumerate(rows)
            if serves(name, row) and met(name, place, row)
        ]
        if dtypes is None:
            plain = [pytest.param(row, apply, id=f"{row}-{name}") for name, apply, row in pairs]
            return pytest.mark.parametrize(("row", "apply"), plain)(law)
        typed = [
            pytest.param(row, apply, dtype, id=f"{dtype.__name__}-{row}-{name}")
            for name, apply, row in pairs
            for dtype in turns(list(dtypes), row, name, full=FULL or name not in SLOW)
        ]
        return pytest.mark.parametrize(("row", "apply", "dtype"), typed)(law)

    return parametrized


def draws(dtype: type) -> st.SearchStrategy[Arrays]:
    """Draw tensors whose entries lie between two powers of two of a dtype, some of them 0."""
    powers = st.integers(*EXPONENTS[dtype]) | st.integers(-3, 3)
    return st.builds(
        _drawn, st.just(dtype), st.integers(0, 2**32 - 1), powers, powers, st.sampled_from([0, 0.5])
    )


def _drawn(dtype: type, seed: int, one: int, other: int, zeros: float) -> Arrays:
    generator = np.random.default_rng(seed)

    def entries(shape: tuple[int, ...]) -> np.ndarray:
        powers = generator.integers(min(one, other), max(one, other), shape, endpoint=True)
        numbers = np.ldexp(generator.uniform(-1.0, 1.0, shape), powers)
        return np.asarray(np.where(generator.random(shape) < zeros, 0.0, numbers), dtype=dtype)

    return {name: entries(shape) for name, shape in SHAPES.items()}


def sample(seed: int, *, scale: float = 1.0, dtype: type = np.float64) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        name: np.asarray(generator.normal(0.0, scale, shape), dtype=dtype)
        for name, shape in SHAPES.items()
    }


def assert_equal(found: Tensors, expected: Tensors, **tolerance: Any) -> None:
    assert list(found) == list(expected)
    for name, array in found.items():
        wanted = expected[name]
        if array is None or wanted is None:
            assert array is wanted, name
        elif tolerance:
            np.testing.assert_allclose(array, wanted, err_msg=name, **tolerance)
        else:
            assert array.dtype == wanted.dtype and array.shape == wanted.shape
            assert array.tobytes() == wanted.tobytes(), name


def referred(row: Row, tensors: Tensors) -> dict[str, np.ndarray | None]:
    present = {name: array for name, array in tensors.items() if array is not None}
    wide = [array.astype(np.float64) for array in present.values()]
    done = row.reference(wide, [UNIT_AXES.get(name) for name in present])
    return {**tensors, **dict(zip(present, done, strict=True))}


@cases(EVERY, dtypes=ROUNDING, every=True)
@settings(max_examples=examples(5, full=30))
@given(data=st.data())
def test_equals_the_reference(row: Row, apply: Apply, dtype: type, data: st.DataObject) -> None:
    tensors = data.draw(draws(dtype))
    tiny = float(np.finfo(dtype).smallest_normal)
    if apply in FLUSHING:
        tensors = {name: np.where(np.abs(a) < tiny, dtype(0), a) for name, a in tensors.items()}
    found, _, _ = apply(row, tensors)
    assert_equal(found, referred(row, tensors), rtol=ROUNDING[dtype], atol=tiny)


@cases([row for row in EVERY if row.bound], dtypes=ROUNDING)
@settings(max_examples=examples(4, full=30))
@given(data=st.data())
def test_never_above_the_bound(row: Row, apply: Apply, dtype: type, data: st.DataObject) -> None:
    assert row.bound is not None
    found, _, _ = apply(row, data.draw(draws(dtype)))
    arrays = [array for array in found.values() if array is not None]
    assert row.bound(arrays, [UNIT_AXES.get(name) for name in found]) <= 1 + ROUNDING[dtype]


@cases([row for row in EVERY if row.idempotent], dtypes=ROUNDING)
@settings(max_examples=examples(4, full=20))
@given(data=st.data())
def test_again_changes_no_bit(row: Row, apply: Apply, dtype: type, data: st.DataObject) -> None:
    once, _, state = apply(row, data.draw(draws(dtype)))
    twice, outcome, _ = apply(row, once, state)
    assert_equal(twice, once)
    assert not outcome.engaged


@cases(EVERY)
def test_the_input_of_the_reference_case_is_really_changed(row: Row, apply: Apply) -> None:
    tensors = sample(0, scale=10.0)
    found, outcome, _ = apply(row, tensors)
    assert outcome.engaged and outcome.action == "clipped" and outcome.post < outcome.pre
    assert any(array is not None and np.any(array != tensors[n]) for n, array in found.items())
    assert_equal(found, referred(row, tensors), rtol=1e-12)


@cases(EVERY)
def test_the_input_is_not_written_to(row: Row, apply: Apply) -> None:
    tensors = sample(1, scale=10.0)
    before = {name: array.copy() for name, array in tensors.items()}
    apply(row, tensors)
    assert_equal(tensors, before)


@cases([row for row in EVERY if not row.always])
def test_small_tensors_keep_every_bit(row: Row, apply: Apply) -> None:
    tensors = sample(2, scale=1e-3)
    found, outcome, _ = apply(row, tensors)
    assert_equal(found, tensors)
    assert not outcome.engaged and outcome.action == "kept"


@cases(LIMITED)
def test_an_infinite_limit_measures_only(row: Row, apply: Apply) -> None:
    for dtype in turns(DTYPES, row, apply):
        tensors = sample(3, scale=100.0, dtype=dtype)
        tensors["linear.bias"][:2] = [-0.0, np.finfo(dtype).max]
        found, outcome, _ = apply(row.measures_only(), tensors)
        assert_equal(found, tensors)
        assert outcome.action == "kept" and outcome.pre > 100.0 and outcome.factor == 1.0


# Every set of absent tensors is compiled by itself, which tests/unit/test_jax.py does once.
@cases(CLIPS, but=frozenset({"jax.jit", "tf.function"}))
@settings(max_examples=examples(4, full=15))
@given(data=st.data())
def test_absent_gradients_stay_absent_and_do_not_count(
    row: Row, apply: Apply, data: st.DataObject
) -> None:
    absent = data.draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
    tensors = {n: None if n in absent else a for n, a in sample(4, scale=5.0).items()}
    found, _, _ = apply(row, tensors)
    assert_equal(found, referred(row, tensors), rtol=1e-12)


@cases(CLIPS)
def test_a_step_without_any_gradient_is_no_error(row: Row, apply: Apply) -> None:
    found, outcome, _ = apply(row, dict.fromkeys(SHAPES))
    assert set(found.values()) == {None}
    assert (outcome.action, outcome.pre) == ("kept", 0.0)


@cases(EVERY)
def test_zeros_stay_zeros(row: Row, apply: Apply) -> None:
    tensors = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    found, outcome, _ = apply(row, tensors)
    assert_equal(found, tensors)
    assert (outcome.pre, outcome.factor, outcome.top()) == (0.0, 1.0, [])


@cases(EVERY)
def test_empty_tensors_are_no_error(row: Row, apply: Apply) -> None:
    tensors = {**sample(5, scale=5.0), "linear.weight": np.zeros((4, 0))}
    found, _, _ = apply(row, tensors)
    assert_equal(found, referred(row, tensors), rtol=1e-12)


@cases(EVERY)
def test_dtypes_are_kept(row: Row, apply: Apply) -> None:
    for dtype in DTYPES:
        tensors = sample(6, scale=5.0, dtype=dtype)
        found, _, _ = apply(row, tensors)
        assert {array.dtype for array in found.values() if array is not None} == {np.dtype(dtype)}
        rounding = 4 * float(np.finfo(dtype).eps)
        assert_equal(found, referred(row, tensors), rtol=rounding, atol=rounding)


# In torch a complex tensor is one unit as a whole, which the reference does not know.
@cases([row for row in CLIPS if not row.by_element and not row.by_unit])
def test_complex_gradients_are_scaled_by_their_magnitudes(row: Row, apply: Apply) -> None:
    tensors = {n: (a * (3 + 4j)).astype(np.complex64) for n, a in sample(7).items()}
    magnitudes = referred(row, {name: np.abs(array) for name, array in tensors.items()})
    found, _, _ = apply(row, tensors)
    assert {array.dtype for array in found.values() if array is not None} == {np.dtype("c8")}
    for name, array in found.items():
        magnitude = magnitudes[name]
        assert array is not None and magnitude is not None
        np.testing.assert_allclose(np.abs(array), magnitude, rtol=1e-5)
        np.testing.assert_allclose(np.angle(array), np.angle(tensors[name]), rtol=1e-5)


@cases(EVERY)
def test_float32_far_from_one(row: Row, apply: Apply) -> None:
    for entry in (1e30, 1e-30):
        tensors = {name: np.full(shape, entry, np.float32) for name, shape in SHAPES.items()}
        found, outcome, _ = apply(row, tensors)
        sizes = np.array([norm(array) for array in tensors.values()])
        if not row.by_element and row.kind == "clip":
            assert outcome.pre == pytest.approx(norm(sizes), rel=1e-6)
        assert all(np.isfinite(array).all() for array in found.values() if array is not None)
        assert_equal(found, referred(row, tensors), rtol=1e-6)


@cases([row for row in CLIPS if not row.by_element])
def test_the_norm_of_many_half_precision_entries_is_finite(row: Row, apply: Apply) -> None:
    tensors: Arrays = {name: np.zeros(shape, np.float16) for name, shape in SHAPES.items()}
    # More entries than one block of a sum, and a norm above the largest number of half precision.
    tensors["linear.weight"] = np.full((4, 20_000), 1_000.0, np.float16)
    found, outcome, _ = apply(row, tensors)
    assert outcome.pre == pytest.approx(282842.7125, rel=1e-6)
    assert {array.dtype for array in found.values() if array is not None} == {np.dtype("f2")}
    assert_equal(found, referred(row, tensors), rtol=1e-3)


@pytest.mark.parametrize("row", [row for row in CLIPS if row.by_unit], ids=str)
def test_bare_parameters_have_no_units(row: Row) -> None:
    with pytest.raises(InvalidArgument, match="known from its module only.*pass the module"):
        torch_parameters(row, sample(0))
