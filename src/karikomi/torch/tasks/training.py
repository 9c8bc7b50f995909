"""The training of the built-in search: seeded, and resumable after every epoch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.prune import Gradual
from karikomi.quantize import Coded
from karikomi.record import Recorder
from karikomi.tasks.runner import Arrays, Phase
from karikomi.tasks.splits import Data, Inputs, Split, mapped_inputs
from karikomi.tasks.task import Task
from karikomi.tasks.user_code import called
from karikomi.torch.attachment.run_facts import run_facts
from karikomi.torch.modules.arrays import fill_, to_arrays
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.quantization.trained_codebook import share_, shared
from karikomi.torch.recovery.training_loop import TrainingLoop, match_moments_
from karikomi.torch.tasks.learned_codes import CodesInTraining, PenalisedLoss
from karikomi.torch.tasks.losses import criterion_of, selected
from karikomi.torch.tasks.memory_format import convert_, format_for, laid_out
from karikomi.torch.tracing.batches import MISSING, Batch, float_type
from karikomi.torch.tracing.isolation import isolated


def batch_tensor(inputs: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return inputs as a tensor.

    Floats are cast to `dtype`, the network's: NumPy makes float64, which torch's layers refuse.
    """
    tensor = torch.from_numpy(_native(inputs))
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _native(array: np.ndarray) -> np.ndarray:
    """Return an array that torch takes: a writable copy of what is mapped from a file, in native byte order."""
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])


def batch_for(model: nn.Module, inputs: Inputs, targets: np.ndarray | None = None) -> Batch:
    """Return inputs and targets as the tensors that a model takes, floats in its own type."""
    dtype = float_type(model) or torch.float32
    tensors = mapped_inputs(inputs, lambda array: batch_tensor(array, dtype))
    wanted = MISSING if targets is None else torch.from_numpy(_native(targets))
    if isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
        wanted = wanted.to(dtype)
    if isinstance(tensors, dict):
        return Batch((), tensors, wanted)
    return Batch(tensors if isinstance(tensors, tuple) else (tensors,), {}, wanted)


def calibration(model: nn.Module, data: Data) -> list[Any]:
    """Return batches of training examples, for re-fits and ranges, without targets."""
    batches = [batch_for(model, part.inputs) for part in data.calibration()]
    # As pairs of inputs and no targets, which several positional inputs need.
    return [(dict(b.named) or b.positional, None) for b in batches]


@torch.no_grad()
def outputs(
    model: nn.Module,
    inputs: Inputs,
    *,
    batch: int = 1000,
    select: Callable[[Any], torch.Tensor] = lambda found: found,
) -> np.ndarray:
    """Return a model's outputs in evaluation mode, which is undone afterwards; `select`: of several."""
    layout = format_for(model, batch_for(model, mapped_inputs(inputs, lambda array: array[:2])))
    was_training, count = model.training, len(Split(inputs, np.empty(0)))
    model.eval()
    parts = []
    for start in range(0, count, batch):
        rows = slice(start, start + batch)
        some = batch_for(model, mapped_inputs(inputs, lambda array, rows=rows: array[rows]))
        some = laid_out(some, layout)
        parts.append(select(model(*some.positional, **some.named)).float().numpy())
    model.train(was_training)
    return np.concatenate(parts)


def evaluated(task: Task, model: nn.Module, inputs: Inputs) -> np.ndarray:
    """Return the outputs of a task's model that are judged; a model that raises is named as the cause."""
    where, what = f"task {task.name}", "the model failed on a batch of inputs"
    return called(
        lambda: outputs(model, inputs, select=lambda found: selected(found, task)),
        what,
        where=where,
    )


class TorchTraining:
    """One `Phase` on one model; data order and noise are drawn from (seed, stage, epoch)."""

    def __init__(
        self,
        task: Task,
        data: Data,
        make: Callable[[], nn.Module],
        arrays: Arrays,
        phase: Phase,
        seed: int,
        *,
        fill: Callable[[nn.Module, Arrays], nn.Module] = fill_,
    ) -> None:
        self._task, self._data, self._phase, self._seed = task, data, phase, seed
        self._model = fill(make(), arrays)
        few = data.train.take(np.arange(min(len(data.train), 2)))
        self._format = format_for(self._model, batch_for(self._model, few.inputs))
        convert_(self._model, self._format)
        taught = phase.teacher
        criterion: Any = criterion_of(
            task, make, None if taught is None else lambda m: fill(m, taught)
        )
        self._epoch = 0
        share_(self._model, phase.coded or {})
        self._batches = max(len(data.train) // task.recipe.batch_size, 1)
        steps, how = self._batches * phase.epochs, phase.learned
        self._codes: CodesInTraining | None = None
        groups: Any = self._model.parameters()
        if how is not None:
            masks = dict(_masks(phase.masks)) if phase.masks else None
            self._codes = CodesInTraining(self._model, how, steps, masks)
            groups, criterion = self._codes.groups(), PenalisedLoss(criterion, self._codes)
        self._optimizer = torch.optim.AdamW(
            groups, lr=phase.learning_rate, weight_decay=phase.weight_decay, fused=True
        )
        warm = 0 if how is None else min(how.warm, steps // 4)
        self._loop = TrainingLoop(self._model, self._optimizer, criterion, steps, warm=warm)
        self._handle = self._loop.attach_(
            clip=phase.clip, bound=phase.bound, prune=_schedule(phase, steps)
        )
        if phase.masks and how is None:
            self._handle.masks = _masks(phase.masks)
            self._handle.masks.apply_(self._model)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self._epoch

    def run_epoch(self, recorder: Recorder) -> None:
        """Train one epoch; write a row per step, and one for the epoch with the validation metric."""
        stage = zlib.crc32(self._phase.stage.encode())
        generator = np.random.default_rng([self._seed, stage, self._epoch])
        with isolated(int(generator.integers(2**62)), self._task.recipe.threads):
            self._epoch_of(generator, recorder)

    def _epoch_of(self, generator: np.random.Generator, recorder: Recorder) -> None:
        self._model.train()
        parameters = dict(self._model.named_parameters())
        recorder.describe(run_facts([self._optimizer], parameters, self._phase.clip, None))
        losses = [
            self._recorded(float(loss), recorder)
            for loss in self._loop.epoch(self._minibatches(generator))
        ]
        validation = self._data.validation
        found = evaluated(self._task, self._model, validation.inputs)
        metric = self._task.judge(found, validation.targets)
        self._write(recorder, "epoch", float(np.mean(losses)), {"validation": metric})
        self._epoch += 1

    def arrays(self) -> Arrays:
        """Return the model's arrays under their ordinary names, codes decoded."""
        if self._codes is not None:
            return self._codes.arrays()
        arrays = to_arrays(self._model)
        for name, coded in self.coded().items():
            prefix, _, leaf = name.rpartition(".")
            stem = f"{prefix}.parametrizations.{leaf}" if prefix else f"parametrizations.{leaf}"
            for key in [key for key in arrays if key.startswith(f"{stem}.")]:
                del arrays[key]
            arrays[name] = coded.decode()
        return arrays

    def masks(self) -> Arrays:
        """Return name -> kept entries, boolean."""
        masks = self._handle.masks or {}
        return {name: mask.numpy().copy() for name, mask in masks.items()}

    def coded(self) -> dict[str, Coded]:
        """Return the tensors with shared or rounded weights, as trained so far."""
        if self._codes is not None:
            return self._codes.codes()
        return shared(self._model)

    def checkpoint(self) -> tuple[Arrays, dict[str, Any]]:
        """Return arrays and facts that `restore` continues from."""
        arrays = {f"model/{name}": array for name, array in to_arrays(self._model).items()}
        state = self._optimizer.state_dict()
        for place, entries in state["state"].items():
            for key, value in entries.items():
                arrays[f"optimizer/{place}/{key}"] = np.array(value.numpy(), order="C")
        for name, mask in self.masks().items():
            arrays[f"mask/{name}"] = mask
        handle = {key: value for key, value in self._handle.state_dict().items() if key != "masks"}
        codes = {} if self._codes is None else {"codes": self._codes.facts()}
        return arrays, {"epoch": self._epoch, "handle": handle, **codes}

    def restore(self, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit as without the interruption."""
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}, "mask": {}}
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = array
        fill_(self._model, parts["model"])
        self._restore_optimizer(parts["optimizer"])
        self._handle.load_state_dict({**facts["handle"], "masks": None})
        if parts["mask"]:
            self._handle.masks = _masks(parts["mask"])
        if self._codes is not None:
            self._codes.restore(facts["codes"])
        self._epoch = int(facts["epoch"])

    def _restore_optimizer(self, stored: Mapping[str, np.ndarray]) -> None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, array in stored.items():
            place, _, key = name.partition("/")
            state.setdefault(int(place), {})[key] = torch.from_numpy(array)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        match_moments_(self._optimizer)

    def _minibatches(self, generator: np.random.Generator) -> Iterator[Batch]:
        train, size = self._data.train, self._task.recipe.batch_size
        order = generator.permutation(len(train))
        for batch in range(self._batches):
            index = order[batch * size : (batch + 1) * size]
            some = train.take(index)
            inputs = some.inputs
            if self._task.augment is not None:
                inputs = self._augmented(inputs, generator)
            yield laid_out(batch_for(self._model, inputs, some.targets), self._format)

    def _augmented(self, inputs: Any, generator: np.random.Generator) -> Any:
        assert self._task.augment is not None  # noqa: S101  (checked by the caller)
        augment, what = self._task.augment, "the task's augment function failed"
        return called(lambda: augment(inputs, generator), what, where=f"task {self._task.name}")

    def _recorded(self, loss: float, recorder: Recorder) -> float:
        rate = self._optimizer.param_groups[0]["lr"]
        recorder.step(self._handle.steps, self._handle.last, {**self._facts(loss), "lr": rate})
        return loss

    def _write(self, recorder: Recorder, event: str, loss: float, more: dict[str, Any]) -> None:
        step = self._handle.steps
        recorder.write({"event": event, "step": step, **self._facts(loss), **more})

    def _facts(self, loss: float) -> dict[str, Any]:
        place = {"stage": self._phase.stage, "epoch": self._epoch}
        return {**place, "loss": loss, "sparsity": self._handle.sparsity}


def _masks(arrays: Mapping[str, np.ndarray]) -> Masks:
    return Masks({name: torch.from_numpy(array) for name, array in arrays.items()})


def _schedule(phase: Phase, total: int) -> Gradual | None:
    if phase.sparsity is None:
        return None
    ramp = max(total // 2, 2)
    return Gradual(phase.sparsity, steps=(1, ramp), every=max(ramp // 40, 1), initial=phase.initial)
