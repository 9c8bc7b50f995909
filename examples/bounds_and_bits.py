"""The effect of gradient clipping, weight bounds and pruning on the weights, the file size and coarse rounding.

Trains the same digits network four times from the same seed and prints one row for each. About ten seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import karikomi as kk
from karikomi.quantize import uniform

EPOCHS = 40
TASK = kk.tasks.load("digits")
DATA = TASK.data()
RUNNER = kk.torch.runner_for(TASK, DATA, seed=0)


def trained(**held: object) -> dict[str, np.ndarray]:
    """Return the arrays of the network after the same training, with a clip, a bound or a sparsity."""
    phase = kk.tasks.Phase(stage="example", epochs=EPOCHS, learning_rate=4e-3, **held)
    training = RUNNER.train(RUNNER.fresh(), phase)
    with tempfile.TemporaryDirectory() as folder, kk.record.Recorder(Path(folder) / "rows") as rows:
        for _ in range(EPOCHS):
            training.run_epoch(rows)
    return training.arrays()


def error(arrays: dict[str, np.ndarray]) -> float:
    """Return the test error in per cent."""
    outputs = RUNNER.outputs(arrays, DATA.test.inputs)
    return 100 * (1 - TASK.judge(outputs, DATA.test.targets))


def rounded(arrays: dict[str, np.ndarray], bits: int) -> dict[str, np.ndarray]:
    """Return the arrays with every weight matrix rounded to one grid of `bits` bits."""
    coarse = {
        name: uniform(arrays[name], bits=bits, axis=None).decode() for name in RUNNER.prunable()
    }
    return {**arrays, **coarse}


def packed(arrays: dict[str, np.ndarray]) -> int:
    """Return the size in bytes of the packed file with 8-bit weights."""
    coded = {name: uniform(arrays[name], bits=8, axis=0) for name in RUNNER.prunable()}
    with tempfile.TemporaryDirectory() as folder:
        return kk.save({**arrays, **coded}, Path(folder) / "model.karikomi").stat().st_size


def main() -> None:
    """Print the table."""
    rows = {
        "nothing": trained(),
        "gradients clipped": trained(clip=kk.clip.ByGlobalNorm(1.0)),
        "weights bounded": trained(bound=kk.bound.Clamp(0.25)),
        "weights pruned": trained(sparsity=0.9),
    }
    print("                    largest   test error %                    8-bit file")
    print("held in training     weight    float  3 bits  2 bits    zero %      bytes")
    for name, arrays in rows.items():
        weights = np.concatenate([arrays[weight].ravel() for weight in RUNNER.prunable()])
        print(
            f"{name:18} {np.abs(weights).max():8.2f} {error(arrays):8.1f}"
            f" {error(rounded(arrays, 3)):7.1f} {error(rounded(arrays, 2)):7.1f}"
            f" {100 * np.mean(weights == 0):9.1f} {packed(arrays):10,}"
        )


if __name__ == "__main__":
    main()
