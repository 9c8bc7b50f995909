"""Small files of trained CIFAR ResNets without training: ``python benchmarks/quantize_resnet.py 20``.

CIFAR-10, weights as published, calibrated on 512 training images without labels. A curve of files (`kk.save`, all of
it counted) over the rate; the operating point of an accuracy drop is the smallest file that keeps it on the first 2,000
test images, and is judged on the other 8,000. Beside it NNCodec 2.1.3 (ISO/IEC 15938-17) with its trellis
quantization, on all of these images, straight lines between its points: for ResNet-20 as it was measured before, for
others in the environment of an interpreter that has it (``--nncodec PYTHON``). Finished points are stored in ``runs/``.

    python benchmarks/quantize_resnet.py {20,56} [--rates 3.0,2.5] [--methods gptq,uniform] [--quick] [--test 10000]
        [--nncodec PYTHON --qps=-24,-20]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prune_resnet20 import DATA, Block, Pair, accuracy, images
from safetensors.numpy import load_file
from torch import nn

import karikomi as kk
from karikomi.files import write_text

RATES = "3.2,2.8,2.6,2.4,2.2,2.0"
CALIBRATION, CHOSEN_ON = 512, 2_000
DROPS = (0.002, 0.005)
# Measured with nncodec 2.1.3, use of dependent quantization, qp -28, -24, -20, -16, -14.
NNCODEC_20 = [(159_900, 0.9166), (128_800, 0.9140), (100_000, 0.9020), (72_800, 0.8813)]


class ResNet(nn.Module):
    """The networks of the published weights: 3 stages of (depth - 2) / 6 blocks."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (inputs, width) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            rest = [Block(width, width) for _ in range((depth - 2) // 6 - 1)]
            setattr(self, f"layer{number}", nn.Sequential(Block(inputs, width), *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (n, 3, 32, 32)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def trained(depth: int) -> nn.Module:
    """Return a network with the published weights, in eval mode."""
    module = ResNet(depth)
    arrays = load_file(DATA / f"resnet{depth}_cifar10.safetensors")
    module.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=False)
    return module.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def point(depth: int, method: str, rate: float, data: list[torch.Tensor], test: Pair) -> dict:
    """Return bytes and accuracies of one file, read back from the disk."""
    module, start = trained(depth), time.perf_counter()
    given: dict[str, Any] = {} if method == "uniform" else {"data": data}
    coded = kk.torch.quantize_(module, rate=rate, method=method, **given)
    spent = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = kk.save(module, Path(folder) / "small.karikomi")
        size, parts = path.stat().st_size, kk.pack.inspect(path)
        module = kk.load(path, into=trained(depth))
    pairs = [(test[0][part], test[1][part]) for part in (slice(CHOSEN_ON), slice(CHOSEN_ON, None))]
    chosen, judged = (accuracy(module, pair) for pair in pairs)
    return {
        "bytes": size,
        "manifest": parts.manifest + parts.header,
        "tables": parts.tables,
        "chosen": chosen,
        "judged": judged,
        "seconds": spent,
        "left_alone": len(coded.left_alone),
    }


def peer_points(
    depth: int, python: str, qps: str, test: Pair, known: dict[str, list[float]]
) -> dict[str, list[float]]:
    """Return parameter -> bytes and accuracy of NNCodec."""
    missing = [qp for qp in qps.split(",") if qp not in known]
    module = trained(depth)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        state = {k: v for k, v in module.state_dict().items() if v.is_floating_point()}
        np.savez(weights, **{name: tensor.numpy() for name, tensor in state.items()})
        script = Path(__file__).with_name("quantize_peer.py")
        shown = subprocess.run(
            [python, str(script), str(weights), folder, *missing],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for line in shown.stdout.splitlines() if missing else ():
            qp, size = json.loads(line)
            with np.load(Path(folder) / f"{qp}.npz") as stored:
                for name, tensor in state.items():
                    tensor.copy_(torch.from_numpy(stored[name].reshape(tensor.shape)))
            known[str(qp)] = [size, accuracy(module, test)]
            print(f"NNCodec, qp {qp}: {size:,} bytes, {known[str(qp)][1]:.2%}", flush=True)
    return known


def peer_bytes(curve: list[tuple[float, float]], wanted: float) -> float | None:
    """Return the bytes of a curve of (bytes, accuracy) at an accuracy, on a line between its points."""
    ordered = sorted(curve)
    for (small, low), (large, high) in zip(ordered, ordered[1:], strict=False):
        if low <= wanted <= high:
            return small + (wanted - low) / max(high - low, 1e-9) * (large - small)
    return None


def main() -> None:
    """Print the curve and the operating points."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int, choices=(20, 56))
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--methods", default="gptq")
    parser.add_argument("--test", type=int, default=10_000, help="test images, 2,000 to choose on")
    parser.add_argument("--nncodec", help="the interpreter of an environment with nncodec 2.1.3")
    parser.add_argument("--qps", default="-24,-20,-16")
    parser.add_argument(
        "--quick", action="store_true", help="64 images to calibrate, 2,500 to test"
    )
    arguments = parser.parse_args()
    depth, quick = arguments.depth, arguments.quick
    count = 2_500 if quick else arguments.test
    kind = "_quick" if quick else "" if count == 10_000 else f"_{count}"
    store = Path("runs") / f"quantize_resnet{depth}{kind}.json"
    done = json.loads(store.read_text()) if store.exists() else {}
    test = images("cifar10_test.npz", slice(count))
    x, _ = images("cifar10_train.npz", slice(64 if quick else CALIBRATION))
    data, dense = list(x.split(64)), trained(depth)
    parts = [(test[0][part], test[1][part]) for part in (slice(CHOSEN_ON), slice(CHOSEN_ON, None))]
    if "dense" not in done:
        done["dense"] = [accuracy(dense, pair) for pair in parts]
    floats = 4 * sum(
        item.numel() for item in dense.state_dict().values() if item.is_floating_point()
    )
    print(f"dense: {floats:,} bytes, {done['dense'][0]:.2%} and {done['dense'][1]:.2%}", flush=True)
    for method in arguments.methods.split(","):
        for rate in map(float, arguments.rates.split(",")):
            key = f"{method} {rate:g}"
            if key not in done:
                done[key] = point(depth, method, rate, data, test)
                store.parent.mkdir(exist_ok=True)
                write_text(store, json.dumps(done, indent=1))
            row = done[key]
            print(
                f"{key}: {row['bytes']:,} bytes ({floats / row['bytes']:.2f}x; manifest {row['manifest']:,}, "
                f"tables {row['tables']:,}), {row['chosen']:.2%} and {row['judged']:.2%}, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )
        _report(method, done, floats, depth, count - CHOSEN_ON)
    if arguments.nncodec:
        done["nncodec"] = peer_points(
            depth, arguments.nncodec, arguments.qps, test, done.get("nncodec", {})
        )
        write_text(store, json.dumps(done, indent=1))
        for method in arguments.methods.split(","):
            _report(method, done, floats, depth, count - CHOSEN_ON)


def _report(method: str, done: dict, floats: int, depth: int, judged: int) -> None:
    curve = [(size, share) for size, share in done.get("nncodec", {}).values()]
    curve = curve or (NNCODEC_20 if depth == 20 else [])
    dense = (done["dense"][0] * CHOSEN_ON + done["dense"][1] * judged) / (CHOSEN_ON + judged)
    rows = [row for key, row in done.items() if key.startswith(f"{method} ")]
    for drop in DROPS:
        kept = [row for row in rows if row["chosen"] >= done["dense"][0] - drop]
        if not kept:
            print(f"{method}, drop of {drop:.1%}: no point keeps it")
            continue
        best = min(kept, key=lambda row: row["bytes"])
        theirs = peer_bytes(curve, dense - drop)
        beside = (
            f", NNCodec {theirs:,.0f}: {best['bytes'] / theirs:.2f} of it (at most 0.70)"
            if theirs
            else ""
        )
        print(
            f"{method}, drop of {drop:.1%}: {best['bytes']:,} bytes, {floats / best['bytes']:.1f}x; "
            f"on the other images {best['judged'] - done['dense'][1]:+.2%}{beside}"
        )


if __name__ == "__main__":
    main()
