"""The manifest since 1.3: the payload without a name, with manifest, checks, and the groups that have no other payload.

CRC32 of what follows up to the groups, a varint with its size, a varint with the size of the manifest, the manifest,
and for each group its digest and the CRC32 of each part. The manifest is strict JSON in columns, deflated with a
dictionary: ``{"v": [major, minor], "t": [types], "n": [names], "i": [type of each tensor], "s": [shapes], "g":
[groups]}``; a type is ``[type]`` or ``[type, grid]``, a group ``[codec, tensors, bytes of the tables, bytes of each
chunk ...]``; and where they are not empty `r`, `a`, `notes` as before, and of a delta `base`, the digest of its base,
and `d`, the places of the tensors that are differences from it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from karikomi.errors import BadFile
from karikomi.pack.codecs.cursor import Cursor, varint
from karikomi.pack.container.contents import (
    Contents,
    ManifestEntry,
    TensorGroup,
    check_codec,
    check_features,
    check_names,
    check_notes,
    checked_entry,
)
from karikomi.pack.container.header import Header
from karikomi.pack.container.strict_json import (
    VERSION,
    Version,
    check_version,
    listed,
    natural,
    parse_json,
    require,
    require_known,
)
from karikomi.pack.read_budget import Budget

INDEX = ""
"""The name in the directory of the payload with the manifest; no tensor can have it."""
CHUNK_SYMBOLS = 2**22
DIGEST_BYTES, CRC_BYTES = 8, 4
DELTA = "delta"
FEATURES = frozenset({DELTA})
NEEDED = {"v", "t", "n", "i", "s", "g"}
KEYS = NEEDED | {"r", "a", "notes", "base", "d"}
DICTIONARY = (
    b'"notes":{"task":"shrunk":"r":["delta"],"base":","a":{"raw",["bits",1,["gaps",1,["rans",1,["planes",1,'
    b'"float8_e4m3fn""bfloat16""f8","f2","u1","i1","b1""i8"],["num_batches_tracked","running_mean","running_var",'
    b'"embeddings.position.embedding.lstm.weight_ih_l0","lstm.weight_hh_l0","lstm.bias_ih_l0","bias_hh_l0",'
    b'"encoder.decoder.blocks.attention.self.query.key.value.q_proj.k_proj.v_proj.out_proj.mlp.norm1.norm2.norm.'
    b'gamma","beta","moving_mean","moving_variance","dense.kernel","dense_1/kernel","classifier.head.model.backbone.'
    b'features.0.weight","features.0.bias","downsample.0.weight","layer1.0.bn1.weight","layer1.0.conv1.weight",'
    b'"bn1.bias","bn1.weight","0.bias","0.weight","2.bias","2.weight","4.bias","4.weight","linear.bias","linear.weight",'
    b'"fc.bias","fc.weight","fc1.bias","fc1.weight","fc2.bias","fc2.weight","fc3.bias","fc3.weight","conv1.bias",'
    b'"conv1.weight","conv2.bias","conv2.weight","conv3.weight"],"i":[0,1,0,1,0,1,0,1,0,0,0,0,1,1,1,1],"s":[[10],[64],[128],'
    b"[256],[512],[768],[1024],[3,3],[64,64,3,3],[20,1,5,5],[50,20,5,5],[300],[300,784],[100],[100,300],[10],[10,100]],"
    b'"g":[["contexts",1,["adaptive",2,{"v":[1,3],"t":[["f4",["codebook",15]],["f4",["uniform",8,0]],'
    b'["f4",["uniform",8,null]],["f4"]],"n":["'
)
"""What deflate may refer to before it has written anything."""


def dump(
    groups: Sequence[TensorGroup],
    equal: Mapping[str, str],
    notes: Mapping[str, str],
    base: str | None = None,
    differences: Collection[str] = (),
) -> bytes:
    """Return manifest and checks as they stand at the start of the payload without a name."""
    entries = [entry for group in groups for entry in group.entries]
    kinds = [[entry.dtype, *([entry.grid] if entry.grid else [])] for entry in entries]
    types = [json.loads(text) for text in dict.fromkeys(map(json.dumps, kinds))]
    whole: dict[str, Any] = {
        "v": VERSION,
        "t": types,
        "n": [entry.name for entry in entries],
        "i": [types.index(kind) for kind in kinds],
        "s": [entry.shape for entry in entries],
        "g": [[group.codec, len(group.entries), group.tables, *group.chunks] for group in groups],
    }
    if base:
        places = [place for place, entry in enumerate(entries) if entry.name in differences]
        whole |= {"r": [DELTA], "base": base, "d": places}
    whole |= {"a": dict(equal)} if equal else {}
    whole |= {"notes": dict(sorted(notes.items()))} if notes else {}
    text = _deflated(json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode("utf-8"))
    checks = b"".join(
        bytes.fromhex(group.digest)
        + b"".join(crc.to_bytes(CRC_BYTES, "little") for _, crc in group.checks)
        for group in groups
    )
    body = varint(len(text)) + text + checks
    body = varint(len(body)) + body
    return zlib.crc32(body).to_bytes(CRC_BYTES, "little") + body


def load(stream: BinaryIO, head: Header, budget: Budget, where: str) -> Contents:
    """Return what the manifest of an open file says; raise `BadFile` for anything malformed."""
    text, checks, end = _read(stream, head, budget, where)
    whole = parse_json(_inflated(text, budget, where), where)
    require(isinstance(whole, dict), "the manifest is not an object", where)
    require(isinstance(whole.get("v"), list), "the manifest has no version", where)
    same = check_version(whole["v"], where) == head.version
    require(same, "header and manifest state different versions", where, whole["v"])
    require_known(set(whole) - KEYS, "unknown fields in the manifest", head.version, where)
    require(set(whole) >= NEEDED, "missing fields", where, sorted(whole))
    check_features(whole.get("r", []), FEATURES, head.version, where)
    base = whole.get("base")
    delta = DELTA in whole.get("r", [])
    require((base is not None) == delta == ("d" in whole), "a delta names its base", where)
    require(base is None or isinstance(base, str), "malformed digest of the base", where, base)
    entries = _entries(whole, head.version, budget, where)
    equal = check_names(entries, whole.get("a", {}), budget, where)
    notes = check_notes(whole.get("notes", {}), where)
    groups = _groups(whole["g"], entries, checks, head.version, where)
    differences = _differences(whole.get("d", []), entries, where)
    size = end - head.spans[INDEX][0]
    return Contents(_placed(groups, head, end, where), equal, notes, size, base, differences)


def _differences(places: Any, entries: list[ManifestEntry], where: str) -> frozenset[str]:
    good = all(natural(place) and place < len(entries) for place in listed(places, where))
    require(good and places == sorted(set(places)), "malformed places of differences", where)
    return frozenset(entries[place].name for place in places)


class Parts(NamedTuple):
    """The deflated manifest, the checks, and where they end in the file."""

    text: bytes
    checks: bytes
    end: int


def _read(stream: BinaryIO, head: Header, budget: Budget, where: str) -> Parts:
    require(INDEX in head.spans, "the manifest is missing", where)
    start, end = head.spans[INDEX]
    stream.seek(start)
    try:
        cursor = Cursor(stream.read(min(end - start, CRC_BYTES + 9)))
        crc = int.from_bytes(cursor.take(CRC_BYTES), "little")
        size = cursor.varint()
    except BadFile as error:
        raise BadFile("the manifest is cut short", where=where) from error
    require(size <= end - start - cursor.at, "the manifest ends beyond its payload", where, size)
    budget.admit("header", size, where)
    stream.seek(start + CRC_BYTES)
    body = stream.read(cursor.at - CRC_BYTES + size)
    require(
        zlib.crc32(body) == crc, "CRC32 mismatch in the manifest: the bytes were altered", where
    )
    inner = Cursor(body)
    try:
        inner.varint()
        text = inner.take(inner.varint())
    except BadFile as error:
        raise BadFile("the manifest is damaged", where=where) from error
    return Parts(text, inner.rest(), start + cursor.at + size)


def _entries(
    whole: dict[str, Any], version: Version, budget: Budget, where: str
) -> list[ManifestEntry]:
    names, places, shapes, types = (listed(whole[key], where) for key in ("n", "i", "s", "t"))
    budget.admit("tensors", len(names), where)
    same = len(names) == len(places) == len(shapes)
    require(same, "columns of different lengths", where, len(names))
    found = []
    for name, place, shape in zip(names, places, shapes, strict=True):
        good = natural(place) and place < len(types)
        require(good, "a tensor has no type", where, place)
        kind = listed(types[place], where)
        require(len(kind) in (1, 2), "malformed type", where, kind)
        grid = kind[1] if len(kind) == 2 else None
        require(len(kind) == 1 or grid is not None, "malformed quantizer", where, kind)
        found.append(checked_entry(name, shape, kind[0], grid, version, budget, where))
    return found


def _groups(
    rows: Any, entries: list[ManifestEntry], checks: bytes, version: Version, where: str
) -> list[TensorGroup]:
    cursor, groups, at = Cursor(checks), [], 0
    for row in listed(rows, where):
        good = isinstance(row, list) and len(row) > 2 and all(map(natural, row[1:]))
        require(good and row[1] > 0, "malformed group", where, row)
        codec, count, tables, *chunks = row
        own = tuple(entries[at : at + count])
        require(len(own) == count, "a group has more tensors than there are", where, count)
        at += count
        place = f"{where}, tensor {own[0].name!r}"
        check_codec(codec, own, version, place)
        needed = -(-sum(entry.size for entry in own) // CHUNK_SYMBOLS)
        require(len(chunks) == needed, "wrong number of chunks", place, len(chunks))
        lengths = [tables + sum(chunks[:1]), *chunks[1:]]
        try:
            digest = cursor.take(DIGEST_BYTES).hex()
            crcs = [int.from_bytes(cursor.take(CRC_BYTES), "little") for _ in lengths]
        except BadFile as error:
            raise BadFile("checks are missing in the manifest", where=where) from error
        pairs = tuple(zip(lengths, crcs, strict=True))
        groups.append(TensorGroup(own, codec, tables, tuple(chunks), pairs, digest, CHUNK_SYMBOLS))
    require(at == len(entries), "a tensor is in no group", where, len(entries) - at)
    require(not cursor.rest(), "checks are left over in the manifest", where)
    return groups


def _placed(groups: list[TensorGroup], head: Header, at: int, where: str) -> list[TensorGroup]:
    """Return the groups with their places: payloads of their own, or one after the other behind the checks."""
    found, alone = [], 0
    for group in groups:
        name = group.entries[0].name
        if len(group.entries) == 1 and name in head.spans:
            start, end = head.spans[name]
            place = f"{where}, tensor {name!r}"
            require(group.size == end - start, "the chunks do not fill the payload", place)
            found.append(group.at(start))
            alone += 1
        else:
            found.append(group.at(at))
            at += group.size
    require(at == head.spans[INDEX][1], "the groups do not fill their payload", where, at)
    fit = alone == len(head.spans) - 1
    require(fit, "manifest and directory name different tensors", where)
    return found


def _deflated(text: bytes) -> bytes:
    machine = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    return machine.compress(text) + machine.flush()


def _inflated(data: bytes, budget: Budget, where: str) -> bytes:
    machine = zlib.decompressobj(-15, DICTIONARY)
    try:
        out = machine.decompress(data, budget.header + 1)
    except zlib.error as error:
        raise BadFile("the manifest is damaged", where=where) from error
    budget.admit("header", len(out), where)
    require(machine.eof and not machine.unused_data, "the manifest is damaged", where)
    return out
