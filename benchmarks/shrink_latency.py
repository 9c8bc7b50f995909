"""How fast a shrunk ResNet-56 is, and where: ``python benchmarks/shrink_latency.py``.

The network of `shrink_resnet56.py` at 2.1 times fewer multiply-accumulates, its channels in multiples of 1, 4 and
8, untrained on purpose: only the shapes count here. Processor time on one thread of a forward pass, all networks in
turns, relative to the dense network in the same engine: torch eager as trained, torch eager after
`kk.torch.fold_batch_norms_`, onnxruntime (`kk.torch.export_onnx`), and with ``--compile`` torch.compile.

    python benchmarks/shrink_latency.py [--batches 1 64] [--seconds 4] [--compile]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shrink_resnet20 import RESIDUAL
from shrink_resnet56 import BUDGET, trained

import karikomi as kk
from karikomi.torch.onnx_export.latency import measure_onnx

Networks = dict[str, Any]


@torch.no_grad()
def eager(networks: Networks, batch: int, seconds: float) -> dict[str, float]:
    """Return the median milliseconds of processor time of each network, all in turns."""
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    found: dict[str, list[float]] = {name: [] for name in networks}
    for module in networks.values():
        module(x)
    end = time.process_time() + seconds
    while time.process_time() < end or len(next(iter(found.values()))) < 5:
        for name, module in networks.items():
            start = time.process_time()
            module(x)
            found[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def folded(networks: Networks, batch: int, seconds: float) -> dict[str, float]:
    """As `eager`, with batch norms folded into convolutions."""
    copies = {name: copy.deepcopy(module) for name, module in networks.items()}
    for module in copies.values():
        kk.torch.fold_batch_norms_(module, torch.zeros(1, 3, 32, 32))
    return eager(copies, batch, seconds)


def compiled(networks: Networks, batch: int, seconds: float) -> dict[str, float]:
    """As `eager`, with torch.compile."""
    return eager({n: torch.compile(module) for n, module in networks.items()}, batch, seconds)


def in_onnxruntime(networks: Networks, batch: int, seconds: float) -> dict[str, float]:
    """Return the median milliseconds of processor time of the networks as ONNX files."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / f"{place}.onnx") for place, name in enumerate(networks)}
        for name, module in networks.items():
            kk.torch.export_onnx(module, torch.zeros(1, 3, 32, 32), files[name], progress=False)
        rows = measure_onnx(files, batches=(batch,), seconds=seconds)
    return {row.name: row.cpu_ms for row in rows}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dense = trained()
    networks: dict[str, Any] = {"dense": dense}
    for multiple in (1, 4, 8):
        small, report = kk.torch.shrink(
            dense,
            torch.zeros(1, 3, 32, 32),
            macs=BUDGET,
            exclude=RESIDUAL,
            multiple_of=multiple,
        )
        share = report.macs_after / report.macs_before
        widths = sorted({w for name, w in report.widths_after.items() if "conv1" in name})
        print(f"multiples of {multiple}: {share:.3f} of the multiply-accumulates, widths {widths}")
        networks[f"of {multiple}"] = small
    engines: dict[str, Callable[[Networks, int, float], dict[str, float]]] = {
        "torch eager": eager,
        "torch eager, folded": folded,
        "onnxruntime": in_onnxruntime,
    } | ({"torch.compile": compiled} if given.compile else {})
    print(f"{'':20} {'batch':>5} {'dense ms':>9}" + "".join(f"{n:>8}" for n in networks))
    for batch in given.batches:
        for engine, times in engines.items():
            found = times(networks, batch, given.seconds)
            shares = "".join(f"{ms / found['dense']:8.2f}" for ms in found.values())
            print(f"{engine:20} {batch:5} {found['dense']:9.2f}{shares}", flush=True)


if __name__ == "__main__":
    main()
