"""Every clipping rule on one small training with bad batches: ``python benchmarks/clip_rules.py``.

A 64-128-64-10 network is trained on scikit-learn's digits; two batches in a hundred are corrupted (inputs times
100, labels shuffled) and one in two hundred has a NaN. All rules get the same batches and the same initial
weights, with their default or the usual limits. Printed: test accuracy (mean, worst of the seeds), shares
of steps clipped and skipped, and the time of a step with the rule. This is one small network: do not generalise.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import karikomi as kk

RULES: dict[str, Any] = {
    "none (NaN steps still skipped)": None,
    "ByValue(0.01)": kk.clip.ByValue(0.01),
    "ByValue(0.1)": kk.clip.ByValue(0.1),
    "ByNorm(0.1)": kk.clip.ByNorm(0.1),
    "ByNorm(1.0)": kk.clip.ByNorm(1.0),
    "ByGlobalNorm(0.1)": kk.clip.ByGlobalNorm(0.1),
    "ByGlobalNorm(1.0)": kk.clip.ByGlobalNorm(1.0),
    "ByGlobalNorm(10.0)": kk.clip.ByGlobalNorm(10.0),
    "AGC(0.01)": kk.clip.AGC(0.01),
    "AGC(0.1)": kk.clip.AGC(0.1),
    "AutoClip(10)": kk.clip.AutoClip(10),
    "AutoClip(50)": kk.clip.AutoClip(50),
    "Quantile(0.9)": kk.clip.Quantile(0.9),
    "EMARatio(2.0)": kk.clip.EMARatio(2.0),
    "ZClip(2.5)": kk.clip.ZClip(2.5),
    "AdaGC(1.05)": kk.clip.AdaGC(1.05),
    "SPAM(5000)": kk.clip.SPAM(5000.0),
    "SPAM(50)": kk.clip.SPAM(50.0),
    "Smooth(1.0)": kk.clip.Smooth(1.0),
    "Normalize(1.0)": kk.clip.Normalize(1.0),
    "SkipSpikes(6.0)": kk.clip.SkipSpikes(6.0),
    "ZClip(2.5), then ByGlobalNorm(1.0)": kk.clip.Chain(
        kk.clip.ZClip(2.5), kk.clip.ByGlobalNorm(1.0)
    ),
    "SkipSpikes(6.0), then ByGlobalNorm(1.0)": kk.clip.Chain(
        kk.clip.SkipSpikes(6.0), kk.clip.ByGlobalNorm(1.0)
    ),
    "BlockRMS(1.0), on updates": kk.clip.BlockRMS(1.0),
}
OPTIMIZERS: dict[str, Any] = {
    "SGD, lr 0.1, momentum 0.9": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW, lr 0.003": lambda p: torch.optim.AdamW(p, lr=3e-3),
}
SPOILT, BROKEN = 0.02, 0.005


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training inputs and labels, test inputs and labels."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    return x[:1297], y[:1297], x[1297:], y[1297:]


def batches(
    x: torch.Tensor, y: torch.Tensor, steps: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of 64, some of them corrupted; a pure function of the seed."""
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = torch.from_numpy(generator.integers(0, len(y), 64))
        inputs, labels = x[chosen].clone(), y[chosen]
        luck = generator.random()
        if luck < BROKEN:
            inputs[0, 0] = float("nan")
        elif luck < BROKEN + SPOILT:
            inputs, labels = inputs * 100.0, labels[torch.from_numpy(generator.permutation(64))]
        yield inputs, labels


def train(rule: Any, make: Any, steps: int, seed: int) -> dict[str, float]:
    """Train once and return accuracy, shares and seconds per step spent around the optimizer."""
    x, y, test_x, test_y = data()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = make(model.parameters())
    handle = kk.torch.attach(optimizer, model, clip=rule)
    engaged = skipped = 0
    seconds = []
    for inputs, labels in batches(x, y, steps, seed):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        outcome = handle.last_update or handle.last
        assert outcome is not None and handle.last is not None  # noqa: S101
        engaged += outcome.engaged
        skipped += bool(handle.last.skipped)
    with torch.no_grad():
        right = (model(test_x).argmax(1) == test_y).double().mean()
    return {
        "accuracy": float(right),
        "clipped": engaged / steps,
        "skipped": skipped / steps,
        "microseconds": statistics.median(seconds) * 1e6,
    }


def main() -> None:
    """Run all rules with both optimizers and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="*", help="glob over the rules' names")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name, make in OPTIMIZERS.items():
        print(f"\n{name}; {arguments.steps} steps, {arguments.seeds} seeds")
        print(f"{'rule':<42}{'accuracy':>9}{'worst':>9}{'clipped':>9}{'skipped':>9}{'us/step':>9}")
        for text, rule in RULES.items():
            if not fnmatch.fnmatch(text, arguments.only):
                continue
            runs = [train(rule, make, arguments.steps, seed) for seed in range(arguments.seeds)]
            mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            worst = min(run["accuracy"] for run in runs)
            found.setdefault(name, {})[text] = {**mean, "worst": worst}
            print(
                f"{text:<42}{mean['accuracy']:>9.1%}{worst:>9.1%}{mean['clipped']:>9.1%}"
                f"{mean['skipped']:>9.1%}{mean['microseconds']:>9.0f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
