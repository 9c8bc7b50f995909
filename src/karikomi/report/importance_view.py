"""The page of importances: what the weights of each tensor are worth, as a chart and a table."""

from __future__ import annotations

from karikomi.prune import Importances
from karikomi.report.bars import Dots, dot_chart
from karikomi.report.drawing import Axis, drawn
from karikomi.report.page import Chart, Page, Section, Table, Tile, Words, render
from karikomi.report.wording import count, percent

MOST = 100
"""How many tensors have a row in the chart."""


def importance_page(importances: Importances) -> str:
    """Return the HTML page of importances that `scores` returned: sizes by tensor, histograms, what has none.

    >>> import numpy as np
    >>> found = Importances({"fc": np.array([1.0, 3.0], np.float32)}, score="magnitude")
    >>> "magnitude" in importance_page(found)
    True
    """
    rows, edges = importances.spreads(), importances.edges()
    # A logarithm has no zero; scores that are negative have none either.
    log = edges[0] == 0.0
    dots = [
        Dots(
            row.name,
            [v if v > 0.0 or not log else None for v in (row.median, row.mean, row.largest)],
        )
        for row in rows[:MOST]
    ]
    chart = drawn(
        lambda: dot_chart(
            "Scores by tensor",
            f"Median, mean and largest {importances.score} of each tensor.",
            ["median", "mean", "largest"],
            dots,
            axis=Axis(importances.score, log=log),
        )
    )
    columns = ["tensor", "items", "least", "median", "mean", "largest", "share of the sum"]
    cells = [
        [
            row.name,
            count(row.items),
            *(f"{value:.3g}" for value in (row.least, row.median, row.mean, row.largest)),
            percent(row.share),
        ]
        for row in rows
    ]
    steps = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges, edges[1:], strict=False)]
    histograms = [[row.name, *map(count, row.counts)] for row in rows]
    sections = [
        Section(
            "Sizes", [Chart("Scores by tensor", chart), Table("Scores by tensor", columns, cells)]
        ),
        Section("Histograms", [Table("Items by score", ["tensor", *steps], histograms)]),
    ]
    alone = [[name, why] for name, why in importances.left_alone.items()]
    left = (
        Table("Without scores", ["tensor", "why"], alone, names=2)
        if alone
        else Words("Every tensor has scores.")
    )
    sections.append(Section("Tensors without scores", [left]))
    tiles = [
        Tile("tensors", count(len(rows))),
        Tile("items", count(sum(row.items for row in rows))),
    ]
    lead = "What each tensor's weights, or units, are worth: the lowest are removed first."
    return render(Page(f"Importances by {importances.score}", lead, tiles, sections))
