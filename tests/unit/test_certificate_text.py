"""The certificate and the verdict in the words of the terminal."""

from __future__ import annotations

from typing import Any

import pytest

from karikomi.report.certificate_text import certificate_sentence, missed_sentence
from karikomi.report.verdict import rerun_line

FOUND: dict[str, Any] = {"alpha": 0.05, "n": 1200, "split": "certify", "tried": 7}
TESTS = [
    {"drop": 0.001, "bound": 0.003, "passed": True},
    {"drop": 0.002, "bound": 0.004, "passed": True},
    {"drop": 0.004, "bound": 0.008, "passed": False},
]


@pytest.mark.parametrize(
    ("status", "tests", "said"),
    [
        (
            "certified",
            TESTS,
            "certified: a drop of at most 0.004 at 95 % (observed 0.002, 1,200 certify",
        ),
        ("not certified", TESTS[2:], "NOT certified: the drop may be up to 0.008 at 95 %"),
    ],
)
def test_the_figures_are_those_of_the_boldest(status: str, tests: Any, said: str) -> None:
    text = certificate_sentence({"certificate": {**FOUND, "status": status, "tests": tests}})
    assert text.startswith(said) and "7 files tried" in text


def test_what_was_not_run_has_its_reason() -> None:
    assert (
        certificate_sentence({"certificate": {"status": "not run", "reason": "no"}})
        == "not run: no"
    )
    assert certificate_sentence({}) == certificate_sentence({"certificate": None}) == ""


def test_a_missed_budget_names_the_limit_and_what_could_be_met() -> None:
    result = {"verdict": "missed", "binding": "ms", "nearest_budgets": [{"drop": 0.1, "ms": 2.5}]}
    assert missed_sentence(result) == "the limit on ms was missed; could be met: drop 0.1, ms 2.5"
    assert missed_sentence({**result, "nearest_budgets": []}) == "the limit on ms was missed"
    assert missed_sentence({**result, "verdict": "held"}) == ""


def test_the_command_has_all_budgets() -> None:
    result = {
        "task": "t",
        "from": "w.npz",
        "preset": "cpu",
        "max_drop": 0.01,
        "budgets": {"max_drop": 0.01, "max_bytes": 2000},
        "training": False,
    }
    assert rerun_line(result) == (
        "karikomi compress t --from w.npz --preset cpu --max-bytes 2000 --no-training --max-drop 0.01"
    )
