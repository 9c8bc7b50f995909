"""Audits of small networks without a framework: of images, of tokens with words, and of a regression."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.audit import audit
from karikomi.audit.gates import gate_of, judged, verdict_of
from karikomi.tasks import Data, Split, Task

WORDS = ("<unk>", "the", "river", "ran", "past", "a", "station", "with", "remarkably", "quiet")


class Linear:
    """A runner of ``features @ weight.T``, where features are inputs, or counts of tokens by their place."""

    def __init__(self, shape: tuple[int, int], loss: str) -> None:
        self.shape, self.loss = shape, loss

    def outputs(self, arrays: Any, inputs: np.ndarray) -> np.ndarray:
        return self._features(inputs) @ arrays["head.weight"].T

    def fresh(self) -> dict[str, np.ndarray]:
        return {"head.weight": np.random.default_rng(9).normal(size=self.shape).astype(np.float32)}

    def layer_outputs(self, arrays: Any, inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {"head": self.outputs(arrays, inputs)}

    def milliseconds(self, arrays: Any) -> float:
        return 0.25

    def costs(self, arrays: Any, examples: int) -> dict[str, int | None]:
        return {"parameters": 0, "memory": 1_000 * examples}

    def input_gradients(self, arrays: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        out = self.outputs(arrays, inputs)
        if self.loss == "mean_squared_error":
            slope = 2 * (out - targets)
        else:
            slope = np.exp(out - out.max(1, keepdims=True))
            slope /= slope.sum(1, keepdims=True)
            slope[np.arange(len(targets)), targets] -= 1
        return (slope @ arrays["head.weight"]).reshape(inputs.shape).astype(np.float32)

    def _features(self, inputs: np.ndarray) -> np.ndarray:
        if inputs.dtype.kind == "f":
            return inputs.reshape(len(inputs), -1)
        return np.eye(len(WORDS), dtype=np.float32)[inputs].reshape(len(inputs), -1)


@dataclass(frozen=True)
class Audited:
    """A task, and the arrays of the network before and after."""

    task: Task
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    slices: dict[str, Any]

    @functools.lru_cache(maxsize=4)  # noqa: B019  (three of them, which live as long as the tests)
    def result(self) -> dict[str, Any]:
        """Return the audit with every part that there is."""
        weight = self.before["head.weight"]
        loss = str(self.task.loss)
        runner: Any = Linear(weight.shape, loss)  # type: ignore[arg-type]
        found = audit(
            self.task,
            self.before,
            self.after,
            runner=runner,
            slices=self.slices,
            labels=("runs/demo/dense.safetensors", "runs/demo/model.karikomi"),
            population=4,
            sizes=(40_000, 2_000),
            most=200,
        )
        gates = ("drop>0.005", "class_drop>0.03@holm", "churn>0.9", "stable_flips>0.4")
        tried = [judged(gate_of(text), found) for text in gates]
        found |= {"gates": [gate.as_dict() for gate in tried], "verdict": verdict_of(tried)}
        return {**found, "command": "karikomi audit dense.safetensors model.karikomi --task demo"}

    __hash__ = object.__hash__


def _made(
    name: str,
    inputs: np.ndarray,
    outputs: int,
    target: Callable[[np.ndarray], np.ndarray],
    **more: Any,
) -> Audited:
    generator = np.random.default_rng(3)
    runner = Linear((outputs, 0), "")
    width = runner._features(inputs[:1]).shape[1]
    weight = (generator.normal(size=(outputs, width)) / 4).astype(np.float32)
    targets = target(runner.outputs({"head.weight": weight}, inputs))
    data = Data(*(Split(inputs, targets) for _ in range(3)))
    noise = generator.normal(0, 0.08, weight.shape).astype(np.float32)
    after = {"head.weight": np.where(np.abs(weight) > 0.05, weight + noise, 0).astype(np.float32)}
    task = Task(name=name, model=dict, data=lambda: data, **more)
    return Audited(task, {"head.weight": weight}, after, {"odd": np.arange(len(inputs)) % 2 == 1})


def _waves() -> np.ndarray:
    generator, places = np.random.default_rng(0), np.linspace(0, 3, 8)
    phase = generator.uniform(0, 6, (400, 3, 1, 1))
    waves = np.sin(places[:, None] * generator.uniform(0.5, 2, (400, 1, 1, 1)) + places + phase)
    return (waves + 0.2 * generator.normal(size=waves.shape)).astype(np.float32)


IMAGES = _made("pictures", _waves(), 6, lambda out: out.argmax(1))
TEXT = _made(
    "sentences",
    np.random.default_rng(1).integers(0, len(WORDS), (300, 14)),
    3,
    lambda out: out.argmax(1),
    words=WORDS,
)
REGRESSION = _made(
    "levels",
    np.random.default_rng(2).normal(size=(300, 12)).astype(np.float32),
    2,
    lambda out: out.astype(np.float32),
    loss="mean_squared_error",
    metric="mean_squared_error",
)
