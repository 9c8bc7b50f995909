"""Clipping and bounding of named arrays, in JAX and in the arrays that Keras has on torch: worked numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")
keras = pytest.importorskip("keras")
jnp = jax.numpy

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument  # noqa: E402
from karikomi.functional.norms import TOGETHER  # noqa: E402
from karikomi.jax.library import library  # noqa: E402

Arrays = dict[str, Any]


class Steps(NamedTuple):
    """What some steps of a rule made: the last arrays, its outcome, and the second moments."""

    arrays: dict[str, np.ndarray]
    outcome: kk.Outcome
    moments: dict[str, np.ndarray]


def in_jax(rule: Any, steps: list[Arrays], **options: Any) -> Steps:
    tx = kk.jax.clip(rule, **options)
    given = [{name: jnp.asarray(array) for name, array in step.items()} for step in steps]
    weights = {name: jnp.ones_like(array) for name, array in given[0].items()}
    state: Any = tx.init(weights)
    done: Any = {}
    for step in given:
        done, state = tx.update(step, state, weights)
    moments = {name: np.asarray(array) for name, array in dict(state.moments).items()}
    arrays = {name: np.asarray(array) for name, array in done.items()}
    return Steps(arrays, kk.jax.outcome(state), moments)


def in_torch(rule: Any, steps: list[Arrays], **options: Any) -> Steps:
    given = [{name: torch.from_numpy(array) for name, array in step.items()} for step in steps]
    weights = {name: torch.ones_like(array) for name, array in given[0].items()}
    state: Any = None
    done: Any = {}
    for step in given:
        done, _, state = kk.keras.clip(step, rule, state, variables=weights, **options)
    moments = {
        key.removeprefix("moment."): array.numpy()
        for key, array in state.items()
        if key.startswith("moment.")
    }
    return Steps({n: a.numpy() for n, a in done.items()}, kk.keras.outcome(state), moments)


both = pytest.mark.parametrize("clip", [in_jax, in_torch], ids=["jax", "torch"])
Clip = Callable[..., Steps]


def f4(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def test_arrays_in_several_groups_have_norms_of_their_own() -> None:
    sizes = [float(place + 1) for place in range(2 * TOGETHER + 5)]
    sizes[TOGETHER + 4] = (
        1e-25  # its squares vanish in float32, so the second group is measured again
    )
    arrays = [jnp.asarray([0.6 * size, -0.8 * size], jnp.float32) for size in sizes]
    np.testing.assert_allclose(library().norm_vector(arrays), sizes, rtol=1e-6)


@both
@pytest.mark.parametrize("policy", ["zero", "pass", "skip"])
def test_a_step_that_is_not_finite_teaches_no_second_moment(clip: Clip, policy: str) -> None:
    good = {"a": f4(1.0, 2.0), "b": f4(3.0)}
    bad = {"a": f4(5.0, math.nan), "b": f4(7.0)}
    after = clip(kk.clip.SPAM(1e9), [good, bad], nonfinite=policy)
    np.testing.assert_allclose(after.moments["a"], [0.001, 0.004], rtol=1e-5)
    np.testing.assert_allclose(after.moments["b"], [0.009], rtol=1e-5)


@both
def test_second_moments_are_those_of_clipped_gradients(clip: Clip) -> None:
    after = clip(kk.clip.SPAM(4.0, warmup=0), [{"a": f4(1.0)}, {"a": f4(-100.0)}])
    np.testing.assert_allclose(after.arrays["a"], [-math.sqrt(4.0 * 0.001)], rtol=1e-5)
    np.testing.assert_allclose(after.moments["a"], [0.999 * 0.001 + 0.001 * 0.004], rtol=1e-5)


@both
def test_second_moments_of_half_precision_are_wide(clip: Clip) -> None:
    after = clip(kk.clip.SPAM(), [{"a": np.array([0.01], np.float16)}])
    square = float(np.float16(0.01)) ** 2
    np.testing.assert_allclose(after.moments["a"], [0.001 * square], rtol=1e-4)


@both
def test_a_bad_unit_zeroes_all_of_its_tensor(clip: Clip) -> None:
    grads = {"a": np.array([[1.0, math.nan], [0.1, 0.1]], np.float32), "b": f4(0.5)}
    after = clip(kk.clip.AGC(9.0), [grads], nonfinite="zero", unit_axes={"a": 0})
    assert after.arrays["a"].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert after.arrays["b"].tolist() == [0.5]
    assert (after.outcome.action, after.outcome.nonfinite) == ("zeroed", ("a",))


@both
def test_the_outcome_has_the_numbers_of_all_three_stages(clip: Clip) -> None:
    rule = kk.clip.Chain(kk.clip.ByValue(4.0), kk.clip.ByNorm(2.0), kk.clip.ByValue(1.5))
    last = clip(rule, [{"a": f4(6.0, 0.0), "b": f4(0.0, 3.0)}]).outcome
    stages = (*last.earlier, last)
    assert [stage.norms.tolist() for stage in stages] == [[6.0, 3.0], [4.0, 3.0], [2.0, 2.0]]
    assert [stage.after.tolist() for stage in stages] == [[4.0, 3.0], [2.0, 2.0], [1.5, 1.5]]
    assert (last.pre, last.post) == (6.0, 1.5)


@both
def test_a_limit_is_rounded_to_the_dtype_of_its_own_tensor(clip: Clip) -> None:
    grads = {"single": f4(1.0), "half": np.array([1.0], np.float16)}
    after = clip(kk.clip.ByValue(0.1), [grads])
    assert after.arrays["single"].tolist() == [float(np.float32(0.1))]
    assert after.arrays["half"].tolist() == [float(np.float16(0.1))]


@both
def test_two_axes_name_one_unit(clip: Clip) -> None:
    grads = {"a": np.arange(12, dtype=np.float32).reshape(2, 3, 2), "b": f4(2.0)}
    norms = clip(kk.clip.AGC(math.inf), [grads], unit_axes={"a": (1, 0)}).outcome.norms
    expected = [*np.linalg.norm(grads["a"], axis=2).ravel(), 2.0]
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


def layer_of(*numbers: float) -> Any:
    layer = keras.layers.Dense(1, use_bias=False)
    layer.build((None, len(numbers)))
    layer.kernel.assign(np.array(numbers).reshape(-1, 1))
    return layer


def share_in_jax(rule: Any) -> float | None:
    weights = {"a": jnp.array([1.0, -0.5, 0.25, 0.5]), "b": jnp.array([0.0])}
    return kk.jax.project(weights, rule)[1].share_at_bound


def share_in_keras(rule: Any) -> float | None:
    model = keras.Sequential([layer_of(1.0, -0.5, 0.25, 0.5), layer_of(0.0)])
    return kk.keras.bound_(model, rule).share_at_bound


@pytest.mark.parametrize("share", [share_in_jax, share_in_keras])
def test_what_stands_at_its_bound_is_counted_over_all_entries(share: Any) -> None:
    assert share(kk.bound.Clamp(0.5)) == 3 / 5
    assert share(kk.bound.NonNegative()) == 2 / 5
    assert share(kk.bound.Clamp(2.0)) == 0.0


def test_a_fan_in_of_zero_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="a fan-in is a number of inputs"):
        kk.jax.project({"a": jnp.ones(2)}, kk.bound.InitScaled(1.0), fan_in={"a": 0})
