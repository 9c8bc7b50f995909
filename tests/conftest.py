"""What the tests share: the real data, the depth of random testing, and a limit on skipping.

A test that is skipped on every machine is no test. `--max-skips N` therefore turns a run with more
than N skipped tests into a failure, and names each of them. Missing real data and a missing browser are the excuses.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

NO_DATA, NO_BROWSER = "no data folder", "no browser"

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1_000)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real data: $KARIKOMI_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("KARIKOMI_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"KARIKOMI_DATA names no folder: {named}")
    pytest.skip(f"{NO_DATA}: set KARIKOMI_DATA to a folder with the real data sets")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --max-skips."""
    parser.addoption(
        "--max-skips",
        type=int,
        default=None,
        metavar="N",
        help="fail if more than N tests are skipped, and list them (default: no limit)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a lane of another Keras backend, leave the tests that the other lane takes."""
    if "KARIKOMI_LANE" in os.environ:
        import keras_backends

        taken = keras_backends.taken(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in taken])
        items[:] = taken


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that passed only because too much of it was skipped."""
    if len(_unexcused(session.config)) > _limit(session.config) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which skips were too many, above the closing line."""
    skips, limit = _unexcused(terminalreporter.config), _limit(terminalreporter.config)
    if len(skips) > limit:
        terminalreporter.section(
            f"{len(skips)} skipped, {limit:.0f} allowed (--max-skips)", red=True
        )
        for report in skips:
            terminalreporter.line(f"SKIPPED {report.nodeid}: {_reason(report)}")


def _limit(config: pytest.Config) -> float:
    limit = config.getoption("max_skips", default=None)
    on_worker = hasattr(config, "workerinput")
    return float("inf") if limit is None or on_worker else limit


def _unexcused(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    excuses = (NO_DATA, NO_BROWSER)
    return [
        report for report in skipped if not any(excuse in _reason(report) for excuse in excuses)
    ]


def _reason(report: pytest.TestReport) -> str:
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")
