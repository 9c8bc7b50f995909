"""The same training over a grid of clip limits and sparsities, with several seeds, resumable."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from karikomi import __version__, registry
from karikomi.clip.by_global_norm import ByGlobalNorm
from karikomi.errors import BadFile, Unsupported, check
from karikomi.files import write_json
from karikomi.prune import check_sparsity
from karikomi.search.grid_run import Run, Setting
from karikomi.search.lock import claim, lock, read_json
from karikomi.search.rehearsal import rehearse_run
from karikomi.tasks import Data, Runner, Task, checked_data, resolved

_FIGURES = ("accuracy", "gap", "ms_per_step", "bytes", "clipped")


def sweep(
    task: Task | str,
    *,
    limits: Sequence[float | None] = (0.1, 1.0, 10.0, None),
    sparsities: Sequence[float] = (0.0, 0.9),
    seeds: int = 3,
    epochs: int | None = None,
    out: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a task at every limit, sparsity and seed, and return the figures of each point of the grid.

    `limits`: of the gradients' global norm, > 0; None and infinity clip nothing (norms are still
    measured). `sparsities`: in [0, 1), reached by gradual pruning within the same epochs. `seeds`:
    how many, counted from 0. `epochs`: of each run, by default the recipe's. `out`: a folder, by
    default ``runs/sweep-<task>``; it keeps one JSON file and one record of steps per run, and the
    result as ``sweep.json``. The same call on the same folder continues. `data`: for a task that is
    given by name and needs a path. `progress`: a bar on stderr.

    The result has one point per limit and sparsity, with mean, min and max over its runs of
    ``accuracy`` (the task's metric on the test split), ``gap`` (by how much it is worse there than
    on the first 5,000 training examples), ``ms_per_step`` (median of a run), ``bytes`` (packed)
    and ``clipped`` (share of steps); ``diverged`` counts runs that ended in non-finite numbers, and
    ``warnings`` names them. Times depend on the machine and decide nothing.

    Raises `InvalidArgument` for a grid out of range, and for a metric function that training lowered
    while its task has no ``goal``, `Unsupported` for a folder of another sweep, or one
    that another process is at work in.

    >>> grid = {"limits": (1.0,), "sparsities": (0.5,), "seeds": 1}
    >>> result = sweep("digits", **grid, epochs=1, progress=False)
    >>> result["points"][0]["runs"], result["points"][0]["bytes"]["mean"] < 60_000
    (1, True)
    """
    grid = _grid(limits, sparsities, seeds, epochs)
    task = resolved(task, data, where="sweep")
    epochs = task.recipe.train_epochs if epochs is None else epochs
    content = checked_data(task)
    path = Path("runs") / f"sweep-{task.name}" if out is None else Path(out)
    make = registry.framework(task.framework).runner_for
    runners: list[Runner] = [make(task, content, seed=seed) for seed in range(seeds)]
    environment = {**runners[0].environment(), "karikomi": __version__}
    if not os.path.exists(path / "configuration.json"):  # noqa: PTH110  (as in `compress`)
        _check_prunable(task, runners[0], sparsities)
        rehearse_run(task, content, max(grid, key=lambda setting: setting.sparsity))
    identity = _identity(task, content, runners[0], grid, epochs, environment)
    claim(path / "configuration.json", identity)
    runs: dict[Setting, dict[str, Any]] = {}
    bar = tqdm(total=len(grid) * epochs, desc="sweep", unit="epoch", disable=not progress)
    with lock(path), bar:
        for place, setting in enumerate(grid, start=1):
            bar.set_postfix_str(_words(setting))
            run = Run(task, content, runners[setting.seed], setting, epochs)
            runs[setting] = _finished(run, path / "runs", bar.update)
            # What was read from a file or diverged did not report its epochs.
            bar.update(place * epochs - bar.n)
    result = _result(task, runs, environment)
    write_json(path / "sweep.json", result)
    return result


def _check_prunable(task: Task, runner: Runner, sparsities: Sequence[float]) -> None:
    if any(sparsities) and not runner.prunable():
        alone = runner.left_alone()
        raise Unsupported(
            "no weight of the network can be pruned",
            where=f"task {task.name}",
            got="; ".join(f"{name}: {reason}" for name, reason in list(alone.items())[:3]),
            hint="sweep with sparsities=(0,)",
        )


def _finished(run: Run, folder: Path, on_epoch: Callable[[], object]) -> dict[str, Any]:
    path = folder / f"{run.setting.name}.json"
    found = read_json(path, hint="delete it")
    if found is None:
        found = run.measure(path.with_suffix(".jsonl"), on_epoch)
        write_json(path, found)
    missing = {*_FIGURES, "diverged", "skipped"} - found.keys()
    if missing:
        raise BadFile("not a file of a run", where=str(path), got=sorted(found), hint="delete it")
    return found


def _grid(
    limits: Sequence[float | None], sparsities: Sequence[float], seeds: int, epochs: int | None
) -> list[Setting]:
    plain = [_limit(limit) for limit in limits]
    for sparsity in sparsities:
        check_sparsity(sparsity, where="sweep(sparsities)")
    for name, values in (("limits", plain), ("sparsities", list(sparsities))):
        good = values and len(set(values)) == len(values)
        check("sweep", (good, f"{name} are empty or repeat themselves", values, None))
    for name, value in (("seeds", seeds), ("epochs", 1 if epochs is None else epochs)):
        good = type(value) is int and value >= 1
        check("sweep", (good, f"{name} must be a whole number", value, ">= 1"))
    # Seeds outermost: an interrupted sweep covers the whole grid with fewer seeds.
    return [
        Setting(limit, float(sparsity), seed)
        for seed in range(seeds)
        for limit in plain
        for sparsity in sparsities
    ]


def _limit(limit: float | None) -> float | None:
    if limit is None:
        return None
    good = isinstance(limit, int | float)
    check("sweep(limits)", (good, "a limit is a number or None", repr(limit), None))
    ByGlobalNorm(limit)
    return None if math.isinf(limit) else float(limit)


def _identity(
    task: Task,
    data: Data,
    runner: Runner,
    grid: Sequence[Setting],
    epochs: int,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "task": task.name,
        "network": runner.describe(),
        "metric": task.metric_name,
        "goal": task.direction,
        "classes": [task.class_axis, task.ignore_index],
        "output": task.output,
        "data": data.fingerprint(),
        "recipe": task.recipe.as_dict(),
        "code": task.fingerprint(),
        "weights": runner.fingerprint(),
        "limits": list(dict.fromkeys(setting.limit for setting in grid)),
        "sparsities": list(dict.fromkeys(setting.sparsity for setting in grid)),
        "seeds": list(dict.fromkeys(setting.seed for setting in grid)),
        "epochs": epochs,
        "environment": dict(environment),
    }


def _result(
    task: Task, runs: Mapping[Setting, Mapping[str, Any]], environment: Mapping[str, Any]
) -> dict[str, Any]:
    points = dict.fromkeys((setting.limit, setting.sparsity) for setting in runs)
    return {
        "task": task.name,
        "seeds": list(dict.fromkeys(setting.seed for setting in runs)),
        "metric": task.metric_name,
        "goal": task.direction,
        "points": [
            _point(*point, [run for at, run in runs.items() if (at.limit, at.sparsity) == point])
            for point in points
        ],
        "environment": dict(environment),
        "warnings": [warning for at, run in runs.items() if (warning := _warning(at, run))],
    }


def _warning(at: Setting, run: Mapping[str, Any]) -> str | None:
    if run["diverged"] is not None:
        return f"{_words(at)}: diverged, left out of the figures ({run['diverged']})"
    if run["skipped"]:
        return f"{_words(at)}: {run['skipped']:.0%} of the steps skipped, gradients not finite"
    return None


def _point(
    limit: float | None, sparsity: float, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    finished = [run for run in runs if run["diverged"] is None]
    return {
        "limit": limit,
        "sparsity": sparsity,
        "runs": len(finished),
        "diverged": len(runs) - len(finished),
        **{key: _spread([run[key] for run in finished]) for key in _FIGURES},
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "min": None, "max": None}
    return {"mean": statistics.fmean(known), "min": min(known), "max": max(known)}


def _words(setting: Setting) -> str:
    limit = "none" if setting.limit is None else f"{setting.limit:g}"
    return f"limit {limit}, sparsity {setting.sparsity:g}, seed {setting.seed}"
