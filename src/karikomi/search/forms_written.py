"""The forms in which a run writes its network beside the packed file, each compared with the network."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from karikomi import pack
from karikomi.errors import BadFile, KarikomiError, Unavailable, check_known, install_hint
from karikomi.pack.reader import load_with_notes
from karikomi.search.folder import Folder
from karikomi.search.search_outcome import SearchOutcome
from karikomi.tasks import Arrays, Form, Runner
from karikomi.tasks.user_code import cause

_WHERE = "compress: export"
USUAL = ("safetensors", "keras")
"""The forms that are written unless others are asked for: those that take no time."""


def wanted_forms(
    runner: Runner, names: str | Iterable[str] | None, *, integers: bool = False
) -> tuple[str, ...]:
    """Return the names of the forms to write: those that were asked for, or the usual ones.

    `names`: a sequence, or one text with commas; ``"all"``: every form of the framework. `integers`: whether a search
    for integer kernels leaves their file too, where its packages are installed. Raises `UnknownName`, and
    `Unavailable` with the line that installs what is missing, before any work.
    """
    known = runner.forms()
    if names is None:
        usual = (*USUAL, "int8") if integers else USUAL
        return tuple(n for n, form in known.items() if n in usual and not missing(form))
    given = names.split(",") if isinstance(names, str) else list(names)
    stripped = dict.fromkeys(name.strip() for name in given if name.strip())
    if list(stripped) == ["all"]:
        return tuple(name for name, form in known.items() if not missing(form))
    for name in stripped:
        check_known(name, known, "unknown form", where=_WHERE)
        if lacking := missing(known[name]):
            raise Unavailable(
                f"{', '.join(lacking)} not installed",
                where=f"{_WHERE}: {name}",
                hint=install_hint(known[name].extra),
            )
    return tuple(stripped)


def missing(form: Form) -> list[str]:
    """Return the packages that a form needs and that are not installed."""
    return [name for name in form.needs if importlib.util.find_spec(name) is None]


def forms_written(
    runner: Runner, outcome: SearchOutcome, names: Sequence[str], folder: Folder
) -> list[dict[str, Any]]:
    """Write the chosen network in each form, and return a row for each; one that cannot be has its ``reason``.

    What the run folder has of the same network already is left as it is.
    """
    chosen, known = outcome.chosen, runner.forms()
    chosen.work.adopt()
    rows = []
    for name in names:
        form, stage = known[name], f"form-{name}-{chosen.stamp}"
        path, done = folder.path / form.file, folder.done(stage)
        current = folder.done(f"form-{name}") or {}
        if done is None or current.get("of") != stage or (done.get("file") and not path.exists()):
            done = _written(runner, outcome, form, folder)
            folder.finish(stage, done)
            folder.finish(f"form-{name}", {"of": stage})
        rows.append({"form": name, "about": form.about, **done})
    return rows


def run_exported(
    folder: Path, runner: Runner, names: str | Iterable[str] | None
) -> list[dict[str, Any]]:
    """Write the network of a finished run folder in other forms; return a row for each, as `forms_written` does."""
    wanted = wanted_forms(runner, "all" if names is None else names)
    tensors, notes = load_with_notes(folder / "model.karikomi")
    runner.adopt(notes)
    try:
        dense = safetensors.numpy.load_file(folder / "dense.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise BadFile(
            "the dense network of the run cannot be read", where=str(folder), got=error
        ) from error
    rows = []
    for name in wanted:
        form = runner.forms()[name]
        done = _tried(runner, form, folder / form.file, dense, tensors)
        rows.append({"form": name, "about": form.about, **done})
    return rows


def _written(runner: Runner, outcome: SearchOutcome, form: Form, folder: Folder) -> dict[str, Any]:
    tensors = pack.load_coded(outcome.chosen.path)
    return _tried(runner, form, folder.path / form.file, outcome.dense.arrays, tensors)


def _tried(
    runner: Runner, form: Form, path: Path, dense: Arrays, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        facts = runner.write(form.name, dense, tensors, path)
    except Exception as error:  # noqa: BLE001  (exporters and engines raise whatever they raise)
        # The packed file is there; what cannot be written is named in the result.
        path.unlink(missing_ok=True)
        named = str(error) if isinstance(error, KarikomiError) else cause(error)
        return {"file": None, "reason": " ".join(named.split())[:500]}
    return {"file": form.file, "reason": None, **facts}
