"""How small packed tensors get: beside Shannon's bound, an independent coder and fixed budgets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from karikomi.pack import inspect, save
from karikomi.pack.codecs import rans
from karikomi.pack.groups.contest import choose
from karikomi.quantize import kmeans, uniform


def gauss(size, spread, density=1.0):
    generator = np.random.default_rng(size)
    codes = np.rint(generator.normal(size=size) * spread)
    return np.clip(codes * (generator.random(size) < density), -127, 127).astype(np.int8)


def shannon(codes):
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum() / 8)


SOURCES = {
    "int8": gauss(300_000, 30.0),
    "int4": gauss(300_000, 2.0),
    "90 % sparse": gauss(400_000, 2.0, 0.1),
    "98 % sparse": gauss(500_000, 2.0, 0.02),
}


@pytest.mark.parametrize("source", SOURCES)
def test_rans_is_within_one_and_a_half_per_cent_of_the_bound(source):
    codes = SOURCES[source]
    head = rans.fit(codes)
    size = len(rans.encode(codes, head)) + len(head)
    assert shannon(codes) <= size <= 1.015 * shannon(codes)


@pytest.mark.parametrize("source", SOURCES)
def test_gaps_are_near_the_bound_where_tensors_are_sparse(source):
    encoded = choose(SOURCES[source])
    assert encoded.size <= 1.015 * shannon(SOURCES[source])


def test_rans_is_as_small_as_an_independent_coder():
    constriction = pytest.importorskip("constriction")
    codes = SOURCES["int4"]
    symbols = (codes.astype(np.int32) - codes.min()).astype(np.int32)
    shares = np.bincount(symbols) / symbols.size
    model = constriction.stream.model.Categorical(shares.astype(np.float32), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, model)
    theirs = 4 * len(coder.get_compressed())
    assert len(rans.encode(codes, rans.fit(codes))) <= 1.006 * theirs


@pytest.mark.parametrize("size", [2, 10, 100, 1000])
def test_tiny_tensors_cost_little_more_than_raw_at_worst(size):
    codes = gauss(size, 40.0)
    assert choose(codes).size <= codes.nbytes
    sparse = gauss(size, 2.0, 0.1)
    assert choose(sparse).size <= math.ceil(shannon(sparse)) + 16


def lenet(seed=0):
    """Return LeNet-300-100 with Laplacian weights at 97, 94 and 70 % sparsity, 16 shared values."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for index, (out, inputs, sparsity) in enumerate(
        [(300, 784, 0.97), (100, 300, 0.94), (10, 100, 0.70)]
    ):
        weight = generator.laplace(size=(out, inputs), scale=0.05).astype(np.float32)
        weight[np.abs(weight) < np.quantile(np.abs(weight), sparsity)] = 0
        tensors[f"{2 * index}.weight"] = kmeans(weight, entries=16)
        tensors[f"{2 * index}.bias"] = uniform(generator.normal(size=out) * 0.05, axis=None)
    return tensors


def test_lenet_keeps_to_its_budget(tmp_path):
    seen = inspect(save(lenet(), tmp_path / "x.karikomi"))
    assert seen.total == (tmp_path / "x.karikomi").stat().st_size < 12_500
    assert seen.header + seen.manifest + seen.tables < 1_400
    assert seen.manifest < 150 * len(seen.entries)


def test_every_byte_is_accounted_for(tmp_path):
    tensors = {**lenet(), "steps": np.array(7), "none": np.zeros((0, 3))}
    seen = inspect(save(tensors, tmp_path / "x.karikomi"))
    assert seen.payload + seen.tables + seen.header + seen.manifest == seen.total
    assert sum(one.manifest for one in seen.entries) == seen.manifest
    assert 0 < seen.header - sum(one.header for one in seen.entries) < 120
    assert seen.dense == sum(one.dense for one in seen.entries)
    assert seen.ratio == pytest.approx(seen.dense / seen.total)
    by_name = {one.name: one for one in seen.entries}
    weight = by_name["0.weight"]
    assert weight.elements == 784 * 300 and weight.nonzero == round(0.03 * 784 * 300)
    assert weight.shannon <= weight.payload <= 1.02 * weight.shannon
    assert weight.bits_per_weight == 8 * (weight.payload + weight.tables) / weight.elements
    assert weight.quantizer.startswith("codebook 1") and weight.dense == 4 * 784 * 300
    assert by_name["0.bias"].quantizer == "uniform 8 bits"
    assert by_name["steps"].quantizer == "none" and by_name["none"].bits_per_weight == 0


def test_a_value_that_the_sample_lacks_does_not_leave_a_tensor_raw():
    """The codec that is best in the middle has no table for it."""
    codes = np.rint(np.random.default_rng(0).normal(size=600_000) * 38).astype(np.int16)
    codes[5] = 5_000
    encoded = choose(codes)
    assert encoded.codec != "raw" and encoded.size < 0.6 * codes.nbytes
