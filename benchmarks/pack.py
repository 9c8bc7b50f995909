"""Bytes and seconds of packed files beside NNCodec 2.1.3, at the same integer levels, paired in one run.

    KARIKOMI_DATA=... python benchmarks/pack.py [--peer /tmp/nncodec_env/bin/python] [--quick]

Levels: the trained ResNet-20 and ResNet-56 at 3 to 8 bits for each channel, at 4 bits for each tensor, and sparse; matrices
of the sizes of LeNet-300-100 and LeNet-5 with few, unevenly spread weights; and synthetic ones of four million. Ours is a
whole file written and read with all its checks; NNCodec's is its bitstream in memory, the smallest of its lossless settings
(each run; its seconds are those of that setting). Ratios below 1 are in our favour for bytes, above 1 for speed.

The peer needs NumPy below 2 and builds for minutes, so it has an environment of its own; without it only our figures are printed:

    python3.11 -m venv /tmp/nncodec_env
    /tmp/nncodec_env/bin/pip install "numpy<2" setuptools wheel pybind11 torch
    /tmp/nncodec_env/bin/pip install --no-deps --no-build-isolation nncodec==2.1.3
    /tmp/nncodec_env/bin/pip install --no-deps zipnn==0.5.4 zstandard
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from karikomi import pack
from karikomi.quantize import kmeans, uniform

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("KARIKOMI_DATA", ROOT.parent / "shared" / "data"))
PEER = Path("/tmp/nncodec_env/bin/python")
SETTINGS = [
    {"use_dq": False, "row_skipping": skipping, "param_opt": optimised}
    for skipping, optimised in itertools.product((False, True), (False, True))
]
Levels = dict[str, np.ndarray]


def network(name: str, bits: int, axis: int | None = 0, sparsity: float = 0.0) -> Levels:
    """Return the levels of the weights of a trained network."""
    found = {}
    for key, weight in load_file(DATA / f"{name}_cifar10.safetensors").items():
        if weight.ndim > 1:
            least = np.quantile(np.abs(weight), sparsity) if sparsity else -1.0
            kept = np.where(np.abs(weight) > least, weight, 0)
            found[key] = uniform(kept.astype("f4"), bits=bits, axis=axis).codes
    return found


def uneven(shapes: dict[str, tuple[int, ...]], density: float, seed: int) -> Levels:
    """Return sparse levels of a small network whose units keep very different numbers of weights."""
    generator = np.random.default_rng(seed)
    found = {}
    for key, shape in shapes.items():
        rows, columns = shape[0], int(np.prod(shape[1:]))
        chance = np.outer(generator.random(rows), generator.random(columns) ** 3)
        chance *= density / chance.mean()
        weight = generator.laplace(size=chance.shape) * (generator.random(chance.shape) < chance)
        codes = kmeans(weight.astype("f4"), entries=15)
        order = np.argsort(np.argsort(codes.grid.values))
        found[key] = (order - order[0]).astype("i1")[codes.codes].reshape(shape)
    return found


def synthetic(size: int) -> Iterator[tuple[str, Levels]]:
    """Yield names and levels of single large tensors."""
    generator = np.random.default_rng(0)
    for name, spread, density in (
        ("Gauss, 8 bit", 30.0, 1.0),
        ("Gauss, 4 bit", 2.0, 1.0),
        ("90 % zeros", 2.0, 0.1),
        ("98 % zeros, ternary", 0.7, 0.04),
    ):
        codes = np.rint(generator.normal(size=size) * spread) * (generator.random(size) < density)
        yield name, {"w": np.clip(codes, -127, 127).astype("i1").reshape(1024, -1)}


def cases(quick: bool) -> Iterator[tuple[str, Levels]]:
    """Yield all cases."""
    for name in ("resnet20",) if quick else ("resnet20", "resnet56"):
        for bits in (4,) if quick else range(3, 9):
            yield f"{name}, {bits} bit, channels", network(name, bits)
        yield f"{name}, 4 bit, tensors", network(name, 4, None)
        for sparsity in (0.8, 0.95):
            yield f"{name}, 5 bit, {sparsity:.0%} zeros", network(name, 5, 0, sparsity)
    lenet300 = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    lenet5 = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}
    yield "LeNet-300-100, 2 % kept", uneven(lenet300, 0.02, 0)
    yield "LeNet-5, 1 % kept", uneven(lenet5, 0.01, 1)
    yield from synthetic(2**20 if quick else 2**22)


def timed(function: Callable[[], object], repeats: int) -> tuple[float, object]:
    """Return the least seconds of some calls, and what the last returned."""
    best, found = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        found = function()
        best = min(best, time.perf_counter() - start)
    return best, found


def ours(levels: Levels, folder: Path, repeats: int) -> tuple[int, float, float]:
    """Return bytes of the file and seconds of writing and reading it."""
    path = folder / "x.karikomi"
    encode, _ = timed(lambda: pack.save(levels, path), repeats)
    decode, back = timed(lambda: pack.load(path), repeats)
    assert isinstance(back, dict)
    assert all(np.array_equal(back[name], levels[name]) for name in levels)
    return path.stat().st_size, encode, decode


def theirs(peer: Path, levels: Levels, folder: Path, repeats: int) -> tuple[int, float, float]:
    """Return the same of the smallest of NNCodec's settings."""
    case = folder / "case.npz"
    np.savez(case, **levels)
    command = [str(peer), str(ROOT / "benchmarks" / "pack_peer.py"), str(case)]
    command += [json.dumps(SETTINGS), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rows = json.loads(done.stdout.splitlines()[-1])
    assert all(row["lossless"] for row in rows)
    best = min(rows, key=lambda row: row["bytes"])
    return best["bytes"], best["encode"], best["decode"]


def against_nncodec(peer: Path, quick: bool, folder: Path) -> None:
    """Print the table of all cases."""
    there = peer.exists()
    print(
        "levels of | weights | ours bytes | theirs | bytes ratio | encode M/s ours, theirs, ratio | decode ..."
    )
    ratios, speeds = [], []
    for name, levels in cases(quick):
        count = sum(codes.size for codes in levels.values())
        repeats = 2 if count > 2**20 else 3
        size, encode, decode = ours(levels, folder, repeats)
        line = f"{name:28} {count:9,} {size:9,}"
        if there:
            other, slow, back = theirs(peer, levels, folder, repeats)
            ratios.append(size / other)
            speeds.append((count, slow / encode, back / decode))
            line += f" {other:9,} {size / other:6.3f}"
            line += (
                f"   {count / encode / 1e6:6.1f} {count / slow / 1e6:6.1f} {slow / encode:6.2f}x"
            )
            line += (
                f"   {count / decode / 1e6:6.1f} {count / back / 1e6:6.1f} {back / decode:6.2f}x"
            )
        else:
            line += f"   {count / encode / 1e6:6.1f} M/s, {count / decode / 1e6:6.1f} M/s"
        print(line, flush=True)
    if ratios:
        print(
            f"bytes, ours / theirs: median {statistics.median(ratios):.3f}, largest {max(ratios):.3f}"
        )
        large = [pair for pair in speeds if pair[0] >= 2**20]
        encodes, decodes = ([row[at] for row in large] for at in (1, 2))
        print(
            f"at least 2^20 weights: encode {min(encodes):.1f}x to {max(encodes):.1f}x, decode {min(decodes):.1f}x to {max(decodes):.1f}x"
        )
    else:
        print(
            "NNCodec was not run: its environment is missing; this file's first lines say how to make it"
        )


def large(folder: Path) -> None:
    """Print the seconds of 100 MB of float32 weights at 8 bit: quantized, packed, unpacked."""
    generator = np.random.default_rng(0)
    weights = {
        f"layer{i}": generator.normal(size=(1280, 1280)).astype("f4") * 0.02 for i in range(16)
    }
    quantize, codes = timed(lambda: {k: uniform(w, bits=8, axis=0) for k, w in weights.items()}, 1)
    assert isinstance(codes, dict)
    path = folder / "large.karikomi"
    save, _ = timed(lambda: pack.save(codes, path), 2)
    load, back = timed(lambda: pack.load(path), 2)
    assert isinstance(back, dict) and np.array_equal(back["layer3"], codes["layer3"].decode())
    dense = sum(w.nbytes for w in weights.values())
    print(
        f"{dense / 1e6:.0f} MB of float32 at 8 bit: quantized in {quantize:.2f} s, packed to"
        f" {path.stat().st_size / 1e6:.1f} MB in {save:.2f} s, unpacked to float32 in {load:.2f} s"
    )


def halves(peer: Path, folder: Path) -> None:
    """Print bytes and seconds of a bfloat16 checkpoint beside ZipNN, where it is installed."""
    generator = np.random.default_rng(0)
    weights = {
        f"layer{i}": (generator.normal(size=(1024, 2048)) * 0.02 / (i + 1)).astype(
            ml_dtypes.bfloat16
        )
        for i in range(16)
    }
    dense = sum(w.nbytes for w in weights.values())
    path = folder / "halves.karikomi"
    save, _ = timed(lambda: pack.save(weights, path), 1)
    load, back = timed(lambda: pack.load(path), 2)
    assert isinstance(back, dict) and back["layer3"].tobytes() == weights["layer3"].tobytes()
    size = path.stat().st_size
    print(
        f"bfloat16, {dense / 1e6:.0f} MB: {size / dense:.3f} of it, {dense / save / 1e6:.0f} MB/s in, {dense / load / 1e6:.0f} MB/s out"
    )
    raw = folder / "halves.bin"
    raw.write_bytes(b"".join(w.tobytes() for w in weights.values()))
    program = (
        "import sys, time, zipnn; data = open(sys.argv[1], 'rb').read(); z = zipnn.ZipNN(input_format='byte',"
        " bytearray_dtype='bfloat16'); s = time.perf_counter(); c = z.compress(bytes(bytearray(data)));"
        " t = time.perf_counter(); d = z.decompress(c); u = time.perf_counter();"
        " d2 = z.decompress(c); v = time.perf_counter(); assert bytes(d) == data;"
        " print(len(c), t - s, min(u - t, v - u))"
    )
    done = (
        subprocess.run([str(peer), "-c", program, str(raw)], capture_output=True, text=True)
        if peer.exists()
        else None
    )
    if done is None or done.returncode:
        print(
            "ZipNN was not run: it is not installed beside the peer",
            "" if done is None else done.stderr[-300:],
        )
        return
    theirs, encode, decode = map(float, done.stdout.split()[-3:])
    print(
        f"ZipNN: {theirs / dense:.3f} of it, {dense / encode / 1e6:.0f} MB/s in, {dense / decode / 1e6:.0f} MB/s out; ours out at {decode / load:.2f}x"
    )


def main() -> None:
    """Print all tables, with what the machine is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer", type=Path, default=PEER, help="interpreter of NNCodec's environment"
    )
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--only", choices=("nncodec", "large", "halves"))
    wanted = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}, NumPy {np.__version__}, Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if wanted.only in (None, "nncodec"):
            against_nncodec(wanted.peer, wanted.quick, Path(folder))
        if wanted.only in (None, "large"):
            large(Path(folder))
        if wanted.only in (None, "halves"):
            halves(wanted.peer, Path(folder))


if __name__ == "__main__":
    main()
