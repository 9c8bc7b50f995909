"""A trained model and its loaders as a task: what `compress` takes beside tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from karikomi import registry
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.search.certificate import example_ids, partition
from karikomi.tasks import Arrays, Data, Inputs, Split, Task
from karikomi.tasks.metrics import CLASS_AXIS, GOALS, cosine

SEARCHED = 1 / 3
"""The share of the validation examples that choose, where there is no test set and the others judge."""


@dataclass(frozen=True, slots=True)
class Held:
    """A function without arguments that returns data that are at hand."""

    data: Data

    def __call__(self) -> Data:
        """Return them."""
        return self.data


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A task made from a trained model, its weights, and whether there are data to train with."""

    task: Task
    weights: Arrays
    trains: bool
    labelled: bool


def trained_model(
    model: Any,
    *,
    train: Iterable[Any] | None,
    validation: Iterable[Any] | None,
    test: Iterable[Any] | None,
    loss: Callable[[Any, Any], Any] | str | None,
    metric: Callable[[np.ndarray, np.ndarray], float] | str | None,
    goal: str | None,
    output: str | int | None,
    class_axis: int | None,
    name: str,
    seed: int,
) -> TrainedModel:
    """Return a model and its loaders as a task.

    `train`, `validation`, `test`: batches as the framework's loaders give them; examples are put in an order of
    their own, so that a loader that shuffles gives the same data again. Without `test` a third of `validation`,
    stratified, chooses and the rest judges. Without targets the outputs of the model are the targets, and the metric
    is the mean `cosine` to them. Without `train` nothing is trained.

    Raises `InvalidArgument` for a metric function without a goal, data without examples, batches that the model
    does not take; `Unsupported` for a framework whose models cannot be compressed yet.
    """
    framework = registry.framework_of(model)
    where = "compress"
    if not hasattr(framework, "examples"):
        raise Unsupported(
            "trained models of this framework cannot be searched yet",
            where=where,
            got=type(model).__module__.partition(".")[0],
            allowed="a PyTorch module, a Keras model, or a task",
        )
    if validation is None:
        raise InvalidArgument(
            "a trained model needs validation data", where=where, hint="validation=loader"
        )
    given = {"train": train, "validation": validation, "test": test}
    found = {
        key: framework.examples(model, data, where=f"{where}: {key}", own_loss=callable(loss))
        for key, data in given.items()
        if data is not None
    }
    labelled = {key: targets is not None for key, (_, targets) in found.items()}
    if len(set(labelled.values())) > 1:
        raise InvalidArgument(
            "some data have targets and some have none", where=where, got=labelled
        )
    known = labelled["validation"]
    metric = metric if metric is not None else None if known else cosine
    make = framework.copies_of(model)
    draft = _Draft(model, make, loss, metric, goal, output, class_axis, name, seed)
    return draft.trained(found, framework, train is not None, known)


@dataclass(frozen=True, slots=True)
class _Draft:
    model: Any
    make: Callable[[], Any]
    loss: Any
    metric: Any
    goal: str | None
    output: str | int | None
    class_axis: int | None
    name: str
    seed: int

    def trained(
        self,
        found: dict[str, tuple[Inputs, np.ndarray | None]],
        framework: Any,
        trains: bool,
        labelled: bool,
    ) -> TrainedModel:
        sample = self._outputs(found["validation"][0], framework)
        splits = {
            key: self._split(key, inputs, targets, framework)
            for key, (inputs, targets) in found.items()
        }
        stated = self._stated(sample, splits["validation"].targets, framework, labelled)
        metric, loss = stated._kind(sample, splits["validation"].targets)
        data = self._parted(splits)
        task = Task(
            name=self.name,
            model=self.make,
            data=Held(data),
            loss=loss,
            metric=metric,
            goal=stated._goal(metric),
            class_axis=stated._axis(sample, data.validation.targets, metric),
            output=self.output,
            framework=framework.__name__.rpartition(".")[2],
        )
        return TrainedModel(task, framework.to_arrays(self.make()), trains, labelled)

    def _stated(
        self, outputs: np.ndarray, targets: np.ndarray, framework: Any, labelled: bool
    ) -> _Draft:
        """Return the draft with what the model was compiled with, where the framework does and nothing is given."""
        if not hasattr(framework, "compiled_of") or not labelled:
            return self
        if self.metric is not None:
            known = framework.loss_of(self.model)
            return replace(self, loss=known if self.loss is None else self.loss)
        found = framework.compiled_of(self.model, outputs, targets)
        return replace(
            self,
            loss=found.loss if self.loss is None else self.loss,
            metric=found.metric,
            goal=found.goal if self.goal is None else self.goal,
            class_axis=found.class_axis if self.class_axis is None else self.class_axis,
        )

    def _goal(self, metric: Any) -> str | None:
        if metric is cosine:
            return "max"
        if callable(metric) and self.goal is None:
            raise InvalidArgument(
                "a metric function needs its direction",
                where="compress",
                got=getattr(metric, "__name__", repr(metric)),
                allowed='goal="max" for a score, goal="min" for an error',
            )
        return self.goal

    def _kind(self, outputs: np.ndarray, targets: np.ndarray) -> tuple[Any, Any]:
        """Return metric and loss: as given, or what fits the targets."""
        metric = self.metric
        if metric is None:
            whole = targets.dtype.kind in "iub" and outputs.shape[1:] != targets.shape[1:]
            metric = "accuracy" if whole else "mean_squared_error"
        if isinstance(metric, str) and metric not in GOALS:
            raise InvalidArgument(
                "unknown metric",
                where="compress",
                got=metric,
                allowed=f"{list(GOALS)}, or a function",
            )
        fitting = "cross_entropy" if metric == "accuracy" else "mean_squared_error"
        return metric, fitting if self.loss is None else self.loss

    def _axis(self, outputs: np.ndarray, targets: np.ndarray, metric: Any) -> int:
        if self.class_axis is not None:
            return self.class_axis
        shape = outputs.shape[1:]
        without = {1: shape[1:], -1: shape[:-1]}
        fitting = [k for k, left in without.items() if left == targets.shape[1:]]
        return next(iter(fitting if metric == "accuracy" else []), CLASS_AXIS)

    def _split(self, key: str, inputs: Inputs, targets: np.ndarray | None, framework: Any) -> Split:
        """Return the examples in the order of their digests: a loader that shuffles gives the same data again."""
        blank = targets is None
        split = Split(inputs, np.zeros(0) if targets is None else targets)
        arrays = list(split.arrays().values())
        ids = example_ids(arrays if targets is None else [*arrays, targets])
        order = np.argsort(ids, kind="stable")
        if not blank:
            return split.take(order)
        taken = Split(inputs, np.zeros(len(order))).take(order)
        return Split(taken.inputs, self._outputs(taken.inputs, framework))

    def _outputs(self, inputs: Inputs, framework: Any) -> np.ndarray:
        """Return the outputs of the model itself: the targets where there are none."""
        few = Data(*[Split(inputs, np.zeros(len(Split(inputs, np.zeros(0)))))] * 3)
        task = Task(
            name=self.name,
            model=self.make,
            data=Held(few),
            metric=cosine,
            output=self.output,
            framework=framework.__name__.rpartition(".")[2],
        )
        runner = framework.runner_for(task, few, seed=self.seed)
        return runner.outputs(framework.to_arrays(self.make()), inputs)

    def _parted(self, splits: dict[str, Split]) -> Data:
        validation, test = splits["validation"], splits.get("test")
        if test is None:
            n = len(validation)
            search = max(round(SEARCHED * n), 1)
            if n < 2:
                raise InvalidArgument(
                    "one validation example can choose or judge, not both", where="compress", got=n
                )
            whole = validation.targets.dtype.kind in "iub" and validation.targets.ndim == 1
            strata = validation.targets if whole else np.zeros(n)
            counts = {"search": search, "certify": n - search}
            parts = partition(strata, counts, seed=self.seed)
            validation, test = (splits["validation"].take(parts[key]) for key in parts)
        return Data(splits.get("train", validation), validation, test)
