"""Networks of keras.applications shrunk to half of their width on each backend, saved, and loaded without karikomi.

Prints one row per network and backend: parameters and multiply-accumulates before and after, the difference of the
proof (removing units against making them zero), the difference after saving and loading in a process in which
karikomi cannot be imported, milliseconds of a prediction of one image before and after (medians, in alternation),
and seconds of the shrink. Weights are random. ``--networks ConvNeXtTiny Xception`` runs others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NETWORKS = ("MobileNetV2", "ResNet50", "DenseNet121", "EfficientNetB0", "VGG16")
BACKENDS = ("torch", "jax", "tensorflow")
RELOAD = """
import sys
sys.modules["karikomi"] = None  # an import of it fails
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[3], keras.ops.convert_to_numpy(model(np.load(sys.argv[2]), training=False)))
"""


def row(name: str, size: int, folder: Path) -> dict[str, Any]:
    """Shrink one network on the backend of this process, and return the figures."""
    import keras
    import numpy as np

    import karikomi as kk

    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    model = make(input_shape=(size, size, 3), weights=None, classes=100)
    start = time.perf_counter()
    small, report = kk.keras.shrink(model, width=0.5)
    seconds = time.perf_counter() - start
    images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype("float32")
    expected = keras.ops.convert_to_numpy(small(images, training=False))
    paths = [folder / leaf for leaf in ("small.keras", "images.npy", "outputs.npy")]
    small.save(paths[0])
    np.save(paths[1], images)
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, paths)], check=True)
    reloaded = np.abs(np.load(paths[2]) - expected).max() / np.abs(expected).max()
    return {
        "parameters": (report.parameters_before, report.parameters_after),
        "macs": (report.macs_before, report.macs_after),
        "proof": report.max_difference,
        "reloaded": float(reloaded),
        "ms": in_alternation([model, small], images[:1]),
        "seconds": seconds,
    }


def in_alternation(models: list[Any], images: Any, rounds: int = 8) -> list[float]:
    """Return the median milliseconds of a compiled prediction of each model, two warm-up rounds apart."""
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, times in zip(models, taken, strict=True):
            start = time.perf_counter()
            model.predict_on_batch(images)
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times[2:]) for times in taken]


def measured(name: str, backend: str, size: int) -> dict[str, Any]:
    """Return the figures of a network in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", name, "--size", str(size), "--folder", folder]
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(row(options.one, options.size, options.folder)))
        return
    head = ("network", "backend", "parameters", "MACs", "proof", "reloaded", "ms", "seconds")
    print(("{:<15} {:<11} {:>23} {:>23} {:>8} {:>8} {:>15} {:>8}").format(*head))
    for name in options.networks:
        for backend in options.backends:
            found = measured(name, backend, options.size)
            counts = [
                "{:,} -> {:,}".format(*(round(n / 1000) for n in found[key]))
                for key in ("parameters", "macs")
            ]
            print(
                f"{name:<15} {backend:<11} {counts[0] + ' k':>23} {counts[1] + ' k':>23} {found['proof']:>8.1g} "
                f"{found['reloaded']:>8.1g} {'{:.1f} -> {:.1f}'.format(*found['ms']):>15} {found['seconds']:>8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
