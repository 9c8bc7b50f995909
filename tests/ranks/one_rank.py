"""The program of one rank: join the world, run all scenarios in order, write what they found."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


def main(scenarios: str, folder: str, rank: str, size: str) -> None:
    """Run as rank `rank` of `size`, meeting the others through a file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=int(rank),
        world_size=int(size),
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
    main(*sys.argv[1:])
