"""What a page says of what both networks look at: the answer in words, and the same numbers in the table."""

from __future__ import annotations

from typing import Any

import pytest

from audited import IMAGES, TEXT
from karikomi import report
from karikomi.report.explanation_section import answer
from pages import Page


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (1.1, "the same"),
        (0.8, "the same"),
        (0.79, "partly"),
        (0.4, "partly"),
        (0.39, "different"),
        (None, "cannot"),
    ],
)
def test_the_answer(place: float | None, words: str) -> None:
    assert words in answer(place)


@pytest.mark.parametrize("audited", [IMAGES, TEXT], ids=["images", "text"])
def test_chart_and_table_have_the_numbers(audited: Any) -> None:
    result = audited.result()
    page, known = Page(report.audit_page(result)), result["explanation"]["measures"]["cosine"]
    row = page.tables["Agreement"][0]
    assert float(row["place"]) == pytest.approx(known["place"], rel=1e-2)
    dots = page.charts["Do both look at the same inputs?"].dots("cosine", 3)
    assert dots == pytest.approx([known[key] for key in ("networks", "floor", "ceiling")], abs=0.02)
    assert any(answer(known["place"]) in sentence for sentence in page.sentences)


def test_words_stand_where_tokens_stood() -> None:
    page = Page(report.audit_page(TEXT.result()))
    svg = page.charts["Tokens that count in some examples"].svg
    assert "remarkably" in svg and "station" in svg
    shown = TEXT.result()["changed_inputs"][0]
    first = page.tables["Changed examples"][0]
    assert first["text"].split()[0] == shown["words"][0] and first["label"] == shown["label"]
