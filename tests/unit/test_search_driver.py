"""The driver of a search on toy candidates: journal, kills, failures, executors, budgets, the front."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import search_toys as toys
from karikomi.errors import BadFile, InvalidArgument, KarikomiError, Unsupported
from karikomi.search.driver import (
    Budgets,
    Finished,
    InlineExecutor,
    LatencyTable,
    Proposal,
    RunJournal,
    Workers,
    drive,
    front,
    opened,
    source_digest,
)

IDENTITY = {"weights": "w", "data": "d", "seed": 1}


def search(folder: Path, evaluate: Any = toys.counted, **options: Any) -> dict[Proposal, Finished]:
    strategy = options.pop("strategy", None) or toys.Ladder()
    executor = options.pop("executor", None) or InlineExecutor()
    with RunJournal(folder / "journal.jsonl", IDENTITY) as journal:
        return drive(
            strategy,
            evaluate,
            journal=journal,
            executor=executor,
            seed=1,
            reference=str(folder),
            **options,
        )


def outcome(results: dict[Proposal, Finished]) -> list[Any]:
    """Return what must not depend on workers, order or resuming: all but times and the threads of the toy."""
    rows = []
    for proposal, found in results.items():
        facts = {name: value for name, value in found.facts.items() if name != "threads"}
        rows.append((proposal.text, found.key, facts, found.artefact, found.error))
    return rows


def asked(folder: Path) -> dict[int, int]:
    paths = folder.glob("asked-*")
    return {int(path.name.partition("-")[2]): len(path.read_text()) for path in paths}


def test_equal_settings_are_one_proposal() -> None:
    first, second = Proposal.of(b=0.5, a=[1, None]), Proposal.of(a=(1, None), b=np.float64(0.5))
    assert first == second and first.digest == second.digest and hash(first) == hash(second)
    # A share of 1.0 and a count of 1 are not the same width.
    assert Proposal.of(width=1.0) != Proposal.of(width=1)
    assert Proposal.of(**first.settings) == first
    for value in (math.nan, math.inf, object()):
        with pytest.raises(InvalidArgument, match="setting"):
            Proposal.of(a=value)


def test_a_search_ends_and_is_not_repeated(tmp_path: Path) -> None:
    first = search(tmp_path)
    assert [p.settings["x"] for p in first] == [0, 1, 2, 3, 4, 5, 6]
    from_journal: list[bool] = []
    again = search(tmp_path, on_finished=lambda found, known: from_journal.append(known))
    assert outcome(again) == outcome(first) and from_journal == [True] * 7
    assert asked(tmp_path) == dict.fromkeys(range(7), 1)


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_dropped_and_named(cut: int, tmp_path: Path) -> None:
    whole, path = search(tmp_path), tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with RunJournal(path, IDENTITY) as journal:
        assert "last line" in journal.notes[0] and journal.found(Proposal.of(x=5)) is not None
        assert journal.found(Proposal.of(x=6)) is None
    assert outcome(search(tmp_path)) == outcome(whole)
    assert asked(tmp_path)[6] == 2 and asked(tmp_path)[5] == 1
    assert path.read_bytes().count(b"\n") == 8


def test_a_torn_header_begins_afresh(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b'{"form')
    assert len(search(tmp_path)) == 7


def test_a_line_of_zeros_at_the_end_is_dropped(tmp_path: Path) -> None:
    """What a power failure leaves of a block that was not written."""
    search(tmp_path)
    with (tmp_path / "journal.jsonl").open("ab") as stream:
        stream.write(b"\0" * 30 + b"\n")
    with RunJournal(tmp_path / "journal.jsonl", IDENTITY) as journal:
        assert "not whole" in journal.notes[0] and journal.found(Proposal.of(x=6)) is not None


def test_a_damaged_line_is_refused(tmp_path: Path) -> None:
    search(tmp_path)
    path = tmp_path / "journal.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"bytes":990', b'"bytes":99', 1))
    with pytest.raises(BadFile, match="line 3"):
        RunJournal(path, IDENTITY)


def test_another_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search(tmp_path)
    later = path.read_bytes().split(b"\n")[0]
    import karikomi.search.driver.run_journal as module

    path.write_bytes(module._sealed({"format": 0}))
    content = path.read_bytes()
    with pytest.raises(Unsupported, match="another format.*choose another --out"):
        RunJournal(path, IDENTITY)
    assert path.read_bytes() == content != later
    path.write_text("not a journal\n")
    with pytest.raises(BadFile, match="not a journal"):
        RunJournal(path, IDENTITY)


@pytest.mark.parametrize("key", ["weights", "data", "seed", "source"])
def test_candidates_of_another_identity_are_not_taken(key: str, tmp_path: Path) -> None:
    search(tmp_path)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with RunJournal(tmp_path / "journal.jsonl", {**IDENTITY, key: "other"}) as journal:
        assert journal.found(Proposal.of(x=1)) is None
        assert "7 candidates" in journal.notes[0]
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_failures_are_kept_and_retried_unless_permanent(tmp_path: Path) -> None:
    strategy = toys.Once(0, 1, 2)
    found = search(tmp_path, toys.failing, strategy=strategy)
    errors = [
        item.error and (item.error["kind"], item.error["permanent"]) for item in found.values()
    ]
    assert errors == [None, ("Unsupported", True), ("MemoryError", False)]
    text = list(found.values())[2].error
    assert text is not None and "search_toys.py:" in text["text"]
    assert asked(tmp_path) == {0: 1, 1: 1, 2: 2}
    (tmp_path / "memory").write_text("")
    again = search(tmp_path, toys.failing, strategy=strategy)
    assert [item.error is None for item in again.values()] == [True, False, True]
    assert asked(tmp_path) == {0: 1, 1: 1, 2: 3}


def test_a_strategy_without_an_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import karikomi.search.driver.rounds as module

    monkeypatch.setattr(module, "_MOST_ROUNDS", 5)
    with pytest.raises(InvalidArgument, match="no end"):
        search(tmp_path, strategy=toys.Ladder(limit=math.inf))


def test_a_killed_worker_costs_its_candidate_only(tmp_path: Path) -> None:
    """Two processes, one of which dies in a candidate: the same results as in this process, one retry."""
    (tmp_path / "inline").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "inline" / "killed").write_text("")
    inline = search(tmp_path / "inline", toys.killed_once)
    with Workers(2) as executor:
        both = search(tmp_path / "two", toys.killed_once, executor=executor)
    assert outcome(both) == outcome(inline)
    assert asked(tmp_path / "two") == dict.fromkeys(range(7), 1)
    lines = [
        json.loads(line) for line in (tmp_path / "two/journal.jsonl").read_text().splitlines()
    ][1:]
    assert [line["error"]["kind"] for line in lines if line["error"]] == ["BrokenProcessPool"]
    # The processes were spawned with one thread each.
    assert {item.facts["threads"] for item in both.values()} == {"1"}


KILLED = """
import sys, pathlib
sys.path[:0] = sys.argv[2:]
import search_toys as toys
from unit import test_search_driver as tests
import time
def slow(proposal, seed, reference):
    time.sleep(0.05)
    return toys.counted(proposal, seed, reference)
tests.search(pathlib.Path(sys.argv[1]), slow)
"""


def test_kill_9_at_any_moment_and_the_same_search_goes_on(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = search(tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    here = Path(__file__).parents[1]
    command = [sys.executable, "-c", KILLED, str(folder), str(here), str(here.parent / "src")]
    process = subprocess.Popen(command)
    journal = folder / "journal.jsonl"
    while process.poll() is None and not (
        journal.exists() and journal.read_bytes().count(b"\n") >= 3
    ):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert journal.read_bytes().count(b"\n") < 8
    assert outcome(search(folder)) == outcome(whole)
    # At most the candidate that was under way was evaluated twice.
    assert sum(asked(folder).values()) <= 8


def test_an_interruption_leaves_no_worker(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Workers(1) as executor:
        executor.submit(time.sleep, 60)
        while not executor.pids():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert executor.pids() == []


def test_executors_are_opened_by_number(tmp_path: Path) -> None:
    with opened(1) as executor:
        assert isinstance(executor, InlineExecutor)
    for workers in (0, -1, True, 1.5):
        with pytest.raises(KarikomiError), opened(workers):  # type: ignore[arg-type]
            pass


def test_the_digest_of_the_source_depends_on_each_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    digests = {source_digest(tmp_path)}
    source_digest.cache_clear()
    (tmp_path / "a.py").write_text("a = 2\n")
    digests.add(source_digest(tmp_path))
    source_digest.cache_clear()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    digests.add(source_digest(tmp_path))
    source_digest.cache_clear()
    assert len(digests) == 3 and source_digest() not in digests


def test_a_latency_is_measured_once_alone_and_kept(tmp_path: Path) -> None:
    calls: list[str] = []

    def measure(form: str) -> dict[str, float]:
        calls.append(form)
        return {"ms": 2.0 * len(calls)}

    path = tmp_path / "latency.json"
    table = LatencyTable(path, {"cpu": "a"}, measure)
    assert (table.ms("wide"), table.ms("wide"), table.ms("narrow")) == (2.0, 2.0, 4.0)
    resumed = LatencyTable(path, {"cpu": "a"}, measure)
    assert (resumed.ms("wide"), calls, resumed.notes) == (2.0, ["wide", "narrow"], [])
    # A worker reads; another machine is said.
    reader = LatencyTable(path, {"cpu": "b"})
    assert reader.ms("narrow") == 4.0 and "another cpu" in reader.notes[0]
    with pytest.raises(Unsupported, match="not in the latency table"):
        reader.ms("new")


def test_what_cannot_be_met_has_a_binding_limit_and_the_nearest_budgets() -> None:
    rows = [{"drop": 0.0, "bytes": 100}, {"drop": 0.02, "bytes": 50}, {"drop": 0.3, "bytes": 10}]
    met = Budgets(max_drop=0.02, max_bytes=60).judge(rows)
    assert (met.best, met.held, met.binding, met.nearest) == (1, True, None, [])
    missed = Budgets(max_drop=0.01, max_bytes=40).judge(rows)
    assert not missed.held and missed.binding == "drop" and missed.best == 1
    assert missed.nearest == [{"drop": 0.3, "bytes": 40}, {"drop": 0.01, "bytes": 100}]
    assert Budgets(max_drop=0.5).judge(rows).best == 2
    assert Budgets(max_bytes=60).objective_name == "drop"
    unknown = Budgets(max_ms=1.0).judge([{"drop": 0.0}])
    assert unknown.held is False and unknown.binding == "ms" and unknown.nearest == []
    assert Budgets(max_drop=0.0).misses({"drop": 1e-17}) == {}
    assert Budgets(max_drop=0.1).misses({"drop": math.nan}) == {"drop": math.inf}


@pytest.mark.parametrize(
    "given_",
    [{"max_drop": -1}, {"max_ms": 0}, {"max_bytes": math.inf}, {"max_macs": True}]
    + [{"max_drop": math.nan}, {"objective": "speed"}, {"max_parameters": "4"}],
)
def test_budgets_out_of_range(given_: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Budgets(**given_)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(point: tuple[int, int]) -> bool:
        return any(q != point and q[0] <= point[0] and q[1] <= point[1] for q in points)

    assert front(points, lambda p: p) == sorted({p for p in points if not dominated(p)})
    assert front([(1.0, math.nan)], lambda p: p) == []
