"""The record: rows that survive a crash, a full disk and a resumed run."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karikomi.errors import BadFile, InvalidArgument, Unwritable
from karikomi.record import SCHEMA, Recorder, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "record.jsonl"


def _steps(path: Path) -> list[Any]:
    return [row["step"] for row in read(path) if row["event"] == "step"]


def _write(path: Path, *steps: int) -> None:
    with Recorder(path) as recorder:
        for step in steps:
            recorder.write({"event": "step", "step": step})


def test_rows_come_back_after_the_first_one_that_carries_the_schema(path: Path) -> None:
    _write(path, 1, 2)
    _write(path, 3)
    rows = list(read(path))
    assert rows[0] == {"event": "start", "schema": SCHEMA} and len(rows) == 4
    assert _steps(path) == [1, 2, 3]


def test_rows_reach_the_disk_in_batches(path: Path) -> None:
    recorder = Recorder(path, flush_every=2)
    recorder.write({"event": "step", "step": 1})
    assert _steps(path) == []
    recorder.write({"event": "step", "step": 2})
    assert _steps(path) == [1, 2]
    assert recorder.flush() == path.stat().st_size


def test_rewinding_drops_what_came_after_a_checkpoint(path: Path) -> None:
    _write(path, 1)
    recorder = Recorder(path)
    place = recorder.flush()
    _write(path, 2, 3)
    recorder.write({"event": "step", "step": 4})
    recorder.rewind(place)
    recorder.write({"event": "step", "step": 2})
    recorder.close()
    assert _steps(path) == [1, 2]


def test_a_record_shorter_than_its_checkpoint_is_refused(path: Path) -> None:
    _write(path, 1)
    recorder = Recorder(path)
    with pytest.raises(BadFile, match="shorter than in its checkpoint; got .* bytes; allowed: >="):
        recorder.rewind(10_000)
    path.unlink()
    with pytest.raises(BadFile, match="got 0 bytes"):
        recorder.rewind(1)


def test_rewinding_to_nothing_leaves_the_first_row(path: Path) -> None:
    _write(path, 1)
    recorder = Recorder(path)
    recorder.rewind(0)
    assert path.read_bytes() == FIRST + b"\n"
    recorder.write({"event": "step", "step": 7})
    recorder.close()
    assert _steps(path) == [7]


@pytest.mark.parametrize("place", [1, len('{"event": "start", "schema": 1}\n') + 3])
def test_a_place_within_a_row_is_refused_and_nothing_is_dropped(path: Path, place: int) -> None:
    _write(path, 1)
    before = path.read_bytes()
    with pytest.raises(BadFile, match=f"no row ends at.*a row that ends at {place}"):
        Recorder(path).rewind(place)
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", [-1, 1.5, None, True])
def test_a_place_that_is_no_length_is_refused(path: Path, place: Any) -> None:
    with pytest.raises(InvalidArgument, match="place must be a whole number"):
        Recorder(path).rewind(place)


def test_rows_that_are_pending_at_a_rewind_are_dropped(path: Path) -> None:
    recorder = Recorder(path)
    place = recorder.flush()
    recorder.write({"event": "step", "step": 1})
    recorder.rewind(place)
    recorder.close()
    assert _steps(path) == []


def test_the_event_comes_first_and_is_a_note_where_there_is_none(path: Path) -> None:
    with Recorder(path) as recorder:
        recorder.write({"a": 1})
        recorder.write({"a": 1, "event": "epoch"})
    lines = path.read_text().splitlines()
    assert lines[1:] == ['{"event": "note", "a": 1}', '{"event": "epoch", "a": 1}']


@pytest.mark.parametrize(
    "arguments",
    [
        {"flush_every": 0},
        {"most": 0},
        {"most": 1.5},
        {"max_bytes": 1000},
        {"tensors": "some"},
        {"rank": -1},
        {"rank": "0"},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(path: Path, arguments: Any) -> None:
    with pytest.raises(InvalidArgument, match=rf"Recorder.*({next(iter(arguments))}|tensors)"):
        Recorder(path, **arguments)
    assert not path.exists()


def test_only_rank_0_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for silence in ({"RANK": "3"}, {}):
        monkeypatch.delenv("RANK", raising=False)
        for name, value in silence.items():
            monkeypatch.setenv(name, value)
        with Recorder(path, flush_every=1, rank=None if silence else 1) as recorder:
            recorder.write({"event": "step", "step": 1})
            recorder.step(2)
            recorder.rewind(10_000)
            assert recorder.flush() == 0
        assert not path.parent.exists()


def test_rank_is_that_of_the_environment_unless_given(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with Recorder(path, rank=0) as recorder:
        recorder.step(1)
    monkeypatch.setenv("RANK", "0")
    with Recorder(path) as recorder:
        recorder.step(2)
    assert _steps(path) == [1, 2]
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InvalidArgument, match="RANK is not a rank; got 'first'.*pass rank=0"):
        Recorder(path)


def test_a_last_line_that_was_cut_short_is_left_out_and_then_replaced(path: Path) -> None:
    _write(path, 1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert _steps(path) == [1]
    _write(path, 2, 3)
    assert _steps(path) == [1, 2, 3]


FIRST = b'{"event": "start", "schema": 1}'


@pytest.mark.parametrize("length", [0, 1, len(FIRST) - 1, len(FIRST)])
def test_a_record_cut_within_its_first_line_is_begun_anew(path: Path, length: int) -> None:
    path.parent.mkdir()
    path.write_bytes(FIRST[:length])
    assert list(read(path)) == []
    _write(path, 1)
    assert path.read_bytes().startswith(FIRST + b"\n")
    assert [row["event"] for row in read(path)] == ["start", "step"]


@pytest.mark.parametrize(
    "content",
    [
        b"a letter",
        b"a letter\nwhose last line has no end",
        b'{"event": "stop',
        b"\n",
        b"\xff\n",
        b"[1]\n",
        b"1\n",
        b'{"event": "step", "schema": 1}\nx',
        b'{"event": "start"}\nx',
        b'{"event": "start", "schema": true}\nx',
        b'{"event": "start", "schema": "1"}\nx',
        b'{"event": "start", "schema": 0}\nx',
        b"[" * 100_000 + b"\n",
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_file_that_is_no_record_is_refused_and_left_as_it_is(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    for use in (Recorder, lambda path: list(read(path))):
        with pytest.raises(BadFile, match=r"record\.jsonl: not a record of karikomi"):
            use(path)
        assert path.read_bytes() == content


def test_a_record_of_a_later_version_is_refused_and_left_as_it_is(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content := b'{"event": "start", "schema": 2, "more": 1}\n{"event": "st')
    for use in (Recorder, lambda path: list(read(path))):
        with pytest.raises(BadFile, match="from a later version; got schema 2; .*upgrade karikomi"):
            use(path)
        assert path.read_bytes() == content


def test_a_folder_in_place_of_the_record_is_named(path: Path) -> None:
    path.mkdir(parents=True)
    for use in (Recorder, lambda path: list(read(path))):
        with pytest.raises(BadFile, match="cannot read the record"):
            use(path)


def test_a_path_with_a_nul_character_is_an_invalid_argument(tmp_path: Path) -> None:
    for use in (Recorder, lambda path: list(read(path))):
        with pytest.raises(InvalidArgument, match="NUL"):
            use(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("line", "text"),
    [(b'{"a": ', "not JSON;"), (b"[1]", "not a JSON object"), (b"\xff", "not JSON;")],
)
def test_a_broken_line_is_named(path: Path, line: bytes, text: str) -> None:
    _write(path, 1, 2)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(BadFile, match=rf"record\.jsonl:2: this line is {text}"):
        list(read(path))


def test_a_missing_record_is_named(path: Path) -> None:
    with pytest.raises(BadFile, match=r"record\.jsonl: cannot read the record; got No such file"):
        list(read(path))


def test_numbers_that_json_lacks_are_null_and_arrays_are_plain(path: Path) -> None:
    with Recorder(path) as recorder:
        recorder.write(
            {
                "event": "step",
                "loss": float("nan"),
                "norms": [1.0, float("inf")],
                "per": {"a": -float("inf")},
                "scalar": np.float32(0.5),
                "array": np.arange(2),
                "flag": True,
            }
        )
    row = list(read(path))[1]
    assert row == {
        "event": "step",
        "loss": None,
        "norms": [1.0, None],
        "per": {"a": None},
        "scalar": 0.5,
        "array": [0, 1],
        "flag": True,
    }


def test_what_json_cannot_say_is_refused_by_key(path: Path) -> None:
    with Recorder(path) as recorder, pytest.raises(InvalidArgument, match="record: loss: .*object"):
        recorder.write({"event": "step", "loss": object()})
    assert len(list(read(path))) == 1


def test_a_full_disk_loses_no_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(path)
    recorder.write({"event": "step", "step": 1})
    ordinary = Path.open

    class Full:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._stream.close()

        def tell(self) -> int:
            return self._stream.tell()

        def write(self, content: bytes) -> None:
            self._stream.write(content[:4])
            self._stream.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, mode: Full(ordinary(self, mode)))
    with pytest.raises(
        Unwritable, match=r"cannot append to the record \(No space left on device\)"
    ):
        recorder.flush()
    monkeypatch.undo()
    recorder.close()
    assert _steps(path) == [1]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unwritable, match="file.*cannot append to the record"):
        Recorder(tmp_path / "file" / "record.jsonl")
