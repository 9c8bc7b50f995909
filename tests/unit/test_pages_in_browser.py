"""The pages of compress, sweep, advise and audit in a browser: nothing cut, covered, tiny, faint, or lost in print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from audited import IMAGES, REGRESSION, TEXT
from browser import Browser, Text, opened, overlaps
from karikomi import report
from unit.test_advise import Series
from unit.test_report import compress_result, record_rows, sweep_result

PHONE, SCREEN, PAPER = 400, 1_400, 718
"""Pixels across: a phone, a screen, and A4 between margins of one centimetre."""

SMALLEST, IN_PRINT = 11.0, 10.0
"""Height of letters in pixels; 10 are 7.5 points on paper, where charts are drawn broad."""


def _advice(folder: Path) -> str:
    made = Series()
    made.gradients[200:204] *= 300.0
    made.gradients[203, 1] = float("inf")
    return report.advice_page(made.advice(folder))


PAGES: dict[str, Callable[[Path], str]] = {
    "compress": lambda folder: report.compress_page(compress_result(), record_rows(400)),
    "sweep": lambda folder: report.sweep_page(sweep_result()),
    "advise": _advice,
    "audit of images": lambda folder: report.audit_page(IMAGES.result()),
    "audit of text": lambda folder: report.audit_page(TEXT.result()),
    "audit of a regression": lambda folder: report.audit_page(REGRESSION.result()),
    "training": lambda folder: report.training_page(record_rows(400)),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened() as started:
        yield started


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read(browser: Browser, name: str, tmp_path: Path) -> None:
    html = PAGES[name](tmp_path)
    for width in (PHONE, SCREEN):
        for scheme in ("light", "dark"):
            browser.show(html, width, scheme=scheme)
            assert browser.faults(smallest=SMALLEST) == [], (width, scheme)
            if (width == PHONE) is (scheme == "light"):
                assert browser.axe() == [], (width, scheme)
    browser.show(html, PAPER, media="print", scheme="dark")
    assert browser.faults(smallest=IN_PRINT) == [], "print"


FAULTY = {
    "cut": '<svg viewBox="0 0 100 20" width="100"><text x="80" y="12">too long for it</text></svg>',
    "px": '<p style="font-size: 9px">small</p>',
    "contrast": '<p style="color: #bbb">faint</p>',
    "overlap": '<div style="margin-bottom: -1.2em">below</div><div>another line</div>',
    "scrolls": '<div style="overflow-x: auto; width: 90px"><pre>a line that is far too long</pre></div>',
    "wider": '<div style="width: 500px">a</div>',
    "hidden": "<table><tr><td>a</td><td style='display: none'>lost</td></tr></table>",
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_fault_is_found(browser: Browser, kind: str) -> None:
    browser.show(f"<body style='background: #fff; font: 12px sans-serif'>{FAULTY[kind]}", PHONE)
    assert any(kind in said for said in browser.faults())


def test_axe_finds_a_picture_without_words(browser: Browser) -> None:
    browser.show('<html lang="en"><body><img src="data:,"></body></html>', PHONE)
    assert any(said.startswith("image-alt") for said in browser.axe())


def test_lines_above_each_other_do_not_overlap() -> None:
    lines = [Text(str(k), (0, 14.0 * k, 50, 14.0 * k + 16), 12, 9, False) for k in range(3)]
    assert list(overlaps(lines)) == []
    assert len(list(overlaps([*lines, lines[1]]))) == 1
