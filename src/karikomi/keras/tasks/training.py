"""The training of the search on Keras: seeded, one batch at a time, resumable after every epoch, on every backend."""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from karikomi.clip.by_global_norm import ByGlobalNorm
from karikomi.errors import Unsupported
from karikomi.keras.arrays.variables import names_of, on_host
from karikomi.keras.layers.arrays import fill_, to_arrays
from karikomi.keras.optimizers.clipping_optimizer import clipped
from karikomi.keras.pruning.in_place import prune_
from karikomi.keras.pruning.masks import Masks
from karikomi.keras.tasks.distilled_loss import DistilledLoss, joined
from karikomi.prune import Gradual
from karikomi.quantize import Codebook, Coded
from karikomi.record import Recorder
from karikomi.tasks.runner import Arrays, Phase
from karikomi.tasks.splits import Data
from karikomi.tasks.task import Task
from karikomi.tasks.user_code import called


class Trainer:
    """A compiled model of one form with its optimizer, used by one training after another: compiling takes seconds."""

    def __init__(self, model: Any, phase: Phase, loss: Any) -> None:
        self.model, self.loss, self.optimizer = model, loss, _optimizer(phase)
        model.compile(optimizer=self.optimizer, loss=loss)
        self.optimizer.build(model.trainable_variables)
        self._start = [np.array(on_host(variable)) for variable in self.optimizer.variables]
        self._user: weakref.ReferenceType[Any] | None = None

    @property
    def free(self) -> bool:
        """Whether no training that is still there uses it."""
        return self._user is None or self._user() is None

    def begin(self, training: Any, arrays: Arrays) -> None:
        """Give a training the model with these arrays, and the optimizer as it was at first."""
        self._user = weakref.ref(training)
        fill_(self.model, arrays)
        for variable, value in zip(self.optimizer.variables, self._start, strict=True):
            variable.assign(value)


def trainer_key(phase: Phase) -> str:
    """Return what the compiled step of a phase depends on, beside the form of the model."""
    return f"{phase.clip!r} {phase.bound!r} {phase.weight_decay} {phase.teacher is not None}"


class KerasTraining:
    """One `Phase` on one model; data order is drawn from (seed, stage, epoch).

    Clipping, masks and shared weights hold after every batch. Where the loss is a `DistilledLoss`, the outputs of the
    teacher stand beside the targets.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        trainer: Trainer,
        arrays: Arrays,
        phase: Phase,
        seed: int,
        *,
        outputs: Callable[[Arrays, Any], np.ndarray],
    ) -> None:
        if phase.learned is not None:
            raise Unsupported(
                "Keras models are not trained quantized in the search", where=f"task {task.name}"
            )
        self._task, self._data, self._phase, self._seed = task, data, phase, seed
        trainer.begin(self, arrays)
        self._trainer, self._outputs = trainer, outputs
        self._targets = data.train.targets
        if isinstance(trainer.loss, DistilledLoss) and phase.teacher is not None:
            self._targets = joined(outputs(phase.teacher, data.train.inputs), self._targets)
        self._model, self._optimizer = trainer.model, trainer.optimizer
        self._epoch = self._step = 0
        self._size = min(task.recipe.batch_size, len(data.train))
        self._batches = max(len(data.train) // self._size, 1)
        self._steps = self._batches * phase.epochs
        self._schedule = _schedule(phase, self._steps)
        self._masks = Masks(phase.masks) if phase.masks else Masks()
        self._shared = {name: _Shared(coded) for name, coded in (phase.coded or {}).items()}
        self._hold()

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self._epoch

    def run_epoch(self, recorder: Recorder) -> None:
        """Train one epoch; write a row per step, and one for the epoch with the validation metric."""
        generator = np.random.default_rng(
            [self._seed, zlib.crc32(self._phase.stage.encode()), self._epoch]
        )
        order, losses = generator.permutation(len(self._data.train)), []
        with self._noise_of(generator):
            for number in range(self._batches):
                places = order[number * self._size : (number + 1) * self._size]
                inputs = self._data.train.take(places).inputs
                losses.append(self._stepped(inputs, self._targets[places], recorder))
        validation = self._data.validation
        found = self._outputs(self.arrays(), validation.inputs)
        metric = self._task.judge(found, validation.targets)
        row = {"event": "epoch", "step": self._step, **self._facts(float(np.mean(losses)))}
        recorder.write({**row, "validation": metric})
        self._epoch += 1

    def _stepped(self, inputs: Any, targets: Any, recorder: Recorder) -> float:
        self._prune()
        done = min(self._step / max(self._steps, 1), 1.0)
        self._optimizer.learning_rate = (
            self._phase.learning_rate * (1 + math.cos(math.pi * done)) / 2
        )
        self._model.reset_metrics()
        given = list(inputs) if isinstance(inputs, tuple) else inputs
        what, where = "the model or its loss failed on a training batch", f"task {self._task.name}"
        found = called(
            lambda: self._model.train_on_batch(given, targets, return_dict=True), what, where=where
        )
        loss = float(found["loss"])
        self._step += 1
        self._hold()
        self._optimizer.check()
        recorder.step(self._step, self._optimizer.last, self._facts(loss))
        return loss

    def arrays(self) -> Arrays:
        """Return the model's arrays as they are now."""
        return to_arrays(self._model)

    def masks(self) -> Arrays:
        """Return name -> kept entries, boolean."""
        return {name: mask.copy() for name, mask in self._masks.items()}

    def coded(self) -> dict[str, Coded]:
        """Return the tensors with shared weights, and their centroids as trained so far."""
        return {name: shared.coded for name, shared in self._shared.items()}

    def checkpoint(self) -> tuple[Arrays, dict[str, Any]]:
        """Return arrays and facts that `restore` continues from."""
        arrays = {f"model/{name}": array for name, array in self.arrays().items()}
        arrays |= {f"mask/{name}": mask for name, mask in self.masks().items()}
        for place, variable in enumerate(self._optimizer.variables):
            arrays[f"optimizer/{place}"] = np.array(on_host(variable), order="C")
        for name, shared in self._shared.items():
            arrays[f"values/{name}"] = shared.values
        return arrays, {"epoch": self._epoch, "step": self._step}

    def restore(self, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        parts: dict[str, dict[str, np.ndarray]] = {
            kind: {} for kind in ("model", "mask", "optimizer", "values")
        }
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = array
        fill_(self._model, parts["model"])
        for place, variable in enumerate(self._optimizer.variables):
            variable.assign(parts["optimizer"][str(place)])
        self._masks = Masks(parts["mask"])
        for name, values in parts["values"].items():
            self._shared[name].values = values
        self._epoch, self._step = int(facts["epoch"]), int(facts["step"])

    def _prune(self) -> None:
        schedule = self._schedule
        if schedule is not None and schedule.due(self._step + 1):
            sparsity = schedule.sparsity_at(self._step + 1)
            self._masks = prune_(self._model, sparsity, masks=self._masks)

    def _hold(self) -> None:
        """Set what is masked to zero, and weights that share a value to one value."""
        if self._masks:
            self._masks.apply_(self._model)
        if self._shared:
            named = dict(_named(self._model))
            for name, shared in self._shared.items():
                named[name].assign(shared.settled(on_host(named[name])))

    @contextmanager
    def _noise_of(self, generator: np.random.Generator) -> Iterator[None]:
        """Let dropout and other noise of an epoch depend on the epoch alone, so that it can be repeated."""
        for variable in self._model.variables:
            if variable.name == "seed_generator_state":
                drawn = generator.integers(0, 2**31, tuple(variable.shape))
                variable.assign(drawn.astype(keras.backend.standardize_dtype(variable.dtype)))
        if keras.config.backend() != "torch":
            yield
            return
        import torch

        # On torch, layers without a seed draw from its own generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator.integers(2**62)))
            yield

    def _facts(self, loss: float) -> dict[str, Any]:
        place = {"stage": self._phase.stage, "epoch": self._epoch}
        return {**place, "loss": loss, "sparsity": self._masks.sparsity if self._masks else 0.0}


class _Shared:
    """A tensor whose entries share values: after each step a value is the mean of its entries.

    For plain gradient descent that is the step of Han, Mao and Dally 2016, section 3.3, divided by the number of
    entries; code 0 stays exactly zero.
    """

    def __init__(self, coded: Coded) -> None:
        if not isinstance(coded.grid, Codebook):
            raise TypeError("only codebooks are shared")
        self._codes = coded.codes.astype(np.int64)
        self._counts = np.bincount(self._codes.ravel(), minlength=coded.grid.values.size)
        self._narrow, self.values = coded.codes.dtype, coded.grid.values.copy()

    def settled(self, array: np.ndarray) -> np.ndarray:
        sums = np.bincount(
            self._codes.ravel(), array.astype(np.float64).ravel(), minlength=self.values.size
        )
        means = sums / np.maximum(self._counts, 1)
        self.values = np.where(self._counts > 0, means, self.values).astype(np.float32)
        self.values[0] = 0.0
        return self.values[self._codes].astype(array.dtype)

    @property
    def coded(self) -> Coded:
        return Coded(self._codes.astype(self._narrow), Codebook(self.values.copy()))


def _named(model: Any) -> list[tuple[str, Any]]:
    return list(zip(names_of(model.weights), model.weights, strict=True))


def _optimizer(phase: Phase) -> Any:
    # The rate is a variable that is set before each step.
    inner = keras.optimizers.AdamW(phase.learning_rate, weight_decay=phase.weight_decay)
    rule = ByGlobalNorm(math.inf) if phase.clip is None else phase.clip
    return clipped(inner, rule, bound=phase.bound)


def _schedule(phase: Phase, total: int) -> Gradual | None:
    if phase.sparsity is None:
        return None
    ramp = max(total // 2, 2)
    return Gradual(phase.sparsity, steps=(1, ramp), every=max(ramp // 40, 1), initial=phase.initial)
