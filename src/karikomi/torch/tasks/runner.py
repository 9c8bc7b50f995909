"""The runner protocol of `compress`, `sweep` and `audit`, for torch."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported, suggest
from karikomi.quantize import Coded, OutputUnits
from karikomi.shrink.account import ROUND
from karikomi.shrink.cuts import Cuts
from karikomi.tasks.runner import Arrays, Form, Phase, chain_of
from karikomi.tasks.splits import Data, Inputs
from karikomi.tasks.task import Task, source_of
from karikomi.tasks.user_code import called
from karikomi.torch.attachment.after_step import FROZEN
from karikomi.torch.modules.arrays import fill_, notes_of, to_arrays, to_stored
from karikomi.torch.modules.kept_units import NOTE
from karikomi.torch.modules.prunable import prunable
from karikomi.torch.pruning.in_place import prune_
from karikomi.torch.quantization.eligible import eligible
from karikomi.torch.quantization.in_place import quantize_
from karikomi.torch.quantization.output_units import output_units
from karikomi.torch.shrinking.costs import (
    milliseconds,
    pairs_in_turn,
    parameters_of,
    peak_bytes,
)
from karikomi.torch.shrinking.smaller_copy import shrink
from karikomi.torch.tasks.integer_engine import IntegerEngine
from karikomi.torch.tasks.losses import loss_of
from karikomi.torch.tasks.networks import NETWORKS
from karikomi.torch.tasks.other_forms import FORMS, OtherForms
from karikomi.torch.tasks.training import TorchTraining, batch_for, calibration, evaluated
from karikomi.torch.tasks.widened import given_bytes, widen_
from karikomi.torch.tracing.batches import leaves
from karikomi.torch.tracing.isolation import isolated


class TorchRunner:
    """One task on torch; each call builds the model from arrays: no state but adopted notes is kept between calls."""

    def __init__(self, task: Task, data: Data, *, seed: int) -> None:
        self._task, self._data, self._seed = task, data, seed
        self._threads = task.recipe.threads
        self._make = _factory(task, data)
        self._shrunk: list[Mapping[str, str]] = []

    def environment(self) -> dict[str, Any]:
        """Return versions, machine kind and thread count."""
        return {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": self._threads or torch.get_num_threads(),
        }

    def fresh(self) -> Arrays:
        """Return the arrays of an untrained network."""
        with isolated(self._seed, self._threads):
            return to_arrays(self._make())

    def describe(self) -> str:
        """Return the layer widths as a short text."""
        model = self.untrained()
        weights = [tensor for tensor in model.parameters() if tensor.dim() > 1]
        widths = [weights[0].shape[1], *(tensor.shape[0] for tensor in weights)] if weights else []
        total = sum(tensor.numel() for tensor in model.parameters())
        return f"{chain_of(widths)}, {total:,} parameters"

    def fingerprint(self) -> str:
        """Return a digest of the untrained network's arrays, its layers and its class's source."""
        model = self.untrained()
        digest = hashlib.sha256(f"{model}{source_of(type(model))}".encode())
        for name, array in to_arrays(model).items():
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()[:16]

    def left_alone(self) -> dict[str, str]:
        """Return name -> why pruning does not act on a parameter; biases are not listed."""
        weights, reasons = prunable(self.untrained())
        reasons |= {name: FROZEN for name, tensor in weights.items() if not tensor.requires_grad}
        tied = self.tied()
        for further, first in tied.items():
            if first in reasons:
                reasons[first] += f"; tied with {further}"
        return {name: reason for name, reason in reasons.items() if reason != "a bias"}

    def prunable(self) -> list[str]:
        """Return the names of the tensors that pruning acts on: weights that are trained."""
        weights = prunable(self.untrained())[0]
        return [name for name, tensor in weights.items() if tensor.requires_grad]

    def tied(self) -> dict[str, str]:
        """Return further name -> first name of each parameter that has several."""
        first, tied = dict[int, str](), dict[str, str]()
        for name, parameter in self.untrained().named_parameters(remove_duplicate=False):
            known = first.setdefault(id(parameter), name)
            if known != name:
                tied[name] = known
        return tied

    def output_units(self) -> dict[str, OutputUnits]:
        """Return name -> output units of each weight that has them."""
        return output_units(self.untrained())

    def biases(self) -> list[str]:
        """Return the names of the bias vectors of the layers that pruning acts on."""
        parameters = dict(self.untrained().named_parameters())
        # Of a recurrent layer weight_ih_l0 has bias_ih_l0, of fused attention in_proj_weight has in_proj_bias.
        parts = [name.rpartition(".") for name in self.prunable()]
        names = [f"{path}{dot}{own.replace('weight', 'bias')}" for path, dot, own in parts]
        return [name for name in names if name in parameters and "bias" in name.rpartition(".")[2]]

    def given_bytes(self, arrays: Arrays) -> dict[str, int]:
        """Return name -> bytes of each array in the type that the network came in, which may be bfloat16."""
        return given_bytes(self.untrained(), arrays)

    def train(self, arrays: Arrays, phase: Phase) -> TorchTraining:
        """Begin a phase from the given arrays."""
        with isolated(self._seed, self._threads):
            return TorchTraining(
                self._task, self._data, self._make, arrays, phase, self._seed, fill=self._fill_
            )

    def outputs(self, arrays: Arrays, inputs: Inputs) -> np.ndarray:
        """Return the network's outputs in evaluation mode, those that are judged."""
        with isolated(self._seed, self._threads):
            return evaluated(self._task, self._model(arrays), inputs)

    def input_gradients(
        self, arrays: Arrays, inputs: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        """Return d loss / d inputs, of the inputs' shape, in evaluation mode."""
        with isolated(self._seed, self._threads):
            model = self._model(arrays).eval()
            batch = batch_for(model, inputs, targets)
            leaf = batch.positional[0].requires_grad_()
            (slope,) = torch.autograd.grad(loss_of(self._task)(model(leaf), batch.targets), leaf)
            return np.ascontiguousarray(slope.numpy())

    def layer_outputs(self, arrays: Arrays, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return layer -> its outputs (n, ...), of layers with weights of their own, in the order of the forward pass.

        Of a layer that is called several times, those of its last call.
        """
        found: dict[str, torch.Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(layer: nn.Module, given: Any, result: Any) -> None:
                first = next((part for part in leaves(result) if torch.is_tensor(part)), None)
                if first is not None and first.is_floating_point():
                    found[name] = first.detach()

            return keep

        with isolated(self._seed, self._threads), torch.no_grad():
            model = self._model(arrays).eval()
            for name, layer in model.named_modules():
                if name and next(layer.parameters(recurse=False), None) is not None:
                    layer.register_forward_hook(hook(name))
            batch = batch_for(model, inputs)
            model(*batch.positional, **batch.named)
        return {name: tensor.float().numpy() for name, tensor in found.items()}

    def notes(self) -> dict[str, str]:
        """Return what a file has to say beside the tensors of the task's network, as it is before a shrink."""
        return notes_of(self.untrained())

    def adopt(self, notes: Mapping[str, str]) -> None:
        """Take the notes of a shrunk network, for models that are built from arrays of its shapes."""
        if NOTE in notes and notes not in self._shrunk:
            self._shrunk.append(notes)

    def shrink(
        self, arrays: Arrays, *, width: float | Sequence[int] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Return the arrays without dead units, or with the share `width` of all units, and the report of it.

        `width` as whole numbers: the units that stay of each layer that pruning acts on, but the last.
        """
        few = self._data.validation.first()
        with isolated(self._seed, self._threads):
            model = self._model(arrays).eval()
            example = batch_for(model, few.inputs)
            if isinstance(width, Sequence):
                _zero_units_(model, self.prunable(), width)
                width = None
            some = None if width is None else calibration(model, self._data)
            try:
                small, report = shrink(
                    model,
                    (example.positional, dict(example.named)),
                    width=width,
                    multiple_of=ROUND if width else 1,
                    data=some,
                    form="module",
                )
            except Unsupported as error:
                # The run continues unshrunk, the reason in its report.
                return arrays, _unshrunk(str(error))
        facts = {k: value for k, value in report.as_dict().items() if k not in ("kept", "members")}
        for cost in ("macs_before", "macs_after"):
            facts[cost] //= len(few)  # of one example, as everywhere
        return to_arrays(small), {**facts, "notes": notes_of(small)}

    def quantized(
        self, arrays: Arrays, *, only: Sequence[str] | None = None, **size: Any
    ) -> tuple[dict[str, np.ndarray | Coded], dict[str, str]]:
        """Return the arrays with codes for every tensor, or those of `only`, and notes on what stays as it is."""
        with isolated(self._seed, self._threads):
            model = self._model(arrays).eval()
            if only is not None:
                # A buffer that no rule is known for stays as it is.
                known = eligible(model)
                only = [name for name in only if name in known.all]
                if not only:
                    return to_stored(model), known.left_alone
            data = calibration(model, self._data) if "rate" in size else None
            coded = quantize_(model, **size, data=data, only=only, seed=self._seed, progress=False)
            return to_stored(model), {**coded.left_alone, **coded.notes}

    def integer_outputs(
        self, tensors: Mapping[str, np.ndarray | Coded], inputs: Inputs
    ) -> np.ndarray:
        """Return the outputs of a quantized network with integer activations, in ONNX Runtime."""
        with isolated(self._seed, self._threads):
            model = self._model(dict(tensors)).eval()
            with self._integers(model) as engine:
                return engine.outputs(inputs, self._task)

    def integer_milliseconds(
        self, tensors: Mapping[str, np.ndarray | Coded], dense: Arrays
    ) -> dict[str, float]:
        """Return the time of a forward pass in ONNX Runtime, ``ms``, and ``dense_ms`` of `dense` in floats."""
        with isolated(self._seed, self._threads):
            model, before = self._model(dict(tensors)).eval(), self._model(dense).eval()
            with self._integers(model) as engine:
                return engine.milliseconds(before)

    def milliseconds(self, arrays: Arrays) -> float:
        """Return the median time of a forward pass on up to 64 validation examples, measured now."""
        with isolated(self._seed, self._threads):
            model = self._model(arrays).eval()
            example = batch_for(model, self._data.validation.first().inputs)
            return milliseconds(model, example.positional, dict(example.named))

    def network(self, tensors: Mapping[str, np.ndarray | Coded]) -> nn.Module:
        """Return the task's module, filled with arrays or codes, in evaluation mode on the CPU."""
        return self._fill_(self.untrained(), tensors).eval()

    def costs(self, arrays: Arrays, examples: int) -> dict[str, int | None]:
        """Return ``parameters``, and the most bytes of tensors that a forward pass has at once, ``memory``.

        None where operators of the network cannot be observed.
        """
        with isolated(self._seed, self._threads):
            model = self._model(arrays).eval()
            example = batch_for(model, self._data.validation.first(examples).inputs)
            try:
                memory = peak_bytes(model, example.positional, dict(example.named))
            except (RuntimeError, NotImplementedError):
                memory = (
                    None  # operators that no mode can look into, such as those of scripted modules
                )
        return {"parameters": parameters_of(model), "memory": memory}

    def times(self, before: Arrays, after: Arrays, examples: int) -> list[tuple[float, float]]:
        """Return milliseconds of forward passes of two networks, run in turn on so many validation examples."""
        with isolated(self._seed, self._threads):
            first, second = self._model(before), self._model(after)
            example = batch_for(first, self._data.validation.first(examples).inputs)
            return pairs_in_turn(
                first, second, example.positional, dict(example.named), most=41, seconds=0.5
            )

    def forms(self) -> dict[str, Form]:
        """Return the forms in which the network can be written."""
        return FORMS

    def write(
        self, form: str, dense: Arrays, tensors: Mapping[str, np.ndarray | Coded], path: Path
    ) -> dict[str, Any]:
        """Write the network of the tensors in a form, and return its difference to the network, and other facts."""
        with isolated(self._seed, self._threads):
            forms = OtherForms(self._task, self._data, self.network(dense), self.network(tensors))
            return forms.write(form, path)

    def _integers(self, model: nn.Module) -> IntegerEngine:
        return IntegerEngine(model, calibration(model, self._data), self._data.validation.first())

    def _model(self, arrays: Mapping[str, Any]) -> nn.Module:
        return self._fill_(self.untrained(), arrays)

    def _fill_(self, model: nn.Module, arrays: Mapping[str, Any]) -> nn.Module:
        """Fill a model with arrays, by the notes of the shrunk network whose shapes they have, if any."""
        before = {n: tuple(t.shape) for n, t in model.state_dict().items() if hasattr(t, "shape")}
        given = {name: tuple(array.shape) for name, array in arrays.items()}
        for notes in self._shrunk if given != before else ():
            cuts = Cuts.from_text(notes[NOTE], where=f"task {self._task.name}")
            if given == {name: cuts.shape(name, shape) for name, shape in before.items()}:
                return fill_(model, arrays, notes)
        return fill_(model, arrays)

    def untrained(self) -> nn.Module:
        """Return the task's network as its code makes it, from the seed alone."""
        with isolated(self._seed, self._threads):
            return self._make()


def _zero_units_(model: nn.Module, names: Sequence[str], units: Sequence[int]) -> None:
    """Set the units of the smallest weights to zero, until so many are left of each named weight's layer."""
    weights = dict(model.named_parameters())
    shares = {
        name: 1.0 - kept / len(weights[name])
        for name, kept in zip(names[:-1], units, strict=False)
        if kept < len(weights[name])
    }
    if shares:
        prune_(model, shares, pattern="units")


def runner_for(task: Task, data: Data, *, seed: int) -> TorchRunner:
    """Return the runner of a task."""
    return TorchRunner(task, data, seed=seed)


def _unshrunk(reason: str) -> dict[str, Any]:
    return {"removed": 0, "left_alone": {"the network": reason}}


def _factory(task: Task, data: Data) -> Callable[[], nn.Module]:
    if isinstance(task.model, str):
        if task.model not in NETWORKS:
            raise InvalidArgument(
                "unknown network",
                where=f"task {task.name}",
                got=task.model,
                hint=suggest(task.model, NETWORKS),
            )
        return NETWORKS[task.model]
    make = task.model

    def checked() -> nn.Module:
        where = f"task {task.name}"
        model = called(make, "the task's model function raised", where=where)
        if not isinstance(model, nn.Module):
            raise InvalidArgument(
                "the model is not a torch module", where=where, got=type(model).__name__
            )
        if any(isinstance(tensor, _LAZY) for tensor in (*model.parameters(), *model.buffers())):
            # A lazy layer takes its shape, and draws its weights, from the first batch.
            evaluated(task, model, data.train.take(np.arange(min(len(data.train), 2))).inputs)
        _check_types(widen_(model), where)
        return model

    return checked


def _check_types(model: nn.Module, where: str) -> None:
    """Raise `Unsupported` naming the first parameter of a type that is not trained, quantized and stored."""
    for name, tensor in model.named_parameters():
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in _TYPES:
            raise Unsupported(
                "a network of this type cannot be compressed",
                where=f"{where}: {name}",
                got=tensor.dtype,
                allowed=", ".join(map(str, _TYPES)),
                hint="return module.float() from the task's model function",
            )


_TYPES = (torch.float32, torch.float64, torch.float16)
_LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)
