"""Exact global magnitude pruning of many weights, compared with torch's methods, and streamed from a file.

Prints one row per method: seconds (median), ratio to karikomi, peak memory above weights and masks, and the
difference to the requested number. Each method runs in a separate process, so that the peaks are independent.
``--stream 1000000000`` adds pruning of a safetensors file of that many weights in bounded memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import karikomi as kk

SPARSITY = 0.9
WAYS = ("karikomi", "karikomi, all scores equal", "torch global_unstructured", "cat + kthvalue")


def network(weights: int, *, equal: bool) -> nn.Sequential:
    """Return 12 linear layers of `weights` weights together."""
    side = int((weights / 12) ** 0.5)
    torch.manual_seed(0)
    layers = [nn.utils.skip_init(nn.Linear, side, side, bias=False) for _ in range(12)]
    for layer in layers:
        _ = layer.weight.data.fill_(1.0) if equal else layer.weight.data.normal_()
    return nn.Sequential(*layers)


def by_karikomi(module: nn.Sequential) -> list[torch.Tensor]:
    """Prune and return the masks."""
    return list(kk.torch.prune_(module, sparsity=SPARSITY).values())


def by_torch(module: nn.Sequential) -> list[torch.Tensor]:
    """Prune by torch's parametrization."""
    chosen = [(layer, "weight") for layer in module]
    torch_prune.global_unstructured(chosen, torch_prune.L1Unstructured, amount=SPARSITY)
    return [layer.weight_mask for layer in module]


@torch.no_grad()
def by_kthvalue(module: nn.Sequential) -> list[torch.Tensor]:
    """Prune by the threshold of all magnitudes in one vector."""
    every = torch.cat([layer.weight.abs().flatten() for layer in module])
    limit = every.kthvalue(round(SPARSITY * len(every))).values
    del every
    masks = [layer.weight.abs() > limit for layer in module]
    for layer, mask in zip(module, masks, strict=True):
        layer.weight.mul_(mask)
    return masks


def measured(way: str, weights: int) -> dict[str, float]:
    """Run one method once in this process; return its seconds, extra MiB and removed weights."""
    module = network(weights, equal="equal" in way)
    warm = network(12_000, equal=False)
    function = {"karikomi": by_karikomi, "torch": by_torch, "cat": by_kthvalue}[
        way.split()[0].rstrip(",")
    ]
    function(warm)
    size = sum(parameter.numel() for parameter in module.parameters())
    # Otherwise the garbage of the imports may be collected while a method is timed.
    gc.collect()
    before, started = peak(), time.perf_counter()
    masks = function(module)
    seconds = time.perf_counter() - started
    removed = sum(mask.numel() - int(mask.bool().count_nonzero()) for mask in masks)
    mask_bytes = sum(mask.numel() * mask.element_size() for mask in masks)
    return {
        "seconds": seconds,
        "extra_mib": (peak() - before - mask_bytes) / 2**20,
        "removed": removed,
        "asked": round(SPARSITY * size),
    }


def streamed(weights: int) -> dict[str, float]:
    """Prune a file of `weights` weights; return seconds and the peak of the whole process in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "dense.safetensors", Path(folder) / "pruned.safetensors"
        write(source, weights)
        before, started = peak(), time.perf_counter()
        result = kk.numpy.prune_file(source, target, sparsity=SPARSITY)
        return {
            "seconds": time.perf_counter() - started,
            "peak_mib": peak() / 2**20,
            "before_mib": before / 2**20,
            "removed": sum(removed for removed, _ in result.counts.values()),
            "asked": round(SPARSITY * weights),
        }


def write(path: Path, weights: int) -> None:
    """Write a safetensors file of random float32 weights in parts, in bounded memory."""
    part = 10_000_000
    sizes = [min(part, weights - start) for start in range(0, weights, part)]
    header, offset = {}, 0
    for index, size in enumerate(sizes):
        span = [offset, offset + 4 * size]
        header[f"layer{index}.weight"] = {"dtype": "F32", "shape": [size], "data_offsets": span}
        offset += 4 * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in sizes:
            file.write(generator.standard_normal(size, np.float32).tobytes())


def peak() -> int:
    """Return the largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(way: str, weights: int) -> dict[str, float]:
    """Run one method in a separate process."""
    command = [sys.executable, __file__, "--way", way, "--weights", str(weights)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", type=int, default=0)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run = (
            streamed(options.weights)
            if options.way == "stream"
            else measured(options.way, options.weights)
        )
        print(json.dumps(run))
        return
    print(f"{options.weights:,} weights, {SPARSITY:.0%} to go, {torch.get_num_threads()} threads")
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            rounds[way].append(child(way, options.weights))
    own = statistics.median(run["seconds"] for run in rounds["karikomi"])
    for way, runs in rounds.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        extra = max(run["extra_mib"] for run in runs)
        off = int(runs[0]["removed"] - runs[0]["asked"])
        print(
            f"{way:28} {seconds:8.3f} s  x{seconds / own:5.1f}  {extra:8.0f} MiB extra  off by {off}"
        )
    if options.stream:
        run = child("stream", options.stream)
        off = int(run["removed"] - run["asked"])
        print(
            f"{options.stream:,} weights streamed: {run['seconds']:.1f} s, peak {run['peak_mib']:.0f} MiB "
            f"of the whole process, off by {off}"
        )


if __name__ == "__main__":
    main()
