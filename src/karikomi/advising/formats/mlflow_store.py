"""Metrics of MLflow: its folders of files, one a key, and its SQLite database."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

from karikomi.advising.formats.keyed import LoggedCurves, as_number
from karikomi.errors import BadFile

FILES = "MLflow files"
DATABASE = "MLflow database"
_MAGIC = b"SQLite format 3\x00"
# MLflow writes infinities as the largest float64.
_INFINITE = 1.7976931348623157e308


def is_database(path: Path) -> bool:
    """Return whether a file is an SQLite database."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def metrics_folder(path: Path) -> Path | None:
    """Return the newest folder ``metrics`` in a folder of a run, an experiment or a store; ``None`` without any."""
    if path.name == "metrics":
        return path
    found = [
        folder
        for pattern in ("metrics", "*/metrics", "*/*/metrics")
        for folder in path.glob(pattern)
        if folder.is_dir() and (folder.parent / "meta.yaml").is_file()
    ]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def read_files(folder: Path) -> tuple[LoggedCurves, list[str]]:
    """Return the curves of a folder of metrics, and what was lost."""
    curves, wrong = LoggedCurves(), 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        key = file.relative_to(folder).as_posix()
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise BadFile("cannot read the file", where=str(file), got=error.strerror) from error
        for line in lines:
            parts = line.split()
            value = as_number(parts[1]) if len(parts) >= 3 else None
            if value is None or not parts[2].lstrip("-").isdigit():
                wrong += 1
                continue
            curves.add(key, int(parts[2]), _finite(value))
    return curves, [f"{wrong:,} lines that are no metric"] if wrong else []


def read_database(path: Path) -> tuple[LoggedCurves, list[str]]:
    """Return the curves of the newest run in a database, which is opened read-only; raises `BadFile`."""
    uri = f"{path.resolve().as_uri()}?mode=ro"
    try:
        connection = sqlite3.connect(uri, uri=True)
        try:
            runs = connection.execute(
                "SELECT run_uuid, MAX(timestamp) FROM metrics GROUP BY run_uuid ORDER BY 2 DESC"
            ).fetchall()
            if not runs:
                raise BadFile("the database has no metric", where=str(path))
            # In the order of writing, so that a restart is seen as one.
            rows = connection.execute(
                "SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY timestamp, step",
                (runs[0][0],),
            )
            curves = LoggedCurves()
            for key, step, value, is_nan in rows:
                number = math.nan if is_nan else as_number(value)
                if number is not None and isinstance(step, int):
                    curves.add(str(key), step, _finite(number))
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise BadFile("not a database of MLflow", where=str(path), got=error) from error
    others = len(runs) - 1
    return curves, [f"{others:,} other runs; this is {runs[0][0]}, the newest"] if others else []


def _finite(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) >= _INFINITE else value
