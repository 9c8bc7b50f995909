"""A million altered files, read in processes of bounded memory: nothing may crash, hang, or load as another tensor.

    python benchmarks/pack_hostile.py [--files 1000000] [--processes 2] [--seed 0]

Half of the files are changed anywhere, half in their groups with checksums that agree again. Each process may
address `MEMORY` bytes more than it starts with; a batch that takes longer than `SECONDS` a file, a process that dies,
or a file that loads as another tensor ends the run with the seed. Printed: how many were refused and how many loaded
unchanged, files a second, the slowest file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fuzz.mutations import mutated, sealed  # noqa: E402
from karikomi.errors import BadFile  # noqa: E402
from karikomi.pack import load, save  # noqa: E402
from karikomi.quantize import kmeans, uniform  # noqa: E402

MEMORY, SECONDS, BATCH = 2**31, 5.0, 2_000


def originals(folder: Path) -> list[bytes]:
    """Return files that have every codec, pools, tensors alone, tied ones and notes."""
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(12, 20)).astype("f4")
    spread = np.exp(np.repeat(generator.normal(size=400), 9))
    sparse = np.where(generator.random((60, 40)) < 0.05, generator.normal(size=(60, 40)), 0)
    small = {
        "book": kmeans(np.where(np.abs(dense) > 1.3, dense, 0), entries=4),
        "flags": np.array([True, False]),
        "floats": dense[:2],
        "long": generator.integers(0, 2**40, 3),
        "tied": dense.repeat(6),
        "too": dense.repeat(6),
        "uniform": uniform(dense[:4], bits=4),
    }
    others = {
        "gaps": sparse,
        "packed": generator.integers(0, 2**9, 300),
        "rans": (generator.normal(size=3000) * 300).astype("i2"),
    }
    levels = np.clip(np.rint(generator.laplace(size=3600) * 3 * spread), -255, 255).astype("i2")
    files = []
    for name, tensors in (("small", small), ("others", others), ("levels", {"w": levels})):
        files.append(save(tensors, folder / name, notes={"k": "v"}).read_bytes())
    return files


def batch(job: tuple[int, int]) -> tuple[Counter[str], float]:
    """Return how many of the files of a seed were refused and loaded, and the seconds of the slowest."""
    seed, count = job
    soft = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY + 2**32
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY:  # the first batch of this process
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    generator, outcomes, slowest = np.random.default_rng(seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").exists() else None
    ) as folder:
        files = originals(Path(folder))
        path = Path(folder) / "x"
        wanted = []
        for content in files:
            path.write_bytes(content)
            wanted.append({name: array.tobytes() for name, array in load(path).items()})
        for turn in range(count):
            which = turn % len(files)
            path.write_bytes(
                (sealed if turn // len(files) % 2 else mutated)(files[which], generator)
            )
            start = time.perf_counter()
            try:
                found = load(path)
            except BadFile:
                outcomes["refused"] += 1
            else:
                same = {name: array.tobytes() for name, array in found.items()} == wanted[which]
                outcomes["unchanged" if same else "ANOTHER TENSOR"] += 1
            slowest = max(slowest, time.perf_counter() - start)
    return outcomes, slowest


def main() -> None:
    """Read the files, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10**6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    jobs = [
        (wanted.seed + at, min(BATCH, wanted.files - at)) for at in range(0, wanted.files, BATCH)
    ]
    outcomes, slowest, start = Counter[str](), 0.0, time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(wanted.processes) as pool:
        pending = [pool.apply_async(batch, (job,)) for job in jobs]
        for job, result in zip(jobs, pending, strict=True):
            found, seconds = result.get(timeout=60 + job[1] * SECONDS)
            outcomes += found
            slowest = max(slowest, seconds)
            assert not outcomes["ANOTHER TENSOR"], f"seed {job[0]}: a file loaded as another tensor"
    total = sum(outcomes.values())
    print(
        f"{total:,} files: {dict(outcomes)}, {total / (time.perf_counter() - start):.0f} a second,"
        f" the slowest took {slowest:.2f} s"
    )


if __name__ == "__main__":
    main()
