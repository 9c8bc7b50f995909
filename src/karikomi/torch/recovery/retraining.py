"""The epochs of a recovery, with its masks applied and a checkpoint after each."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from karikomi.errors import BadFile, KarikomiError, NonFinite, Unsupported
from karikomi.files import as_path, write_atomically
from karikomi.rule import Composite, Rule
from karikomi.torch.distributed.replicas import gathered, rank_of
from karikomi.torch.modules.fingerprint import fingerprint, tensors_of
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.recovery.distillation import WHERE, DistillationLoss
from karikomi.torch.recovery.training_loop import TrainingLoop, match_moments_
from karikomi.torch.sparse_training.regrowth import forget_moments_
from karikomi.torch.tracing.batches import batches_of, length_of
from karikomi.torch.tracing.isolation import isolated

_FORMAT = "karikomi recovery 2"
_OWN = {"plan", "losses", "buffers", "generators"}
"""Entries that differ between replicas; those of the first are stored beside the shared ones."""
_PARTS = {"format", "weights", "optimizer", "handle", "others", *_OWN}


class Retraining:
    """All epochs of one recovery, with one module, optimizer and loss; see `recover_`."""

    def __init__(
        self,
        module: nn.Module,
        masks: Masks,
        optimizer: torch.optim.Optimizer,
        criterion: DistillationLoss,
        data: Iterable[Any],
        epochs: int,
        seed: int,
        progress: bool,
    ) -> None:
        self._module, self._masks, self._optimizer = module, masks, optimizer
        self._criterion, self._data = criterion, data
        self._epochs, self._seed, self._progress = epochs, seed, progress
        self._losses: list[float] = []
        self._batches = _length(data, seed)
        self._loop = TrainingLoop(module, optimizer, criterion, self._batches * epochs)

    def run_(
        self,
        clip: Rule | Composite | None,
        bound: Rule | None,
        checkpoint: str | os.PathLike[str] | None,
    ) -> tuple[float, ...]:
        """Train all epochs, from the checkpoint if it exists; return the mean loss of each epoch."""
        plan = {} if checkpoint is None else self._plan(clip, bound)
        saved = None if checkpoint is None else self._read(checkpoint, plan)
        named = dict(unwrapped(self._module).named_parameters())
        forget_moments_(self._optimizer, named, {}, self._masks)
        if saved is not None and checkpoint is not None:
            try:
                self._restore(saved)
            except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
                raise BadFile(
                    "the checkpoint does not fit", where=str(checkpoint), got=type(error).__name__
                ) from error
        handle = self._loop.attach_(clip=clip, bound=bound, prune=self._masks or None)
        try:
            if saved is not None:
                handle.load_state_dict(saved["handle"])
            for epoch in range(len(self._losses), self._epochs):
                self._epoch(epoch)
                if checkpoint is not None:
                    self._save(checkpoint, plan)
        finally:
            self._loop.detach_()
        return tuple(self._losses)

    def _epoch(self, epoch: int) -> None:
        drawn = int(np.random.default_rng([self._seed, epoch]).integers(2**62))
        with isolated(drawn, 0):
            batches = tqdm(
                batches_of(self._data, self._module, where=f"{WHERE}: data"),
                desc=f"recover {epoch + 1}/{self._epochs}",
                unit="batch",
                total=self._batches,
                disable=None if self._progress else True,
                leave=False,
            )
            losses = list(self._loop.epoch(batches))
        mean = float(torch.stack(losses).float().mean())
        if not math.isfinite(mean):
            raise NonFinite(
                "the loss is NaN or infinite",
                where=f"{WHERE}, epoch {epoch + 1}",
                hint="lower rate=, or look for NaN in the data; the weights are as before",
            )
        self._losses.append(mean)

    def _plan(self, clip: Any, bound: Any) -> dict[str, Any]:
        """Return what identifies this recovery, as plain data; the loss function is not included."""
        teacher = self._criterion.teacher
        return {
            "replicas": len(gathered(self._module, None)),
            "epochs": self._epochs,
            "batches": self._batches,
            "seed": self._seed,
            "optimizer": type(self._optimizer).__name__,
            "rates": self._loop.rates,
            "teacher": None if teacher is None else fingerprint(teacher),
            "temperature": float(self._criterion.temperature),
            "weight": float(self._criterion.weight),
            "axis": self._criterion.axis,
            "clip": repr(clip),
            "bound": repr(bound),
            "module": fingerprint(self._module),
            "masks": fingerprint(self._masks),
        }

    def _save(self, path: str | os.PathLike[str], plan: dict[str, Any]) -> None:
        buffers = dict(unwrapped(self._module).named_buffers())
        own = {
            "plan": plan,
            "losses": self._losses,
            "buffers": {name: buffer.detach().cpu() for name, buffer in buffers.items()},
            "generators": [generator.get_state() for generator in _generators(self._data)],
        }
        first, *others = gathered(self._module, own)
        if rank_of(self._module) > 0:
            return
        weights = dict(unwrapped(self._module).named_parameters())
        content = {
            "format": _FORMAT,
            "weights": {name: weight.detach() for name, weight in weights.items()},
            "optimizer": self._optimizer.state_dict(),
            "handle": self._loop.handle.state_dict(),
            **first,
            "others": others,
        }
        write_atomically(path, lambda stream: torch.save(content, stream))

    def _read(self, path: str | os.PathLike[str], plan: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the checkpoint, None if the file does not exist; raises on all ranks if one fails."""
        saved, failure = None, None
        try:
            saved = _read(path, plan, rank_of(self._module))
        except KarikomiError as error:
            failure = error
        epochs = None if saved is None else len(saved["losses"])
        states = gathered(self._module, str(failure) if failure else epochs)
        if failure is not None:
            raise failure
        if len(set(states)) > 1:
            raise Unsupported(
                "the ranks found different checkpoints",
                where=str(path),
                got=", ".join(f"rank {rank}: {state}" for rank, state in enumerate(states)),
                allowed="the same path on all ranks, on a shared disk",
            )
        return saved

    @torch.no_grad()
    def _restore(self, saved: Mapping[str, Any]) -> None:
        tensors = {**saved["weights"], **saved["buffers"]}
        for name, tensor in tensors_of(self._module).items():
            tensor.copy_(tensors[name])
        self._optimizer.load_state_dict(saved["optimizer"])
        match_moments_(self._optimizer)
        for generator, state in zip(_generators(self._data), saved["generators"], strict=True):
            generator.set_state(state)
        self._losses = list(saved["losses"])


def _length(data: Iterable[Any], seed: int) -> int:
    """Return the number of batches in an epoch; data without a length is iterated once to count."""
    count = length_of(data)
    if count is None:
        generators = _generators(data)
        states = [generator.get_state() for generator in generators]
        with isolated(seed, 0):
            count = sum(1 for _ in data)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
    return max(count, 1)


def _generators(data: Any) -> list[torch.Generator]:
    """Return the generators that shuffle a DataLoader, each once."""
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    holders = (data, getattr(data, "sampler", None), inner)
    found = {
        id(holder): holder for holder in (getattr(holder, "generator", None) for holder in holders)
    }
    return [item for item in found.values() if isinstance(item, torch.Generator)]


def _read(
    path: str | os.PathLike[str], plan: Mapping[str, Any], rank: int
) -> dict[str, Any] | None:
    path = as_path(path)
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception class of its own
        raise BadFile(
            "not a checkpoint of a recovery", where=str(path), got=type(error).__name__
        ) from error
    if not isinstance(saved, dict) or set(saved) != _PARTS or saved["format"] != _FORMAT:
        raise BadFile("not a checkpoint of a recovery", where=str(path), allowed=_FORMAT)
    if 0 < rank <= len(saved["others"]):
        saved |= saved["others"][rank - 1]
    then = saved["plan"]
    differing = [key for key in plan if then.get(key) != plan[key]]
    if differing:
        raise Unsupported(
            "the checkpoint is of another recovery",
            where=str(path),
            got=", ".join(f"{key} {then.get(key)}, now {plan[key]}" for key in differing),
            hint="pass another path, or delete the file to start again",
        )
    return saved
