"""Hostile files of version 1.3: every byte altered, every truncation, and lies with right checksums."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from depth import FULL, examples
from fuzz.mutations import Index, mutated, sealed
from karikomi.errors import BadFile
from karikomi.pack import Budget, expand, inspect, load, load_coded, save
from karikomi.pack.codecs.bit_numbers import BitWriter
from karikomi.pack.codecs.cursor import varint
from karikomi.quantize import kmeans, uniform

GENERATOR = np.random.default_rng(3)
DENSE = GENERATOR.normal(size=(12, 20)).astype(np.float32)
TENSORS = {
    "book": kmeans(np.where(np.abs(DENSE) > 1.3, DENSE, 0), entries=4),
    "floats": DENSE[:2],
    "flags": np.array([True, False]),
    "long": GENERATOR.integers(0, 2**40, 3),
    "tied": DENSE.repeat(6),
    "uniform": uniform(DENSE[:4], bits=4),
    "also tied": DENSE.repeat(6),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> bytes:
    """Return a file with pooled levels, pooled floats, tied tensors and notes."""
    path = save(TENSORS, tmp_path_factory.mktemp("index") / "x", notes={"k": "v"})
    assert {"adaptive", "planes"} <= {entry.codec for entry in inspect(path).entries}
    return path.read_bytes()


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> bytes:
    """Return a file with a tensor of its own in the directory, coded in contexts, and one by rANS."""
    generator = np.random.default_rng(0)
    spread = np.exp(np.repeat(generator.normal(size=6000), 9))
    levels = np.clip(np.rint(generator.laplace(size=54_000) * 2 * spread), -255, 255)
    tensors = {
        "waves": levels.astype("i2"),
        "wide": (generator.normal(size=9000) * 90).astype("i2"),
    }
    path = save(tensors, tmp_path_factory.mktemp("streams") / "x")
    assert {entry.codec for entry in inspect(path).entries} == {"contexts", "rans"}
    return path.read_bytes()


@pytest.fixture
def refuse(tmp_path):
    """Return a check that a file is refused in one line that has `fact` in it."""

    def check(content: bytes, fact: str, **budget: int) -> None:
        path = tmp_path / "bad.karikomi"
        path.write_bytes(content)
        for read in (load, load_coded, inspect):
            with pytest.raises(BadFile, match=fact) as caught:
                read(path, budget=Budget(**budget) if budget else None)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    return check


def test_a_rebuilt_file_still_loads(original, streams, tmp_path):
    """Without this, every test below might pass for the wrong reason."""
    for whole in (original, streams):
        (tmp_path / "x").write_bytes(Index(whole).build())
        assert (tmp_path / "x").read_bytes() == whole
        load(tmp_path / "x")


def test_every_altered_byte_is_found(original, tmp_path):
    path = tmp_path / "x"
    for at in range(len(original)):
        for bit in range(8) if FULL else (at % 8,):
            path.write_bytes(original[:at] + bytes([original[at] ^ 1 << bit]) + original[at + 1 :])
            with pytest.raises(BadFile) as caught:
                load(path)
            assert "\n" not in str(caught.value)


def test_every_truncation_is_found(original, tmp_path):
    path = tmp_path / "x"
    for length in range(0, len(original), 1 if FULL else 3):
        path.write_bytes(original[:length])
        with pytest.raises(BadFile):
            load(path)
    path.write_bytes(original + b"\0")
    with pytest.raises(BadFile, match="bytes follow"):
        load(path)


@pytest.mark.parametrize("part", range(4))
def test_mutated_files_are_refused_or_the_same(original, tmp_path, part):
    """1,000 of them: bytes changed, cut, doubled and moved, half with a checksum that agrees."""
    path = tmp_path / "x"
    path.write_bytes(original)
    wanted = {name: array.tobytes() for name, array in load(path).items()}
    generator = np.random.default_rng(part)
    for turn in range(examples(250, full=25_000)):
        content = (sealed if turn % 2 else mutated)(original, generator)
        path.write_bytes(content)
        try:
            found = load(path)
        except BadFile as error:
            assert "\n" not in str(error)
        else:
            assert {name: array.tobytes() for name, array in found.items()} == wanted


def test_altered_chunks_with_right_checksums_are_found_by_codec_or_digest(streams, refuse):
    for name in ("waves", "wide"):
        index = Index(streams)
        start, end = index.span(name)
        for at in np.linspace(start, end - 1, 12).astype(int):
            bad = bytearray(index.payload)
            bad[at] ^= 0x10
            refuse(index.build(bytes(bad)), f"tensor '{name}'")


# Manifest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"v": [1, 2]}, "different versions"),
        ({"v": [2, 0]}, "another major version"),
        ({"v": None}, "no version"),
        ({"r": ["other"]}, "needs features.*other"),
        ({"r": ["delta"]}, "a delta names its base"),
        ({"base": "00"}, "a delta names its base"),
        ({"more": 1}, "unknown fields.*more"),
        ({"n": 3}, "a list is missing"),
        ({"n": []}, "columns of different lengths"),
        ({"i": [9] * 6}, "a tensor has no type"),
        ({"i": [-1] * 6}, "a tensor has no type"),
        ({"i": [True] * 6}, "a tensor has no type"),
        ({"t": [["f4", None]] * 6}, "malformed quantizer"),
        ({"t": [[]] * 6}, "malformed type"),
        ({"t": [["f4", ["other"]]] * 6}, "unknown quantizer"),
        ({"t": [["f3"]] * 6}, "unknown type"),
        ({"s": [[2**62]] * 6}, "more elements than the budget"),
        ({"s": [[-1]] * 6}, "malformed shape"),
        ({"s": [[1] * 65] * 6}, "more rank than the budget"),
        ({"g": []}, "in no group|left over"),
        ({"g": [["raw", 0, 0]]}, "malformed group"),
        ({"g": [["raw", 99, 0]]}, "more tensors than there are"),
        ({"g": [["lzma", 1, 0]]}, "unknown codec"),
        ({"g": [["raw", 1, 0, 1, 1]]}, "wrong number of chunks"),
        ({"g": [["raw", 1, True, 1]]}, "malformed group"),
        ({"g": [3]}, "malformed group"),
        ({"a": {"copy": "none"}}, "equal to one that is not stored"),
        ({"a": {"copy": "copy"}}, "equal to one that is not stored"),
        ({"a": {"floats": "tied"}}, "stored, and equal to another"),
        ({"notes": []}, "notes must be text"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_manifests_are_refused(original, refuse, change, fact):
    index = Index(original)
    assert len(index.manifest["n"]) == 6
    index.manifest |= change
    refuse(index.build(), fact)


@pytest.mark.parametrize("key", ["v", "t", "n", "i", "s", "g"])
def test_missing_columns_are_refused(original, refuse, key):
    index = Index(original)
    del index.manifest[key]
    refuse(index.build(), "missing fields|no version")


@pytest.mark.parametrize("name", ["", "../x", "/etc/x", "a\0", "x" * 513, "floats", "e\u0301"])
def test_bad_names_are_refused(original, refuse, name):
    index = Index(original)
    index.manifest["n"][0] = name
    refuse(index.build(), "bad tensor name|two tensors have one name")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff", b'{"v":[1,3],"v":[1,3]}', b'{"v":[1.5,3]}', b"[" * 10**5]
)
def test_manifests_that_are_no_strict_json_are_refused(original, refuse, text):
    index = Index(original)
    index.text = lambda: text
    refuse(index.build(), "JSON|object")


def test_a_manifest_bomb_is_refused(original, refuse):
    index = Index(original)
    index.text = lambda: b" " * 2**25
    refuse(index.build(), "more header than the budget")


def test_checks_that_are_missing_or_left_over_are_refused(original, refuse):
    for change in (lambda checks: checks[:-1], lambda checks: checks + b"\0"):
        index = Index(original)
        index.checks = change(index.checks)
        refuse(index.build(), "checks are (missing|left over)")


def test_a_manifest_that_ends_beyond_its_payload_is_refused(original, refuse):
    index = Index(original)
    start = len(original) - len(index.body)
    body = varint(len(index.body)) + index.body[index.size_bytes :]
    forged = zlib.crc32(body).to_bytes(4, "little") + body
    refuse(original[:start] + forged[: len(index.body)], "CRC32|beyond its payload|JSON|damaged")


def test_directory_and_manifest_must_agree(streams, refuse):
    index = Index(streams)
    index.directory["other"] = index.directory.pop("waves")
    refuse(index.build(), "different tensors|do not fill")
    index = Index(streams)
    del index.directory[""]
    refuse(index.build(), "hole|missing")


# Codecs ----------------------------------------------------------------------------------------


def test_floats_coded_as_levels_are_refused(original, refuse):
    index = Index(original)
    for group in index.manifest["g"]:
        group[0] = "adaptive"
    refuse(index.build(), "the codec is for integers")


def test_more_slow_levels_than_the_budget_are_refused(original, refuse):
    refuse(original, "more slow than the budget.*Budget\\(slow=", slow=100)


def test_a_claim_of_many_levels_takes_no_time(original, refuse):
    index = Index(original)
    place = next(i for i, row in enumerate(index.manifest["g"]) if row[0] == "adaptive")
    first = sum(row[1] for row in index.manifest["g"][:place])
    index.manifest["s"][first] = [2**22]
    refuse(index.build(), "slow|chunks|quantizer|levels")


@pytest.mark.parametrize(
    "head",
    [b"", b"\xff" * 40, b"\0" * 40, BitWriter().close(), bytes(range(64))],
    ids=lambda head: head.hex()[:12],
)
def test_bad_models_of_contexts_are_refused(head):
    from karikomi.pack.codecs import context_model

    with pytest.raises(BadFile):
        context_model.parse(head, 1)


def test_bad_lists_of_floats_are_refused():
    from karikomi.pack.codecs import floats
    from karikomi.pack.codecs.cursor import Cursor

    for data in (
        b"",
        b"\2",
        b"\1\2\0\0\0",
        b"\1\0\x09\0\0",
        b"\1\0\0\0\x18",
        b"\1\0\1\xff\x17\x80",
    ):
        with pytest.raises(BadFile):
            floats.read(Cursor(data), 1)


def test_a_file_is_expanded_without_its_names_as_paths(original, tmp_path):
    (tmp_path / "x").write_bytes(original)
    out = expand(tmp_path / "x", tmp_path / "y.safetensors")
    length = int.from_bytes(out.read_bytes()[:8], "little")
    header = json.loads(out.read_bytes()[8 : 8 + length])
    assert set(header) == {*TENSORS, "__metadata__"}
