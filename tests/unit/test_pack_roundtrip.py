"""What goes into a packed file comes out of it: any shape, type, sparsity and codec."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings

from karikomi.errors import BadFile, InvalidArgument, UnknownName, Unwritable
from karikomi.pack import encoded_sizes, expand, grid_codec, inspect, load, load_coded, plain, save
from karikomi.pack.codecs import SINGLE_CODECS as CODECS
from karikomi.pack.container import manifest
from karikomi.pack.groups.contest import choose
from karikomi.pack.stored import EXTENDED, describe
from karikomi.quantize import Codebook, Coded, kmeans, uniform
from karikomi.search.accounting import bytes_by_cause

DTYPES = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 >i4 >f4 >u2 >f8".split()
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
)
names = st.text(min_size=1, max_size=20).filter(
    lambda text: (
        text.isprintable()
        and not {"/", "\\", ":", "."} & set(text)
        and text.isascii()
        and text != "__metadata__"  # reserved by safetensors, refused by save
    )
)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays have the same shape, type and bits, apart from byte order."""
    native = other.astype(other.dtype.newbyteorder("="))
    return (
        one.dtype == native.dtype and one.shape == other.shape and one.tobytes() == native.tobytes()
    )


@given(tensors=st.dictionaries(names, arrays, max_size=4))
@settings(max_examples=150)
def test_arrays_come_back_bit_for_bit(tmp_path_factory, tensors):
    path = save(tensors, tmp_path_factory.mktemp("pack") / "x.karikomi")
    loaded = load(path)
    assert list(loaded) == sorted(tensors)
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert set(safetensors.numpy.load_file(path)) == {""}


@st.composite
def sparse(draw):
    """Draw a flat array of any type with a chosen share of zeros, made by a seeded generator."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([1, 2, 3, 17, 300, 5000, 30_000]))
    density = draw(st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]))
    dtype = np.dtype(draw(st.sampled_from(["i1", "u1", "i2", "i4", "i8", "u8", "f2", "f4", "f8"])))
    spread = draw(st.sampled_from([1, 7, 100]))
    values = generator.normal(size=size) * spread * (generator.random(size) < density)
    return np.abs(values).astype(dtype) if dtype.kind == "u" else values.astype(dtype)


@given(sparse())
@settings(max_examples=80)
def test_every_codec_that_applies_is_lossless(array):
    flat = describe("x", array).flat
    best = choose(flat)
    for name, codec in CODECS.items():
        head = codec.fit(flat)
        if head is None:
            continue
        data = codec.encode(flat, head)
        assert codec.decode(data, flat.size, flat.dtype, head).tobytes() == flat.tobytes()
        assert codec.floor(flat, head) <= len(data)
        assert best.size <= len(head) + len(data) + len(name)


@pytest.mark.parametrize("codec", CODECS)
def test_each_codec_wins_somewhere(codec):
    generator = np.random.default_rng(0)
    rare = generator.random(200_000) < 0.002
    cases = {
        "raw": np.float32([1.5]),
        "bits": generator.integers(-8, 8, 10_000),
        "planes": generator.normal(size=5000).astype(np.float32),
        "gaps": np.where(rare, generator.normal(size=rare.size), 0).astype(np.float32),
        "rans": generator.normal(size=20_000).round().astype(np.int8),
    }
    array = cases[codec]
    assert choose(describe("x", array).flat).codec == codec
    sizes = {name: size for name, size in encoded_sizes(array).items() if name in CODECS}
    assert min(sizes, key=lambda name: sizes[name] + len(name)) == codec


@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_side=12), elements=st.floats(-9, 9, width=32)),
    st.integers(2, 16),
    st.booleans(),
)
def test_quantized_tensors_come_back_as_codes_and_as_floats(tmp_path_factory, array, bits, axis):
    path = tmp_path_factory.mktemp("pack") / "x.karikomi"
    tensors = {
        "uniform": uniform(array, bits=bits, axis=0 if axis else None),
        "codebook": kmeans(array, entries=bits),
        "wide": kmeans(array.astype(np.float16), entries=300),
    }
    save(tensors, path)
    dense, coded = load(path), load_coded(path)
    for name, tensor in tensors.items():
        back = coded[name]
        assert isinstance(back, Coded) and np.array_equal(back.codes, tensor.codes)
        assert same(dense[name], tensor.decode()) and same(back.decode(), tensor.decode())
        assert type(back.grid) is type(tensor.grid)
    assert coded["uniform"].grid.axis == tensors["uniform"].grid.axis
    assert coded["uniform"].grid.bits == bits


def test_scales_of_groups_come_back(tmp_path):
    array = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
    for groups in (1, 3):
        tensors = {"w": uniform(array, bits=4, axis=1, groups=groups), "b": array}
        path = save(tensors, tmp_path / "x.karikomi")
        back = load_coded(path)["w"]
        assert same(back.grid.scale, tensors["w"].grid.scale) and back.grid.groups == groups
        assert same(load(path)["w"], tensors["w"].decode())


class Powers:
    """Toy grid: 0, or a power of two above the exponent of its smallest value."""

    def __init__(self, smallest: float) -> None:
        self.numbers, self.bits = np.float32([smallest]), 3
        self.code_dtype = np.dtype("<u1")

    def check(self, codes: np.ndarray) -> None:
        assert codes.size == 0 or codes.max() < 8

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.where(codes == 0, 0, self.numbers * 2.0 ** (codes - 1.0)).astype(np.float32)


class PowersCodec:
    kind, grid = "powers", Powers

    def parameters(self, grid):
        return []

    def numbers(self, grid):
        return grid.numbers

    def is_valid(self, parameters, shape):
        return parameters == []

    def count(self, parameters, shape):
        return 1

    def make(self, parameters, numbers):
        return Powers(float(numbers[0]))

    def text(self, parameters):
        return "powers of two"

    def minor_version(self, parameters):
        return 1


def test_a_new_kind_of_grid_needs_one_entry(tmp_path, monkeypatch):
    tensor = Coded(np.array([[0, 1, 3], [7, 0, 2]], np.uint8), Powers(0.25))
    with pytest.raises(InvalidArgument, match="this kind of grid cannot be packed; got Powers"):
        save({"w": tensor}, tmp_path / "x")
    monkeypatch.setitem(grid_codec.GRID_CODECS, "powers", PowersCodec())
    path = save({"w": tensor}, tmp_path / "x")
    assert load(path)["w"].tolist() == [[0, 0.25, 1], [16, 0, 0.5]]
    assert isinstance(load_coded(path)["w"].grid, Powers)
    assert inspect(path).entries[0].quantizer == "powers of two"
    assert bytes_by_cause(tensor, 9)["quantized"] == 4 * (3 + 1) // 8 + 4


def test_special_values_and_layouts(tmp_path):
    odd = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, 1e308])
    odd.view(np.uint64)[2] |= 12345
    grid = np.arange(24, dtype=">f4").reshape(2, 3, 4)
    tensors = {
        "odd": odd,
        "sparse-odd": np.concatenate([odd, np.zeros(1000)]),
        "scalar": np.float16(1.5),
        "empty": np.zeros((3, 0, 2), np.int8),
        "transposed": grid.T,
        "strided": grid[:, ::2, ::-1],
        "fortran": np.asfortranarray(grid),
        "broadcast": np.broadcast_to(np.int16(7), (4, 5)),
        "largest": np.array([2**64 - 1, 0], np.uint64),
        "smallest": np.array([-(2**63), 2**63 - 1]),
        "no codes": Coded(np.zeros((0, 4), int), Codebook(np.float32([0, 1]))),
        "no scales": uniform(np.zeros((0, 4))),
    }
    loaded = load(save(tensors, tmp_path / "x"))
    for name, tensor in tensors.items():
        array = tensor.decode() if isinstance(tensor, Coded) else np.asarray(tensor)
        assert same(loaded[name], array), name
    assert all(one.flags.writeable for one in loaded.values())


CHUNK = 2**12


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_tensors_of_several_chunks(tmp_path, monkeypatch, size):
    monkeypatch.setattr(manifest, "CHUNK_SYMBOLS", CHUNK)
    generator = np.random.default_rng(size)
    codes = (generator.normal(size=size) * (generator.random(size) < 0.1)).round().astype(np.int8)
    tensors = {"codes": codes, "sparse": codes.astype(np.float32) / 3, "ramp": np.arange(size)}
    path = save(tensors, tmp_path / "x")
    loaded = load(path)
    assert all(same(loaded[name], tensors[name]) for name in tensors)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    array = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    tensors = {"b": kmeans(array), "a": array}
    first = save(tensors, tmp_path / "1", notes={"y": "1", "x": "2"}).read_bytes()
    turned = dict(reversed(tensors.items()))
    assert save(turned, tmp_path / "2", notes={"x": "2", "y": "1"}).read_bytes() == first


def test_any_safetensors_reader_opens_the_file(tmp_path):
    array = np.random.default_rng(0).normal(size=(100, 100)).astype("f4")
    path = save({"größe/0.weight": array, "b": kmeans(array[:2])}, tmp_path / "x.karikomi")
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {
            "größe/0.weight",
            "",
        }  # small ones are pooled, with the manifest
        assert file.metadata() == {"karikomi": "1.3"}
        for name in file.keys():
            assert file.get_tensor(name).dtype == np.uint8 and file.get_tensor(name).ndim == 1


def test_expanded_files_are_plain_safetensors(tmp_path):
    coded = uniform(np.random.default_rng(0).normal(size=(30, 20)))
    tensors = {"w": coded, "n": np.array(3), "m": np.eye(3, dtype=bool)}
    path = save(tensors, tmp_path / "x.karikomi", notes={"task": "digits"})
    out = expand(path, tmp_path / "deep" / "x.safetensors")
    plain = safetensors.numpy.load_file(out)
    assert same(plain["w"], coded.decode()) and same(plain["n"], tensors["n"])
    assert same(plain["m"], tensors["m"])
    with safetensors.safe_open(out, "np") as file:
        assert file.metadata() == {"task": "digits"}
    assert inspect(path).notes == {"task": "digits"}


def test_types_of_ml_dtypes_come_back_bit_for_bit_smaller_and_in_plain_files(tmp_path):
    floats = np.random.default_rng(0).normal(size=(64, 32))
    bits = {"bfloat16": 16, "float4_e2m1fn": 4, "int4": 4, "uint4": 4}
    tensors = {name: floats.astype(getattr(ml_dtypes, name)) for name in EXTENDED}
    path = save(tensors, tmp_path / "x.karikomi")
    loaded, seen = load(path), inspect(path)
    assert all(same_bits(loaded[name], tensors[name]) for name in EXTENDED)
    for account in seen.entries:
        assert account.dense == 64 * 32 * bits.get(account.name, 8) // 8
        assert account.payload + account.tables < account.dense
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"karikomi": "1.3"}
    out = expand(path, tmp_path / "x.safetensors")
    found = plain.read(out)
    for name in EXTENDED.keys() - {"int4", "uint4"}:
        assert same_bits(found[name], tensors[name])
    assert np.array_equal(found["int4"], tensors["int4"].astype("i1"))
    assert found["int4"].min() < 0 and found["uint4"].dtype == np.uint8
    theirs = safetensors.torch.load_file(out)
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
        assert theirs[name].dtype == getattr(torch, name)
        np.testing.assert_array_equal(theirs[name].float().numpy(), tensors[name].astype("f4"))
    pairs = theirs["float4_e2m1fn"].view(torch.uint8).numpy()
    assert np.array_equal(pairs & 15, tensors["float4_e2m1fn"].view("u1")[:, 0::2])


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3)])
def test_small_types_of_any_shape(tmp_path, shape):
    tensors = {name: np.zeros(shape, getattr(ml_dtypes, name)) for name in EXTENDED}
    loaded = load(save(tensors, tmp_path / "x"))
    assert all(same_bits(loaded[name], tensors[name]) for name in EXTENDED)


def test_pruned_and_unknown_bits_of_small_types_stay(tmp_path):
    every = np.arange(2**16, dtype="u2").view(ml_dtypes.bfloat16)  # each NaN, both zeros, all of it
    few = np.where(np.arange(2**16) % 50, 0, np.arange(2**16)).astype("u2").view(ml_dtypes.bfloat16)
    path = save({"every": every, "few": few}, tmp_path / "x")
    assert all(same_bits(load(path)[name], one) for name, one in (("every", every), ("few", few)))
    assert inspect(save({"few": few}, path)).entries[0].codec == "gaps"


def test_equal_tensors_are_stored_once_and_are_arrays_of_their_own(tmp_path):
    weight = np.random.default_rng(0).normal(size=(50, 40)).astype("f4")
    coded = uniform(weight)
    tensors = {"a": weight, "b": weight.copy(), "c": coded, "d": coded, "e": weight.T.copy()}
    tensors |= {"n": np.zeros(4), "o": np.zeros(4)}
    path = save(tensors, tmp_path / "x")
    once = save({name: tensors[name] for name in "acen"}, tmp_path / "once")
    assert path.stat().st_size < once.stat().st_size + 300
    loaded, codes = load(path), load_coded(path)
    assert list(loaded) == list(codes) == sorted(tensors)
    assert same(loaded["b"], weight) and same(loaded["d"], coded.decode())
    loaded["a"][0] = 9
    assert same(loaded["b"], weight)
    assert np.array_equal(codes["d"].codes, coded.codes)
    seen = inspect(path)
    assert [(one.name, one.codec) for one in seen.entries[-2:]] == [("b", "= a"), ("d", "= c")]
    # Three different weights and two small ones; what is tied counts once.
    assert seen.dense == 3 * weight.nbytes + 2 * 32
    assert sum(one.payload for one in seen.entries) == seen.payload
    expanded = safetensors.numpy.load_file(expand(path, tmp_path / "x.safetensors"))
    assert all(same(expanded[name], loaded[name]) for name in "bde")


@pytest.mark.parametrize(
    ("tensor", "fact"),
    [
        ({"kernel": np.ones(1)}, "only NumPy arrays.*got dict; give nested ones flat names"),
        ([1.0], "only NumPy arrays"),
        (None, "only NumPy arrays"),
        (np.ones(2, complex), "cannot be packed.*bfloat16"),
        (np.array(["a"]), "cannot be packed"),
        (np.array([object()]), "cannot be packed"),
        (np.zeros(2, "V2"), "bfloat16"),
        (np.zeros(2, "M8[s]"), "cannot be packed"),
    ],
)
def test_what_cannot_be_packed_is_named(tmp_path, tensor, fact):
    with pytest.raises(InvalidArgument, match=f"tensor 'layer.w': .*{fact}"):
        save({"layer.w": tensor}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


BAD_NAMES = ["", "__metadata__", "../x", "a/../b", "/x", "\\x", "C:\\x", "a\0b", "a\nb", "x" * 513]


@pytest.mark.parametrize("name", [*BAD_NAMES, "e\u0301", "\ud800", 3])
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(InvalidArgument, match="bad tensor name"):
        save({name: np.ones(1)}, tmp_path / "x")


def test_bad_notes_and_mappings_are_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="notes"):
        save({}, tmp_path / "x", notes={"a": 1})
    with pytest.raises(InvalidArgument, match="mapping"):
        save([np.ones(1)], tmp_path / "x")
    with pytest.raises(InvalidArgument, match="mapping from names to arrays; got .*Path"):
        save(tmp_path / "x", {"a": np.ones(1)})


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = save({"a": np.ones(3)}, tmp_path / "x")
    before = path.read_bytes()
    with pytest.raises(InvalidArgument):
        save({"a": np.ones(3, complex)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    with pytest.raises(Unwritable):
        save({"a": np.ones(3)}, tmp_path / "folder")


def test_a_path_with_a_nul_character_is_an_invalid_argument(tmp_path):
    for path in (tmp_path / "a\0b", "~\0"):
        with pytest.raises(InvalidArgument, match="NUL"):
            save({"a": np.ones(3)}, path)
    good = save({"a": np.ones(3)}, tmp_path / "x")
    with pytest.raises(InvalidArgument, match="NUL"):
        expand(good, tmp_path / "a\0b")


def test_the_home_sign_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save({"a": np.ones(3)}, "~/x.karikomi")
    assert (tmp_path / "x.karikomi").is_file() and load("~/x.karikomi")["a"].sum() == 3


def test_single_tensors_are_read_without_the_others(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {f"w{i}": generator.normal(size=(90, 90)).astype("f4") for i in range(3)}
    tensors |= {"tied": tensors["w1"].copy(), "b": np.arange(5)}
    path = save(tensors, tmp_path / "x")
    some = load(path, only=["w2", "tied"])
    assert list(some) == ["tied", "w2"] and all(same(some[name], tensors[name]) for name in some)
    with safetensors.safe_open(path, "np") as file:
        assert "w0" in file.keys()
    whole = bytearray(path.read_bytes())
    start = len(whole) - 3 * 90 * 90  # within the last payload in the file, that of w2
    whole[start] ^= 1
    path.write_bytes(whole)
    assert same(load(path, only={"w0"})["w0"], tensors["w0"]) and load(path, only=[]) == {}
    with pytest.raises(BadFile, match="tensor 'w2'"):
        load(path, only=["w2"])
    with pytest.raises(UnknownName, match="no such tensor; got 'w9'"):
        load(path, only=["w9"])
    with pytest.raises(InvalidArgument, match="a list of names"):
        load(path, only="w0")
