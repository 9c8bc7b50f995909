"""Quantized trees of NumPy arrays and pytrees of JAX: the same codes, names in files, types on the way back."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported
from karikomi.quantize import Coded, OutputUnits, kmeans, uniform
from karikomi.quantize.output_units import units_along

RNG = np.random.default_rng(3)
Pair = namedtuple("Pair", "kernel bias")
KERNEL = RNG.normal(size=(4, 3)).astype(np.float32)


def tree() -> dict[str, Any]:
    return {
        "dense": Pair(KERNEL, np.zeros(3, np.float32)),
        "layers": [{"scale": RNG.normal(size=3)}, (RNG.normal(size=2).astype(ml_dtypes.bfloat16),)],
        "steps": np.arange(3),
        "absent": None,
    }


@pytest.mark.parametrize(
    ("axes", "shape", "units"),
    [
        ((), (3, 4), (None, 1)),
        ((1,), (3, 4), (1, 1)),
        ((0,), (3, 4), (0, 1)),
        ((0, 2), (3, 4, 5), (2, 3)),
        ((0, 2), (1, 4, 5), (2, 1)),
        ((1, 2), (3, 4, 5), (2, 1)),
        ((1, 2), (3, 5, 4), (1, 1)),
        ((2, 3), (3, 3, 8, 1), (2, 1)),
        ((2, 3), (3, 3, 1, 8), (3, 1)),
        ((0, 1, 2), (2, 5, 3), (1, 1)),
        ((1,), (3, 1), (1, 1)),
        ((0,), (0, 3), (0, 1)),
    ],
)
def test_scales_go_along_the_axes_that_a_grid_can_have(axes, shape, units):
    found = units_along(axes, shape)
    assert found == OutputUnits(*units)
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    coded = uniform(weights, bits=8, axis=found.axis, groups=found.groups)
    # Each entry of a unit has the scale of that unit.
    if len(axes) == 2 and axes[0] == 0:
        peak = np.abs(weights).max(axis=1, keepdims=True)
        assert (np.abs(coded.decode() - weights) <= peak / 127 * 0.5 * (1 + 1e-5)).all()


def test_a_tree_keeps_its_containers_and_what_is_not_floating():
    before = tree()
    coded = kk.numpy.quantize(before, bits=4, unit_axes={"*kernel": -1})
    assert isinstance(coded["dense"], Pair) and coded["steps"] is before["steps"]
    assert coded["absent"] is None
    expected = uniform(KERNEL, bits=4, axis=1)
    assert np.array_equal(coded["dense"].kernel.codes, expected.codes)
    assert coded["dense"].bias.grid.numbers.size == 1
    assert coded["layers"][1][0].decode().dtype == np.float32
    back = kk.numpy.decode(coded)
    assert np.array_equal(back["dense"].kernel, expected.decode())
    types = kk.numpy.decode(coded, like=before)
    assert types["layers"][0]["scale"].dtype == np.float64
    assert types["layers"][1][0].dtype == ml_dtypes.bfloat16
    assert np.array_equal(before["dense"].kernel, KERNEL)  # left alone


def test_several_calls_give_several_widths_and_zeros_stay():
    weights = {"a": KERNEL * (np.abs(KERNEL) > 0.7), "b": KERNEL}
    coded = kk.numpy.quantize(weights, entries=3, only="a")
    assert coded["b"] is weights["b"]
    coded = kk.numpy.quantize(coded, bits=8)
    assert np.array_equal(coded["a"].codes, kmeans(weights["a"], entries=3).codes)
    assert np.array_equal(coded["a"].decode() == 0, weights["a"] == 0)
    assert coded["b"].grid.bits == 8


def test_jax_gives_the_same_codes_types_and_places():
    before = tree() | {"steps": jnp.arange(3)}
    params = jax.tree.map(jnp.asarray, before)
    for options in ({"bits": 5, "unit_axes": {"*kernel": -1}}, {"entries": 4, "exclude": "*bias"}):
        coded, wanted = kk.jax.quantize(params, **options), kk.numpy.quantize(before, **options)
        own, other = kk.numpy.decode(coded), kk.numpy.decode(wanted)
        # Without x64 the float64 leaf of the tree is float32 in JAX, and has other codes.
        for name in ("dense",):
            assert all(map(np.array_equal, own[name], other[name]))
        assert isinstance(coded["dense"], Pair) and coded["steps"] is params["steps"]
        back = kk.jax.decode(coded, like=params)
        same = jax.tree.map(
            lambda a, b: a.dtype == b.dtype and isinstance(a, jax.Array), back, params
        )
        assert all(jax.tree.leaves(same))
    assert jax.jit(lambda p: p["dense"].kernel.sum())(back) == back["dense"].kernel.sum()


def test_units_of_two_axes_are_named_by_both():
    kernel = RNG.normal(size=(4, 5, 3)).astype(np.float32)
    coded = kk.jax.quantize({"k": jnp.asarray(kernel)}, bits=8, unit_axes={"k": (0, -1)})["k"]
    assert coded.grid.numbers.size == 12
    assert np.allclose(coded.grid.numbers.reshape(4, 3), np.abs(kernel).max(axis=1) / 127)


def test_files_have_the_codes_under_the_names_of_the_leaves(tmp_path: Path):
    coded = kk.jax.quantize(jax.tree.map(jnp.asarray, {"net": [{"kernel": KERNEL}]}), bits=3)
    path = kk.save(coded, tmp_path / "tree.karikomi")
    stored = kk.pack.load_coded(path)
    assert list(stored) == ["net.0.kernel"] and isinstance(stored["net.0.kernel"], Coded)
    assert np.array_equal(stored["net.0.kernel"].codes, coded["net"][0]["kernel"].codes)
    # A list is a tree as well.
    assert list(kk.load(kk.save([KERNEL], tmp_path / "list.karikomi"))) == ["0"]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda q: q({"a": np.arange(3)}, bits=8), Unsupported, "no floating array"),
        (lambda q: q({"a": KERNEL}), InvalidArgument, "exactly one"),
        (lambda q: q({"a": KERNEL}, bits=1), InvalidArgument, "bits out of range"),
        (lambda q: q({"a": KERNEL}, bits=8, method="kmeans"), InvalidArgument, "takes entries"),
        (lambda q: q({"a": KERNEL}, bits=8, only="b"), UnknownName, "matches no tensor"),
        (lambda q: q({"a": KERNEL}, bits=8, unit_axes={"a": 2}), InvalidArgument, "no such axis"),
        (lambda q: q({"a": KERNEL * np.nan}, bits=8), NonFinite, "^a: "),
        (lambda q: q({"a": KERNEL * 1j}, bits=8), InvalidArgument, "real numbers"),
    ],
)
@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_what_cannot_be_done_is_refused(framework, call, error, words):
    def quantize(weights, **options):
        own = weights if framework == "numpy" else jax.tree.map(jnp.asarray, weights)
        return getattr(kk, framework).quantize(own, **options)

    with pytest.raises(error, match=words):
        call(quantize)


def test_codes_need_values_and_a_like_with_their_names():
    with pytest.raises(Unsupported, match="under jit"):
        jax.jit(lambda k: kk.jax.quantize({"k": k}, bits=8))(KERNEL)
    for framework in (kk.numpy, kk.jax):
        coded = framework.quantize(
            {"kernel": jnp.asarray(KERNEL) if framework is kk.jax else KERNEL}, bits=8
        )
        with pytest.raises(InvalidArgument, match="kernel: like has no array"):
            framework.decode(coded, like={"kernels": KERNEL})
