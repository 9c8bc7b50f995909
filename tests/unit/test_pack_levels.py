"""The codecs of levels: what they lose, what they win beside a static table, and the lists of floats."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from karikomi.errors import BadFile
from karikomi.pack import inspect, load, load_coded, save
from karikomi.pack.codecs import (
    LEVEL_CODECS,
    adaptive,
    context_model,
    contexts,
    floats,
    level_tables,
    mixing,
    neighbours,
)
from karikomi.pack.codecs.binary_range import RangeDecoder, RangeEncoder
from karikomi.pack.codecs.bit_numbers import BitReader, BitWriter
from karikomi.pack.codecs.cursor import Cursor
from karikomi.pack.codecs.neighbours import Neighbours
from karikomi.pack.container import manifest
from karikomi.pack.groups import on_cores
from karikomi.pack.groups.contest import choose
from karikomi.pack.groups.levels import codes_of, levels_of
from karikomi.pack.groups.pools import LARGE
from karikomi.quantize import Codebook, Coded, kmeans, uniform


def in_turn(function, items):
    return [function(item) for item in items]


def entropy_bytes(levels: np.ndarray) -> float:
    counts = np.unique(levels, return_counts=True)[1]
    return float((counts * np.log2(levels.size / counts)).sum() / 8)


def waves(size: int, seed: int = 0) -> np.ndarray:
    """Return levels whose spread changes slowly, as that of weights does from kernel to kernel."""
    generator = np.random.default_rng(seed)
    spread = np.exp(np.repeat(generator.normal(size=-(-size // 9)), 9)[:size])
    return np.clip(np.rint(generator.laplace(size=size) * spread), -255, 255).astype(np.int16)


@st.composite
def groups(draw):
    """Draw the levels of a few tensors with their shapes."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = draw(
        st.lists(
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=14),
            min_size=1,
            max_size=4,
        )
    )
    spread = draw(st.sampled_from([0.0, 0.3, 3.0, 60.0, 400.0]))
    size = sum(math.prod(shape) for shape in shapes)
    levels = np.clip(np.rint(generator.normal(size=size) * spread), -255, 255)
    return levels.astype(np.int16), shapes


@pytest.mark.parametrize("name", LEVEL_CODECS)
@given(groups())
@settings(max_examples=40)
def test_levels_come_back(name, group):
    levels, shapes = group
    codec = LEVEL_CODECS[name]
    coded = codec.encode(levels, shapes, 500, in_turn)
    if coded is not None:
        head, chunks = coded
        assert len(chunks) == -(-levels.size // 500)
        assert np.array_equal(codec.decode(chunks, shapes, head, 500, in_turn), levels)


def test_every_level_has_a_frequency_and_they_sum_to_a_power_of_two():
    for spread in (0.1, 2.0, 40.0):
        levels = np.clip(np.rint(np.random.default_rng(1).normal(size=3000) * spread), -255, 200)
        tally = np.bincount(levels.astype(int) + 255, minlength=511)
        for precision, detail in ((12, 0), (12, 2), (14, 1)):
            table = level_tables.fitted(tally, precision, detail)
            assert table.counts.sum() == 2**precision and table.counts.min() >= 1
            assert table.counts.size == sum(table.most) + 1
            ideal = 8 * entropy_bytes(levels)
            assert ideal <= table.cost(tally) <= 1.03 * ideal + 60


def test_a_model_is_read_as_it_was_written():
    levels = waves(20_000)
    walked = contexts._walk(levels, [levels.size - 7, 7], [20, 3], 3, 16)
    tallies = contexts._tallies(walked, levels.size)
    assert tallies.sum() == levels.size and tallies.min() == 0
    model, bits = context_model.fit(tallies, 3, [20, 3])
    data = model.to_bytes()
    back = context_model.parse(data, 2)
    assert (back.lag, back.classes, back.begins) == (3, (20, 3), model.begins)
    assert len(back.tables) > 2
    for one, other in zip(back.tables, model.tables, strict=True):
        assert np.array_equal(one.counts, other.counts)
    coded = 8 * len(contexts._pushed(walked, levels.size, back))
    assert bits < coded < 1.005 * bits + 8 * 4 * 16 + 32
    for cut in range(len(data)):
        with pytest.raises(BadFile):
            context_model.parse(data[:cut], 2)


def test_energies_are_those_of_the_page():
    """The formula of docs/file-format.md, one lane and one level at a time."""
    levels, mean, lag = waves(300).tolist(), 37, 5
    before = Neighbours(np.full((1, 1), mean), lag)
    past, average = [0] * 16, mean << 6
    for level in levels:
        energy, lean = before.context()
        sizes = [abs(past[-back]) for back in (1, 2, lag)]
        parts = 16 * (7 * sizes[0] + 2 * sizes[1] + 4 * sizes[2]) + (11 * average >> 6) + 8 * mean
        assert int(energy[0]) == parts >> 3 and int(lean[0]) == past[-1] + past[-lag]
        before.push(np.array([level]))
        past.append(level)
        average += ((abs(level) << 10) - average) >> 5


@pytest.mark.parametrize(("lag", "several"), [(1, False), (3, True), (15, True)])
def test_contexts_at_once_are_those_step_by_step(monkeypatch, lag, several):
    monkeypatch.setattr(neighbours, "BLOCK", 40)
    generator = np.random.default_rng(lag)
    levels = generator.integers(-255, 256, (50, 4)).astype(np.int16)
    stated = generator.integers(0, 4080, (50 if several else 1, 4))
    before = Neighbours(stated, lag)
    for rows, energies, leans in neighbours.contexts_of(levels, stated, lag):
        for row, energy, lean in zip(levels[rows], energies, leans, strict=True):
            expected = before.context()
            assert np.array_equal(energy, expected[0]) and np.array_equal(lean, expected[1])
            before.push(row.astype(np.int64))
    assert before.step == 50


def test_five_ways_written_out_are_those_of_the_mixer():
    generator = np.random.default_rng(0)
    contexts = generator.integers(0, 3, (3000, 5)) + 4 * np.arange(5)
    bits = generator.random(3000) < 0.1
    one, other = RangeEncoder(), RangeEncoder()
    mixer, code = mixing.Mixer(one.bit, 5, 1 / 16), mixing.five_ways(other.bit, 20, 1 / 16)
    for context, bit in zip(contexts.tolist(), bits.tolist(), strict=True):
        assert mixer.code(context, bit) == code(*context, bit) == bit
    assert one.close() == other.close()


def test_a_likely_sign_is_used():
    generator = np.random.default_rng(0)
    smooth = np.convolve(generator.normal(size=60_002), [1, 1, 1], "valid")
    levels = np.rint(2 * smooth).astype(np.int16)
    head, chunks = contexts.encode(levels, [(60_000 // 9, 1, 3, 3)], 2**20, in_turn)
    assert len(head) + len(chunks[0]) < 0.97 * entropy_bytes(levels)


def test_levels_before_tell_about_the_next():
    levels = waves(60_000)
    head, chunks = contexts.encode(levels, [levels.shape], 2**20, in_turn)
    assert len(head) + len(chunks[0]) < 0.98 * entropy_bytes(levels)
    shuffled = np.random.default_rng(0).permutation(levels)
    assert contexts.encode(shuffled, [levels.shape], 2**20, in_turn) is None


def dead_inputs(seed: int = 0) -> np.ndarray:
    """Return the levels of a sparse matrix whose inputs and outputs differ in how many weights they keep."""
    generator = np.random.default_rng(seed)
    kept = np.outer(generator.random(80) ** 2, generator.random(200) ** 6)
    return (generator.integers(1, 5, kept.shape) * (generator.random(kept.shape) < kept)).astype(
        np.int8
    )


def test_adaptive_coding_finds_dead_inputs():
    levels = dead_inputs()
    _, chunks = adaptive.encode(levels.reshape(-1).astype(np.int16), [levels.shape], 2**20, in_turn)
    assert len(chunks[0]) < 0.9 * choose(levels.reshape(-1)).size
    mixed = np.random.default_rng(1).permutation(levels.reshape(-1)).astype(np.int16)
    _, chunks = adaptive.encode(mixed, [levels.shape], 2**20, in_turn)
    assert len(chunks[0]) < 1.03 * entropy_bytes(mixed)


def test_adaptive_coding_is_for_few_levels(tmp_path):
    assert adaptive.encode(np.zeros(2**19 + 1, np.int16), [(2**19 + 1,)], 2**20, in_turn) is None
    assert adaptive.encode(np.ones(2**17, np.int16), [(2**17,)], 2**20, in_turn) is None
    with pytest.raises(BadFile, match="too many levels"):
        adaptive.decode([b""], [(2**20,)], b"", 0, in_turn)


@given(st.lists(st.tuples(st.integers(1, 2**16 - 1), st.booleans()), max_size=300), st.booleans())
@settings(max_examples=60)
def test_bits_come_back_from_the_range_coder(bits, likely):
    if likely:  # the carry goes far where bits are nearly certain
        bits = [(1, False)] * 200 + bits
    coder = RangeEncoder()
    for chance, bit in bits:
        coder.bit(chance, int(bit))
    data = coder.close()
    reader = RangeDecoder(data)
    assert [reader.bit(chance) for chance, _ in bits] == [int(bit) for _, bit in bits]
    reader.close()
    ideal = sum(-math.log2((chance if bit else 2**16 - chance) / 2**16) for chance, bit in bits)
    assert len(data) <= ideal / 8 * 1.01 + 4


@given(
    st.lists(st.integers(-(2**20), 2**20), max_size=40),
    st.lists(st.integers(0, 2**9 - 1), max_size=9),
)
def test_numbers_come_back_from_bits(signed, plain):
    out = BitWriter()
    out.signed(signed)
    for number in plain:
        out.number(number, 9)
    reader = BitReader(out.close())
    assert reader.signed(len(signed)) == signed and [reader.number(9) for _ in plain] == plain
    reader.close()


@given(
    hnp.arrays("<u4", st.integers(0, 40), elements=st.integers(0, 2**32 - 1)), st.integers(0, 31)
)
def test_floats_come_back_bit_for_bit(whole, cut):
    numbers = (whole >> cut << cut).astype("<u4").view("<f4")
    data = floats.write(numbers)
    cursor = Cursor(data)
    assert floats.read(cursor, numbers.size).tobytes() == numbers.tobytes()
    cursor.close()


def test_short_floats_take_few_bytes():
    values = np.float32([1.5, -0.75, 0.875, 2.25, -1.25, 3.0, 0.5])
    assert len(floats.write(values)) <= 5 + 7
    assert floats.write(np.empty(0, np.float32)) == b""


def test_codes_of_a_codebook_are_ordered_around_zero():
    grid = Codebook(np.float32([0, -2, 1, -1, 3]))
    codes = np.uint8([0, 1, 2, 3, 4])
    assert levels_of(codes, grid).tolist() == [0, -2, 1, -1, 2]
    assert codes_of(np.int16([0, -2, 1, -1, 2]), grid, np.dtype("u1")).tolist() == codes.tolist()
    for bad in (-3, 3):
        with pytest.raises(BadFile, match="levels outside of the grid"):
            codes_of(np.int16([bad]), grid, np.dtype("u1"))
    assert levels_of(np.float32([1]), None) is None and levels_of(np.int32([300]), None) is None


def test_small_tensors_share_one_stream_and_come_back_as_codes(tmp_path):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(40, 60)).astype("f4")
    tensors = {
        "uniform": uniform(weight, bits=4),
        "book": kmeans(np.where(abs(weight) < 1.5, 0, weight), entries=12),
        "codes": (generator.normal(size=500) * 3).astype("i4"),
    }
    path = save(tensors, tmp_path / "x")
    assert {entry.codec for entry in inspect(path).entries} == {"adaptive"}
    back, dense = load_coded(path), load(path)
    for name in ("uniform", "book"):
        assert isinstance(back[name], Coded) and np.array_equal(
            back[name].codes, tensors[name].codes
        )
        assert dense[name].tobytes() == tensors[name].decode().tobytes()
    assert dense["codes"].dtype == np.int32 and np.array_equal(dense["codes"], tensors["codes"])


def test_the_bytes_do_not_depend_on_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK_SYMBOLS", 5000)
    tensors = {"a": waves(11_000).astype("i2"), "b": np.random.default_rng(0).normal(size=9_000)}
    monkeypatch.setattr("karikomi.pack.groups.pools.LARGE", 1000)
    many = save(tensors, tmp_path / "many").read_bytes()
    monkeypatch.setattr(on_cores, "MOST_THREADS", 1)
    assert save(tensors, tmp_path / "one").read_bytes() == many
    assert np.array_equal(load(tmp_path / "many")["a"], tensors["a"]) and LARGE > 1000


SAVED = """
import hashlib, sys
import numpy as np
from karikomi.pack import save
generator = np.random.default_rng(0)
weight = np.rint(np.cumsum(generator.integers(-2, 3, (90, 100)), 1) / 4).astype("i2")
codes = {"a": weight, "b": generator.integers(0, 9, 5_000).astype("u1"), "c": weight.astype("f4") / 7}
codes["d"] = np.where(generator.random((60, 50)) < 0.1, generator.integers(-7, 8, (60, 50)), 0)
print(hashlib.sha256(save(codes, sys.argv[1]).read_bytes()).hexdigest())
"""


def test_the_bytes_do_not_depend_on_the_instruction_set(tmp_path):
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    digests = {
        subprocess.run(
            [sys.executable, "-c", SAVED, str(tmp_path / "x")],
            env={**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for disabled in ("", " ".join(found))
    }
    assert len(digests) == 1 and digests.pop().strip()
