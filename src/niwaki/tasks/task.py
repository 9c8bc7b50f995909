"""What to train and how to judge it, without a word about the framework that does it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from niwaki.clip.by_global_norm import ByGlobalNorm
from niwaki.errors import InvalidArgument, NiwakiError
from niwaki.rule import Rule


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
    """`train` is learnt from, `validation` decides, `test` only measures."""

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
            if getattr(self, name) < 1:
                raise InvalidArgument(
                    f"{name} must be >= 1", where="Recipe", got=getattr(self, name)
                )
        if self.threads < 0:
            raise InvalidArgument("threads must be >= 0", where="Recipe", got=self.threads)
        for value in self.sparsities:
            if not 0 <= value < 1:
                raise InvalidArgument(
                    "a sparsity is the share of weights that go",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model factory, data, a loss and a metric.

    `model`: a function without arguments that returns a fresh model of `framework`, or the name of a
    built-in network. `data`: a function that returns `Data`. `loss`: ``"cross_entropy"``,
    ``"mean_squared_error"``, or a function of the framework's ``(outputs, targets)``. `metric`:
    ``"accuracy"``, or a NumPy function ``(outputs, targets) -> float``; higher is better.
    `augment`: ``(inputs, generator) -> inputs`` on NumPy batches of the training split.

    >>> import numpy as np, niwaki as nw
    >>> task = nw.tasks.load("digits")
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

    @property
    def metric_name(self) -> str:
        """The metric's name for tables."""
        if isinstance(self.metric, str):
            return self.metric
        return getattr(self.metric, "__name__", "metric")

    def judge(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Return the metric of a model's outputs; higher is better."""
        if self.metric == "accuracy":
            return accuracy(outputs, targets)
        if isinstance(self.metric, str):
            raise InvalidArgument(
                "unknown metric",
                where=self.name,
                got=self.metric,
                allowed="'accuracy' or a function of (outputs, targets)",
            )
        return float(self.metric(outputs, targets))


def accuracy(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of examples whose largest output is the target class."""
    return float(np.mean(np.argmax(outputs, axis=-1) == targets))


def checked_data(task: Task) -> Data:
    """Return the task's data after checking it; a task that raises is named as the cause."""
    try:
        data = task.data()
    except NiwakiError:
        raise
    except Exception as error:
        raise NiwakiError(
            "the task's data function failed",
            where=f"task {task.name}",
            got=f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(data, Data):
        raise InvalidArgument(
            "data() must return nw.tasks.Data", where=f"task {task.name}", got=type(data).__name__
        )
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
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
