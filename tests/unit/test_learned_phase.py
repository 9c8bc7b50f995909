"""Phases of quantized training, and what the runner of the search does with a network beside training it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import karikomi as kk  # noqa: E402
from karikomi import registry  # noqa: E402
from karikomi.quantize import Coded  # noqa: E402
from karikomi.record import Recorder  # noqa: E402
from karikomi.tasks import Data, LearnedCodes, Phase, Recipe, Split, Task  # noqa: E402


class Tied(torch.nn.Module):
    """Two layers with one weight, a batch norm, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm, self.last = torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)

    def forward(self, inputs: Any) -> Any:
        return self.last(self.norm(torch.relu(self.second(torch.relu(self.first(inputs))))))


def _split(count: int, seed: int) -> Split:
    inputs = np.random.default_rng(seed).standard_normal((count, 6), dtype=np.float32)
    return Split(inputs, np.argmax(inputs[:, :3], axis=1).astype(np.int64))


def _runner(model: Any = Tied) -> Any:
    recipe = Recipe(batch_size=20, threads=1)
    data = Data(_split(100, 0), _split(50, 1), _split(50, 2))
    task = Task(name="t", model=model, data=lambda: data, recipe=recipe)
    return registry.framework("torch").runner_for(task, data, seed=0)


def _phase(arrays: Any, *, strength: float = 1e-6, **more: Any) -> Phase:
    how = LearnedCodes(goal=120.0, warm=4, strength=strength)
    return Phase(
        stage="learned",
        epochs=6,
        learning_rate=1e-2,
        clip=kk.clip.ByGlobalNorm(1.0),
        teacher=arrays,
        learned=how,
        **more,
    )


def test_a_phase_of_learned_codes_resumes_bit_for_bit(tmp_path: Path) -> None:
    runner = _runner()
    arrays = runner.fresh()
    whole = runner.train(arrays, _phase(arrays))
    with Recorder(tmp_path / "a.jsonl") as recorder:
        for _ in range(6):
            whole.run_epoch(recorder)
    first = runner.train(arrays, _phase(arrays))
    with Recorder(tmp_path / "b.jsonl") as recorder:
        for _ in range(6):
            first.run_epoch(recorder)
            kept, facts = first.checkpoint()
            first = runner.train(arrays, _phase(arrays))
            first.restore(kept, facts)
    expected, found = whole.arrays(), first.arrays()
    assert {n: a.tobytes() for n, a in found.items()} == {
        n: a.tobytes() for n, a in expected.items()
    }
    codes = first.coded()
    # Every parameter under its ordinary names, tied ones with one grid; the statistics of the norm are not trained.
    assert set(found) == set(arrays) and set(arrays) - set(codes) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert codes["first.weight"] is codes["second.weight"]
    for name, coded in codes.items():
        assert np.array_equal(coded.decode(), found[name]), name


def test_the_penalty_goes_to_its_goal(tmp_path: Path) -> None:
    """Many weights that say nothing: bits fall to the goal, and masked weights stay zero."""
    runner = _runner(lambda: torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Linear(40, 3)))
    arrays = runner.fresh()
    mask = np.arange(240).reshape(40, 6) % 3 > 0
    phase = _phase(arrays, strength=1e-3, masks={"0.weight": mask})
    training = runner.train(arrays, phase)
    before = training._codes._training.size().total
    with Recorder(tmp_path / "a.jsonl") as recorder:
        for _ in range(6):
            training.run_epoch(recorder)
    after = training._codes._training.size().total
    assert after < 0.7 * before and training._codes.done == 6 * 5
    assert not np.any(training.arrays()["0.weight"][~mask])


def test_every_tensor_is_quantized_to_a_rate() -> None:
    runner = _runner()
    arrays = runner.fresh()
    tensors, notes = runner.quantized(arrays, rate=4.0, method="gptq")
    assert set(tensors) == set(arrays)
    left = {name for name, tensor in tensors.items() if not isinstance(tensor, Coded)}
    assert left == {"norm.num_batches_tracked"} <= set(notes)
    again, _ = runner.quantized(arrays, rate=4.0, method="gptq")
    for name, tensor in tensors.items():
        same = again[name]
        if isinstance(tensor, Coded) and isinstance(same, Coded):
            assert np.array_equal(tensor.codes, same.codes), (
                "a pure function of the arrays and the seed"
            )
    some, _ = runner.quantized(arrays, only=["norm.running_var"], bits=8)
    assert [n for n, t in some.items() if isinstance(t, Coded)] == ["norm.running_var"]
    none, notes = runner.quantized(arrays, only=["norm.num_batches_tracked"], bits=8)
    assert not any(isinstance(t, Coded) for t in none.values()) and notes


def test_units_of_each_layer_are_removed_by_number() -> None:
    layers = lambda: torch.nn.Sequential(  # noqa: E731
        torch.nn.Linear(6, 12),
        torch.nn.ReLU(),
        torch.nn.Linear(12, 8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 3),
    )
    runner = _runner(layers)
    arrays = runner.fresh()
    small, report = runner.shrink(arrays, width=[5, 8])
    assert small["0.weight"].shape == (5, 6) and small["2.weight"].shape == (8, 5)
    norms = np.abs(arrays["0.weight"]).sum(1) if report["removed"] else None
    assert norms is not None and report["removed"] == 7
    runner.adopt(report["notes"])
    assert runner.outputs(small, _split(4, 5).inputs).shape == (4, 3)


def test_a_file_runs_with_integer_activations() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layers = lambda: torch.nn.Sequential(  # noqa: E731
        torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    )
    runner = _runner(layers)
    arrays = runner.fresh()
    tensors, _ = runner.quantized(arrays, bits=8)
    inputs = _split(130, 3).inputs
    found, expected = runner.integer_outputs(tensors, inputs), runner.outputs(arrays, inputs)
    assert found.shape == expected.shape
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_what_is_written_for_integer_kernels_is_what_is_searched(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layers = lambda: torch.nn.Sequential(  # noqa: E731
        torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    )
    runner = _runner(layers)
    arrays = runner.fresh()
    # Codes of more than 8 bits in one unit, which kernels do not take.
    arrays["0.weight"][2, 3] = 30.0
    tensors, _ = runner.quantized(arrays, rate=6.0, method="gptq")
    facts = runner.write("int8", arrays, tensors, tmp_path / "model.int8.onnx")
    assert facts["rounded_again"] == ["0.weight"] and facts["macs_float"] == 0
    inputs = _split(130, 3).inputs
    session = runtime.InferenceSession(tmp_path / "model.int8.onnx")
    (name,) = [value.name for value in session.get_inputs()]
    (written,) = session.run(None, {name: inputs.astype(np.float32)})
    assert np.array_equal(written, runner.integer_outputs(tensors, inputs))
