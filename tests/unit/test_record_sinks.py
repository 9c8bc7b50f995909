"""Sinks of a recorder: they get every row, and their failure stops nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from karikomi.errors import InvalidArgument, Unwritable
from karikomi.record import Recorder, Sink, read


class Kept:
    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.flushed = self.closed = 0

    def write(self, row: Any) -> None:
        self.rows.append(row)

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed += 1


class Broken(Kept):
    def write(self, row: Any) -> None:
        raise ConnectionError("no\nnetwork")

    flush = close = write  # type: ignore[assignment]


def test_a_sink_gets_every_row_as_plain_data_and_is_flushed_and_closed(tmp_path: Path) -> None:
    sink = Kept()
    assert isinstance(sink, Sink)
    with Recorder(tmp_path / "r", sinks=[sink], flush_every=3) as recorder:
        sink.rows.clear()
        flushed = sink.flushed
        recorder.step(1, facts={"loss": float("nan"), "name": "a"})
        recorder.write({"event": "epoch", "epoch": 1})
        assert sink.flushed == flushed
        recorder.step(2)
        assert sink.flushed == flushed + 1 and sink.closed == 0
    assert sink.rows == list(read(tmp_path / "r"))[1:]
    assert sink.rows[0]["loss"] is None and sink.closed == 1


def test_a_sink_gets_the_steps_that_the_file_leaves_out(tmp_path: Path) -> None:
    sink = Kept()
    with Recorder(tmp_path / "r", sinks=[sink], max_bytes=1 << 16) as recorder:
        for step in range(1, 1_001):
            recorder.step(step, facts={"pad": "x" * 400})
    assert [row["step"] for row in sink.rows if row["event"] == "step"] == list(range(1, 1_001))
    assert not any("left_out" in row for row in sink.rows)
    assert len(list(read(tmp_path / "r"))) < 300


def test_a_sink_that_fails_is_named_once_and_the_others_go_on(tmp_path: Path) -> None:
    sink = Kept()
    with pytest.warns(UserWarning, match="the sink Broken .* failed .ConnectionError: no network"):
        recorder = Recorder(tmp_path / "r", sinks=[Broken(), sink])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            recorder.step(step)
        recorder.close()
    assert len(sink.rows) == 4 == len(list(read(tmp_path / "r")))


def test_each_failing_sink_is_named(tmp_path: Path) -> None:
    class Other(Broken):
        pass

    with pytest.warns(UserWarning) as caught:
        Recorder(tmp_path / "r", sinks=[Broken(), Other(), Broken()])
    assert [str(one.message).split()[2] for one in caught] == ["Broken", "Other", "Broken"]


def test_sinks_are_closed_although_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Kept()
    recorder = Recorder(tmp_path / "r", sinks=[sink])
    recorder.step(1)

    def full(self: Path, mode: str) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(Unwritable):
        recorder.close()
    assert sink.closed == 1


def test_sinks_of_other_ranks_hear_nothing(tmp_path: Path) -> None:
    sink = Kept()
    with Recorder(tmp_path / "r", sinks=[sink], rank=1) as recorder:
        recorder.step(1)
        recorder.flush()
    assert (sink.rows, sink.flushed, sink.closed) == ([], 0, 0)


def test_a_recorder_can_be_the_sink_of_another(tmp_path: Path) -> None:
    copy = Recorder(tmp_path / "copy", tensors="none")
    with Recorder(tmp_path / "r", sinks=[copy]) as recorder:
        recorder.step(1)
    assert [row.get("step") for row in read(tmp_path / "copy")][-1] == 1


@pytest.mark.parametrize("sinks", [[object()], [Kept], Kept(), ["wandb"], None])
def test_what_is_no_sink_is_refused(tmp_path: Path, sinks: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"Recorder\(sinks\): not a (sink|list of)"):
        Recorder(tmp_path / "r", sinks=sinks)
    assert not (tmp_path / "r").exists()
