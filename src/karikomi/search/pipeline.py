"""From a task, or a trained model, and budgets to a verified small file: search, certify, pack, verify."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from karikomi import registry
from karikomi.errors import InvalidArgument, check
from karikomi.search.compressed import Compressed
from karikomi.search.dense_checks import check_dense
from karikomi.search.driver import Budgets
from karikomi.search.folder import Folder
from karikomi.search.forecast import forecast, said
from karikomi.search.forms_written import wanted_forms
from karikomi.search.presets import Preset, narrowing, preset_named
from karikomi.search.publishing import completed
from karikomi.search.rehearsal import rehearse
from karikomi.search.run_reference import TaskSource
from karikomi.search.search_run import SearchRequest, identity_of
from karikomi.search.trained_model import trained_model
from karikomi.tasks import (
    Task,
    check_seed,
    checked_data,
    configured,
    is_share,
    resolved,
)
from karikomi.tasks.user_code import called


def compress(
    task: Task | str | Any,
    *,
    train: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Any] | str | None = None,
    metric: Callable[[np.ndarray, np.ndarray], float] | str | None = None,
    goal: str | None = None,
    output: str | int | None = None,
    class_axis: int | None = None,
    max_drop: float | None = 0.005,
    max_ms: float | None = None,
    max_macs: float | None = None,
    max_parameters: float | None = None,
    max_bytes: float | None = None,
    preset: str | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    training: bool = True,
    workers: int = 1,
    scheduler: str | None = None,
    reuse: str | Path | None = None,
    take: int | None = None,
    export: str | Iterable[str] | None = None,
    out: str | Path | None = None,
    data: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Make a network as small as the budgets allow, and return the result.

    `task`: a task or its name, whose network is trained first; or a *trained* PyTorch module, with its loaders.
    Of a module the outputs on the validation data are judged by `metric`: ``"accuracy"`` (for whole-number
    targets), ``"mean_squared_error"``, ``"mean_absolute_error"``, or a NumPy function of ``(outputs, targets)`` with
    its `goal`, ``"max"`` or ``"min"``. Data without targets have the module's own outputs as targets, and the
    metric is the mean cosine. `train` is for recovery only; without it, or with ``training=False``, nothing is trained.
    Without `test`, a third of `validation` chooses and the rest judges. `loss`, `output`, `class_axis`: as in
    `kk.tasks.Task`.
    `weights`: name -> array of a trained network for a task, which then is not trained.

    Every choice is made on the validation split. `max_drop`: by how much the metric may get worse than the dense
    network's, absolute and in its own unit (0.005 of an accuracy is half a point), or None; `max_bytes`: of the file;
    `max_parameters`, `max_macs` (of one example): of the network; `max_ms`: of a forward pass on up to 64
    validation examples, by a latency table that is measured once, alone, and kept with the run. The file is made small,
    or where `max_drop` is None the drop, unless `preset` says otherwise: ``"storage"``, ``"cpu"`` (units are removed,
    activations are integers), ``"deep-compression"`` (quantized training), ``"quick"``. A limit on milliseconds,
    multiply-accumulates or parameters lets units be removed (``widths`` of the recipe). A budget that cannot be met
    gives the best network found, ``verdict`` ``"missed"``, the ``binding`` limit and ``nearest_budgets``.

    Then a handful of candidates, from safe to bold, is tested on examples that nothing was chosen on: the result's
    ``certificate`` has the drop there with its upper bound at 95 %, or the reason why there is none. Where none of
    them is certified, or so many examples cannot certify any, ``verdict`` is ``"undecided"``.

    `workers`: processes that evaluate candidates, or with `scheduler` those of a dask cluster; the result does not
    depend on them, times excepted. `take`: the number of a point of the result's ``front``, to have instead of the
    chosen one. `export`: forms of the network beside the packed file, a sequence or a text with commas:
    ``"safetensors"`` (always, unless others are named), ``"pt2"``, ``"onnx"``, ``"int8"`` (ONNX for integer kernels),
    ``"keras"``, or ``"all"``; each is compared with the network, and ``exports`` of the result has the
    differences. `config`: a TOML file, or a mapping, of recipe values (see `Recipe`). `reuse`: the folder of another
    run of this network and data, whose candidates are taken over, for other budgets or a preset that trains alike.
    The result is a dictionary whose values are attributes too, and ``result.model`` is the small network itself.
    `out`: the run folder (default ``runs/<task>``); it holds ``model.karikomi``, ``dense.safetensors``,
    ``README.md`` (a model card), ``result.json``, ``record.jsonl``, the journal and all candidates, and the same call
    continues a run that was stopped at any moment, to the same bytes (same machine, build and thread count).

    Raises `InvalidArgument` for budgets out of range, for a metric function that training lowered while its
    task has no ``goal``, for a trained network that is no better than a guess; `Unsupported` when `out` holds another
    run or one of another format, and `KarikomiError` naming the cause when the task's own code fails.

    >>> import karikomi as kk
    >>> kk.compress("digits", max_drop=-1)
    Traceback (most recent call last):
        ...
    karikomi.errors.InvalidArgument: compress: max_drop must be >= 0; got -1; allowed: >= 0

    Source: the pipeline of Han, Mao and Dally 2016, Deep Compression; gradual pruning after Zhu and Gupta
    2017; the techniques of `kk.torch.quantize_` and `kk.torch.quantized_training` beside it. Deviations: distillation
    while recovering, rANS beside Huffman coding, the search, the certificate.
    """
    chosen = None if preset is None else preset_named(preset)
    budgets = Budgets(
        max_drop=max_drop,
        max_ms=max_ms,
        max_macs=max_macs,
        max_parameters=max_parameters,
        max_bytes=max_bytes,
        objective=_objective(chosen, max_drop),
    )
    check_seed(seed, where="compress")
    loaders = {"train": train, "validation": validation, "test": test, "loss": loss}
    loaders |= {"metric": metric, "goal": goal, "output": output, "class_axis": class_axis}
    if isinstance(task, Task | str):
        _check_no_loaders(loaders)
        plain = resolved(task, data, where="compress")
        trains = training and plain.trains
        if weights is None and plain.weights is not None:
            weights = called(plain.weights, "its weights cannot be had", where=f"task {plain.name}")
    else:
        check("compress", (data is None, "a trained model has its own data", data, "loaders"))
        made = trained_model(task, name=_word(task, out), seed=seed, **loaders)
        plain, weights, trains = made.task, made.weights, training and made.trains
    plain = _with_steps(plain, config, preset, budgets)
    # By name, so that other processes can load it too.
    source = TaskSource(task if isinstance(task, str) else plain, _text(data), _recipe_of(plain))
    request = SearchRequest(
        task=plain,
        source=source,
        content=checked_data(plain),
        budgets=budgets,
        preset=preset,
        weights=None if weights is None else dict(weights),
        trains=trains,
        seed=seed,
        workers=workers,
        scheduler=scheduler,
        reuse=None if reuse is None else Path(reuse),
        take=take,
        progress=progress,
        integers=chosen is not None and chosen.integers,
    )
    path = Path(out) if out is not None else Path("runs") / plain.name
    return _compressed(request, path, export)


def _compressed(
    request: SearchRequest, path: Path, export: str | Iterable[str] | None
) -> Compressed:
    task, content = request.task, request.content
    runner = registry.framework(task.framework).runner_for(task, content, seed=request.seed)
    request = dataclasses.replace(
        request, forms=wanted_forms(runner, export, integers=request.integers)
    )
    if not os.path.exists(path / "run.json"):  # noqa: PTH110  (a folder that cannot be read has none)
        if request.weights is not None:
            check_dense(task, runner, request.weights, content.validation)
        value = rehearse(request)
        if is_share(task.metric_name) and 0 <= value <= 1:
            check_share(request.budgets.max_drop)
        if request.progress and (sentence := said(forecast(request))):
            tqdm.write(f"karikomi: {sentence}", file=sys.stderr)
    with Folder(path, identity_of(request, runner)) as folder:
        return Compressed(completed(request, runner, folder), runner)


def check_share(max_drop: float | None) -> None:
    """Refuse a budget above 1 for a share, which is points that were meant, or no budget at all."""
    if max_drop is not None and max_drop > 1:
        raise InvalidArgument(
            "the accuracy is a share of 0..1, and so is its budget",
            where="compress: max_drop",
            got=f"{max_drop:g}",
            allowed="0..1",
            hint=f"{max_drop:g} points are {max_drop / 100:g}; {max_drop:g} as a share would allow"
            " any network",
        )


def _objective(preset: Preset | None, max_drop: float | None) -> str | None:
    """Return what is made small: what the preset says, else the file, or without a limit on it the drop."""
    if preset is not None:
        return preset.objective
    return "drop" if max_drop is None else "bytes"


def _check_no_loaders(loaders: Mapping[str, Any]) -> None:
    foreign = sorted(name for name, value in loaders.items() if value is not None)
    fault = "a task has its own data, loss and metric"
    check("compress", (not foreign, fault, ", ".join(foreign), "a trained model"))


def _with_steps(
    task: Task,
    config: str | Path | Mapping[str, Any] | None,
    preset: str | None,
    budgets: Budgets,
) -> Task:
    """Return a task with the recipe of the call; a limit on the network itself lets units be removed."""
    task = task if preset is None else preset_named(preset).applied(task, preset)
    task = task if config is None else configured(task, config)
    if not task.recipe.widths and {"ms", "macs", "parameters"} & set(budgets.limits):
        task = narrowing(task)
    if task.classifies:
        check_share(budgets.max_drop)
    return task


def _recipe_of(task: Task) -> dict[str, Any]:
    """Return the recipe as `configured` takes it."""
    return {name: getattr(task.recipe, name) for name in type(task.recipe).__slots__}


def _word(model: object, out: str | Path | None) -> str:
    """Return a name for the task of a model: its folder's, or its class's."""
    name = type(model).__name__ if out is None else Path(out).name
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    return kept.lstrip("._-") or "model"


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
