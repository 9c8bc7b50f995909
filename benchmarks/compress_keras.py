"""A compiled Keras model through `kk.compress` on one backend: ``python benchmarks/compress_keras.py jax``.

A network of 50,826 parameters on scikit-learn's handwritten digits (1,000 to train, 400 choose, 397 judge), trained by
``fit`` and compressed at a drop of at most 0.005; its ``model.keras`` is then loaded in a process that cannot import
karikomi, and must give the same accuracy.

    python benchmarks/compress_keras.py [torch | jax | tensorflow] [--out runs/keras-digits]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

RELOAD = """
import sys
sys.modules["karikomi"] = None  # any import of it fails
import keras, numpy as np
data = np.load(sys.argv[2])
found = keras.models.load_model(sys.argv[1]).predict(data["inputs"], verbose=0)
print(float((found.argmax(1) == data["targets"]).mean()))
"""


def main() -> None:
    """Print the figures of one backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", nargs="?", default="torch")
    parser.add_argument("--out", type=Path, default=Path("runs/keras-digits"))
    parser.add_argument("--preset", default=None)
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend
    import keras
    import numpy as np
    from sklearn.datasets import load_digits

    import karikomi as kk

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = (digits.data / 16).astype(np.float32)[order], digits.target.astype(np.int64)[order]
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(256, "relu"),
            keras.layers.Dense(128, "relu"),
            keras.layers.Dense(10, "softmax"),
        ],
        name="digits",
    )
    net.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    net.fit(x[:1000], y[:1000], epochs=30, batch_size=32, verbose=0)
    start = time.process_time()
    out = arguments.out / arguments.backend
    result = kk.compress(
        net,
        train=(x[:1000], y[:1000]),
        validation=(x[1000:1400], y[1000:1400]),
        test=(x[1400:], y[1400:]),
        max_drop=0.005,
        preset=arguments.preset,
        config={"batch_size": 32, "prune_epochs": 8, "learning_rate": 2e-3},
        out=out,
        progress=False,
    )
    spent = time.process_time() - start
    np.savez(out.parent / "test.npz", inputs=x[1400:], targets=y[1400:])
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(out / "model.keras"), str(out.parent / "test.npz")],
        capture_output=True,
        text=True,
        check=True,
    )
    again = float(done.stdout.split()[-1])
    print(
        f"{arguments.backend}: {result['bytes_dense']:,} -> {result['bytes_packed']:,} bytes, {result['ratio']:.1f}x"
        f" (10x asked); validation {result['validation_before']:.4f} -> {result['validation_after']:.4f} (drop at"
        f" most 0.005), test {result['metric_before']:.4f} -> {result['metric_after']:.4f}, reloaded without"
        f" karikomi {again:.4f}; {result['verdict']}; {spent:.0f} s of processor"
    )
    assert again == result["metric_after"]


if __name__ == "__main__":
    main()
