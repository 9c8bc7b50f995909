"""Keras on JAX has no need of optax: only `nw.jax` has."""

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
import keras, numpy as np, niwaki as nw
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile(nw.keras.clipped(keras.optimizers.SGD(0.1), nw.clip.ByNorm(1.0)), "mse")
model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
assert model.optimizer.last.pre > 0
try:
    nw.jax.clip
except nw.NiwakiError as error:
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
    assert "optax is not installed" in done.stdout and "pip install 'niwaki[jax]'" in done.stdout
