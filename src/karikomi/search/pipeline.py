"""From a task and a budget to a verified small file: train, prune, shrink, quantize, pack, verify."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import safetensors.numpy
from tqdm import tqdm

from karikomi import __version__, registry
from karikomi.errors import InvalidArgument, KarikomiError, check
from karikomi.files import write_bytes, write_json
from karikomi.search.folder import Folder
from karikomi.search.pipeline_stages import Candidate, Stages
from karikomi.search.rehearsal import rehearse
from karikomi.search.result import SearchOutcome, clip_summary, describe
from karikomi.tasks import (
    Data,
    Runner,
    Task,
    check_seed,
    checked_data,
    configured,
    is_share,
    resolved,
)


def compress(
    task: Task | str,
    *,
    out: str | Path | None = None,
    data: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    max_drop: float = 0.005,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a task's network, make it as small as the budget allows, and return the result.

    One batch is taken through all stages first, so that a task that does not fit fails before it trains.
    Then the network is trained with gradient clipping, pruned by magnitude up a ladder of sparsities, freed
    of dead units, given shared weights (or 8-bit grids), packed and read back. `max_drop`: how far
    the metric may get worse than the dense network's, in the metric's own direction and units (0.005 of
    accuracy is half a point); it binds on the validation split, which training does not see; the test
    split only measures. `config`: a TOML file, or a mapping, of recipe values (see `Recipe`).
    `out`: the run folder (default ``runs/<task>``); it holds ``model.karikomi``, ``dense.safetensors``,
    ``result.json``, ``record.jsonl`` and all checkpoints, and the same call continues a run that was stopped at any
    moment, to the same bytes (same machine, build and thread count).

    Raises `InvalidArgument` for a negative budget, for a metric function that training lowered while its
    task has no ``goal``, `Unsupported` when `out` holds another run, and
    `KarikomiError` naming the cause when the task's own code fails.

    >>> import karikomi as kk
    >>> kk.compress("digits", max_drop=-1)
    Traceback (most recent call last):
        ...
    karikomi.errors.InvalidArgument: compress: max_drop must be >= 0; got -1; allowed: >= 0

    Source: the pipeline of Han, Mao and Dally 2016, Deep Compression; gradual pruning after Zhu and Gupta
    2017. Deviations: distillation while recovering, rANS beside Huffman coding, and the search.
    """
    good = isinstance(max_drop, Real) and math.isfinite(max_drop) and max_drop >= 0
    check("compress", (good, "max_drop must be >= 0", max_drop, ">= 0"))
    check_seed(seed, where="compress")
    task = resolved(task, data, where="compress")
    task = task if config is None else configured(task, config)
    if task.classifies:
        check_share(max_drop)
    content = checked_data(task)
    runner = registry.framework(task.framework).runner_for(task, content, seed=seed)
    path = Path(out) if out is not None else Path("runs") / task.name
    if not os.path.exists(path / "run.json"):  # noqa: PTH110  (a folder that cannot be read has none)
        untrained = rehearse(task, content, seed=seed, search=_search)
        if is_share(task.metric_name) and 0 <= untrained <= 1:
            check_share(max_drop)
    with Folder(path, _identity(task, content, runner, max_drop, seed)) as folder:
        return _compressed(task, content, runner, folder, max_drop, seed, progress)


def _compressed(
    task: Task,
    content: Data,
    runner: Runner,
    folder: Folder,
    max_drop: float,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    environment = _remembered(folder, runner)
    with _bar(task, progress) as bar:

        def on_epoch(stage: str, epochs: int) -> None:
            bar.set_postfix_str(stage, refresh=False)
            bar.update(epochs)

        stages = Stages(task, content, runner, folder, max_drop, on_epoch)
        outcome, untrained = _search(task, stages), stages.untrained()
    if folder.done("search") is None:
        folder.finish("search", {})
    result = {
        **describe(task, content, runner, outcome, max_drop=max_drop, seed=seed),
        "file": str(folder.path / "model.karikomi"),
        "dense": str(folder.path / "dense.safetensors"),
        "record": str(folder.path / "record.jsonl"),
        "clip": clip_summary(task, folder.path / "record.jsonl"),
        "seconds": round(folder.seconds, 1),
        "resumed": folder.resumed,
        "environment": environment,
    }
    if task.drop(untrained, outcome.dense.validation) > 0:
        moved = "lowered" if task.direction == "max" else "raised"
        result["warnings"].append(
            f"training {moved} the {task.metric_name} on the validation split, and so made it worse:"
            f" {untrained:.6g} before, {outcome.dense.validation:.6g} after"
        )
    if not runner.prunable():
        result["warnings"].append(
            "no weight of the network can be pruned: it was quantized and packed only; the reasons"
            " are below"
        )
    if max_drop >= 1 and 0 <= untrained <= 1 and 0 <= outcome.dense.validation <= 1:
        result["warnings"].append(
            f"if the {task.metric_name} is a share of 0..1, the budget of {max_drop:g} allows any"
            f" network; {max_drop:g} points are {max_drop / 100:g}"
        )
    if not result["verified"]:
        raise KarikomiError(
            "the packed file does not give back the network, so it was not published",
            where=str(outcome.chosen.path),
            hint="delete the run folder and run again; if it stays, report it",
        )
    write_bytes(folder.path / "model.karikomi", outcome.chosen.path.read_bytes())
    write_bytes(folder.path / "dense.safetensors", safetensors.numpy.save(outcome.dense.arrays))
    write_json(folder.path / "result.json", result)
    return result


def _search(task: Task, stages: Stages) -> SearchOutcome:
    dense = stages.dense()
    rungs = list(stages.rungs(dense))
    # Without a rung nothing can be pruned, and so no weight shares values either.
    sizes = task.recipe.entries if rungs else ()
    tried: list[Candidate] = []
    passing = [dense, *(rung for rung in rungs if rung.passed)]
    for rung in reversed(passing):
        arrays, shrink = stages.shrunk(rung)
        found = [stages.shared(rung, arrays, k, dense) for k in sizes]
        tried += found
        if not any(item.passed for item in found):
            found = [stages.eight_bits(rung, arrays, dense)]
            tried += found
        if holding := [item for item in found if item.passed]:
            chosen = min(holding, key=lambda value: value.size)
            return SearchOutcome(dense, rungs, rung, shrink, tried, chosen)
    arrays, shrink = stages.shrunk(dense)
    chosen = stages.floats(dense, arrays, dense)
    return SearchOutcome(dense, rungs, dense, shrink, [*tried, chosen], chosen)


def check_share(max_drop: float) -> None:
    """Refuse a budget above 1 for a share, which is points that were meant, or no budget at all."""
    if max_drop > 1:
        raise InvalidArgument(
            "the accuracy is a share of 0..1, and so is its budget",
            where="compress: max_drop",
            got=f"{max_drop:g}",
            allowed="0..1",
            hint=f"{max_drop:g} points are {max_drop / 100:g}; {max_drop:g} as a share would allow"
            " any network",
        )


def _identity(task: Task, data: Data, runner: Runner, max_drop: float, seed: int) -> dict[str, Any]:
    return {
        "karikomi": __version__,
        "task": task.name,
        "data": data.fingerprint(),
        "code": task.fingerprint(),
        "network": runner.fingerprint(),
        "goal": task.direction,
        "classes": [task.class_axis, task.ignore_index],
        "output": task.output,
        "recipe": task.recipe.as_dict(),
        "max_drop": max_drop,
        "seed": seed,
    }


def _remembered(folder: Folder, runner: Runner) -> dict[str, Any]:
    now = runner.environment()
    facts = folder.done("begin")
    if facts is None:
        folder.finish("begin", now)
        facts = now
    changed = sorted(key for key in now if facts.get(key) != now[key])
    if changed:
        tqdm.write(
            f"karikomi: resumed with another {', '.join(changed)}: the bytes may differ from those of "
            "an uninterrupted run",
            file=sys.stderr,
        )
    return {**now, "changed": changed}


def _bar(task: Task, progress: bool) -> tqdm[Any]:
    recipe = task.recipe
    epochs = (
        recipe.train_epochs
        + len(recipe.sparsities) * recipe.prune_epochs
        + len(recipe.entries) * recipe.tune_epochs
    )
    # In a log file a line every ten seconds is enough.
    calm = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=epochs, desc=task.name, unit="epoch", disable=not progress, mininterval=calm)
