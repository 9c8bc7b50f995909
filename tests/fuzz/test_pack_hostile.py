"""Hostile files: every altered byte, every truncation, and lies with a right checksum.

A file is taken apart, changed in one place, and put together again with correct CRC32 values, so
that the check under test is the one that has to answer. Each must answer with one `BadFile`.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from depth import FULL
from karikomi.errors import BadFile, InvalidArgument
from karikomi.pack import Budget, inspect, load, load_coded, save
from karikomi.pack.codecs import SINGLE_CODECS as CODECS
from karikomi.pack.codecs import deflate
from karikomi.pack.codecs.cursor import Cursor, signed_varint, varint
from karikomi.pack.stored import describe
from karikomi.quantize import kmeans, uniform

GENERATOR = np.random.default_rng(3)
DENSE = GENERATOR.normal(size=(12, 40)).astype(np.float32)
SPARSE = np.where(GENERATOR.random((12, 40)) < 0.1, DENSE, 0).astype(np.float32)
TENSORS = {
    "bits": GENERATOR.integers(0, 16, 40),
    "gaps": np.pad(SPARSE, ((0, 60), (0, 0))),
    "planes": DENSE,
    "rans": kmeans(SPARSE, entries=4),
    "raw": np.array([True, False]),
    "uniform": uniform(DENSE[:4], bits=4),
}


class Parts:
    """A packed file taken apart: metadata, manifest, directory and payloads, all open to change."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        self.directory = json.loads(data[8 : 8 + length])
        self.metadata = self.directory.pop("__metadata__")
        self.manifest = json.loads(zlib.decompress(base64.b85decode(self.metadata["manifest"])))
        self.entries = {entry["n"]: entry for entry in self.manifest["t"]}
        body = data[8 + length :]
        self.payloads = {}
        for name, item in self.directory.items():
            start, end = item["data_offsets"]
            self.payloads[name] = body[start:end]

    def parts(self, name: str) -> list[bytes]:
        """Return tables and chunks of a tensor."""
        cursor = Cursor(self.payloads[name])
        return [cursor.take(length) for length, _ in self.entries[name]["k"]]

    def replace(self, name: str, parts: list[bytes]) -> None:
        """Set tables and chunks of a tensor, with lengths and CRC32 values that agree."""
        self.entries[name]["k"] = [[len(part), zlib.crc32(part)] for part in parts]
        self.payloads[name] = b"".join(parts)
        at = 0
        for one, payload in self.payloads.items():
            span = {"shape": [len(payload)], "data_offsets": [at, at + len(payload)]}
            self.directory[one] = {"dtype": "U8", **span}
            at += len(payload)

    def text(self) -> str:
        """Return the manifest's text as it stands in the metadata."""
        return encode_manifest(json.dumps(self.manifest).encode())

    def build(self) -> bytes:
        """Return the file."""
        metadata = {"__metadata__": {**self.metadata, "manifest": self.text()}}
        return assemble(json.dumps(metadata | self.directory).encode(), self.body())

    def body(self) -> bytes:
        """Return all payloads."""
        return b"".join(self.payloads.values())


def assemble(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def encode_manifest(text: bytes) -> str:
    return base64.b85encode(zlib.compress(text)).decode()


@pytest.fixture(scope="module")
def original() -> bytes:
    """Return a file of version 1.0, as `save` wrote it then."""
    path = Path(__file__).parents[1] / "unit" / "earlier_files" / "1.0.karikomi"
    assert {one.name: one.codec for one in inspect(path).entries} | {"uniform": ""} == {
        name: name if name != "uniform" else "" for name in TENSORS
    }
    return path.read_bytes()


@pytest.fixture
def parts(original) -> Parts:
    return Parts(original)


@pytest.fixture
def refuse(tmp_path):
    """Return a check that a file is refused in one line that has `fact` in it, and say the line."""

    def check(content: bytes, fact: str = "karikomi", **budget: int) -> str:
        path = tmp_path / "bad.karikomi"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            for read in (load, load_coded, inspect):
                with pytest.raises(BadFile, match=fact) as caught:
                    read(path, budget=Budget(**budget) if budget else None)
                assert "\n" not in str(caught.value) and str(path) in str(caught.value)
                assert len(str(caught.value)) < 600
            assert tracemalloc.get_traced_memory()[1] < 2**26, "memory was taken before the check"
            return str(caught.value)
        finally:
            tracemalloc.stop()

    return check


def test_a_rebuilt_file_still_loads(parts, tmp_path):
    """Without this, every test below might pass for the wrong reason."""
    for name in TENSORS:
        parts.replace(name, parts.parts(name))
    path = tmp_path / "x"
    path.write_bytes(parts.build())
    assert_identical(load(path))


def assert_identical(loaded) -> None:
    assert loaded.keys() == TENSORS.keys()
    for name, array in loaded.items():
        assert array.tobytes() == describe(name, TENSORS[name]).decoded().tobytes()
        assert array.shape == TENSORS[name].shape


# Integrity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "mask"), list(enumerate([0x01, 0x80, 0xFF])))
def test_every_altered_byte_is_found(original, tmp_path, first, mask):
    path = tmp_path / "x"
    for at in range(len(original)) if FULL else range(3 * first, len(original), 9):
        path.write_bytes(original[:at] + bytes([original[at] ^ mask]) + original[at + 1 :])
        with pytest.raises(BadFile) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_every_truncation_is_found(original, tmp_path):
    path = tmp_path / "x"
    for length in range(0, len(original), 1 if FULL else 4):
        path.write_bytes(original[:length])
        with pytest.raises(BadFile):
            load(path)


@given(st.data())
@settings(max_examples=150)
def test_payloads_of_noise_are_refused(original, tmp_path_factory, data):
    parts = Parts(original)
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    noise = [data.draw(st.binary(max_size=80)) if one else b"" for one in parts.parts(name)]
    parts.replace(name, noise)
    path = tmp_path_factory.mktemp("noise") / "x"
    path.write_bytes(parts.build())
    with pytest.raises(BadFile, match=f"tensor '{name}'"):
        load(path)


@pytest.mark.parametrize("name", list(TENSORS))
def test_altered_bytes_with_a_right_crc_are_found_by_codec_or_digest(parts, refuse, name):
    for index, part in enumerate(parts.parts(name)):
        for at in range(0, len(part), max(1, len(part) // 6)):
            forged = copy.deepcopy(parts)
            pieces = forged.parts(name)
            pieces[index] = part[:at] + bytes([part[at] ^ 0x55]) + part[at + 1 :]
            forged.replace(name, pieces)
            refuse(forged.build(), f"tensor '{name}'")


def test_a_wrong_digest_is_named(parts, refuse):
    parts.entries["planes"]["x"] = "0" * 32
    refuse(parts.build(), "tensor 'planes': .*digest")


def test_swapped_chunks_table_is_named(parts, refuse):
    parts.entries["raw"]["k"][1][1] ^= 1
    refuse(parts.build(), "tensor 'raw': .*CRC32")


# Header ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 3, 2**20, 2**63, 2**64 - 1])
def test_a_lying_header_length_is_refused(original, refuse, length):
    refuse(length.to_bytes(8, "little") + original[8:])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1.0}',
        b'{"a": 1, "a": 1}',
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"__metadata__": {"format": "pt"}}',
        b'{"__metadata__": {"karikomi": 1}}',
        b'{"__metadata__": {"karikomi": "1.0"}}',
        b'{"__metadata__": {"karikomi": "1.0", "manifest": 3}}',
        b'{"__metadata__": {"karikomi": "1.0", "manifest": "!"}}',
        b'{"__metadata__": {"karikomi": "1.0", "manifest": "\\ud800"}}',
        b'{"__metadata__": {"karikomi": "1.0", "manifest": "", "more": ""}}',
    ],
)
def test_malformed_headers_are_refused(refuse, header):
    refuse(assemble(header, b""))


@pytest.mark.parametrize(
    "version", ["2.0", "0.9", "1", "1.0.0", "", "1.x", "-1.0", "\u0661.0", "9" * 99]
)
def test_other_versions_are_refused(parts, refuse, version):
    parts.metadata["karikomi"] = version
    refuse(parts.build(), "version")


@pytest.mark.parametrize("version", [[2, 0], [1], [], "1.0", None, [1.5, 0], [True, 0], [-1, 0]])
def test_other_manifest_versions_are_refused(parts, refuse, version):
    parts.manifest["v"] = version
    refuse(parts.build())


def test_a_later_minor_version_is_read(parts, tmp_path):
    parts.metadata["karikomi"], parts.manifest["v"] = "1.7", [1, 7]
    path = tmp_path / "x"
    path.write_bytes(parts.build())
    assert_identical(load(path))


def later(parts: Parts) -> bytes:
    """Return the file as a later minor version would have written it."""
    parts.metadata["karikomi"], parts.manifest["v"] = "1.7", [1, 7]
    return parts.build()


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda parts: parts.manifest.update(more=1), "'more'"),
        (lambda parts: parts.manifest.update(r=["delta"]), "delta"),
        (lambda parts: parts.metadata.update(more="1"), "'more'"),
        (lambda parts: parts.entries["raw"].update(z=0), "'z'"),
        (lambda parts: parts.entries["raw"].update(c="lzma"), "'lzma'"),
        (lambda parts: parts.entries["raw"].update(d="f16"), "'f16'"),
        (lambda parts: parts.entries["uniform"].update(g=["lattice", 8]), "'lattice'"),
    ],
    ids="field feature metadata tensor-field codec type quantizer".split(),
)
def test_what_a_later_minor_version_adds_is_named_as_such(parts, refuse, change, fact):
    change(parts)
    assert "later version" not in refuse(parts.build(), fact)
    refuse(later(parts), rf"from a later version, 1\.7: .*{fact}.*upgrade karikomi")


def test_a_damaged_file_of_a_later_version_is_not_said_to_be_newer(parts, refuse):
    del parts.entries["raw"]["x"]
    assert "later version" not in refuse(later(parts), "tensor 'raw': missing fields")


@pytest.mark.parametrize(
    ("header", "manifest"), [("1.7", [1, 0]), ("1.0", [1, 7]), ("1.8", [1, 7])]
)
def test_header_and_manifest_must_state_one_version(parts, refuse, header, manifest):
    parts.metadata["karikomi"], parts.manifest["v"] = header, manifest
    refuse(parts.build(), "header and manifest state different versions")


def test_unknown_required_features_are_refused(parts, refuse):
    parts.manifest["r"] = ["delta"]
    refuse(parts.build(), "needs features.*delta.*upgrade")


# Directory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F32"},
        {"shape": [-1]},
        {"shape": [2**63]},
        {"shape": []},
        {"shape": [True]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 0, 0]},
        {"data_offsets": [-1, 1]},
        {"data_offsets": [2, 0]},
        {"data_offsets": [0, 2**64]},
        {"data_offsets": "0"},
        {"more": 1},
    ],
)
def test_malformed_directory_entries_are_refused(parts, refuse, change):
    parts.directory["raw"] |= change
    refuse(parts.build(), "malformed")


def test_holes_overlaps_and_trailing_bytes_are_refused(parts, refuse, original):
    refuse(original + b"\0", "bytes follow the last payload")
    shifted = copy.deepcopy(parts)
    for item in shifted.directory.values():
        item["data_offsets"] = [at + 1 for at in item["data_offsets"]]
    shifted.payloads = {"": b"\0", **shifted.payloads}
    refuse(shifted.build(), "overlap or leave a hole")
    shared = copy.deepcopy(parts)
    shared.directory["planes"] = shared.directory["gaps"]
    refuse(shared.build(), "overlap or leave a hole")


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/../../b", "/etc/x", "\\x", "C:/x", "a\0", "x" * 513, "x" * 10**6, "e\u0301"],
)
def test_bad_names_are_refused(parts, refuse, name):
    parts.entries["raw"]["n"] = name
    parts.directory = {name if one == "raw" else one: item for one, item in parts.directory.items()}
    refuse(parts.build(), "bad tensor name")


def test_manifest_and_directory_must_name_the_same_tensors(parts, refuse):
    renamed = copy.deepcopy(parts)
    renamed.entries["raw"]["n"] = "other"
    refuse(renamed.build(), "different tensors")
    twice = copy.deepcopy(parts)
    twice.manifest["t"].append(twice.manifest["t"][0])
    refuse(twice.build(), "different tensors")
    parts.manifest["t"].pop()
    refuse(parts.build(), "different tensors")


# Manifest --------------------------------------------------------------------------------------

HUGE = [[2**62], [2**31, 2**31], [2**63, 0], [10**400], [2] * 40, [1] * 100_000]
SHAPES = [[-1], [1.5], [True], "2", None, [None], [3], *HUGE]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape)[:20])
def test_bad_shapes_are_refused(parts, refuse, shape):
    parts.entries["raw"]["s"] = shape
    refuse(parts.build())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d", "f3"),
        ("d", None),
        ("d", ["f4"]),
        ("c", "lzma"),
        ("c", ["raw"]),
        ("c", "__init__"),
        ("x", "00"),
        ("x", None),
        ("k", None),
        ("k", []),
        ("k", [[0, 0]]),
        ("k", [[0, 0], [2, 0], [0, 0]]),
        ("k", [[0, 0], [2]]),
        ("k", [[0, 0], [-2, 0]]),
        ("k", [[0, 0], [2.0, 0]]),
        ("k", [[0, 0], [10**12, 0]]),
        ("k", [[0, 0], 7]),
        ("n", None),
        ("z", 0),
        ("g", ["uniform", 8, None]),
    ],
)
def test_bad_fields_are_refused(parts, refuse, key, value):
    parts.entries["raw"][key] = value
    refuse(parts.build())


@pytest.mark.parametrize("key", ["n", "s", "d", "c", "k", "x"])
def test_missing_fields_are_refused(parts, refuse, key):
    del parts.entries["raw"][key]
    refuse(parts.build())


@pytest.mark.parametrize(
    "change",
    [
        {"t": None},
        {"t": [None]},
        {"t": {}},
        {"r": "x"},
        {"r": [["x"]]},
        {"r": [{}]},
        {"notes": []},
        {"notes": {"a": 1}},
        {"more": 1},
        {"v": None},
    ],
)
def test_malformed_manifests_are_refused(parts, refuse, change):
    parts.manifest |= change
    refuse(parts.build())


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff", b'{"v":[1,0],"v":[1,0],"t":[]}', b'{"v":[1,0],"t":[1e3]}']
)
def test_manifests_that_are_no_strict_json_are_refused(parts, refuse, text):
    parts.text = lambda: encode_manifest(text)
    refuse(parts.build())


def test_a_manifest_bomb_is_refused(parts, refuse):
    parts.text = lambda: encode_manifest(b" " * 2**25)
    refuse(parts.build(), "more header than the budget")


# Quantizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid",
    [
        ["uniform", 1, 0],
        ["uniform", 33, 0],
        ["uniform", 4, 2],
        ["uniform", 4, -1],
        ["uniform", 4, True],
        ["uniform", True, 0],
        ["uniform", 4.0, 0],
        ["uniform", 4],
        ["uniform", 4, None],
        ["uniform", 4, None, 2],
        ["uniform", 4, 0, 2],
        ["uniform", 4, 1, 1],
        ["uniform", 4, 1, -2],
        ["uniform", 4, 1, 3],
        ["uniform", 4, 1, 2.0],
        ["uniform", 4, 1, True],
        ["uniform", 4, 1, None],
        ["uniform", 4, 1, 2, 2],
        [["uniform"], 4, 0],
        ["codebook", -1],
        ["codebook", 0],
        ["codebook", 2**16],
        ["codebook", True],
        ["other", 4],
        [],
        {},
        "uniform",
        4,
    ],
    ids=str,
)
def test_bad_quantizers_are_refused(parts, refuse, grid):
    parts.entries["uniform"]["g"] = grid
    refuse(parts.build(), "tensor 'uniform'|is not an integer")


def test_groups_need_version_1_1(parts, refuse):
    parts.entries["uniform"]["g"] = ["uniform", 4, 1, 2]
    refuse(parts.build(), r"equal tensors of a later version; got '?\[1, 0\]")


@pytest.mark.parametrize(
    ("equal", "fact"),
    [
        ({"copy": "no"}, "equal to one that is not stored"),
        ({"copy": "copy"}, "equal to one that is not stored"),
        ({"copy": ["raw"]}, "equal to one that is not stored"),
        ({"bits": "raw"}, "stored, and equal to another"),
        ({"../x": "raw"}, "bad tensor name"),
        (["raw"], "not an object"),
        (3, "not an object"),
        ({f"x{n}": "raw" for n in range(2**16)}, "more tensors than the budget"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_equal_tensors_are_refused(parts, refuse, equal, fact):
    parts.manifest |= {"a": equal, "v": [1, 2]}
    parts.metadata["karikomi"] = "1.2"
    refuse(parts.build(), fact)


def test_equal_tensors_count_among_what_is_decoded(parts, refuse):
    parts.manifest |= {"a": {f"x{n}": "planes" for n in range(9)}, "v": [1, 2]}
    parts.metadata["karikomi"] = "1.2"
    refuse(parts.build(), "more decoded than the budget", decoded=2 * 12 * 72 * 4 + 9 * 12 * 40 * 4)


def test_equal_tensors_and_small_types_need_version_1_2(parts, refuse):
    parts.manifest["a"] = {"copy": "raw"}
    refuse(parts.build(), r"later version; got '?\[1, 0\]")
    del parts.manifest["a"]
    parts.entries["raw"]["d"] = "uint4"
    refuse(parts.build(), r"later version; got '?\[1, 0\]")
    parts.manifest["v"], parts.metadata["karikomi"] = [1, 2], "1.2"
    parts.replace("raw", [b"", b"\1\20"])
    refuse(parts.build(), "tensor 'raw': a uint4 out of range; got 1 to 16; allowed: 0 to 15")


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-40])
def test_bad_scales_are_refused(parts, refuse, scale):
    from karikomi.pack.codecs import planes

    tables, *chunks = parts.parts("uniform")
    cursor = Cursor(tables)
    planes.read(cursor, 4, np.dtype("<f4"))
    scales = planes.write(np.array([1, scale, 1, 1], "<f4"))
    parts.replace("uniform", [scales + cursor.rest(), *chunks])
    refuse(parts.build(), "tensor 'uniform': .*scale")


def test_codes_beyond_the_codebook_are_refused(parts, refuse):
    parts.entries["rans"] |= {"g": ["codebook", 0], "c": "raw"}
    no_values = b"\0" * 4
    parts.replace("rans", [no_values, b"\1" * 480])
    refuse(parts.build(), "tensor 'rans': .*codes outside of the grid")


# Codecs ----------------------------------------------------------------------------------------


def rans_file(parts: Parts, table: bytes | None, chunk: bytes | None) -> bytes:
    """Return the file with another frequency table or another stream of the rANS tensor."""
    from karikomi.pack.codecs import planes

    tables, stream = parts.parts("rans")
    cursor = Cursor(tables)
    planes.read(cursor, parts.entries["rans"]["g"][1], np.dtype("<f4"))
    grid = tables[: cursor.at]
    parts.replace("rans", [grid + (cursor.rest() if table is None else table), chunk or stream])
    return parts.build()


def table(setting=0, low=0, size=5, peak=0, body=b"\x01") -> bytes:
    return bytes([setting]) + signed_varint(low) + varint(size) + varint(peak) + body


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        table(setting=24),
        table(setting=255),
        table(size=0),
        table(size=1),
        table(size=4097),
        table(size=2**40),
        table(peak=5),
        table(body=b""),
        table(body=b"\x01\x00"),
        table(body=b"\x00\x01\x00\x00"),
        table(body=b"\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        table(body=b"\x01\x00\x00"),
        table(body=b"\x01" + b"\xdd\xdd"),
        table(low=2**60, body=b"\x01\x11\x11"),
    ],
    ids=lambda bad: bad.hex()[:24],
)
def test_bad_frequency_tables_are_refused(parts, refuse, bad):
    refuse(rans_file(parts, bad, None), "tensor 'rans'")


@pytest.mark.parametrize(
    "change",
    [
        lambda chunk: b"",
        lambda chunk: b"\x00" + chunk[1:],
        lambda chunk: varint(481) + chunk[1:],
        lambda chunk: varint(10**12) + chunk[1:],
        lambda chunk: chunk[:1] + b"\xff\xff\x00\x00" + chunk[5:],
        lambda chunk: chunk[:-1],
        lambda chunk: chunk[:-2],
        lambda chunk: chunk + b"\0",
        lambda chunk: chunk + b"\0\0",
        lambda chunk: b"\x81\x00" + chunk[1:],
        lambda chunk: b"\xff" * 12,
    ],
)
def test_bad_rans_streams_are_refused(parts, refuse, change):
    chunk = parts.parts("rans")[1]
    assert chunk[0] == 1, "the cases speak of a stream of one lane"
    refuse(rans_file(parts, None, change(chunk) or b"\0"), "tensor 'rans'")


def test_too_few_lanes_for_the_symbols_are_refused():
    """A chunk of one lane would keep the reader busy for seconds, a file of them for hours."""
    codes = np.arange(2**20) % 3
    head = CODECS["rans"].fit(codes)
    data = varint(1) + CODECS["rans"].encode(codes, head)[1:]
    with pytest.raises(BadFile, match="lane count"):
        CODECS["rans"].decode(data, codes.size, codes.dtype, head)


def gap_chunk(symbols, values, nonzero=None, total=None) -> bytes:
    from karikomi.pack.codecs import planes

    symbols, values = np.array(symbols, np.uint8), np.array(values, np.float32)
    counts = varint(values.size if nonzero is None else nonzero)
    counts += varint(symbols.size if total is None else total)
    return counts + planes.write(symbols) + planes.write(values)


@pytest.mark.parametrize(
    ("head", "chunk"),
    [
        (b"", gap_chunk([0], [1])),
        (b"\x00", gap_chunk([0], [1])),
        (b"\x09", gap_chunk([0], [1])),
        (b"\x02\x02", gap_chunk([0], [1])),
        (b"\x02", gap_chunk([3, 3, 3, 2], [1])),
        (b"\x02", gap_chunk([3, 3, 3, 3, 0], [1])),
        (b"\x02", gap_chunk([4], [1])),
        (b"\x02", gap_chunk([0, 3], [1])),
        (b"\x02", gap_chunk([3], [])),
        (b"\x02", gap_chunk([0, 0], [1])),
        (b"\x02", gap_chunk([0], [1, 2])),
        (b"\x02", gap_chunk([0] * 11, [1] * 11)),
        (b"\x02", gap_chunk([0], [0])),
        (b"\x02", gap_chunk([0], [1], nonzero=10**12)),
        (b"\x02", gap_chunk([0], [1], total=10**12)),
        (b"\x02", gap_chunk([0], [1]) + b"\0"),
        (b"\x02", gap_chunk([0], [1])[:-1]),
    ],
)
def test_bad_gap_streams_are_refused(head, chunk):
    with pytest.raises(BadFile):
        CODECS["gaps"].decode(chunk, 10, np.dtype("<f4"), head)


def test_gap_streams_of_this_form_are_read():
    """The counterpart of the test above: fillers carry no value, the last place can be reached."""
    decoded = CODECS["gaps"].decode(gap_chunk([3, 3, 3, 0], [5]), 10, np.dtype("<f4"), b"\x02")
    assert decoded.tolist() == [0] * 9 + [5]


def deflated(data: bytes, dictionary: bytes | None = None) -> bytes:
    extra = () if dictionary is None else (dictionary,)
    machine = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, *extra)
    return machine.compress(data) + machine.flush()


BOMB = deflated(b"\0" * 2**26)
INFLATERS = list(dict.fromkeys((deflate.inflater, zlib)))
"""The one of this environment, and that of the standard library."""


@pytest.mark.parametrize(
    "stream",
    [
        BOMB,
        deflated(b"\0" * 99),
        deflated(b"\0" * 101),
        deflated(b"\0" * 100) + b"\0",
        deflated(b"\0" * 100)[:-1],
        deflated(b"abcdefghij" * 10, b"abcdefghij"),
        b"\x07" * 9,
        b"",
    ],
    ids=lambda stream: stream.hex()[:16],
)
@pytest.mark.parametrize("inflater", INFLATERS, ids=lambda module: module.__name__)
def test_bad_deflate_streams_are_refused(stream, inflater, monkeypatch):
    monkeypatch.setattr(deflate, "inflater", inflater)
    tracemalloc.start()
    with pytest.raises(BadFile):
        data = varint(len(stream) << 2 | 1) + stream
        CODECS["planes"].decode(data, 100, np.dtype("u1"), b"")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("inflater", INFLATERS, ids=lambda module: module.__name__)
def test_every_reader_of_deflate_streams_gives_what_was_written(inflater, monkeypatch):
    monkeypatch.setattr(deflate, "inflater", inflater)
    generator = np.random.default_rng(0)
    for size in (0, 1, 70_000):
        data = generator.geometric(0.3, size).astype(np.uint8).tobytes()
        for strategy in (deflate.HUFFMAN, deflate.MATCHES):
            stream = deflate.squeeze(data, strategy)
            assert deflate.expand(stream, size) == data
            if size > 1:
                altered = (
                    stream[: size // 9] + bytes([stream[size // 9] ^ 255]) + stream[size // 9 + 1 :]
                )
                with suppress(BadFile):
                    assert len(deflate.expand(altered, size)) == size
    assert deflate.crc32(b"123456789") == 0xCBF43926


@pytest.mark.parametrize(
    ("codec", "head", "data"),
    [
        ("raw", b"", b"\0" * 9),
        ("raw", b"\0", b"\0" * 10),
        ("planes", b"\0", varint(10 << 2) + b"\0" * 10),
        ("planes", b"", varint(9 << 2) + b"\0" * 9),
        ("planes", b"", varint(10 << 2 | 3) + b"\0" * 10),
        ("planes", b"", varint(2 << 2 | 2) + b"\0\0"),
        ("planes", b"", varint(1 << 2 | 2)),
        ("planes", b"", varint(10**15 << 2) + b"\0"),
        ("bits", b"", b"\0" * 10),
        ("bits", b"\0\x21", b"\0" * 42),
        ("bits", b"\0\x08\0", b"\0" * 10),
        ("bits", b"\0\x08", b"\0" * 9),
        ("bits", b"\0\x03", b"\0\0\0\x01"),
        ("bits", signed_varint(250) + b"\x03", b"\xff\xff\xff\xfc"),
        ("bits", signed_varint(-1) + b"\x00", b""),
    ],
)
def test_bad_simple_streams_are_refused(codec, head, data):
    with pytest.raises(BadFile):
        CODECS[codec].decode(data, 10, np.dtype("u1"), head)


@pytest.mark.parametrize("codec", ["bits", "rans"])
@pytest.mark.parametrize("name", ["planes", "gaps"])
def test_codecs_of_integers_are_refused_for_floats(parts, refuse, codec, name):
    parts.entries[name]["c"] = codec
    head = b"\0\0" if codec == "bits" else table(body=b"\x01\x11\x11")
    parts.replace(name, [head, b"" if codec == "bits" else b"\1\0\0\1\0"])
    refuse(parts.build(), f"tensor '{name}': the codec is for integers; got '{codec} for f4'")


def test_a_boolean_that_is_none_is_refused(parts, refuse):
    parts.replace("raw", [b"", b"\1\2"])
    refuse(parts.build(), "tensor 'raw': a b1 out of range; got 1 to 2")


def test_tables_without_elements_are_refused(parts, refuse):
    parts.entries["raw"]["s"] = [0]
    parts.replace("raw", [b"\0"])
    refuse(parts.build(), "tensor 'raw'")


# Budget ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "limit"),
    [("tensors", 5), ("rank", 1), ("elements", 1000), ("decoded", 10_000), ("header", 500)],
)
def test_each_budget_is_kept_and_can_be_raised(original, refuse, tmp_path, field, limit):
    refuse(original, rf"more {field} than the budget.*Budget\({field}=", **{field: limit})
    path = tmp_path / "x"
    path.write_bytes(original)
    assert_identical(load(path, budget=Budget(**{field: 30 * limit if field != "rank" else 2})))


def test_expansion_is_limited_for_large_results_only(tmp_path):
    path = save({"zeros": np.zeros(2**24 + 1, np.float32)}, tmp_path / "x")
    assert path.stat().st_size < 1000
    with pytest.raises(BadFile, match=r"more ratio than the budget.*Budget\(ratio="):
        load(path)
    assert load(path, budget=Budget(ratio=2**20))["zeros"].size == 2**24 + 1


def test_a_claim_of_a_large_grid_takes_no_memory(parts, refuse):
    parts.entries["uniform"] |= {"s": [2**30, 0], "k": [[0, 0]]}
    refuse(parts.build(), "ratio|decoded|chunks")


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "9"])
def test_a_budget_must_make_sense(bad):
    with pytest.raises(InvalidArgument):
        Budget(tensors=bad)
    with pytest.raises(InvalidArgument):
        Budget(rank=65)


def test_a_million_names_are_refused_soon(refuse):
    names = ",".join(f'"{i}":0' for i in range(10**5))
    refuse(
        assemble(b'{"__metadata__":{"karikomi":"1.0","manifest":""},' + names.encode() + b"}", b"")
    )


# Filesystem ------------------------------------------------------------------------------------


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe") if hasattr(os, "mkfifo") else (tmp_path / "pipe").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("", "pipe", "loop", "missing", "a\0b"):
        with pytest.raises(BadFile) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    from karikomi.pack.reader import opened

    # Large enough that no read-ahead has all of it.
    path = save({"noise": GENERATOR.integers(0, 2**62, 2**17)}, tmp_path / "x")
    with pytest.raises(BadFile, match="ends too early"), opened(path) as file:
        os.truncate(path, file.header.size + file.contents.manifest + 3)
        list(file.tensors())
