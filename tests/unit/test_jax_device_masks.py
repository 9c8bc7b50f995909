"""Compiled selection equals a stable sort and the NumPy reference, to the last tie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import karikomi as kk  # noqa: E402
from depth import examples  # noqa: E402
from karikomi.errors import InvalidArgument, Unsupported  # noqa: E402
from karikomi.jax.sparse_training import device_masks, mask_plan  # noqa: E402

SHAPES = {"a": (3, 5), "b": (), "c": (0, 2), "d": (7,)}
POOLS = ((0, 3), (1,), (2,))
# Ties, both zeros, numbers next to zero and next to infinity.
VALUES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 0.5, -0.5, 1.0, -1.0, 2.0, 3.4e38, -3.4e38]

_lowest = jax.jit(lambda numbers, among, counts: device_masks.lowest(numbers, among, counts, POOLS))
_moved = jax.jit(device_masks.moved)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return numbers of the shapes, and which of them take part; the others may be anything."""
    numbers, among = [], []
    for shape in SHAPES.values():
        size = int(np.prod(shape))
        row = draw(st.lists(st.sampled_from(VALUES), min_size=size, max_size=size))
        kept = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        own = np.where(kept, np.array(row, np.float32), np.float32(np.nan))
        numbers.append(own.reshape(shape).astype(np.float32))
        among.append(np.array(kept, bool).reshape(shape))
    return numbers, among


def first_of_a_stable_sort(numbers: Any, among: Any, count: int) -> list[np.ndarray]:
    """Return where the `count` lowest of several arrays are, in plain NumPy."""
    flat = np.concatenate([np.where(m, a, np.inf).reshape(-1) for a, m in zip(numbers, among)])  # noqa: B905
    part = np.concatenate([mask.reshape(-1) for mask in among])
    order = [place for place in np.argsort(flat, kind="stable") if part[place]]
    found = np.zeros(len(flat), bool)
    found[order[:count]] = True
    ends = np.cumsum([mask.size for mask in among])
    return [a.reshape(m.shape) for a, m in zip(np.split(found, ends[:-1]), among, strict=True)]


@settings(max_examples=examples(60, full=600))
@given(arrays(), st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3))
def test_the_lowest_are_those_of_a_stable_sort(drawn: Any, shares: list[float]) -> None:
    numbers, among = drawn
    there = [sum(int(among[place].sum()) for place in pool) for pool in POOLS]
    counts = [round(share * count) for share, count in zip(shares, there, strict=True)]
    found = _lowest(numbers, among, np.array(counts, np.int32))
    for pool, count in zip(POOLS, counts, strict=True):
        own = [[array[place] for place in pool] for array in (numbers, among)]
        expected = first_of_a_stable_sort(*own, count)
        for place, mask in zip(pool, expected, strict=True):
            assert np.array_equal(found[place], mask)


@settings(max_examples=examples(30, full=300))
@given(arrays(), arrays(), st.floats(0.0, 1.0))
def test_as_many_are_kept_after_weights_have_moved(one: Any, other: Any, share: float) -> None:
    weights, masks = [np.nan_to_num(array) for array in one[0]], one[1]
    worth = [np.abs(np.nan_to_num(array)) for array in other[0]]
    counts = np.array([int(share * mask.sum()) for mask in masks], np.int32)
    after, good = _moved(weights, masks, worth, counts)
    assert bool(good)
    for weight, mask, gain, count, found in zip(weights, masks, worth, counts, after, strict=True):
        kept = mask & ~first_of_a_stable_sort([np.abs(weight)], [mask], count)[0]
        expected = kept | first_of_a_stable_sort([-gain], [~kept], count)[0]
        assert np.array_equal(found, expected) and int(found.sum()) == int(mask.sum())


@pytest.mark.parametrize("entry", [np.nan, np.inf, -np.inf])
def test_entries_that_are_not_finite_are_found_where_they_count(entry: float) -> None:
    numbers, mask = jnp.array([1.0, entry]), jnp.array([True, False])
    assert bool(device_masks.finite([numbers], [mask]))
    assert not bool(device_masks.finite([numbers], [~mask]))
    assert bool(device_masks.finite([], []))


def test_more_than_32_bits_can_count_is_refused() -> None:
    huge = jax.ShapeDtypeStruct((1 << 16, 1 << 15), jnp.float32)
    mask = jax.ShapeDtypeStruct(huge.shape, bool)
    counts = jax.ShapeDtypeStruct((1,), jnp.int32)
    with pytest.raises(Unsupported, match=r"2,147,483,648; allowed: 2,147,483,647"):
        jax.eval_shape(lambda a, m, c: device_masks.lowest([a], [m], c, [[0]]), huge, mask, counts)


# --- whole schedules against the reference


TREE = {"w": (4, 6), "flat": (9,), "deep": {"kernel": (3, 2, 4), "scale": (), "none": (0, 3)}}
_compiled: dict[Any, Any] = {}


def tree(seed: int, dtype: Any) -> Any:
    """Return arrays with many ties."""
    generator = np.random.default_rng(seed)

    def made(shape: Any) -> Any:
        return jnp.asarray(np.round(generator.normal(0, 2, shape)), dtype)

    is_shape = lambda shape: isinstance(shape, tuple)  # noqa: E731
    return jax.tree.map(made, TREE, is_leaf=is_shape)


def masks_of(rule: Any, params: Any, step: int, **more: Any) -> dict[str, np.ndarray]:
    """Return compiled masks; each rule is compiled once per type."""
    key = (rule, jax.tree.leaves(params)[0].dtype)
    if key not in _compiled:
        _compiled[key] = jax.jit(lambda own, t: kk.jax.masks_at(own, rule, t, **more))
    return {name: np.asarray(mask) for name, mask in _compiled[key](params, step).items()}


@settings(max_examples=examples(40, full=400))
@given(
    allocation=st.sampled_from(["global", "isomorphic"]),
    step=st.integers(0, 45),
    seed=st.integers(0, 99),
)
def test_masks_of_a_step_are_those_of_the_reference(allocation: str, step: int, seed: int) -> None:
    dtype = jnp.bfloat16 if allocation == "global" else jnp.float32
    rule = kk.prune.Gradual(0.95, steps=(2, 40), every=3, allocation=allocation, exclude="*scale")
    params = tree(seed, dtype)
    found = masks_of(rule, params, step)
    made_at = max((due for due in range(step + 1) if rule.due(due)), default=None)
    if made_at is None:
        assert all(mask.all() for mask in found.values())
        return
    arrays_of = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    _, expected = kk.numpy.prune(
        arrays_of, sparsity=rule.sparsity_at(made_at), allocation=allocation, exclude="*scale"
    )
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("keep", [1, 2])
def test_n_of_m_is_that_of_the_reference(keep: int) -> None:
    pattern = kk.prune.NofM(keep=keep, of=4)
    rule = kk.prune.OneShot(pattern.sparsity, pattern=pattern, exclude=("flat", "*scale", "*none"))
    axes = {
        "w": kk.prune.Layout(units=-1, inputs=0),
        "deep.kernel": kk.prune.Layout(units=0, inputs=1),
    }
    params = tree(keep, jnp.float32)
    found = masks_of(rule, params, 0, layouts=axes)
    _, expected = kk.numpy.prune(
        jax.tree.map(np.asarray, params), pattern=pattern, exclude=rule.exclude, layouts=axes
    )
    # Two inputs of the one are no multiple of four.
    assert [*found] == [*expected] == ["w"]
    assert np.array_equal(found["w"], expected["w"]) and found["w"].sum() == 6 * keep


def test_scores_by_gradients_and_by_numbers_that_were_given() -> None:
    params, slopes = tree(1, jnp.float32), tree(2, jnp.float32)
    names = ("w", "flat")
    facts = {"gradient": {name: slopes[name] for name in names}}
    rule = kk.prune.OneShot(0.5, score="snip", only=names)
    found = kk.jax.masks_at(params, rule, 3, facts=facts)
    host = jax.tree.map(np.asarray, params)
    given = {"gradient": {name: np.asarray(slopes[name]) for name in names}}
    _, expected = kk.numpy.prune(host, sparsity=0.5, score="snip", only=names, facts=given)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    with pytest.raises(InvalidArgument, match="the score needs facts; got none; allowed: gradient"):
        kk.jax.masks_at(params, rule, 3)
    for step in (1.5, "x", None):
        with pytest.raises(InvalidArgument, match="a step is a whole number"):
            kk.jax.masks_at(params, rule, step, facts=facts)


def test_a_weight_that_is_not_finite_is_shown_and_not_hidden() -> None:
    rule = kk.prune.OneShot(0.5)
    found = kk.jax.masks_at({"w": jnp.array([1.0, jnp.nan, 2.0, 3.0])}, rule, 0)
    assert found["w"].all()


def test_random_masks_have_the_number() -> None:
    rule = kk.prune.OneShot(0.9, score=kk.prune.Random(1 << 40))
    found = np.asarray(kk.jax.masks_at({"w": jnp.ones((20, 20))}, rule, 0)["w"])
    assert found.sum() == 40 and not found[:2].all()


def test_noise_depends_on_all_of_seed_step_and_name() -> None:
    ways = [("a", 1, 0), ("a", 1, 0), ("b", 1, 0), ("a", 1 + (1 << 32), 0), ("a", 1, 3)]
    first, again, *others = [
        np.asarray(mask_plan.noise(name, (50,), seed, step)) for name, seed, step in ways
    ]
    assert np.array_equal(first, again) and first.dtype == np.float32
    assert all(not np.array_equal(first, other) for other in others)
    assert first.min() >= 0.0 and first.max() < 1.0 and 0.3 < first.mean() < 0.7
