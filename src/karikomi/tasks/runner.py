"""The protocol of framework folders for the search, the audit and the sweep, which import none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from karikomi.quantize import Coded, OutputUnits
from karikomi.record import Recorder
from karikomi.rule import Rule
from karikomi.tasks.splits import Data, Inputs
from karikomi.tasks.task import Task

_MOST, _FIRST, _LAST = 12, 5, 3
Arrays = dict[str, np.ndarray]
"""Name -> array: the weights and buffers of a model, outside of its framework."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedCodes:
    """Quantized training towards a size: `goal` bits of codes in all, on grids of `width` bits.

    The goal is reached at the share `ramp` of the steps. `gain`, `strength`: of `karikomi.quantize.RateGoal`, the
    latter at the first step, in loss per bit. `step_rate`: the learning rate of the grids' steps. `warm`: steps in
    which the rates rise.
    """

    goal: float
    width: int = 4
    ramp: float = 0.6
    gain: float = 0.02
    strength: float = 1e-6
    step_rate: float = 3e-3
    warm: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of training: so many epochs at a cosine learning rate, with its rule, masks and targets.

    `stage`: the name in the rows of the record. `sparsity`: prune gradually up to it, from
    `initial` on. `masks`: name -> kept entries, to begin with. `teacher`: the dense network's arrays
    to distil from. `coded`: tensors that share weights, whose centroids are what learns. `learned`: every parameter is
    rounded while training, under a penalty on its bits.
    """

    stage: str
    epochs: int
    learning_rate: float
    weight_decay: float = 0.0
    clip: Rule | None = None
    bound: Rule | None = None
    sparsity: float | None = None
    initial: float = 0.0
    masks: Mapping[str, np.ndarray] | None = None
    teacher: Arrays | None = None
    coded: Mapping[str, Coded] | None = None
    learned: LearnedCodes | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """A form in which a network is written beside its packed file, for other programs.

    `file`: its name in the run folder. `needs`: packages that write it, which the extra `extra` installs.
    """

    name: str
    file: str
    about: str
    needs: tuple[str, ...] = ()
    extra: str = ""


@dataclass(frozen=True, slots=True)
class CompiledWith:
    """Loss, metric, goal and axis of the classes that a framework has for a model; None for what it has not."""

    loss: Any = None
    metric: Any = None
    goal: str | None = None
    class_axis: int | None = None


class Training(Protocol):
    """A phase under way; can be checkpointed after every epoch and continued bit for bit."""

    @property
    def epoch(self) -> int:
        """Epochs done."""
        ...

    def run_epoch(self, recorder: Recorder) -> None:
        """Train one epoch and write its rows."""
        ...

    def arrays(self) -> Arrays:
        """Return the model's arrays as they are now."""
        ...

    def masks(self) -> Arrays:
        """Return name -> kept entries of what is pruned, boolean."""
        ...

    def coded(self) -> dict[str, Coded]:
        """Return the tensors that share weights, or are rounded while training, as they are now."""
        ...

    def checkpoint(self) -> tuple[Arrays, dict[str, Any]]:
        """Return what a continuation needs: arrays, and facts for JSON."""
        ...

    def restore(self, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        ...


class Runner(Protocol):
    """One task on one framework."""

    def environment(self) -> dict[str, Any]:
        """Return versions, machine kind and thread count: what reproducible bytes depend on."""
        ...

    def fresh(self) -> Arrays:
        """Return the arrays of an untrained network, from the seed alone."""
        ...

    def describe(self) -> str:
        """Return the network in a few words."""
        ...

    def fingerprint(self) -> str:
        """Return a digest of the untrained network and its code, so that a run never mixes two."""
        ...

    def left_alone(self) -> dict[str, str]:
        """Return name -> why pruning does not act on a parameter; biases are not listed."""
        ...

    def prunable(self) -> list[str]:
        """Return the names of the tensors that pruning and weight sharing act on."""
        ...

    def tied(self) -> dict[str, str]:
        """Return further name -> first name of each parameter that has several (tied weights)."""
        ...

    def output_units(self) -> dict[str, OutputUnits]:
        """Return name -> output units of each weight that has them, a fact of its layer's type."""
        ...

    def biases(self) -> list[str]:
        """Return the names of the bias vectors of the layers that pruning acts on."""
        ...

    def given_bytes(self, arrays: Arrays) -> dict[str, int]:
        """Return name -> bytes of each array in the type that the network came in, which may be a narrower one."""
        ...

    def train(self, arrays: Arrays, phase: Phase) -> Training:
        """Begin a phase from the given arrays (whose shapes may be smaller after a shrink)."""
        ...

    def outputs(self, arrays: Arrays, inputs: Inputs) -> np.ndarray:
        """Return the network's outputs in evaluation mode."""
        ...

    def input_gradients(
        self, arrays: Arrays, inputs: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        """Return the loss's gradient with respect to the inputs, of the inputs' shape."""
        ...

    def layer_outputs(self, arrays: Arrays, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return layer -> its outputs (n, ...) in the order of the forward pass, in evaluation mode."""
        ...

    def notes(self) -> dict[str, str]:
        """Return what a file has to say beside the tensors of the task's network, as it is before a shrink."""
        ...

    def adopt(self, notes: Mapping[str, str]) -> None:
        """Take the notes of a shrunk network, which say how its model is built from arrays of its shapes."""
        ...

    def shrink(
        self, arrays: Arrays, *, width: float | Sequence[int] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Return the arrays without dead units, or with the share `width` of all units, and the report of it.

        `width` as whole numbers: the units that stay of each layer that pruning acts on, but the last. ``notes`` in
        the report are for `adopt`; without them nothing was removed.
        """
        ...

    def quantized(
        self, arrays: Arrays, *, only: Sequence[str] | None = None, **size: Any
    ) -> tuple[dict[str, np.ndarray | Coded], dict[str, str]]:
        """Return the arrays with codes for every tensor, or those of `only`, and notes on what stays as it is.

        `size`: ``entries=``, ``bits=`` or ``rate=`` with a ``method``, as `kk.torch.quantize_` takes them; methods that
        need data see some training examples, without targets.
        """
        ...

    def integer_outputs(
        self, tensors: Mapping[str, np.ndarray | Coded], inputs: Inputs
    ) -> np.ndarray:
        """Return the outputs of a quantized network whose activations are integers too, in its engine.

        Raises `Unavailable` where the engine is not installed.
        """
        ...

    def milliseconds(self, arrays: Arrays) -> float:
        """Return the median time of a forward pass on up to 64 validation examples, measured now."""
        ...

    def integer_milliseconds(
        self, tensors: Mapping[str, np.ndarray | Coded], dense: Arrays
    ) -> dict[str, float]:
        """Return the same of a quantized network with integer activations as ``ms``, and ``dense_ms`` of `dense`.

        Both in the engine of `integer_outputs`, in turns.
        """
        ...

    def network(self, tensors: Mapping[str, np.ndarray | Coded]) -> Any:
        """Return the framework's own model, filled with arrays or codes, in evaluation mode."""
        ...

    def costs(self, arrays: Arrays, examples: int) -> dict[str, int | None]:
        """Return ``parameters``, and the most bytes of tensors that a forward pass has at once, ``memory``."""
        ...

    def times(self, before: Arrays, after: Arrays, examples: int) -> list[tuple[float, float]]:
        """Return milliseconds of forward passes of two networks, run in turn on so many validation examples."""
        ...

    def forms(self) -> dict[str, Form]:
        """Return the forms in which the network can be written."""
        ...

    def write(
        self, form: str, dense: Arrays, tensors: Mapping[str, np.ndarray | Coded], path: Path
    ) -> dict[str, Any]:
        """Write the network of the tensors in a form, and return its difference to the network, and other facts."""
        ...


class Framework(Protocol):
    """The functions of a framework folder for code that is independent of frameworks."""

    def runner_for(self, task: Task, data: Data, *, seed: int) -> Runner:
        """Return a runner for a task."""
        ...

    def to_arrays(self, model: Any) -> Arrays:
        """Return name -> array of all parameters and buffers."""
        ...

    def examples(
        self, model: Any, data: Any, *, where: str, own_loss: bool = True
    ) -> tuple[Inputs, np.ndarray | None]:
        """Return one pass over loaders as people have them, as arrays: the inputs of a model, and targets if any.

        `own_loss`: whether the loss is the user's, who may read the one that the network computes from its labels.
        """
        ...

    def copies_of(self, model: Any) -> Callable[[], Any]:
        """Return a function that returns copies of a model, and can be sent to other processes if the model can."""
        ...

    def to_stored(self, model: Any) -> dict[str, np.ndarray | Coded]:
        """Return the tensors to store: codes for quantized weights, arrays for all others."""
        ...

    def notes_of(self, model: Any) -> dict[str, str]:
        """Return texts to store beside the tensors: what a shrink left of the model."""
        ...

    def fill_(
        self,
        model: Any,
        tensors: Mapping[str, np.ndarray | Coded],
        notes: Mapping[str, str] | None = None,
    ) -> Any:
        """Put named arrays or codes into a model, resizing layers that a shrink made smaller by the notes."""
        ...


def chain_of(widths: Sequence[int]) -> str:
    """Return widths joined by dashes, of a long chain its ends and its length.

    >>> chain_of([4, 8, 2]), chain_of([3, *[16] * 20, 10])
    ('4-8-2', '3-16-16-16-16-...-16-16-10 (21 layers)')
    """
    if len(widths) <= _MOST:
        return "-".join(map(str, widths))
    ends = ["-".join(map(str, part)) for part in (widths[:_FIRST], widths[-_LAST:])]
    return f"{ends[0]}-...-{ends[1]} ({len(widths) - 1} layers)"
