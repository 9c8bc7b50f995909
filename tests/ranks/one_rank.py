"""The program of a world: import what its ranks need once, and fork them; each joins, runs all scenarios in order,
and writes what they found.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


def main(scenarios: str, folder: str, size: int) -> None:
    """Run a world of `size` ranks, until the last one ends."""
    importlib.import_module(f"ranks.{scenarios}")
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in ways else None)
    ranks = [
        context.Process(target=run, args=(scenarios, folder, rank, size)) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()


def run(scenarios: str, folder: str, rank: int, size: int) -> None:
    """Run as rank `rank` of `size`, meeting the others through a file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    np.seterr(divide="raise", over="raise", invalid="raise")
    found = {}
    for name, scenario in importlib.import_module(f"ranks.{scenarios}").SCENARIOS.items():
        torch.manual_seed(0)
        try:
            found[name] = scenario()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    target = Path(folder) / f"{rank}.json"
    target.with_suffix(".part").write_text(json.dumps(found))
    target.with_suffix(".part").rename(target)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]))
