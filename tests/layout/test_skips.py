"""The limit on skipping: it must be able to fail a run, and missing data must be excused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from layout.source import ROOT

SKIPS = """
import pytest

def test_passes(): ...
def test_is_skipped(): pytest.skip("no reason at all")
def test_wants_data(data_dir): ...
"""
WORKERS = [(), ("-n", "1")]
Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the tests above in a folder that has no data beside it."""
    monkeypatch.delenv("KARIKOMI_DATA", raising=False)
    nested = pytester.mkdir("tests")
    (nested / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text("utf-8"))
    (nested / "test_one.py").write_text(SKIPS)
    return lambda *arguments: pytester.runpytest_subprocess(nested, *arguments)


@pytest.mark.parametrize("workers", WORKERS)
def test_one_skip_too_many_fails_the_run_and_is_named(run: Run, workers: tuple[str, ...]) -> None:
    result = run("--max-skips", "0", *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*1 skipped, 0 allowed*", "SKIPPED *test_is_skipped: no reason at all"]
    )


def test_missing_data_is_excused(run: Run) -> None:
    assert run("--max-skips", "1", "-n", "1").ret == pytest.ExitCode.OK


def test_without_a_limit_skipping_is_free(run: Run) -> None:
    assert run().ret == pytest.ExitCode.OK


def test_a_named_folder_that_is_not_there_is_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KARIKOMI_DATA", str(tmp_path / "nowhere"))
    run("-k", "data").stdout.fnmatch_lines(["*KARIKOMI_DATA names no folder*"])
