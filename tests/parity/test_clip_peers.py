"""Clipping against its peers: equal where they are right, beside them where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import karikomi as kk
from contract.namespaces import INSTALLED, load_quietly
from karikomi.errors import InvalidArgument

Arrays = list[np.ndarray]
Peer = Callable[[Arrays, float], Arrays]


def _with_gradients(arrays: Arrays) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros(array.shape)) for array in arrays]
    for parameter, array in zip(parameters, arrays, strict=True):
        parameter.grad = torch.from_numpy(array.copy())
    return parameters


def _gradients(parameters: list[torch.nn.Parameter]) -> Arrays:
    return [p.grad.numpy() for p in parameters if p.grad is not None]


def torch_norm(arrays: Arrays, limit: float) -> Arrays:
    parameters = _with_gradients(arrays)
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    return _gradients(parameters)


def torch_value(arrays: Arrays, limit: float) -> Arrays:
    parameters = _with_gradients(arrays)
    torch.nn.utils.clip_grad_value_(parameters, limit)
    return _gradients(parameters)


def optax_global_norm(arrays: Arrays, limit: float) -> Arrays:
    optax = load_quietly("optax")
    return _optax(optax.clip_by_global_norm(limit), arrays)


def optax_value(arrays: Arrays, limit: float) -> Arrays:
    return _optax(load_quietly("optax").clip(limit), arrays)


def _optax(transform: Any, arrays: Arrays) -> Arrays:
    clipped, _ = transform.update(arrays, transform.init(arrays))
    return [np.asarray(array) for array in clipped]


def tf_norm(arrays: Arrays, limit: float) -> Arrays:
    tf = load_quietly("tensorflow")
    return [tf.clip_by_norm(array, limit).numpy() for array in arrays]


def tf_global_norm(arrays: Arrays, limit: float) -> Arrays:
    tf = load_quietly("tensorflow")
    clipped, _ = tf.clip_by_global_norm([tf.constant(array) for array in arrays], limit)
    return [array.numpy() for array in clipped]


def keras_clipnorm(arrays: Arrays, limit: float) -> Arrays:
    return _keras(arrays, clipnorm=limit)


def keras_global_clipnorm(arrays: Arrays, limit: float) -> Arrays:
    return _keras(arrays, global_clipnorm=limit)


def keras_clipvalue(arrays: Arrays, limit: float) -> Arrays:
    return _keras(arrays, clipvalue=limit)


def _keras(arrays: Arrays, **option: float) -> Arrays:
    """Return what one step of plain SGD at learning rate 1 takes away from zeros."""
    keras = load_quietly("keras")
    variables = [keras.Variable(np.zeros_like(array)) for array in arrays]
    gradients = [keras.ops.convert_to_tensor(array) for array in arrays]
    optimizer = keras.optimizers.SGD(learning_rate=1.0, **option)
    optimizer.apply(gradients, variables)
    return [-keras.ops.convert_to_numpy(variable) for variable in variables]


# Peers whose framework is not installed take no part. Keras needs none but torch.
PEERS: dict[Peer, type] = {torch_norm: kk.clip.ByGlobalNorm, torch_value: kk.clip.ByValue}
if "jax" in INSTALLED:
    PEERS |= {optax_global_norm: kk.clip.ByGlobalNorm, optax_value: kk.clip.ByValue}
if "tensorflow" in INSTALLED:
    PEERS |= {tf_norm: kk.clip.ByNorm, tf_global_norm: kk.clip.ByGlobalNorm}
    PEERS |= {
        keras_clipnorm: kk.clip.ByNorm,
        keras_global_clipnorm: kk.clip.ByGlobalNorm,
        keras_clipvalue: kk.clip.ByValue,
    }


def ours_torch(arrays: Arrays, rule: Any) -> Arrays:
    parameters = _with_gradients(arrays)
    kk.torch.clip_(parameters, rule)
    return _gradients(parameters)


def ours_numpy(arrays: Arrays, rule: Any) -> Arrays:
    return kk.numpy.clip(arrays, rule)[0]


@pytest.mark.parametrize("ours", [ours_torch, ours_numpy])
@pytest.mark.parametrize("limit", [0.1, 1.0, 7.0, 1e3])
@pytest.mark.parametrize(("peer", "rule"), PEERS.items(), ids=lambda one: one.__name__)
def test_the_same_as_the_peer(peer: Peer, rule: type, limit: float, ours: Any) -> None:
    generator = np.random.default_rng(0)
    shapes = [(8, 4), (4,), (3, 2, 5)]
    arrays = [generator.normal(0, 2, shape).astype(np.float32) for shape in shapes]
    pairs = zip(ours(arrays, rule(limit)), peer(arrays, limit), strict=True)
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine, theirs, rtol=2e-6)


@pytest.mark.parametrize("limit", [0.1, 0.3, 0.7, 1.0])
def test_by_value_has_the_very_bits_of_torch(limit: float) -> None:
    arrays = [np.linspace(-2, 2, 101, dtype=np.float32)]
    assert ours_torch(arrays, kk.clip.ByValue(limit))[0].tobytes() == (
        torch_value(arrays, limit)[0].tobytes()
    )


def test_a_norm_at_the_limit_is_left_alone_where_torch_rescales() -> None:
    at_limit = [np.array([3.0], dtype=np.float32)]
    assert torch_norm(at_limit, 3.0)[0][0] < 3.0
    assert ours_torch(at_limit, kk.clip.ByGlobalNorm(3.0))[0][0] == 3.0


def _halves() -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros(1_000_000, dtype=torch.half)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 100.0)
    return parameters


def test_torch_zeroes_finite_half_precision_gradients_and_we_do_not() -> None:
    theirs, ours = _halves(), _halves()
    total = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert torch.isinf(total) and not any(p.grad.any() for p in theirs if p.grad is not None)
    outcome, _ = kk.torch.clip_(ours, kk.clip.ByGlobalNorm(1.0))
    assert outcome.pre == pytest.approx(173205.0808, rel=1e-6)
    for gradient in _gradients(ours):
        np.testing.assert_allclose(gradient, 1 / np.sqrt(3e6), rtol=1e-3)


def test_torch_turns_gradients_around_at_a_negative_limit_and_we_refuse() -> None:
    theirs = torch_norm([np.array([3.0, 4.0], dtype=np.float32)], -1.0)
    np.testing.assert_allclose(theirs[0], [-0.6, -0.8], rtol=1e-5)
    with pytest.raises(InvalidArgument, match="the limit must be positive; got -1"):
        kk.clip.ByGlobalNorm(-1.0)


def test_torch_counts_a_parameter_twice_and_we_once() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([3.0])
    assert float(torch.nn.utils.get_total_norm([parameter.grad] * 2)) > 4.2
    outcome, _ = kk.torch.clip_([parameter, parameter], kk.clip.ByGlobalNorm(1.0))
    assert outcome.pre == 3.0 and float(parameter.grad) == 1.0
