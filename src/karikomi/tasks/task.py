"""A task: model, data, loss and metric, independent of the framework."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from karikomi.clip.by_global_norm import ByGlobalNorm
from karikomi.errors import InvalidArgument, KarikomiError, NonFinite, check
from karikomi.rule import Rule


@dataclass(frozen=True, slots=True)
class Split:
    """Inputs of shape (n, ...) and targets of shape (n, ...), NumPy arrays of the same length."""

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: np.ndarray) -> Split:
        """Return the examples at `index`."""
        return Split(self.inputs[index], self.targets[index])


@dataclass(frozen=True, slots=True)
class Data:
    """`train` is for training, `validation` for decisions, `test` for measurement only."""

    train: Split
    validation: Split
    test: Split

    def fingerprint(self) -> str:
        """Return a digest of all arrays, so that a run is never resumed on other data."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for array in (split.inputs, split.targets):
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a task is trained and compressed; every number can be overridden in a TOML file.

    `sparsities`: the ladder that pruning climbs while `validation` holds. `entries`: codebook sizes
    that quantization tries (non-zero centroids per tensor). `distill`: the weight of the dense network's
    outputs in the loss while recovering, 0..1, at `temperature`; only for cross-entropy. `threads`: for
    training, 0 meaning as many as the framework takes; very small networks are fastest with one.
    """

    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    train_epochs: int = 20
    prune_epochs: int = 10
    tune_epochs: int = 4
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    entries: tuple[int, ...] = (32, 16, 8)
    distill: float = 0.5
    temperature: float = 2.0
    threads: int = 0
    clip: Rule = field(default_factory=lambda: ByGlobalNorm(1.0))

    def __post_init__(self) -> None:
        for name in ("batch_size", "train_epochs", "prune_epochs", "tune_epochs"):
            value = getattr(self, name)
            check("Recipe", (value >= 1, f"{name} must be >= 1", value, None))
        ladder, sizes = self.sparsities, self.entries
        rate, decay, heat = self.learning_rate, self.weight_decay, self.temperature
        shares = all(0 <= value < 1 for value in ladder)
        codebooks = sizes and min(sizes) >= 1 and max(sizes) <= 65_535
        climbs = ladder and list(ladder) == sorted(set(ladder))
        check(
            "Recipe",
            (0 < rate < math.inf, "learning_rate out of range", rate, "> 0, finite"),
            (0 <= decay < math.inf, "weight_decay out of range", decay, ">= 0, finite"),
            (0 < heat < math.inf, "temperature out of range", heat, "> 0, finite"),
            (0 <= self.distill <= 1, "distill out of range", self.distill, "0..1"),
            (self.threads >= 0, "threads out of range", self.threads, ">= 0"),
            (climbs, "the ladder of sparsities must rise", ladder, None),
            (shares, "a sparsity is the share of pruned weights", ladder, "0 <= sparsity < 1"),
            (codebooks, "entries out of range", sizes, "1..65535"),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values; the rule as the call that makes it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "clip": repr(self.clip)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model factory, data, a loss and a metric.

    `model`: a function without arguments that returns a fresh model of `framework`, or the name of a
    built-in network. `data`: a function that returns `Data`. `loss`: ``"cross_entropy"``,
    ``"mean_squared_error"``, or a function of the framework's ``(outputs, targets)``. `metric`:
    ``"accuracy"``, or a NumPy function ``(outputs, targets) -> float``; higher is better.
    `augment`: ``(inputs, generator) -> inputs`` on NumPy batches of the training split.

    >>> import numpy as np, karikomi as kk
    >>> task = kk.tasks.load("digits")
    >>> task.name, task.data().train.inputs.shape[1:]
    ('digits', (64,))
    """

    name: str
    model: Callable[[], Any] | str
    data: Callable[[], Data]
    loss: Callable[[Any, Any], Any] | str = "cross_entropy"
    metric: Callable[[np.ndarray, np.ndarray], float] | str = "accuracy"
    framework: str = "torch"
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None
    recipe: Recipe = field(default_factory=Recipe)
    about: str = ""

    def __post_init__(self) -> None:
        good = isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name)
        what, allowed = (
            "a task's name is a word that can name a folder",
            "letters, digits, '.', '_', '-'",
        )
        check("Task", (good, what, repr(self.name), allowed))
        known = isinstance(self.recipe, Recipe)
        what = "the recipe is not a kk.tasks.Recipe"
        check(f"task {self.name}", (known, what, repr(self.recipe), None))

    def fingerprint(self) -> str:
        """Return a digest of the code that the task names, so that a run never mixes two versions."""
        parts = (self.model, self.data, self.loss, self.metric, self.augment)
        return hashlib.sha256("\0".join(map(source_of, parts)).encode()).hexdigest()[:16]

    @property
    def metric_name(self) -> str:
        """The metric's name for tables."""
        if isinstance(self.metric, str):
            return self.metric
        return getattr(self.metric, "__name__", "metric")

    def judge(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Return the metric of a model's outputs; higher is better."""
        if self.metric == "accuracy":
            self._check_classes(outputs, targets)
            return accuracy(outputs, targets)
        if isinstance(self.metric, str):
            allowed = "'accuracy' or a function of (outputs, targets)"
            raise InvalidArgument(
                "unknown metric", where=self.name, got=self.metric, allowed=allowed
            )
        metric = self.metric
        value = _called(lambda: float(metric(outputs, targets)), self, "metric")
        if not math.isfinite(value):
            raise NonFinite("the metric is not finite", where=f"task {self.name}", got=value)
        return value

    def _check_classes(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        if targets.dtype.kind not in "iu" or outputs.ndim != targets.ndim + 1:
            raise InvalidArgument(
                "accuracy needs integer classes, and one output per class",
                where=f"task {self.name}",
                got=f"targets {targets.dtype} {targets.shape}, outputs {outputs.shape}",
                hint="give the task a metric of its own: metric=function",
            )


def source_of(thing: object) -> str:
    """Return the source of a function or class, or its name where there is none; a change of code changes it."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    if thing is None or isinstance(thing, str):
        return repr(thing)
    try:
        return inspect.getsource(thing)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return getattr(thing, "__qualname__", type(thing).__qualname__)


def accuracy(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of examples whose largest output is the target class."""
    return float(np.mean(np.argmax(outputs, axis=-1) == targets))


def checked_data(task: Task) -> Data:
    """Return the task's data after checking it; a task that raises is named as the cause."""
    data = _called(task.data, task, "data function")
    where, kind = f"task {task.name}", type(data).__name__
    check(where, (isinstance(data, Data), "data() must return kk.tasks.Data", kind, None))
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        _check_split(split, name, task)
        inputs, targets = len(split.inputs), len(split.targets)
        lengths, finite = f"{inputs} inputs, {targets} targets", np.isfinite(split.inputs).all()
        check(
            where,
            (inputs == targets > 0, f"the {name} split is empty or uneven", lengths, None),
            (finite, f"the {name} inputs have non-finite entries", None, None),
        )
    return data


def _called(function: Callable[[], Any], task: Task, what: str) -> Any:
    try:
        return function()
    except KarikomiError:
        raise
    except Exception as error:
        raise KarikomiError(
            f"the task's {what} failed",
            where=f"task {task.name}",
            got=f"{type(error).__name__}: {error}",
        ) from error


def _check_split(split: object, name: str, task: Task) -> None:
    arrays = (split.inputs, split.targets) if isinstance(split, Split) else (None, None)
    for what, array in zip(("inputs", "targets"), arrays, strict=True):
        good = isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.ndim > 0
        fault = f"the {name} {what} are not an array of numbers"
        got = f"{type(array).__name__} {getattr(array, 'dtype', '')}".strip()
        check(f"task {task.name}", (good, fault, got, "kk.tasks.Split of two NumPy arrays"))
