"""A record at its bound: thinner, never wrong, and the same after a kill as without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karikomi.record import Recorder, read, tally
from karikomi.record.thinning import LeftOut, every, keeps

BOUND = 1 << 16
PAD = "x" * 400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.jsonl"


def _row(step: int, **more: Any) -> dict[str, Any]:
    calm = {"clipped": False, "skipped": False, "norm": 1.0}
    return {"event": "step", "step": step, **calm, "pad": PAD, **more}


def _record(path: Path, rows: list[dict[str, Any]], **arguments: Any) -> list[dict[str, Any]]:
    with Recorder(path, max_bytes=BOUND, **arguments) as recorder:
        for row in rows:
            recorder.write(row)
    return [row for row in read(path) if row["event"] == "step"]


def test_the_first_half_is_whole_and_then_steps_thin_out(path: Path) -> None:
    steps = [row["step"] for row in _record(path, [_row(step) for step in range(1, 20_001)])]
    assert path.stat().st_size <= BOUND + 1_000
    half = BOUND // 2 // 500
    assert steps[: half - 5] == list(range(1, half - 4))
    gaps = [after - before for before, after in zip(steps, steps[1:-1], strict=False)]
    assert all(after >= before / 2 for before, after in zip(gaps, gaps[1:], strict=False))
    assert max(gaps) >= 256
    assert steps[-1] == 20_000


def test_sums_stay_exact_and_the_largest_norm_is_not_lost(path: Path) -> None:
    rows = [
        _row(step, clipped=step % 3 == 0, skipped=step == 4_001, norm=float(step == 3_001) * 9 + 1)
        for step in range(1, 5_001)
    ]
    kept = _record(path, rows)
    assert len(kept) < 200
    assert tally(read(path)) == {"steps": 5_000, "clipped": 1_666, "skipped": 1}
    assert sum(row.get("left_out", {}).get("steps", 0) for row in kept) == 5_000 - len(kept)
    assert all(row["norm"] == 1.0 for row in kept)
    assert max(row["left_out"]["norm"] for row in kept if "left_out" in row) == 10.0


def test_skipped_steps_and_the_first_clipped_one_after_quiet_are_kept(path: Path) -> None:
    clipped, skipped = {201, 202, 203, 333}, {255, 401}
    rows = [
        _row(step, clipped=step in clipped, skipped=step in skipped) for step in range(1, 1_001)
    ]
    assert every(BOUND * 9 // 16, BOUND) == 8
    steps = {row["step"] for row in _record(path, rows)}
    assert steps >= {201, 255, 333, 401} and 203 not in steps


def test_events_in_every_step_do_not_break_the_bound(path: Path) -> None:
    kept = _record(path, [_row(step, skipped=True) for step in range(1, 5_001)])
    assert path.stat().st_size <= BOUND + 1_000
    assert tally(kept)["skipped"] == 5_000 and kept[-1]["step"] == 5_000
    # And leave room for what comes after them.
    assert kept[-2]["step"] > 4_000


def test_closing_writes_the_newest_step_even_if_the_record_is_full(path: Path) -> None:
    rows = [{"event": "epoch", "pad": "x" * BOUND}, *(_row(step) for step in (1, 2, 3))]
    kept = _record(path, rows)
    assert [row["step"] for row in kept] == [3] and kept[0]["left_out"]["steps"] == 2


def test_the_newest_step_is_there_at_each_flush_and_after_closing(path: Path) -> None:
    recorder = Recorder(path, max_bytes=BOUND)
    for step in range(1, 402):
        recorder.write(_row(step))
        if step in (333, 401):
            recorder.flush()
            assert list(read(path))[-1]["step"] == step
    for step in range(402, 408):
        recorder.write(_row(step))
    recorder.close()
    assert list(read(path))[-1]["step"] == 407


def test_rows_of_other_events_are_kept(path: Path) -> None:
    rows: list[dict[str, Any]] = [_row(step) for step in range(1, 2_001)]
    rows[700:700] = [{"event": "epoch", "epoch": 3}]
    _record(path, rows)
    assert [row["epoch"] for row in read(path) if row["event"] == "epoch"] == [3]


def test_without_a_bound_every_step_is_kept(path: Path) -> None:
    with Recorder(path, max_bytes=None) as recorder:
        for step in range(1, 401):
            recorder.write(_row(step))
    assert len(list(read(path))) == 401 and path.stat().st_size > 2 * BOUND


def test_what_was_thinned_out_is_flushed_as_often_as_what_was_not(path: Path) -> None:
    seen: list[int] = []

    class Sink:
        def write(self, row: Any) -> None: ...
        def flush(self) -> None:
            seen.append(path.stat().st_size)

        def close(self) -> None: ...

    recorder = Recorder(path, max_bytes=BOUND, flush_every=10, sinks=[Sink()])
    for step in range(1, 5_001):
        recorder.write(_row(step))
    assert len(seen) >= 500


EVENTS = st.tuples(
    st.sampled_from(["quiet", "quiet", "quiet", "clipped", "clipped", "skipped", "epoch"]),
    st.integers(0, 800),
)


@given(
    events=st.lists(EVENTS, min_size=1, max_size=60),
    flushes=st.sets(st.integers(0, 900), max_size=8),
    resumed_at=st.integers(0, 7),
    lost=st.integers(0, 300),
)
@settings(max_examples=60)
def test_killed_and_resumed_is_byte_for_byte_as_not_stopped(
    tmp_path_factory: pytest.TempPathFactory,
    events: list[tuple[str, int]],
    flushes: set[int],
    resumed_at: int,
    lost: int,
) -> None:
    """900 steps: far into the thin part; the kill leaves up to 300 rows after the checkpoint."""

    def go(recorder: Recorder, start: int, stop: int) -> dict[int, int]:
        places = {}
        for step in range(start, stop):
            kind, length = events[step % len(events)]
            kinds = {"clipped": kind == "clipped", "skipped": kind == "skipped"}
            pad = "x" * length
            epoch = {"event": "epoch", "pad": pad}
            recorder.write(epoch if kind == "epoch" else _row(step, pad=pad, **kinds))
            if step in flushes:
                places[step] = recorder.flush()
        return places

    folder = tmp_path_factory.mktemp("killed")
    with Recorder(folder / "whole", max_bytes=BOUND) as recorder:
        places = go(recorder, 0, 900)
    if not places:
        return
    checkpoint = sorted(places)[resumed_at % len(places)]
    killed = Recorder(folder / "killed", max_bytes=BOUND, flush_every=7)
    again = go(killed, 0, min(900, checkpoint + 1 + lost))
    assert again.items() <= places.items()
    del killed
    with Recorder(folder / "killed", max_bytes=BOUND) as recorder:
        recorder.rewind(places[checkpoint])
        go(recorder, checkpoint + 1, 900)
    assert (folder / "killed").read_bytes() == (folder / "whole").read_bytes()
    assert tally(read(folder / "whole"))["steps"] <= 900


def test_a_record_that_is_opened_again_goes_on_thinning(path: Path) -> None:
    _record(path, [_row(step) for step in range(1, 1_001)])
    before = path.stat().st_size
    kept = _record(path, [_row(step) for step in range(1_001, 1_101)])
    assert path.stat().st_size - before < 20 * 600
    assert tally(kept)["steps"] == 1_100


def test_what_is_left_out_is_counted_with_the_largest_norm() -> None:
    left = LeftOut()
    for norm, clipped in ((2.0, True), (None, False), (1.0, True)):
        left = left.plus({"norm": norm, "clipped": clipped})
    assert left == LeftOut(3, 2, 0, 2.0)
    assert LeftOut().plus({"norm": None}).norm is None


@given(st.integers(0, 10**9), st.integers(1 << 16, 10**9))
def test_every_is_a_power_of_two_that_never_falls(length: int, bound: int) -> None:
    here = every(length, bound)
    assert here & (here - 1) == 0 and 1 <= here <= 1 << 16
    assert every(length + 1, bound) >= here
    assert (here == 1) == (2 * length < bound)
    assert not keeps({"step": 0}, bound - length + 1, length, bound, quiet=True)
