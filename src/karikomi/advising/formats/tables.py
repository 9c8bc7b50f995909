"""Tables: Lightning ``metrics.csv``, histories of W&B as CSV or parquet, and any other CSV."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from karikomi.advising.formats.json_logs import STEPS, add_rows
from karikomi.advising.formats.keyed import LoggedCurves
from karikomi.errors import BadFile, Unavailable

LIGHTNING = "metrics.csv of Lightning"
WANDB = "history of W&B"
OTHER = "CSV"
PARQUET = "parquet"


def read_csv(path: Path, step: str | None) -> tuple[LoggedCurves, str, list[str]]:
    """Return the curves of a CSV file, its format, and what was lost; raises `BadFile`.

    The first line names the columns. Without a column of steps the rows are counted from 1. Of a row that
    is longer or shorter than the first line, as a torn last one, only the complete cells count, and it is named.
    """
    curves, torn = LoggedCurves(), []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as stream:
            reader = csv.reader(stream)
            head = [name.strip() for name in next(reader, [])]
            if len(head) < 1 or len(set(head)) != len(head):
                raise BadFile(
                    "the first line does not name the columns", where=str(path), got=head[:8]
                )
            lost = add_rows(curves, _numbered(reader, head, step, torn), step or _step_of(head))
    except OSError as error:
        raise BadFile("cannot read the file", where=str(path), got=error.strerror) from error
    except csv.Error as error:
        raise BadFile("this is not CSV", where=str(path), got=error) from error
    if torn:
        lost.append(f"{len(torn):,} rows with another number of cells, first in line {torn[0]:,}")
    format = LIGHTNING if {"epoch", "step"} <= set(head) else WANDB if "_step" in head else OTHER
    return curves, format, lost


def read_parquet(path: Path, step: str | None) -> tuple[LoggedCurves, str, list[str]]:
    """Return the same of a parquet file, as W&B stores histories; raises `Unavailable` without pyarrow."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise Unavailable("reading parquet needs pyarrow", hint="pip install pyarrow") from error
    curves = LoggedCurves()
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        key = step or _step_of(names)
        lost = []
        for batch in file.iter_batches(batch_size=4096):
            lost += add_rows(curves, batch.to_pylist(), key)
    except Exception as error:
        raise BadFile("cannot read this parquet file", where=str(path), got=error) from error
    return curves, WANDB if "_step" in names else PARQUET, lost


def _step_of(head: list[str]) -> str:
    return next((name for name in STEPS if name in head), _COUNTED)


_COUNTED = "(row)"


def _numbered(
    reader: Any, head: list[str], step: str | None, torn: list[int]
) -> Iterator[dict[str, Any]]:
    counted = step is None and _step_of(head) == _COUNTED
    for number, cells in enumerate(reader, start=1):
        if not cells:
            continue
        if len(cells) != len(head):
            torn.append(number + 1)
            if len(cells) > len(head):
                continue
            # The last cell of a torn row may be half of a number.
            cells = cells[:-1]
        row: dict[str, Any] = dict(zip(head, cells, strict=False))
        yield {_COUNTED: number, **row} if counted else row
