"""The training of the built-in search: seeded, and resumable after every epoch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from karikomi.errors import InvalidArgument, KarikomiError
from karikomi.prune import Gradual
from karikomi.quantize import Coded
from karikomi.record import Recorder
from karikomi.tasks.runner import Arrays, Phase
from karikomi.tasks.task import Data, Task
from karikomi.torch.modules.arrays import fill_, to_arrays
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.quantization.trained_codebook import share_, shared
from karikomi.torch.recovery.distillation import DistillationLoss
from karikomi.torch.recovery.training_loop import TrainingLoop, match_moments_
from karikomi.torch.tasks.memory_format import convert_, format_for, tensor_in
from karikomi.torch.tracing.batches import Batch
from karikomi.torch.tracing.isolation import isolated

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _mean_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if outputs.shape != targets.shape:
        # torch would broadcast (n, 1) against (n,) to (n, n).
        raise InvalidArgument(
            "outputs and targets differ in shape",
            where="mean_squared_error",
            got=f"{tuple(outputs.shape)} and {tuple(targets.shape)}",
        )
    return F.mse_loss(outputs, targets)


LOSSES: dict[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "mean_squared_error": _mean_squared_error,
}


def loss_of(task: Task) -> Loss:
    """Return the task's loss as a torch function of ``(outputs, targets)``."""
    if callable(task.loss):
        return task.loss
    if task.loss not in LOSSES:
        raise InvalidArgument(
            "unknown loss", where=f"task {task.name}", got=task.loss, allowed=sorted(LOSSES)
        )
    return LOSSES[task.loss]


@torch.no_grad()
def outputs(model: nn.Module, inputs: np.ndarray, *, batch: int = 1000) -> np.ndarray:
    """Return a model's outputs in evaluation mode, which is undone afterwards."""
    layout = format_for(model, inputs)
    was_training = model.training
    model.eval()
    parts = [
        model(tensor_in(inputs[start : start + batch], layout)).float().numpy()
        for start in range(0, len(inputs), batch)
    ]
    model.train(was_training)
    return np.concatenate(parts)


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
    ) -> None:
        self._task, self._data, self._phase, self._seed = task, data, phase, seed
        self._model = fill_(make(), arrays)
        self._format = format_for(self._model, data.train.inputs)
        convert_(self._model, self._format)
        criterion = self._criterion(make)
        self._epoch = 0
        share_(self._model, phase.coded or {})
        self._batches = max(len(data.train) // task.recipe.batch_size, 1)
        steps = self._batches * phase.epochs
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=phase.learning_rate,
            weight_decay=phase.weight_decay,
            fused=True,
        )
        self._loop = TrainingLoop(self._model, self._optimizer, criterion, steps)
        self._handle = self._loop.attach_(
            clip=phase.clip, bound=phase.bound, prune=_schedule(phase, steps)
        )
        if phase.masks:
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
        losses = [
            self._recorded(float(loss), recorder)
            for loss in self._loop.epoch(self._minibatches(generator))
        ]
        validation = self._data.validation
        metric = self._task.judge(outputs(self._model, validation.inputs), validation.targets)
        self._write(recorder, "epoch", float(np.mean(losses)), {"validation": metric})
        self._epoch += 1

    def arrays(self) -> Arrays:
        """Return the model's arrays under their ordinary names, codebooks decoded."""
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
        """Return the tensors with shared weights, and their centroids as trained so far."""
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
        return arrays, {"epoch": self._epoch, "handle": handle}

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
            inputs = train.inputs[index]
            if self._task.augment is not None:
                inputs = self._augmented(inputs, generator)
            yield Batch(
                (tensor_in(inputs, self._format),), targets=torch.from_numpy(train.targets[index])
            )

    def _augmented(self, inputs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        assert self._task.augment is not None  # noqa: S101  (checked by the caller)
        try:
            return self._task.augment(inputs, generator)
        except Exception as error:
            raise KarikomiError(
                "the task's augment function failed",
                where=f"task {self._task.name}",
                got=f"{type(error).__name__}: {error}",
            ) from error

    def _recorded(self, loss: float, recorder: Recorder) -> float:
        last = self._handle.last
        self._write(recorder, "step", loss, {} if last is None else last.as_row())
        return loss

    def _write(self, recorder: Recorder, event: str, loss: float, more: dict[str, Any]) -> None:
        place = {"stage": self._phase.stage, "epoch": self._epoch, "step": self._handle.steps}
        sparsity = self._handle.sparsity
        recorder.write({"event": event, **place, "loss": loss, **more, "sparsity": sparsity})

    def _criterion(self, make: Callable[[], nn.Module]) -> DistillationLoss:
        task, recipe, where = self._task, self._task.recipe, f"task {self._task.name}"
        arrays = self._phase.teacher
        if arrays is None or recipe.distill == 0 or task.loss != "cross_entropy":
            return _TaskLoss(loss=loss_of(task), where=where)
        return _TaskLoss(
            loss=None if recipe.distill == 1 else loss_of(task),
            teacher=fill_(make(), arrays).eval(),
            temperature=recipe.temperature,
            weight=recipe.distill,
            axis=1,
            where=where,
        )


class _TaskLoss(DistillationLoss):
    """The loss of a task, with a `KarikomiError` for any exception of the user's network or loss."""

    def of(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        try:
            return super().of(module, batch)
        except KarikomiError:
            raise
        except Exception as error:
            raise KarikomiError(
                "the model or its loss failed on a training batch",
                where=self.where,
                got=f"{type(error).__name__}: {error}",
            ) from error


def _masks(arrays: Mapping[str, np.ndarray]) -> Masks:
    return Masks({name: torch.from_numpy(array) for name, array in arrays.items()})


def _schedule(phase: Phase, total: int) -> Gradual | None:
    if phase.sparsity is None:
        return None
    ramp = max(total // 2, 2)
    return Gradual(phase.sparsity, steps=(1, ramp), every=max(ramp // 40, 1), initial=phase.initial)
