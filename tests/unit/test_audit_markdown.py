"""An audit as Markdown: the content of the page and of the JSON, escaped for a pull request."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audited import IMAGES, REGRESSION, TEXT, Linear
from karikomi import report
from karikomi.audit import audit
from karikomi.report.markdown import MOST_LETTERS, escaped, markdown
from karikomi.report.page import Code, Page, Points, Section, Table, Words
from karikomi.tasks import Data, Split, Task
from pages import Page as ReadPage
from pages import plain

RESULTS = {"images": IMAGES, "text": TEXT, "regression": REGRESSION}


def unescaped(text: str) -> str:
    return re.sub(r"\\([\\`*_\[\]<>|#~])", r"\1", text).replace("&#64;", "@")


def tables(text: str) -> list[list[str]]:
    """Return the rows of all tables, each as cells, without rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    cells = [[unescaped(cell.strip()).strip("*") for cell in row] for row in rows]
    return [row for row in cells if not all(re.fullmatch("-+:?", cell) for cell in row)]


@pytest.mark.parametrize("kind", RESULTS)
def test_it_has_every_table_and_sentence_of_the_page(kind: str) -> None:
    result = RESULTS[kind].result()
    text, page = report.audit_markdown(result), ReadPage(report.audit_page(result))
    rows = {tuple(" ".join(cell.split()) for cell in row) for row in tables(text)}
    for caption, body in page.tables.items():
        for row in body:
            assert tuple(" ".join(cell.split()) for cell in row.values()) in rows, caption
    shown = unescaped(text)
    for sentence in page.sentences:
        assert " ".join(sentence.removeprefix("Warning: ").rstrip(".").split()) in shown
    assert len(text) < MOST_LETTERS


def test_it_has_the_verdict_and_the_numbers_of_the_json() -> None:
    result = IMAGES.result()
    rows = tables(report.audit_markdown(result))
    assert ["verdict", result["verdict"], "4 gates"] in rows
    for gate in result["gates"]:
        assert any(row[:2] == [gate["gate"], gate["outcome"]] for row in rows)
    for row in result["classes"]:
        assert any(cells[:2] == [row["class"], f"{row['examples']:,}"] for cells in rows)
    for name, why in result["not_checked"].items():
        assert f"- {name.replace('_', ' ')}: {why}" in unescaped(report.audit_markdown(result))
    text = unescaped(report.audit_markdown(result))
    assert all(warning in text for warning in result["warnings"])


def test_a_comment_mentions_nobody_and_opens_no_tag() -> None:
    evil = "<img src=x> @holm #12 | `a` [b](c) *d*"
    hostile: dict[str, Any] = {"task": evil, "before": evil, "after": evil, "metric": evil}
    result = {**hostile, "metric_before": 1.0, "metric_after": 2.0, "warnings": [evil]}
    text = report.audit_markdown(result | {"not_checked": {evil: evil}})
    for bad in ("<img", "@holm", "#12", "`a", "[b", "*d*"):
        assert not re.search(r"(?<!\\)" + re.escape(bad), text), bad
    folded = markdown(Page("t", "", [], [Section(evil, [Words("x")])]), opened=0)
    assert "<img" not in folded and "@holm" not in folded


@given(st.text("ab @#~|`*_<>[]\\\n&;64", max_size=40))
def test_what_is_escaped_reads_the_same(text: str) -> None:
    assert unescaped(escaped(text)).split() == text.replace("&#64;", "@").split()


def test_code_keeps_its_fence() -> None:
    text = markdown(Page("t", "", [], [Section("s", [Code("c", "a\n```\nb")])]))
    assert "````\na\n```\nb\n````" in text


def test_what_is_too_long_for_a_comment_is_named() -> None:
    table = Table("t", ("a", "b"), [("word" * 10, "1")] * 2_000)
    page = Page("t", "", [], [Section("Long", [table]), Section("Short", [Points(["kept"])])])
    text = markdown(page)
    assert len(text) < MOST_LETTERS and "- kept" in text
    assert "Left out, as comments are short: Long." in text
    assert plain(text)


def test_equal_accuracies_with_five_percent_of_flips() -> None:
    """Flips, churn and the class that pays stand on the first screen, with what so many examples cannot show."""
    generator = np.random.default_rng(0)
    targets = np.repeat(np.arange(10), 400)
    right = generator.random(4_000) < 0.9
    first = np.where(right, targets, (targets + 1) % 10)
    second = first.copy()
    paying = np.flatnonzero(right & (targets == 3))[:100]
    gaining = generator.permutation(np.flatnonzero(~right & (targets != 3)))[:99]
    second[paying], second[gaining] = (targets[paying] + 2) % 10, targets[gaining]
    inputs = np.concatenate([np.eye(10)[first], np.eye(10)[second]], axis=1).astype(np.float32)
    split = Split(inputs, targets)
    task = Task(name="equal", model=dict, data=lambda: Data(split, split, split))
    halves = np.eye(20, dtype=np.float32)[:10], np.eye(20, dtype=np.float32)[10:]
    runner: Any = Linear((10, 20), "cross_entropy")
    pair = [{"head.weight": 6 * half} for half in halves]
    result = audit(task, pair[0], pair[1], runner=runner, most=100)
    assert f"{result['metric_before']:.3f}" == f"{result['metric_after']:.3f}"
    assert result["outcomes"]["churn"] == pytest.approx(199 / 4_000)
    for text in (report.audit_table(result), report.audit_markdown(result)):
        words = " ".join(unescaped(text).split())
        assert "class 3 lost 25.0 points, 100 of 400 examples" in words
        assert re.search(r"negative flips[^|]* \|? ?2\.50 %", words)
        assert re.search(r"churn[^|]* \|? ?4\.9[78] %", words)
        # 1 / 4,000 and 1.96 sqrt(200) / 4,000 to either side.
        assert "the true drop lies between -0.67 and 0.72 points (95 %)" in words
        assert "of a class a drop of less than 2.2 points cannot be shown" in words
    lines = report.audit_table(result).splitlines()
    assert any("class 3 lost" in line for line in lines[:4])
