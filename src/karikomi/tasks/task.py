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
from karikomi.errors import InvalidArgument, KarikomiError, NonFinite
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
        for name in ("learning_rate", "weight_decay", "distill", "temperature"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise InvalidArgument(
                    f"{name} must be finite and >= 0", where="Recipe", got=getattr(self, name)
                )
        for name in ("batch_size", "train_epochs", "prune_epochs", "tune_epochs"):
            if getattr(self, name) < 1:
                raise InvalidArgument(
                    f"{name} must be >= 1", where="Recipe", got=getattr(self, name)
                )
        if self.threads < 0:
            raise InvalidArgument("threads must be >= 0", where="Recipe", got=self.threads)
        for value in self.sparsities:
            if not 0 <= value < 1:
                raise InvalidArgument(
                    "a sparsity is the share of pruned weights",
                    where="Recipe.sparsities",
                    got=value,
                    allowed="0 <= sparsity < 1",
                )
        if not self.sparsities or list(self.sparsities) != sorted(set(self.sparsities)):
            raise InvalidArgument(
                "the ladder must rise", where="Recipe.sparsities", got=self.sparsities
            )
        if not self.entries or min(self.entries) < 1 or max(self.entries) > 65_535:
            raise InvalidArgument(
                "codebook sizes", where="Recipe.entries", got=self.entries, allowed="1..65535"
            )
        if not self.learning_rate > 0 or not 0 <= self.distill <= 1 or not self.temperature > 0:
            raise InvalidArgument(
                "out of range",
                where="Recipe",
                got=f"learning_rate={self.learning_rate}, distill={self.distill}, "
                f"temperature={self.temperature}",
                allowed="learning_rate > 0, 0 <= distill <= 1, temperature > 0",
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
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise InvalidArgument(
                "a task's name is a word that can name a folder",
                where="Task",
                got=repr(self.name),
                allowed="letters, digits, '.', '_', '-'",
            )
        if not isinstance(self.recipe, Recipe):
            raise InvalidArgument(
                "the recipe is not a kk.tasks.Recipe",
                where=f"task {self.name}",
                got=repr(self.recipe),
            )

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
            raise InvalidArgument(
                "unknown metric",
                where=self.name,
                got=self.metric,
                allowed="'accuracy' or a function of (outputs, targets)",
            )
        try:
            value = float(self.metric(outputs, targets))
        except Exception as error:
            raise KarikomiError(
                "the task's metric failed",
                where=f"task {self.name}",
                got=f"{type(error).__name__}: {error}",
            ) from error
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
    try:
        data = task.data()
    except KarikomiError:
        raise
    except Exception as error:
        raise KarikomiError(
            "the task's data function failed",
            where=f"task {task.name}",
            got=f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(data, Data):
        raise InvalidArgument(
            "data() must return kk.tasks.Data", where=f"task {task.name}", got=type(data).__name__
        )
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        _check_split(split, name, task)
        if len(split.inputs) != len(split.targets) or len(split.inputs) == 0:
            raise InvalidArgument(
                f"the {name} split is empty or uneven",
                where=f"task {task.name}",
                got=f"{len(split.inputs)} inputs, {len(split.targets)} targets",
            )
        if not np.all(np.isfinite(split.inputs)):
            raise InvalidArgument(
                f"the {name} inputs have non-finite entries", where=f"task {task.name}"
            )
    return data


def _check_split(split: object, name: str, task: Task) -> None:
    arrays = (split.inputs, split.targets) if isinstance(split, Split) else (None, None)
    for what, array in zip(("inputs", "targets"), arrays, strict=True):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim == 0:
            raise InvalidArgument(
                f"the {name} {what} are not an array of numbers",
                where=f"task {task.name}",
                got=f"{type(array).__name__} {getattr(array, 'dtype', '')}".strip(),
                allowed="kk.tasks.Split of two NumPy arrays",
            )
