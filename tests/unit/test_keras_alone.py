"""Keras on JAX has no need of optax: only `kk.jax` has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")
pytest.importorskip("keras")

SCRIPT = """
import sys
sys.modules["optax"] = None
import keras, numpy as np, karikomi as kk
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile(kk.keras.clipped(keras.optimizers.SGD(0.1), kk.clip.ByNorm(1.0)), "mse")
model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
assert model.optimizer.last.pre > 0
try:
    kk.jax.clip
except kk.KarikomiError as error:
    print(error)
"""


def test_keras_on_jax_without_optax() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "optax is not installed" in done.stdout and "pip install '.[jax]'" in done.stdout
