"""Deltas: fine-tuned weights as differences from a base file, which has to be the same one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import karikomi as kk
from karikomi.errors import BadFile, InvalidArgument
from karikomi.pack import expand, inspect, load, load_coded, plain, save
from karikomi.quantize import Coded, kmeans, uniform

GENERATOR = np.random.default_rng(0)


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return tensors, slightly changed ones, and the base file of the first."""
    weight = (GENERATOR.normal(size=(60, 50)) * 0.02).astype("f4")
    coded = uniform(weight, bits=6)
    base = {
        "codes": coded,
        "float": weight,
        "half": weight.astype(ml_dtypes.bfloat16),
        "ints": GENERATOR.integers(-(2**40), 2**40, 900),
        "odd": np.array([0.0, -0.0, np.nan, np.inf]),
        "same": GENERATOR.normal(size=4000),
        "gone": np.ones(3),
        "type": np.ones(3, "f4"),
    }
    changed = coded.codes.copy()
    changed[::7] = np.clip(changed[::7] + 1, -31, 31)
    tuned = base | {
        "codes": Coded(changed, coded.grid),
        "float": (weight * np.float32(1 + 1e-5)).astype("f4"),
        "half": (weight * np.float32(1.01)).astype(ml_dtypes.bfloat16),
        "ints": base["ints"] + 3,
        "odd": np.array([-0.0, 1.0, -np.inf, np.nan]),
        "type": np.ones(3),
        "new": np.arange(5),
        "book": kmeans(weight, entries=4),
    }
    del tuned["gone"]
    folder = tmp_path_factory.mktemp("delta")
    return tuned, save(base, folder / "base"), folder


def test_a_delta_is_small_and_exact(pair):
    tuned, base, folder = pair
    path = kk.save(tuned, folder / "delta", base=base)
    whole = save(tuned, folder / "whole")
    assert path.stat().st_size < 0.5 * whole.stat().st_size
    found, coded = kk.load(path, base=base), load_coded(path, base=base)
    for name, tensor in tuned.items():
        dense = tensor.decode() if isinstance(tensor, Coded) else tensor
        assert found[name].dtype == dense.dtype and bits(found[name]) == bits(dense), name
    assert np.array_equal(coded["codes"].codes, tuned["codes"].codes)
    assert list(load(path, only=["float"], base=base)) == ["float"]
    assert save(tuned, folder / "again", base=base).read_bytes() == path.read_bytes()
    read = plain.read(expand(path, folder / "x.safetensors", base=base))
    assert bits(read["float"]) == bits(tuned["float"])
    assert inspect(path).total == path.stat().st_size


def test_an_unchanged_file_takes_next_to_nothing(pair):
    _, base, folder = pair
    again = {name: value for name, value in load_coded(base).items()}
    assert save(again, folder / "same", base=base).stat().st_size < 500


def test_the_base_is_needed_and_has_to_be_the_same(pair):
    tuned, base, folder = pair
    path = save(tuned, folder / "delta", base=base)
    with pytest.raises(InvalidArgument, match="is a delta; got no base; .*base="):
        load(path)
    with pytest.raises(InvalidArgument, match="this is not the base"):
        load(path, base=save({"float": tuned["float"]}, folder / "other"))
    with pytest.raises(InvalidArgument, match="is no delta"):
        load(base, base=base)
    with pytest.raises(InvalidArgument, match="is a delta"):
        save(tuned, folder / "chain", base=path)
    with pytest.raises(BadFile):
        load(path, base=folder / "missing")


def test_a_base_with_the_same_content_will_do(pair):
    """Its bytes may be those of another version or codec."""
    tuned, base, folder = pair
    path = save(tuned, folder / "delta", base=base)
    copy = save(load_coded(base), folder / "copy", notes={"more": "bytes"})
    assert copy.read_bytes() != base.read_bytes()
    assert bits(load(path, base=copy)["half"]) == bits(tuned["half"])
