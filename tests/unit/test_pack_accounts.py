"""The sizes that decide which codec and which table is taken, against all that could have been taken."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from karikomi.pack import inspect, save
from karikomi.pack.codecs import SINGLE_CODECS as CODECS
from karikomi.pack.codecs import frequencies, gaps, planes
from karikomi.pack.groups.contest import choose, encoded_sizes
from karikomi.pack.groups.pools import GROUP_BYTES
from karikomi.quantize import Codebook, uniform


def test_the_file_takes_as_much_as_the_smallest_codec_with_its_grid(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        "units": uniform(generator.normal(size=(50, 9)).astype(np.float32), bits=5),
        "sparse": np.where(generator.random(4000) < 0.01, 3, 0).astype(np.int8),
        "floats": generator.normal(size=300).astype(np.float32),
    }
    seen = inspect(save(tensors, tmp_path / "x.karikomi"))
    best = sum(min(encoded_sizes(tensor).values()) for tensor in tensors.values())
    # A group less is worth its bytes in the manifest.
    assert seen.payload + seen.tables <= best + 2 * GROUP_BYTES
    for name, tensor in tensors.items():
        alone = inspect(save({name: tensor}, tmp_path / "x.karikomi"))
        sizes = encoded_sizes(tensor)
        assert alone.payload + alone.tables == sizes[alone.entries[0].codec]
        assert alone.payload + alone.tables <= min(sizes.values()) + 8


@pytest.mark.parametrize(
    ("values", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (16, 4), (17, 5), (257, 9)]
)
def test_a_code_has_as_many_bits_as_its_largest_value_needs(values: int, bits: int) -> None:
    assert Codebook(np.arange(values, dtype=np.float32)).bits == bits


@pytest.mark.parametrize("density", [0.3, 0.05, 0.01, 0.002])
def test_the_width_of_gaps_is_the_cheapest(density: float) -> None:
    generator = np.random.default_rng(1)
    flat = (generator.random(60_000) < density).astype(np.int8)
    sizes = {width: len(gaps.encode(flat, bytes([width]))) for width in gaps.WIDTHS}
    head = gaps.fit(flat)
    assert head is not None
    assert sizes[head[0]] <= 1.05 * min(sizes.values()) < 0.9 * max(sizes.values())


@pytest.mark.parametrize(("size", "spread"), [(60, 20.0), (500, 4.0), (20_000, 9.0)])
def test_the_frequency_table_is_the_cheapest_with_its_own_bytes(size: int, spread: float) -> None:
    flat = np.rint(np.random.default_rng(2).normal(size=size) * spread).astype(np.int8)
    low, counts = int(flat.min()), np.bincount(flat.astype(int) - int(flat.min()))

    def cost(table: frequencies.Frequencies) -> float:
        used = counts > 0
        shares = table.counts[used] / 2**table.precision
        return -(counts[used] * np.log2(shares)).sum() + 8 * len(table.to_bytes())

    settings = product(frequencies.PRECISIONS, frequencies.DETAILS)
    tables = [frequencies._table(counts, low, *setting) for setting in settings]
    chosen = frequencies.fit(flat)
    assert chosen is not None
    assert chosen.counts.sum() == 2**chosen.precision
    assert cost(chosen) == pytest.approx(min(cost(table) for table in tables if table))


def test_the_entropy_of_a_few_symbols() -> None:
    assert planes.entropy(np.array([4, 2, 1, 1, 0])) == pytest.approx(4 + 2 * 2 + 3 + 3)
    assert planes.entropy(np.array([7])) == 0.0


def test_every_codec_is_tried() -> None:
    flat = np.zeros(100_000, np.int8)
    flat[::3_001] = np.arange(1, 35)
    best = choose(flat)
    sizes = encoded_sizes(flat)
    assert {*sizes} == {*CODECS, "adaptive"} and best.size == sizes[best.codec]
