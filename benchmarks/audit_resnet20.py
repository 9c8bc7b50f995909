"""Robustness of a trained ResNet-20 on CIFAR-10 and of the same network with few bits: corruptions, and attacks.

    KARIKOMI_DATA=../shared/data python benchmarks/audit_resnet20.py [--bits 4] [--most 1000] [--attacked 256]

Ten corruptions at five severities on the first `--most` test images, both networks, with the same random numbers, and
projected gradient descent within 2/255 of the range on each network and carried over from the dense one. Weights are
rounded to the nearest of 2^bits values per output channel, without any training. Printed: the table, with errors
relative to the dense network, and the processor time of each part.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

import karikomi as kk
from karikomi.audit.attacks import attacked
from karikomi.audit.stress import under_corruptions
from karikomi.tasks import Data, Split, Task

DATA = Path(os.environ.get("KARIKOMI_DATA") or Path(__file__).parents[2] / "shared" / "data")
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def images() -> Split:
    """Return the test images, as the published weights take them; the file is in random order."""
    with np.load(DATA / "cifar10_test.npz") as stored:
        pictures = (stored["images"].astype(np.float32) / 255 - MEAN) / DEVIATION
        return Split(
            np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)), stored["labels"].astype(int)
        )


def weights() -> dict[str, np.ndarray]:
    """Return the published weights, with the counters that their file lacks."""
    arrays = load_file(DATA / "resnet20_cifar10.safetensors")
    counters = {
        name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64)
        for name in arrays
        if name.endswith("running_mean")
    }
    return {**counters, **arrays}


def rounded(arrays: dict[str, np.ndarray], bits: int) -> dict[str, np.ndarray]:
    """Return the arrays with kernels of few bits, nearest values, a scale per output channel."""
    most = 2 ** (bits - 1) - 1
    made = dict(arrays)
    for name, array in arrays.items():
        if array.ndim > 1:
            rows = array.reshape(len(array), -1)
            scale = np.abs(rows).max(axis=1, keepdims=True) / most
            made[name] = (np.rint(rows / scale) * scale).reshape(array.shape).astype(np.float32)
    return made


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the seconds of processor that it took."""
    began = time.process_time()
    return call(), time.process_time() - began


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--most", type=int, default=1_000)
    parser.add_argument("--attacked", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    test, dense = images(), weights()
    data = Data(test, test, test)
    task = Task(name="cifar10-resnet20", model="cifar-resnet20", data=lambda: data)
    runner = kk.registry.framework("torch").runner_for(task, data, seed=0)
    pair = (dense, rounded(dense, arguments.bits))
    found, seconds = timed(
        lambda: under_corruptions(task, runner, pair, test, seed=0, most=arguments.most)
    )
    print(
        f"ResNet-20, {arguments.bits} bits; {found['examples']} images; accuracy of five severities in %"
    )
    print("| corruption | dense | small | drop | errors, relative | p |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for row in found["rows"]:
        texts = [
            " ".join(f"{100 * value:.1f}" for value in row[key]) for key in ("before", "after")
        ]
        print(
            f"| {row['corruption']} | {' | '.join(texts)} | {100 * row['drop']:.1f} | {row['relative']:.3f} |"
            f" {row['p']:.2g} |"
        )
    relative = np.mean([row["relative"] for row in found["rows"]])
    print(f"mean of the relative errors {relative:.3f}; {seconds:.0f} s of processor", flush=True)
    hit, seconds = timed(
        lambda: attacked(task, runner, pair, test, seed=0, most=arguments.attacked)
    )
    print(
        f"attack within 2/255, {hit['steps']} steps, {hit['examples']} images: dense {100 * hit['clean_before']:.1f} ->"
        f" {100 * hit['before']:.1f} %, small {100 * hit['clean_after']:.1f} -> {100 * hit['after']:.1f} % by its own"
        f" gradients, {100 * hit['transfer']:.1f} % by those of the dense one; {seconds:.0f} s of processor"
    )
    print(platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
