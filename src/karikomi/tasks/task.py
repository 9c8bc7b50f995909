"""A task: model, data, loss and metric, independent of the framework."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from karikomi.clip.by_global_norm import ByGlobalNorm
from karikomi.errors import InvalidArgument, NonFinite, check
from karikomi.rule import Rule
from karikomi.tasks.metrics import (
    CLASS_AXIS,
    GOALS,
    IGNORED,
    accuracy,
    mean_absolute_error,
    mean_squared_error,
    predictions,
)
from karikomi.tasks.splits import Data, Split, as_array, blocks, mapped_inputs
from karikomi.tasks.user_code import called


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a task is trained and compressed; every number can be overridden in a TOML file.

    `widths`: shares of the units that stay, falling, each with up to `prune_epochs` of recovery; none by default.
    `units`: of each layer but the last, the units that stay before quantized training; all by default.
    `sparsities`: the ladder that pruning climbs while `validation` holds. `entries`: codebook sizes that quantization
    tries (non-zero centroids per tensor). `rates`: bits per number of an entropy coder, falling, to which `method` (a
    registered quantizer) rounds without training. `learned`: likewise bits per weight of the dense network, to which
    it is trained for `learned_epochs` at `learned_rate`; none by default. `distill`: the weight of the dense
    network's outputs in the loss while recovering, 0..1, at `temperature`; only for cross-entropy. `threads`: for
    training, 0 meaning as many as the framework takes; very small networks are fastest with one.
    """

    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    train_epochs: int = 20
    prune_epochs: int = 10
    tune_epochs: int = 4
    widths: tuple[float, ...] = ()
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    entries: tuple[int, ...] = (32, 16, 8)
    units: tuple[int, ...] = ()
    rates: tuple[float, ...] = (6.0, 4.0, 3.0, 2.5, 2.0, 1.6, 1.3)
    method: str = "gptq"
    learned: tuple[float, ...] = ()
    learned_epochs: int = 20
    learned_rate: float = 1e-3
    learned_bits: int = 4
    distill: float = 0.5
    temperature: float = 2.0
    threads: int = 0
    clip: Rule = field(default_factory=lambda: ByGlobalNorm(1.0))

    def __post_init__(self) -> None:
        for name in ("batch_size", "train_epochs", "prune_epochs", "tune_epochs", "learned_epochs"):
            value = getattr(self, name)
            check("Recipe", (value >= 1, f"{name} must be >= 1", value, None))
        ladder, sizes = self.sparsities, self.entries
        rate, decay, heat = self.learning_rate, self.weight_decay, self.temperature
        shares = all(0 <= value < 1 for value in ladder)
        codebooks = sizes and min(sizes) >= 1 and max(sizes) <= 65_535
        narrower = _fall(self.widths) and all(0 < width < 1 for width in self.widths)
        fewer = _fall(self.rates) and all(0 < bits <= _MOST_RATE for bits in self.rates)
        least = _fall(self.learned) and all(0 < bits <= _MOST_RATE for bits in self.learned)
        step = self.learned_rate
        climbs = list(ladder) == sorted(set(ladder))
        check(
            "Recipe",
            (0 < rate < math.inf, "learning_rate out of range", rate, "> 0, finite"),
            (0 <= decay < math.inf, "weight_decay out of range", decay, ">= 0, finite"),
            (0 < heat < math.inf, "temperature out of range", heat, "> 0, finite"),
            (0 <= self.distill <= 1, "distill out of range", self.distill, "0..1"),
            (narrower, "widths are shares that fall", self.widths, "0 < width < 1, falling"),
            (fewer, "rates are bits per number that fall", self.rates, "0 < bits <= 16, falling"),
            (least, "learned are bits per weight that fall", self.learned, "0 < bits <= 16"),
            (0 < step < math.inf, "learned_rate out of range", step, "> 0, finite"),
            (2 <= self.learned_bits <= 8, "learned_bits out of range", self.learned_bits, "2..8"),
            (all(n >= 1 for n in self.units), "units are numbers of units", self.units, ">= 1"),
            (self.threads >= 0, "threads out of range", self.threads, ">= 0"),
            (climbs, "the ladder of sparsities must rise", ladder, None),
            (shares, "a sparsity is the share of pruned weights", ladder, "0 <= sparsity < 1"),
            (codebooks, "entries out of range", sizes, "1..65535"),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values; the rule as the call that makes it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "clip": repr(self.clip)}


_MOST_RATE = 16.0


def _fall(numbers: tuple[float, ...]) -> bool:
    return list(numbers) == sorted(set(numbers), reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model factory, data, a loss and a metric.

    `model`: a function without arguments that returns a fresh model of `framework`, or the name of a
    built-in network. `data`: a function that returns `Data`. `loss`: ``"cross_entropy"``,
    ``"mean_squared_error"``, or a function of the framework's ``(outputs, targets)``. `metric`:
    ``"accuracy"``, ``"mean_squared_error"``, ``"mean_absolute_error"``, or a NumPy function
    ``(outputs, targets) -> float``.
    `goal`: ``"max"`` where a higher metric is better, ``"min"`` for an error; known for the built-in
    metrics, and ``"max"`` for a function unless given. `augment`: ``(inputs, generator) -> inputs`` on
    NumPy batches of the training split.

    `class_axis`: the axis of the classes in the outputs, 1 as in torch's ``cross_entropy``; -1 for
    sequences (n, steps, classes). `ignore_index`: the target that does not count. Both hold for the
    built-in loss, distillation, the accuracy and the audit; a loss function has its own, which must
    agree. `output`: the entry that metric, built-in loss and audit take of a network that returns
    several, by key, attribute or place; by default ``logits`` where there is one. A loss function is given all.
    `weights`: a function that returns name -> array of a trained network, which `compress` then does not train.
    `words`: the text of each token by its number, for the pages of an audit.
    `trains`: False where there are no data to train with; its training split then is for calibration alone.
    `command`: the words by which the command line has the task, for the line that reproduces a run.
    `presets`: preset of `compress` -> values of the recipe that it has for this task.

    Raises `InvalidArgument` for names, goals and axes out of range.

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
    goal: str | None = None
    class_axis: int = CLASS_AXIS
    ignore_index: int = IGNORED
    output: str | int | None = None
    weights: Callable[[], Mapping[str, np.ndarray]] | None = None
    words: Sequence[str] | None = None
    trains: bool = True
    command: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def text_of(self, tokens: np.ndarray) -> list[str] | None:
        """Return the words of tokens, the number itself where it has none; None for a task without `words`."""
        if self.words is None:
            return None
        known = range(len(self.words))
        return [str(self.words[n]) if n in known else str(n) for n in tokens.reshape(-1).tolist()]

    def __post_init__(self) -> None:
        good = isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name)
        what, allowed = (
            "a task's name is a word that can name a folder",
            "letters, digits, '.', '_', '-'",
        )
        check("Task", (good, what, repr(self.name), allowed))
        known = isinstance(self.recipe, Recipe)
        what = "the recipe is not a kk.tasks.Recipe"
        axis, label = self.class_axis, self.ignore_index
        goal, better = self.goal, GOALS.get(self._built_in or "")
        whole = type(axis) is int and axis != 0
        goals = better or "max, or min"
        check(
            f"task {self.name}",
            (known, what, repr(self.recipe), None),
            (goal in (None, better or "max", better or "min"), "unknown goal", repr(goal), goals),
            (whole, "the class axis is a whole number; axis 0 is the examples", repr(axis), "!= 0"),
            (type(label) is int, "ignore_index is a whole number", repr(label), None),
        )

    def fingerprint(self) -> str:
        """Return a digest of the code that the task names, so that a run never mixes two versions."""
        parts = (self.model, self.data, self.loss, self.metric, self.augment)
        return hashlib.sha256("\0".join(map(source_of, parts)).encode()).hexdigest()[:16]

    @property
    def metric_name(self) -> str:
        """The metric's name for tables."""
        name = self._built_in or (
            self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "")
        )
        return "metric" if name in ("", "<lambda>") else name

    @property
    def classifies(self) -> bool:
        """Whether the metric is the built-in accuracy, which has predictions to compare."""
        return self._built_in == "accuracy"

    @property
    def error(self) -> str | None:
        """The name of the metric where it is a built-in error, whose mean over examples is the metric."""
        return self._built_in if self._built_in in _ERRORS else None

    @property
    def direction(self) -> str:
        """``"max"`` if a higher metric is better, else ``"min"``."""
        return self.goal or GOALS.get(self._built_in or "", "max")

    @property
    def assumes_goal(self) -> bool:
        """Whether the direction is the default, because the metric is a function without a `goal`."""
        return self.goal is None and self._built_in is None

    def drop(self, before: float, after: float) -> float:
        """Return by how much the metric got worse, in its own direction; negative where it got better.

        >>> Task(name="t", model=dict, data=dict, metric="mean_squared_error").drop(0.25, 0.75)
        0.5
        """
        return before - after if self.direction == "max" else after - before

    def check_direction(self, before: float, after: float, split: str) -> None:
        """Raise `InvalidArgument` where a metric whose goal is only assumed fell by training."""
        if self.assumes_goal and self.drop(before, after) > 0:
            raise InvalidArgument(
                f"training lowered the {self.metric_name} on the {split} split, and the task does not"
                " state whether lower or higher is better",
                where=f"task {self.name}",
                got=f"{before:.6g} before, {after:.6g} after",
                allowed='goal="min" for an error, goal="max" for a score',
            )

    def judge(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Return the metric of a model's outputs.

        Raises `InvalidArgument` for outputs and targets that do not fit a built-in metric, and `NonFinite`.
        """
        where, metric = f"task {self.name}", self.metric
        if self._built_in == "accuracy":
            axis, label = self.class_axis, self.ignore_index
            return accuracy(outputs, targets, class_axis=axis, ignore_index=label, where=where)
        if self._built_in is not None:
            value = _ERRORS[self._built_in](outputs, targets, where=where)
        elif isinstance(metric, str):
            allowed = f"{', '.join(map(repr, GOALS))} or a function of (outputs, targets)"
            raise InvalidArgument("unknown metric", where=where, got=metric, allowed=allowed)
        else:
            value = called(
                lambda: float(metric(outputs, targets)), "the task's metric failed", where=where
            )
        if not math.isfinite(value):
            raise NonFinite("the metric is not finite", where=where, got=value)
        return value

    def predictions(
        self, outputs: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the predicted classes, and which targets count, as loss and accuracy have them."""
        axis, label, where = self.class_axis, self.ignore_index, f"task {self.name}"
        return predictions(outputs, targets, class_axis=axis, ignore_index=label, where=where)

    @property
    def _built_in(self) -> str | None:
        if isinstance(self.metric, str):
            return self.metric if self.metric in GOALS else None
        functions = {"accuracy": accuracy, **_ERRORS}
        return next((name for name, known in functions.items() if known is self.metric), None)


_ERRORS: dict[str, Callable[..., float]] = {
    "mean_squared_error": mean_squared_error,
    "mean_absolute_error": mean_absolute_error,
}


def source_of(thing: object) -> str:
    """Return the source of a function or class, or its name where there is none; a change of code changes it."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    if thing is None or isinstance(thing, str):
        return repr(thing)
    try:
        if thing not in _SOURCES:
            # Of a class Python parses the whole file, which takes a tenth of a second.
            _SOURCES[thing] = inspect.getsource(thing)  # type: ignore[arg-type]
        return _SOURCES[thing]
    except (OSError, TypeError):
        return getattr(thing, "__qualname__", type(thing).__qualname__)


_SOURCES: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


def checked_data(task: Task) -> Data:
    """Return the task's data after checking it; a task that raises is named as the cause."""
    where = f"task {task.name}"
    given = called(task.data, "the task's data function failed", where=where)
    known, kind = isinstance(given, Data), type(given).__name__
    check(where, (known, "data() must return kk.tasks.Data", kind, None))
    splits = [_checked(getattr(given, name), name, task) for name in _SPLITS]
    further = None if given.certify is None else _checked(given.certify, "certify", task)
    return Data(splits[0], splits[1], splits[2], further)


_SPLITS = ("train", "validation", "test")


def _checked(split: object, name: str, task: Task) -> Split:
    where = f"task {task.name}"
    if not isinstance(split, Split):
        raise InvalidArgument(
            f"the {name} split is no kk.tasks.Split of arrays",
            where=where,
            got=type(split).__name__,
            hint="gather a loader or a stream: kk.tasks.Split.of(loader)",
        )
    made = called(
        lambda: Split(
            mapped_inputs(split.inputs, lambda value: _array(value, name, where)),
            _array(split.targets, name, where),
        ),
        f"the {name} split cannot be read as arrays",
        where=where,
    )
    for label, array in {**made.arrays(), "targets": made.targets}.items():
        good = isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.ndim > 0
        if not good:
            raise InvalidArgument(
                f"the {name} {label} are not an array of numbers",
                where=where,
                got=f"{type(array).__name__} {getattr(array, 'dtype', '')}".strip(),
                allowed="kk.tasks.Split of NumPy arrays of numbers",
                hint=_numbers_hint(array),
            )
    lengths = {len(array) for array in (*made.arrays().values(), made.targets)}
    counted = f"{sorted(lengths)} inputs and targets"
    check(
        where, (lengths == {len(made)} - {0}, f"the {name} split is empty or uneven", counted, None)
    )
    for label, array in made.arrays().items():
        finite = array.dtype.kind != "f" or all(np.isfinite(part).all() for part in blocks(array))
        check(where, (finite, f"the {name} {label} have non-finite entries", None, None))
    return made


def _numbers_hint(array: Any) -> str:
    if getattr(array, "dtype", None) is not None and array.dtype.kind in "UTSO":
        return "class names become numbers by np.unique(names, return_inverse=True)[1]"
    return (
        "without labels the outputs of the dense network can be the targets"
        if array is None
        else ""
    )


def _array(value: Any, name: str, where: str) -> Any:
    """Return a tensor, or what else has an array form, as an array; anything else unchanged."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__array__"):
        return value
    return as_array(value, where=f"{where}: the {name} split")
