"""The runner protocol of `compress` and `audit`, for Keras on every backend."""

from __future__ import annotations

import hashlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.keras.arrays.variables import names_of
from karikomi.keras.facts.gradients import gradients
from karikomi.keras.facts.layer_calls import run, watched
from karikomi.keras.internals import all_layers, graph_of
from karikomi.keras.layers.arrays import CONFIG, fill_, notes_of, to_arrays, to_stored
from karikomi.keras.layers.codes import as_floats, forget
from karikomi.keras.layers.prunable import is_weight, oriented, prunable
from karikomi.keras.layers.unit_axes import weights_of
from karikomi.keras.quantization.in_place import quantize_
from karikomi.keras.quantization.output_units import output_units
from karikomi.keras.shrinking.rewriting import own_objects
from karikomi.keras.shrinking.smaller_copy import shrink
from karikomi.keras.tasks.distilled_loss import DistilledLoss, can_distil
from karikomi.keras.tasks.other_forms import FORMS, OtherForms
from karikomi.keras.tasks.trained import Copies, copied
from karikomi.keras.tasks.training import KerasTraining, Trainer, trainer_key
from karikomi.quantize import Coded, OutputUnits
from karikomi.shrink.account import ROUND
from karikomi.tasks.runner import Arrays, Form, Phase, chain_of
from karikomi.tasks.splits import Data, Inputs
from karikomi.tasks.task import Task, source_of
from karikomi.tasks.user_code import called

_BATCH = 256


class KerasRunner:
    """One task on Keras; models of each form are made once, and filled with the arrays of each call."""

    def __init__(self, task: Task, data: Data, *, seed: int) -> None:
        self._task, self._data, self._seed = task, data, seed
        self._configs: list[str] = []
        self._models: dict[str, Any] = {}
        self._trainers: dict[str, Trainer] = {}

    def environment(self) -> dict[str, Any]:
        """Return versions, machine kind and backend."""
        backend = keras.config.backend()
        return {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "keras": keras.__version__,
            "backend": backend,
            "machine": platform.machine(),
            "threads": None,
        }

    def fresh(self) -> Arrays:
        """Return the arrays of the network as the task's code makes it, from the seed alone."""
        return to_arrays(self.untrained())

    def describe(self) -> str:
        """Return the widths of the layers with weights as a short text."""
        model = self._original()
        shapes = [tuple(item.variable.shape) for item in self._weights().values()]
        kernels = [shape for shape in shapes if len(shape) > 1]
        widths = [kernels[0][-2], *(shape[-1] for shape in kernels)] if kernels else []
        return f"{chain_of(widths)}, {model.count_params():,} parameters"

    def fingerprint(self) -> str:
        """Return a digest of the network's layers and arrays."""
        model = self._original()
        names = [(type(layer).__name__, layer.name) for layer in all_layers(model)]
        digest = hashlib.sha256(f"{names}{source_of(type(model))}".encode())
        for name, array in self.fresh().items():
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()[:16]

    def left_alone(self) -> dict[str, str]:
        """Return name -> why pruning does not act on a parameter; biases are not listed."""
        found = self._weights()
        reasons = prunable(found, ("norms", "embeddings"))[1]
        reasons |= {
            name: "it is not trained"
            for name, item in found.items()
            if is_weight(item) and not item.variable.trainable
        }
        return {name: reason for name, reason in reasons.items() if reason != "a bias"}

    def prunable(self) -> list[str]:
        """Return the names of the kernels that pruning acts on."""
        found = self._weights()
        names = prunable(found, ("norms", "embeddings"))[0]
        return [name for name in names if found[name].variable.trainable]

    def tied(self) -> dict[str, str]:
        """Return nothing: a variable that layers share has one name."""
        return {}

    def output_units(self) -> dict[str, OutputUnits]:
        """Return name -> output units of each variable that has them."""
        items = weights_of(self._original(), where="compress")
        names = names_of([item.variable for item in items])
        return {
            name: output_units(item)
            for name, item in zip(names, items, strict=True)
            if item.axes is not None
        }

    def biases(self) -> list[str]:
        """Return the names of the bias vectors of the layers that pruning acts on."""
        found, chosen = self._weights(), set(self.prunable())
        layers = {id(found[name].layer) for name in chosen}
        return [
            name
            for name, item in found.items()
            if id(item.layer) in layers and item.variable.name == "bias"
        ]

    def given_bytes(self, arrays: Arrays) -> dict[str, int]:
        """Return name -> bytes of each array in the type that the network came in."""
        return {name: array.nbytes for name, array in arrays.items()}

    def train(self, arrays: Arrays, phase: Phase) -> KerasTraining:
        """Begin a phase from the given arrays."""
        return KerasTraining(
            self._task,
            self._data,
            self._trainer(arrays, phase),
            arrays,
            phase,
            self._seed,
            outputs=self.outputs,
        )

    def _trainer(self, arrays: Arrays, phase: Phase) -> Trainer:
        key = f"{_key(arrays)}\n{trainer_key(phase)}"
        if key not in self._trainers or not self._trainers[key].free:
            loss = self._loss() if phase.teacher is None else self._distilled(self._loss())
            self._trainers[key] = Trainer(self._made(arrays), phase, loss)
        return self._trainers[key]

    def _distilled(self, loss: Any) -> Any:
        """Return a loss with the dense model as a teacher, or as it is where it is no cross-entropy of one output."""
        recipe, loss = self._task.recipe, keras.losses.get(loss) if isinstance(loss, str) else loss
        single = len(graph.outputs) == 1 if (graph := graph_of(self._original())) else True
        if not (recipe.distill and single and can_distil(loss)):
            return loss
        return DistilledLoss(
            loss, recipe.distill, recipe.temperature, probabilities=self._probabilities()
        )

    def outputs(self, arrays: Arrays, inputs: Inputs) -> np.ndarray:
        """Return the network's outputs in inference mode, those that are judged."""
        return self._predicted(self._model(arrays), inputs)

    def input_gradients(
        self, arrays: Arrays, inputs: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        """Return d loss / d inputs, of the inputs' shape, in inference mode."""
        model, loss = self._model(arrays), self._loss()
        leaf = keras.Variable(inputs, trainable=True, name="inputs")
        wanted = keras.ops.convert_to_tensor(targets)

        def value(outputs: Any) -> Any:
            return keras.ops.mean(loss(wanted, outputs))

        def of_leaf(_: Any, training: bool = False) -> Any:
            return model(keras.ops.convert_to_tensor(leaf), training=training)

        (found,) = gradients(of_leaf, [leaf], value, None)
        return np.asarray(keras.ops.convert_to_numpy(found), dtype=np.float32)

    def layer_outputs(self, arrays: Arrays, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return layer -> its outputs (n, ...), of layers with weights of their own, of their last call."""
        model, found = self._model(arrays), dict[str, np.ndarray]()

        def see(layer: Any, _: Any, args: Any, kwargs: Any, result: Any) -> None:
            if layer is not model and layer.weights and hasattr(result, "shape"):
                found[layer.path] = as_floats(np.asarray(keras.ops.convert_to_numpy(result)))

        with watched(model, see):
            run(model, _given(inputs))
        return found

    def notes(self) -> dict[str, str]:
        """Return what a file has to say beside the tensors of the task's network, as it is before a shrink."""
        return notes_of(self._original())

    def adopt(self, notes: Mapping[str, str]) -> None:
        """Take the notes of a shrunk network, for models that are built from arrays of its shapes."""
        if notes.get(CONFIG) and notes[CONFIG] not in self._configs:
            self._configs.append(notes[CONFIG])

    def shrink(
        self, arrays: Arrays, *, width: float | Sequence[int] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Return the arrays without dead units, or with the share `width` of all units, and the report of it."""
        if isinstance(width, Sequence):
            reason = "numbers of units for each layer are of PyTorch modules"
            return arrays, {"removed": 0, "left_alone": {"the network": reason}}
        try:
            small, report = shrink(
                self._model(arrays),
                width=width,
                multiple_of=ROUND if width else 1,
                data=self._calibration() if width else None,
                inputs=_given(self._data.validation.first(8).inputs),
            )
            text = small.to_json()
            self._from_json(text)
        except Unsupported as error:
            return arrays, {"removed": 0, "left_alone": {"the network": str(error)}}
        facts = {k: v for k, v in report.as_dict().items() if k not in ("kept", "members")}
        notes = {CONFIG: text} if report.removed else {}
        self.adopt(notes)
        return to_arrays(small), {**facts, "notes": {**notes_of(small), **notes} if notes else {}}

    def quantized(
        self, arrays: Arrays, *, only: Sequence[str] | None = None, **size: Any
    ) -> tuple[dict[str, np.ndarray | Coded], dict[str, str]]:
        """Return the arrays with codes for every variable, or those of `only`, and notes on what stays as it is."""
        model = self._model(arrays)
        data = self._calibration() if "rate" in size else None
        coded = quantize_(model, **size, data=data, only=only, seed=self._seed, progress=False)
        tensors = to_stored(model)
        for variable in model.weights:
            forget(variable)
        return tensors, {**coded.left_alone, **coded.notes}

    def integer_outputs(
        self, tensors: Mapping[str, np.ndarray | Coded], inputs: Inputs
    ) -> np.ndarray:
        """Raise `Unsupported`: no engine with integer kernels runs Keras models here."""
        raise Unsupported(
            "Keras models are not run with integer activations", where=f"task {self._task.name}"
        )

    def integer_milliseconds(
        self, tensors: Mapping[str, np.ndarray | Coded], dense: Arrays
    ) -> dict[str, float]:
        """Raise `Unsupported`, as `integer_outputs` does."""
        raise Unsupported(
            "Keras models are not run with integer activations", where=f"task {self._task.name}"
        )

    def milliseconds(self, arrays: Arrays) -> float:
        """Return the median time of a forward pass on up to 64 validation examples, measured now."""
        model, given = self._model(arrays), _given(self._data.validation.first().inputs)
        self._timed(model, given)
        return statistics.median(self._timed(model, given) for _ in range(9))

    def network(self, tensors: Mapping[str, np.ndarray | Coded]) -> Any:
        """Return the task's model, filled with arrays or codes; compiled if the one that was given is."""
        model, make = self._filled(tensors), self._task.model
        if isinstance(make, Copies):
            make.compile_(model)
        return model

    def _filled(self, tensors: Mapping[str, np.ndarray | Coded]) -> Any:
        return fill_(self._made(tensors), tensors)

    def costs(self, arrays: Arrays, examples: int) -> dict[str, int | None]:
        """Return ``parameters``; what a forward pass holds in memory is up to the backend, and not known."""
        model = self._model(arrays)
        return {"parameters": sum(int(np.prod(v.shape)) for v in model.weights), "memory": None}

    def times(self, before: Arrays, after: Arrays, examples: int) -> list[tuple[float, float]]:
        """Return milliseconds of forward passes of two networks, run in turn on so many validation examples."""
        given = _given(self._data.validation.first(examples).inputs)
        first, second = self._model(before), self._filled(after)
        pairs, start = [], time.perf_counter()
        while len(pairs) <= 21 and (len(pairs) <= 5 or time.perf_counter() - start < 1.0):
            pairs.append((self._timed(first, given), self._timed(second, given)))
        return pairs[1:]

    def forms(self) -> dict[str, Form]:
        """Return the forms in which the network can be written."""
        return FORMS

    def write(
        self, form: str, dense: Arrays, tensors: Mapping[str, np.ndarray | Coded], path: Path
    ) -> dict[str, Any]:
        """Write the network of the tensors in a form, and return its difference to the network, and other facts."""
        train = self._data.train
        some = train.take(np.arange(min(len(train), 64)))
        return OtherForms(self._filled(tensors), _given(some.inputs)).write(form, path)

    def untrained(self) -> Any:
        """Return the task's network as its code makes it."""
        where, what = f"task {self._task.name}", "the task's model function raised"
        make = self._task.model
        if isinstance(make, str):
            raise InvalidArgument("no built-in network of Keras", where=where, got=make)
        with _seeded(self._seed):
            model = called(make, what, where=where)
        if not isinstance(model, keras.Model):
            raise InvalidArgument(
                "the model is not a Keras model", where=where, got=type(model).__name__
            )
        return model if isinstance(make, Copies) else Copies(model)()

    def _original(self) -> Any:
        if "" not in self._models:
            self._models[""] = self.untrained()
        return self._models[""]

    def _weights(self) -> dict[str, Any]:
        return oriented(self._original(), where="compress")

    def _model(self, arrays: Mapping[str, Any]) -> Any:
        """Return the model of these shapes, filled."""
        key = _key(arrays)
        if key not in self._models:
            self._models[key] = self._made(arrays)
        return fill_(self._models[key], arrays)

    def _made(self, arrays: Mapping[str, Any]) -> Any:
        """Return a new model of these shapes: the task's own, or the shrunk one that has them."""
        wanted = {name: tuple(array.shape) for name, array in arrays.items()}
        makers: list[Callable[[], Any]] = [self.untrained]
        makers += [lambda text=text: self._from_json(text) for text in reversed(self._configs)]
        for make in makers:
            model = make()
            shapes = zip(names_of(model.weights), model.weights, strict=True)
            if {name: tuple(map(int, v.shape)) for name, v in shapes} == wanted:
                return model
        raise Unsupported(
            "no network of the task has these shapes", where=f"task {self._task.name}"
        )

    def _from_json(self, text: str) -> Any:
        own = {
            name: thing
            for layer in all_layers(self._original())
            for name, thing in own_objects(layer).items()
        }
        try:
            with keras.saving.custom_object_scope(own):
                # A copy has its variables under the same paths as all other copies.
                return copied(keras.models.model_from_json(text))
        except Exception as error:
            raise Unsupported(
                "the smaller network cannot be made from its configuration",
                where=f"task {self._task.name}",
                got=str(error)[:200],
            ) from error

    def _loss(self) -> Any:
        """Return the loss as Keras takes it: targets first."""
        loss = self._task.loss
        if isinstance(loss, str):
            return _built_in(loss, self._probabilities)
        if isinstance(loss, keras.losses.Loss | Mapping | list) or loss is None:
            return loss
        if getattr(loss, "__module__", "").startswith("keras."):
            return loss
        return lambda targets, outputs: loss(outputs, targets)

    def _probabilities(self) -> bool:
        found = self._predicted(self._original(), self._data.validation.first().inputs)
        return bool((found >= 0).all() and np.allclose(found.sum(-1), 1, atol=1e-3))

    def _predicted(self, model: Any, inputs: Inputs) -> np.ndarray:
        where, what = f"task {self._task.name}", "the model failed on a batch of inputs"
        given = _given(inputs)
        found = called(
            lambda: model.predict(given, batch_size=_BATCH, verbose=0), what, where=where
        )
        return as_floats(np.asarray(self._selected(found)))

    def _selected(self, found: Any) -> Any:
        wanted = self._task.output
        if isinstance(found, Mapping | list | tuple) and wanted is not None:
            several: Any = found
            try:
                return several[wanted]
            except (LookupError, TypeError) as error:
                raise InvalidArgument(
                    "there is no such output", where=f"task {self._task.name}", got=repr(wanted)
                ) from error
        if isinstance(found, Mapping) and "logits" in found:
            return found["logits"]
        if isinstance(found, Mapping | list | tuple):
            raise InvalidArgument(
                "the network returns several outputs",
                where=f"task {self._task.name}",
                got=list(found) if isinstance(found, Mapping) else len(found),
                hint="output= is a key or a place",
            )
        return found

    def _timed(self, model: Any, given: Any) -> float:
        start = time.perf_counter()
        model.predict_on_batch(given)
        return (time.perf_counter() - start) * 1e3

    def _calibration(self) -> list[Any]:
        """Return batches of up to 512 training examples, without targets."""
        return [(_given(part.inputs), None) for part in self._data.calibration()]


def runner_for(task: Task, data: Data, *, seed: int) -> KerasRunner:
    """Return the runner of a task."""
    return KerasRunner(task, data, seed=seed)


def _key(arrays: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} {tuple(arrays[name].shape)}" for name in sorted(arrays))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what layers draw their weights from, and put back the generators of Python and NumPy."""
    states = random.getstate(), np.random.get_state()
    try:
        keras.utils.set_random_seed(seed % 2**31)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _given(inputs: Inputs) -> Any:
    """Return inputs as a model takes them: several positional ones as a list."""
    return list(inputs) if isinstance(inputs, tuple) else inputs


def _built_in(name: str, probabilities: Callable[[], bool]) -> Any:
    if name == "cross_entropy":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=not probabilities())
    if name == "mean_squared_error":
        return keras.losses.MeanSquaredError()
    return keras.losses.get(name)
