"""A headless browser that opens pages and measures them: cut and overlapping text, its height, its contrast, axe."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

NO_BROWSER = "no browser"
_PATIENCE = 180_000  # milliseconds: a build machine may be busy
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

# Every piece of text that is seen: its box, its letters' height, its colour and what lies behind it.
TEXTS = """
() => {
  const seen = [];
  const mix = (top, share, below) => below.map((c, k) => share * top[k] + (1 - share) * c);
  const colour = (text) => {
    const found = (text.match(/[\\d.]+/g) || []).map(Number);
    return found.length === 4 ? [found.slice(0, 3), found[3]] : [found.slice(0, 3), 1];
  };
  const light = (c) => {
    const [r, g, b] = c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = colour(getComputedStyle(document.body).backgroundColor)[0];
  const behind = (element, box) => {
    let below = paper;
    const chain = [];
    for (let e = element; e && e !== document.body; e = e.parentElement) chain.unshift(e);
    for (const e of chain) {
      const [c, share] = colour(getComputedStyle(e).backgroundColor);
      if (c.length === 3) below = mix(c, share, below);
    }
    const svg = element.closest("svg");
    const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
    for (const rect of svg ? svg.querySelectorAll("rect") : []) {
      const b = rect.getBoundingClientRect(), style = getComputedStyle(rect);
      const inside = b.left <= x && x <= b.right && b.top <= y && y <= b.bottom;
      if (!inside || style.fill === "none") continue;
      const [c, share] = colour(style.fill);
      below = mix(c, share * parseFloat(style.fillOpacity), below);
    }
    return below;
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest("title, desc, style")) continue;
    const style = getComputedStyle(element), range = document.createRange();
    const head = element.closest("thead");
    if (head && getComputedStyle(head).clipPath !== "none") continue;
    range.selectNodeContents(node);
    const svg = element.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const frame = svg ? svg.getBoundingClientRect() : null;
    for (const box of range.getClientRects()) {
      if (box.width < 1 || box.height < 1) continue;
      const below = behind(element, box), ink = colour(svg ? style.fill : style.color)[0];
      const [a, b] = [light(below), light(ink)].sort((p, q) => q - p);
      seen.push({
        text: node.textContent.trim().slice(0, 60), box: [box.left, box.top, box.right, box.bottom],
        size: parseFloat(style.fontSize) * scale, contrast: (a + 0.05) / (b + 0.05),
        cut: box.left < -0.5 || box.right > innerWidth + 0.5 || (frame !== null && (box.left < frame.left - 0.5
          || box.right > frame.right + 0.5 || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)),
      });
    }
  }
  const sideways = [...document.querySelectorAll("*")].filter((e) => {
    const flow = getComputedStyle(e).overflowX;
    return flow !== "visible" && e.tagName !== "svg" && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 1;
  }).map((e) => e.tagName + " " + (e.className.baseVal ?? e.className) + " " + e.textContent.trim().slice(0, 40));
  const hidden = [...document.querySelectorAll("td, th")].filter((e) => e.textContent.trim() && !e.closest("thead"))
    .filter((e) => e.getClientRects().length === 0).map((e) => e.textContent);
  return {seen, sideways, hidden, wide: document.documentElement.scrollWidth - innerWidth};
}
"""


@dataclass(frozen=True, slots=True)
class Text:
    """A line of text that is seen."""

    text: str
    box: tuple[float, float, float, float]
    size: float
    contrast: float
    cut: bool

    def covers(self, other: Text) -> bool:
        """Return whether two lines lie on each other by more than the space between lines."""
        (a, b, c, d), (e, f, g, h) = self.box, other.box
        across, down = min(c, g) - max(a, e), min(d, h) - max(b, f)
        # The boxes of lines hold the room of letters that reach above and below others.
        return across > 1.5 and down > 0.35 * min(d - b, h - f)


class Browser:
    """One browser for all pages."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._page = driver.new_page()
        self._page.set_default_timeout(_PATIENCE)

    def show(self, html: str, width: int, *, scheme: str = "light", media: str = "screen") -> None:
        """Open a page at a width."""
        self._page.set_viewport_size({"width": width, "height": 900})
        self._page.emulate_media(color_scheme=scheme, media=media)
        self._page.set_content(html)

    def faults(self, *, smallest: float = 11.0, least_contrast: float = 4.5) -> list[str]:
        """Return what a reader of the page that is shown would stumble over."""
        found = self._page.evaluate(TEXTS)
        texts = [Text(**row | {"box": tuple(row["box"])}) for row in found["seen"]]
        assert texts
        said = [f"hidden: {text}" for text in found["hidden"]]
        said += [f"scrolls sideways: {name}" for name in found["sideways"]]
        said += ["the page is wider than the screen"] if found["wide"] > 0 else []
        said += [f"cut: {text.text} {text.box}" for text in texts if text.cut]
        said += [f"{text.size:.1f} px: {text.text}" for text in texts if text.size < smallest]
        said += [
            f"contrast {text.contrast:.2f}: {text.text}"
            for text in texts
            if text.contrast < least_contrast
        ]
        return said + [f"overlap: {a.text} | {b.text}" for a, b in overlaps(texts)]

    def axe(self) -> list[str]:
        """Return what axe finds on the page that is shown."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self._page).response["violations"]
        return [f"{item['id']}: {item['help']}, {item['nodes'][0]['html'][:80]}" for item in found]

    def picture(self, path: str) -> None:
        """Write a picture of the whole page, to look at."""
        self._page.screenshot(path=path, full_page=True)


def overlaps(texts: list[Text]) -> Iterator[tuple[Text, Text]]:
    """Yield pairs of lines that lie on each other."""
    ready = sorted(texts, key=lambda text: text.box[1])
    for place, first in enumerate(ready):
        for other in ready[place + 1 :]:
            if other.box[1] >= first.box[3]:
                break
            if first.covers(other):
                yield first, other


@contextlib.contextmanager
def opened() -> Iterator[Browser]:
    """Start the browser of the system; a test is skipped where there is none."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"{NO_BROWSER}: install Debian's chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        driver = playwright.chromium.launch(executable_path=path, timeout=_PATIENCE)
        try:
            yield Browser(driver)
        finally:
            driver.close()
