"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from karikomi import files
from karikomi.errors import InvalidArgument, KarikomiError, Unwritable


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return a file that has old content."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    return path


def _only(target: Path) -> bool:
    return [path.name for path in target.parent.iterdir()] == [target.name]


def test_the_new_content_replaces_the_old(target: Path) -> None:
    assert files.write_bytes(target, b"new") == target
    assert target.read_bytes() == b"new" and _only(target)


def test_missing_folders_are_made_and_empty_content_is_content(tmp_path: Path) -> None:
    path = files.write_bytes(tmp_path / "a" / "b" / "file", b"")
    assert path.read_bytes() == b""


def test_text_and_json_are_the_same_bytes_everywhere(tmp_path: Path) -> None:
    assert files.write_text(tmp_path / "t", "ä\n").read_bytes() == b"\xc3\xa4\n"
    written = files.write_json(tmp_path / "j", {"b": 1, "a": [0.5]})
    assert written.read_bytes() == b'{\n  "a": [\n    0.5\n  ],\n  "b": 1\n}\n'


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_without_numbers_that_json_lacks(number: float, target: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(target, {"a": [1.0, number]})
    assert target.read_bytes() == b"old" and _only(target)


def test_the_permissions_are_those_of_an_ordinary_new_file(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        path = files.write_bytes(tmp_path / "file", b"")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)


def test_the_mask_of_the_process_is_never_touched(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread would make a file in that moment that everyone may write."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was changed"))
    files.write_bytes(target, b"new")
    assert target.read_bytes() == b"new" and _only(target)


def test_a_file_that_has_the_temporary_name_is_left_alone(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0")
    other = target.with_name(".file.bin.0.part")
    other.write_bytes(b"another's")
    with pytest.raises(Unwritable, match="File exists"):
        files.write_bytes(target, b"new")
    assert (target.read_bytes(), other.read_bytes()) == (b"old", b"another's")


def test_a_path_with_a_nul_character_is_an_invalid_argument(tmp_path: Path) -> None:
    for path in (tmp_path / "a\0b", tmp_path / "\0" / "b", f"{tmp_path}/a\0"):
        with pytest.raises(InvalidArgument, match="NUL") as caught:
            files.write_bytes(path, b"new")
        assert "\0" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class _Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("no"), _Interrupted(), MemoryError()])
def test_a_failure_in_the_middle_leaves_the_old_content(target: Path, error: BaseException) -> None:
    def half(stream: BinaryIO) -> None:
        stream.write(b"ne")
        stream.flush()
        raise error

    with pytest.raises(type(error)):
        files.write_atomically(target, half)
    assert target.read_bytes() == b"old" and _only(target)


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_content(
    target: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call, _full)
    with pytest.raises(Unwritable, match=r"file\.bin: cannot write the file \(No space left"):
        files.write_bytes(target, b"new")
    monkeypatch.undo()
    assert target.read_bytes() == b"old" and _only(target)


def test_a_disk_that_is_full_while_writing_leaves_the_old_content(target: Path) -> None:
    with pytest.raises(Unwritable, match="No space left"):
        files.write_atomically(target, _full)
    assert target.read_bytes() == b"old" and _only(target)


def test_a_file_in_place_of_the_folder_is_unwritable(target: Path) -> None:
    with pytest.raises(Unwritable, match="cannot write the file"):
        files.write_bytes(target / "below", b"new")
    assert target.read_bytes() == b"old" and _only(target)


def test_a_folder_in_place_of_the_file_is_unwritable(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(KarikomiError, match="folder: cannot write the file"):
        files.write_bytes(tmp_path / "folder", b"new")
    assert _only(tmp_path / "folder")


def test_a_path_without_a_name_is_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unwritable, match="cannot write the file"):
        files.write_bytes("", b"new")
    assert not list(tmp_path.iterdir())
