"""Every score with every allocation on a trained ResNet-20: ``python benchmarks/prune_resnet20.py``.

CIFAR-10, weights as published, no training: at 50, 70, 80 and 90 % the accuracy on all 10,000 test images, once
as pruned and once with recalibrated batch norms if that improves the loss on held-out training images (marked ``*``).
Scores that need data use 256 training images; the recalibration is validated on 512 others, and the curves of the
allocation `sensitivity` are measured on these, by magnitude for all scores. No choice uses the test images.
`--finetune`: two epochs of training with masks at 90 %, last weights. Finished cells are stored in a file,
so that a stopped run resumes.

    python benchmarks/prune_resnet20.py [--quick] [--finetune] [--scores obc,magnitude] [--allocations global]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import nn
from tqdm import tqdm

import karikomi as kk
from karikomi import registry
from karikomi.errors import KarikomiError
from karikomi.files import write_text
from karikomi.torch.recovery.batch_norm import recalibrate_

DATA = Path(os.environ.get("KARIKOMI_DATA") or Path(__file__).parents[2] / "shared" / "data")
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
CALIBRATION, HELD_OUT, TRAINING = slice(0, 256), slice(256, 768), slice(768, 50_000)
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)

Pair = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut that is padded with zeros (He et al. 2015, option A)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.stride, self.padding = width // inputs, (width - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations after the addition."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """The network of the published weights: 269,722 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (n, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def trained() -> nn.Module:
    """Return the network with the published weights, in eval mode."""
    module = ResNet20()
    arrays = load_file(DATA / "resnet20_cifar10.safetensors")
    module.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=False)
    return module.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def images(name: str, part: slice) -> Pair:
    """Return normalised images, channels last, and labels."""
    with np.load(DATA / name) as file:
        pixels, labels = file["images"][part], file["labels"][part].astype(np.int64)
    return normalised(pixels), torch.from_numpy(labels)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """Return (n, 32, 32, 3) bytes as (n, 3, 32, 32) floats."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255.0)
    return x.sub_(MEAN).div_(DEVIATION).contiguous(memory_format=torch.channels_last)


def batches(pair: Pair, size: int) -> list[Pair]:
    """Return a pair of tensors as a list of batches."""
    return list(zip(pair[0].split(size), pair[1].split(size), strict=True))


@torch.no_grad()
def accuracy(module: nn.Module, pair: Pair) -> float:
    """Return the share of correctly classified images."""
    right = sum(int((module(x).argmax(1) == y).sum()) for x, y in batches(pair, 500))
    return right / len(pair[1])


def combinations(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (score, allocation) by name: all that are registered, for single weights."""
    scores = [one.name for one in registry.entries("score") if not one.thing.of_units_only]
    allocations = [one.name for one in registry.entries("allocation")]
    chosen = arguments.scores.split(",") if arguments.scores else scores
    places = arguments.allocations.split(",") if arguments.allocations else allocations
    return [(score, allocation) for score in chosen for allocation in places]


def curves(held: Pair) -> dict[str, list[tuple[float, float]]]:
    """Return what pruning each weight alone by magnitude costs on held-out training images."""
    found = kk.torch.sensitivity(trained(), lambda module: accuracy(module, held))
    return {name: list(curve.items()) for name, curve in found.items()}


def cell(
    score: str,
    allocation: str,
    sparsity: float,
    calibration: Pair,
    held: Pair,
    test: Pair,
    known: dict[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    """Prune once; return accuracies and seconds, or the reason why the combination is unsupported."""
    module, start = trained(), (time.perf_counter(), time.process_time())
    curve = {name: dict(map(tuple, points)) for name, points in known.items()}
    data = batches(calibration, 64)
    try:
        kk.torch.prune_(
            module,
            sparsity,
            score=score,
            allocation=allocation,
            data=data,
            loss=F.cross_entropy,
            facts={"curve": curve} if curve else None,
        )
    except KarikomiError as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
        "accuracy": accuracy(module, test),
    }
    judged = recalibrate_(module, data, judge=batches(held, 256), loss=F.cross_entropy)
    found["recalibrated"] = accuracy(module, test) if judged.kept else found["accuracy"]
    return {**found, "kept": judged.kept}


def finetuned(
    score: str, sparsity: float, epochs: int, limit: int | None, test: Pair
) -> dict[str, Any]:
    """Prune and train with masks; return the accuracy before, and of the last weights."""
    module = trained()
    calibration = images("cifar10_train.npz", CALIBRATION)
    masks = kk.torch.prune_(
        module, sparsity, score=score, data=batches(calibration, 64), loss=F.cross_entropy
    )
    before = accuracy(module, test)
    with np.load(DATA / "cifar10_train.npz") as file:
        pixels, labels = file["images"][TRAINING][:limit], file["labels"][TRAINING][:limit]
    steps = len(labels) // 128 * epochs
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps, pct_start=0.1)
    generator = np.random.default_rng(0)
    module.train()
    bar = tqdm(total=steps, desc=f"finetune {score}")
    for _ in range(epochs):
        order = generator.permutation(len(labels))[: len(labels) // 128 * 128]
        for chosen in order.reshape(-1, 128):
            x = normalised(augmented(pixels[chosen], generator))
            optimizer.zero_grad()
            F.cross_entropy(module(x), torch.from_numpy(labels[chosen].astype(np.int64))).backward()
            optimizer.step()
            masks.apply_(module)
            rate.step()
            bar.update()
    return {"before": before, "accuracy": accuracy(module.eval(), test), "sparsity": masks.sparsity}


def augmented(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return images flipped and shifted by up to 4 pixels, at random."""
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    shifts, flips = generator.integers(0, 9, (len(pixels), 2)), generator.random(len(pixels)) < 0.5
    return np.stack(
        [
            one[top : top + 32, left : left + 32][:, :: -1 if flip else 1]
            for one, (top, left), flip in zip(padded, shifts, flips, strict=True)
        ]
    )


class Cells:
    """The finished cells, stored in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a stored cell, or compute and store it."""
        if key not in self.done:
            self.done[key] = make()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(self.done, indent=1))
        return self.done[key]


def table(cells: dict[str, Any], rows: list[tuple[str, str]]) -> str:
    """Return the Markdown table: accuracy as pruned / recalibrated, ``*`` where that was kept."""
    head = "| score | allocation | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " | CPU s |"
    lines = [head, "| --- | --- |" + " ---: |" * (len(SPARSITIES) + 1)]
    for score, allocation in rows:
        found = [cells[f"{score} {allocation} {s}"] for s in SPARSITIES]
        if all("refused" in one for one in found):
            continue
        seconds = max(one.get("cpu_seconds", 0.0) for one in found)
        lines.append(
            f"| {score} | {allocation} | {' | '.join(map(shown, found))} | {seconds:.1f} |"
        )
    refused = {one["refused"] for one in cells.values() if "refused" in one}
    return "\n".join([*lines, *(f"\nLeft out: {why}" for why in sorted(refused))])


def shown(one: dict[str, Any]) -> str:
    """Return one cell as text, in per cent."""
    if "refused" in one:
        return "-"
    mark = "*" if one["kept"] else ""
    return f"{100 * one['accuracy']:.2f} / {100 * one['recalibrated']:.2f}{mark}"


def main() -> None:
    """Compute the missing cells of the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 test images; short fine-tuning")
    parser.add_argument("--finetune", action="store_true", help="then two epochs at 90 %%")
    parser.add_argument("--scores", help="names, with commas between (default: all)")
    parser.add_argument("--allocations", help="names, with commas between (default: all)")
    parser.add_argument("--cells", type=Path, help="the file of finished cells, in runs/")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # Cells of another state of the code must not be reused.
    package = Path(kk.__file__).parent
    folders = ("prune", "selection", "reconstruction", "torch")
    files = sorted(path for folder in folders for path in (package / folder).rglob("*.py"))
    code = "".join(path.read_text() for path in files)
    digest = hashlib.sha256(code.encode()).hexdigest()[:8]
    name = f"prune_resnet20{'_quick' if arguments.quick else ''}_{digest}.json"
    cells = Cells(arguments.cells or Path("runs") / name)
    test = images("cifar10_test.npz", slice(0, 1_000 if arguments.quick else 10_000))
    training = images("cifar10_train.npz", slice(0, HELD_OUT.stop))
    calibration, held = ((training[0][p], training[1][p]) for p in (CALIBRATION, HELD_OUT))
    dense = cells.get("dense", lambda: {"accuracy": accuracy(trained(), test)})
    rows = combinations(arguments)
    for score, allocation in tqdm(rows, "scores x allocations"):
        for sparsity in SPARSITIES:
            key = f"{score} {allocation} {sparsity}"
            measured = (
                cells.get("curves", lambda: curves(held)) if allocation == "sensitivity" else {}
            )
            arguments_of = (score, allocation, sparsity, calibration, held, test, measured)
            cells.get(key, lambda: cell(*arguments_of))  # noqa: B023
    print(f"\ndense: {100 * dense['accuracy']:.2f} % of {len(test[1]):,} test images\n")
    print(table(cells.done, rows))
    if arguments.finetune:
        limit = 2_560 if arguments.quick else None
        for score in arguments.scores.split(",") if arguments.scores else ["magnitude", "obc"]:
            make = lambda score=score: finetuned(score, 0.9, 2, limit, test)  # noqa: E731
            found = cells.get(f"finetune {score} 0.9", make)
            print(
                f"\n{score}, 90 %, two epochs: {100 * found['before']:.2f} -> "
                f"{100 * found['accuracy']:.2f} % (last weights, {found['sparsity']:.2%} zero)"
            )


if __name__ == "__main__":
    main()
