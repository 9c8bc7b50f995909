"""Bytes and seconds of packed files beside NNCodec 2.1.3, at the same integer levels, paired in one run.

    KARIKOMI_DATA=... python benchmarks/pack.py [--peer runs/nncodec_env/bin/python] [--quick]

Levels: the trained ResNet-20 and ResNet-56 at 3 to 8 bits a channel, at 4 bits a tensor, and sparse;
matrices as large as those of LeNet-300-100 and LeNet-5 with few, unevenly spread weights; and synthetic ones of four
million.
Ours is a whole file written and read with all its checks; NNCodec's is its bitstream in memory, the smallest of its
lossless settings (the seconds are those of that setting). Seconds are of the CPU, of all threads together. A ratio of
bytes below 1 is in our favour, and one of speeds above 1.

The peer needs NumPy below 2 and builds for minutes, so it has an environment of its own;
without it only our figures are printed:

    python3.11 -m venv runs/nncodec_env
    runs/nncodec_env/bin/pip install "numpy<2" setuptools wheel pybind11 torch
    runs/nncodec_env/bin/pip install --no-deps --no-build-isolation nncodec==2.1.3
    runs/nncodec_env/bin/pip install --no-deps zipnn==0.5.4 zstandard
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
from karikomi.pack.codecs import deflate
from karikomi.quantize import kmeans, uniform

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("KARIKOMI_DATA", ROOT.parent / "shared" / "data"))
PEER = ROOT / "runs" / "nncodec_env" / "bin" / "python"
SETTINGS = [
    {"use_dq": False, "row_skipping": skipping, "param_opt": optimised}
    for skipping, optimised in itertools.product((False, True), (False, True))
]
REPEATS = 2
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


def timed(
    function: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time
) -> tuple[float, object]:
    """Return the least seconds of some calls, and what the last returned."""
    best, found = float("inf"), None
    for _ in range(repeats):
        start = clock()
        found = function()
        best = min(best, clock() - start)
    return best, found


def ours(levels: Levels, folder: Path) -> tuple[int, float, float]:
    """Return bytes of the file and CPU seconds of writing and reading it."""
    path = folder / "x.karikomi"
    encode, _ = timed(lambda: pack.save(levels, path), REPEATS)
    decode, back = timed(lambda: pack.load(path), REPEATS)
    assert isinstance(back, dict)
    assert all(np.array_equal(back[name], levels[name]) for name in levels)
    return path.stat().st_size, encode, decode


def theirs(peer: subprocess.Popen, levels: Levels, folder: Path) -> tuple[int, float, float]:
    """Return the same of the smallest of NNCodec's settings."""
    case = folder / "case.npz"
    np.savez(case, **levels)
    assert peer.stdin is not None and peer.stdout is not None
    peer.stdin.write(f"{case}\n")
    peer.stdin.flush()
    line = peer.stdout.readline()
    while line and not line.startswith("["):  # it prints as it likes
        line = peer.stdout.readline()
    rows = json.loads(line)
    assert all(row["lossless"] for row in rows)
    best = min(rows, key=lambda row: row["bytes"])
    return best["bytes"], best["encode"], best["decode"]


def against_nncodec(interpreter: Path, quick: bool, folder: Path) -> None:
    """Print the table of all cases."""
    command = [str(interpreter), str(ROOT / "benchmarks" / "pack_peer.py")]
    command += [json.dumps(SETTINGS), str(REPEATS)]
    pipe = subprocess.PIPE
    peer = None
    if interpreter.exists():
        peer = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder)
    print("bytes; then millions of weights a CPU second: ours, NNCodec's, ratio")
    ratios, speeds = [], []
    for name, levels in cases(quick):
        count = sum(codes.size for codes in levels.values())
        size, encode, decode = ours(levels, folder)
        line = f"{name:30} {count:9,}  {size:9,}"
        if peer is None:
            line += f"  encode {count / encode / 1e6:5.1f}  decode {count / decode / 1e6:5.1f}"
        else:
            other, slow, back = theirs(peer, levels, folder)
            ratios.append(size / other)
            speeds.append((count, slow / encode, back / decode))
            line += f" {other:9,} {size / other:6.3f}"
            line += f"  encode {count / encode / 1e6:5.1f} {count / slow / 1e6:5.1f} {slow / encode:5.2f}x"
            line += f"  decode {count / decode / 1e6:5.1f} {count / back / 1e6:5.1f} {back / decode:5.2f}x"
        print(line, flush=True)
    if not ratios:
        print(
            "NNCodec was not run: its environment is missing; this file's first lines say how to make it"
        )
        return
    print(
        f"bytes, ours / theirs: median {statistics.median(ratios):.3f}, largest {max(ratios):.3f}"
    )
    big = [pair for pair in speeds if pair[0] >= 2**20]
    for at, what in ((1, "encode"), (2, "decode")):
        found = [pair[at] for pair in big]
        print(f"{what}, at least 2^20 weights: {min(found):.1f}x to {max(found):.1f}x")


def large(folder: Path) -> None:
    """Print the seconds of 100 MB of float32 weights at 8 bit: quantized, packed, unpacked."""
    generator = np.random.default_rng(0)
    weights = {
        f"layer{i}": generator.normal(size=(1280, 1280)).astype("f4") * 0.02 for i in range(16)
    }
    quantize, codes = timed(lambda: {k: uniform(w, bits=8, axis=0) for k, w in weights.items()}, 1)
    assert isinstance(codes, dict)
    path = folder / "large.karikomi"
    save, _ = timed(lambda: pack.save(codes, path), 2, time.perf_counter)
    load, back = timed(lambda: pack.load(path), 2, time.perf_counter)
    used = timed(lambda: pack.save(codes, path), 1)[0], timed(lambda: pack.load(path), 1)[0]
    assert isinstance(back, dict) and np.array_equal(back["layer3"], codes["layer3"].decode())
    dense = sum(w.nbytes for w in weights.values())
    print(
        f"{dense / 1e6:.0f} MB of float32 at 8 bit: quantized in {quantize:.2f} s, packed to"
        f" {path.stat().st_size / 1e6:.1f} MB in {save:.2f} s, unpacked to float32 in {load:.2f} s"
        f" (CPU, all threads: {used[0]:.2f} s and {used[1]:.2f} s)"
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
    load, back = timed(lambda: pack.load(path), 5)
    wall, _ = timed(lambda: pack.load(path), 5, time.perf_counter)
    assert isinstance(back, dict) and back["layer3"].tobytes() == weights["layer3"].tobytes()
    size = path.stat().st_size
    print(
        f"bfloat16, {dense / 1e6:.0f} MB: {size / dense:.3f} of it, {dense / save / 1e6:.0f} MB a CPU second in,"
        f" {dense / load / 1e6:.0f} out, {dense / wall / 1e6:.0f} a second ({deflate.inflater.__name__})"
    )
    raw = folder / "halves.bin"
    raw.write_bytes(b"".join(w.tobytes() for w in weights.values()))
    program = (
        "import sys, time, zipnn; data = open(sys.argv[1], 'rb').read(); z = zipnn.ZipNN(input_format='byte',"
        " bytearray_dtype='bfloat16'); s = time.process_time(); c = z.compress(bytes(bytearray(data)));"
        " t = time.process_time(); d = z.decompress(c); assert bytes(d) == data;"
        "\ndef least(clock):"
        "\n    times = []"
        "\n    for _ in range(5): u = clock(); z.decompress(c); times.append(clock() - u)"
        "\n    return min(times)"
        "\nprint(len(c), t - s, least(time.process_time), least(time.perf_counter))"
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
    theirs, encode, decode, waited = map(float, done.stdout.split()[-4:])
    print(
        f"ZipNN: {theirs / dense:.3f} of it, {dense / encode / 1e6:.0f} MB a CPU second in,"
        f" {dense / decode / 1e6:.0f} out, {dense / waited / 1e6:.0f} a second; ours out at {decode / load:.2f}x"
        f" by CPU seconds (with its SHA-256 of each tensor), {waited / wall:.2f}x by the clock"
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
        f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}, NumPy {np.__version__},"
        f" Python {platform.python_version()}"
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
