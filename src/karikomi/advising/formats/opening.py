"""Open a run of any known format: recognised by content first, by name where the content does not tell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from karikomi.advising.formats import event_files, json_logs, megatron_log, mlflow_store, tables
from karikomi.advising.formats.keyed import run_of
from karikomi.advising.formats.own_record import read_record
from karikomi.advising.recorded import Recorded
from karikomi.errors import BadFile
from karikomi.files import as_path

KNOWN = (
    "a record of karikomi, TensorBoard event files, trainer_state.json, metrics.csv, a W&B history "
    "(csv, json, parquet), MLflow (files, SQLite), a Megatron log, or CSV with --map"
)
_EVENTS = "*tfevents*"


def open_run(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    stage: str | None = None,
) -> Recorded:
    """Return the run in a file or folder; raises `BadFile` for one of no known format."""
    where = as_path(path)
    if not where.exists():
        raise BadFile("there is no such file or folder", where=str(where))
    found = _inside(where) if where.is_dir() else where
    columns = dict(columns or {})
    if found.is_dir():
        curves, lost = mlflow_store.read_files(found)
        return run_of(
            curves, source=str(found), format=mlflow_store.FILES, columns=columns, lost=lost
        )
    if _is_record(found):
        return read_record(found, stage)
    return _foreign(found, columns, where if where.is_dir() else None)


def _foreign(path: Path, columns: dict[str, str], folder: Path | None) -> Recorded:
    step = columns.get("step")
    source = str(path)
    if event_files.is_event_file(path):
        curves, lost = event_files.read_event_files(_siblings(path))
        lost += [] if folder is None else _other_runs(folder, path)
        return run_of(curves, source=source, format=event_files.FORMAT, columns=columns, lost=lost)
    if mlflow_store.is_database(path):
        curves, lost = mlflow_store.read_database(path)
        return run_of(
            curves, source=source, format=mlflow_store.DATABASE, columns=columns, lost=lost
        )
    if _begins(path, b"PAR1"):
        curves, format, lost = tables.read_parquet(path, step)
        return run_of(curves, source=source, format=format, columns=columns, lost=lost)
    if _begins(path, b"{", b"["):
        curves, format, lost, facts = json_logs.read_json(path, step)
        mean = format == json_logs.STATE
        return run_of(
            curves,
            source=source,
            format=format,
            columns=columns,
            lost=lost,
            mean_loss=mean,
            facts=facts,
        )
    if megatron_log.is_megatron(path):
        curves, lost = megatron_log.read_log(path)
        return run_of(
            curves,
            source=source,
            format=megatron_log.FORMAT,
            columns=columns,
            lost=lost,
            mean_loss=True,
        )
    if path.suffix.lower() in (".csv", ".tsv", ".txt") or columns:
        curves, format, lost = tables.read_csv(path, step)
        return run_of(curves, source=source, format=format, columns=columns, lost=lost)
    raise BadFile("no known format of a run", where=source, allowed=KNOWN)


def _inside(folder: Path) -> Path:
    """Return the run in a folder: a record, event files, a state, a table, or a store, the newest of its kind."""
    for pattern in ("record.jsonl", "*.jsonl"):
        records = [path for path in folder.glob(pattern) if _is_record(path)]
        if records:
            return max(records, key=_age)
    for pattern in (
        *(_EVENTS, f"**/{_EVENTS}", "trainer_state.json", "*/trainer_state.json"),
        *("metrics.csv", "**/metrics.csv", "mlflow.db"),
    ):
        found = [path for path in folder.glob(pattern) if path.is_file()]
        if found:
            return max(found, key=_age)
    metrics = mlflow_store.metrics_folder(folder)
    if metrics is not None:
        return metrics
    raise BadFile("this folder holds no run", where=str(folder), allowed=KNOWN)


def _siblings(path: Path) -> list[Path]:
    """Return the event files of the same run in the order of their names, which begin with a time."""
    if "tfevents" not in path.name:
        return [path]
    files = sorted(own for own in path.parent.glob(_EVENTS) if event_files.is_event_file(own))
    return files or [path]


def _other_runs(folder: Path, chosen: Path) -> list[str]:
    folders = {own.parent for own in folder.glob(f"**/{_EVENTS}")} - {chosen.parent}
    return [f"{len(folders)} other folders with event files; this is the newest"] if folders else []


def _is_record(path: Path) -> bool:
    return path.is_file() and _begins(path, b'{"event": "start"', b'{"event":"start"')


def _begins(path: Path, *heads: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise BadFile("cannot read the file", where=str(path), got=error.strerror) from error
    return any(start.startswith(head) for head in heads)


def _age(path: Path) -> float:
    return path.stat().st_mtime
