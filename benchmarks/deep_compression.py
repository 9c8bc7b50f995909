"""Deep Compression's LeNets, from scratch to a file: ``python benchmarks/deep_compression.py lenet300 --seed 0``.

MNIST, by ``karikomi compress mnist-lenet300 --preset deep-compression``: dense training, then quantized training with a
penalty on the bits of the codes, whose strength follows a goal in bytes (the recipe is that of the task for this
preset). 55,000 training images; 5,000 choose; the file is evaluated once on all 10,000 test images. Ratios are the
float32 bytes of all parameters of the network (1,066,440 and 1,724,320) divided by the bytes of the file, container
included.

    python benchmarks/deep_compression.py lenet300|lenet5 [--seed 0 1 2] [--set learned=[0.15] ...]

Each seed has a run folder, so that an interrupted command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

import karikomi as kk
from karikomi.pack import inspect

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("KARIKOMI_DATA", ROOT.parent / "shared" / "data")) / "mnist.npz"
PARAMETERS = {"lenet300": 266_610, "lenet5": 431_080}
PEERS = {
    "lenet300": "Han et al. 40x at 1.58 %, EPR 124x at 1.9 %",
    "lenet5": "Han et al. 39x at 0.74 %, MIRACLE 555x at 0.69 % and 1110x at 0.96 %",
}


def run(network: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Compress once, and return the figures of the table."""
    changes = dict(text.split("=", 1) for text in given.set)
    name = "-".join([network, str(seed), *given.set]).replace("[", "").replace("]", "")
    result = kk.compress(
        f"mnist-{network}",
        data=given.data,
        preset="deep-compression",
        max_drop=given.max_drop,
        config={key: _tuples(json.loads(text)) for key, text in changes.items()},
        seed=seed,
        out=given.out / name,
    )
    account, size = inspect(result["file"]), result["bytes_packed"]
    return {
        "ratio": 4 * PARAMETERS[network] / size,
        "error": 100 * (1 - result["metric_after"]),
        "dense_error": 100 * (1 - result["metric_before"]),
        "bytes": size,
        "payload": account.payload,
        "tables": account.tables,
        "container": account.header + account.manifest,
        "nonzero": result["nonzero"],
        "seconds": result["seconds"],
        "verdict": result["verdict"],
    }


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def row(network: str, runs: list[dict[str, Any]]) -> str:
    """Return one line of the table."""

    def spread(key: str, form: str) -> str:
        values = [run[key] for run in runs]
        if len(values) == 1:
            return f"{values[0]:{form}}"
        return f"{statistics.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"

    cells = [network, spread("ratio", ".0f"), spread("error", ".2f"), spread("bytes", ",.0f")]
    cells += [spread(key, ",.0f") for key in ("payload", "tables", "container", "nonzero")]
    cells += [spread("dense_error", ".2f"), spread("seconds", ".0f")]
    return f"| {' | '.join([*cells, ', '.join(run['verdict'] for run in runs)])} |"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description="LeNet on MNIST, from scratch to a small file")
    parser.add_argument("network", choices=PARAMETERS)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of the recipe")
    parser.add_argument("--max-drop", type=float, default=0.005)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/deep_compression"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(given.network, seed, given) for seed in given.seed]
    print(f"\nerrors on the 10,000 test images; seeds {given.seed}: mean [range]")
    print(f"peers: {PEERS[given.network]}")
    print(f"one thread; {platform.machine()}, {platform.processor()}\n")
    print(
        "| network | ratio | error % | bytes | payload | tables | container | not zero | dense error % "
        "| wall s | verdict |"
    )
    print(f"|{' --- |' * 11}")
    print(row(given.network, runs))


if __name__ == "__main__":
    main()
