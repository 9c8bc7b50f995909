"""Trained CIFAR-10 ResNets, fine-tuned to a small file: ``python benchmarks/train_quantized.py resnet20``.

From the published weights: quantized training with a penalty on the bits of the codes, whose strength follows a goal in
bytes, distilled from the dense network. Then every batch norm is folded into its convolution (a factor of the channel's
scale; the codes stay), biases are rounded to 8 bits and scales to 8 significant bits, and the file that
`kk.save` wrote is evaluated, the last weights: on the first 2,000 test images, on which recipes may be chosen, and on
the other 8,000, which judge. The ratio is that of the float32 bytes of the trainable parameters to those of the file.

    python benchmarks/train_quantized.py resnet20|resnet56 [--epochs 5] [--bytes 82800] [--begin 1.6] [--quick]

`--begin`: training begins at second-order codes of so many bits a number, from 512 training images, 0: at the weights.
The bits by the smooth estimate, which `--bytes` is of, are then more than half above those of the coder.

A killed run goes on from its last checkpoint, written every 50 steps; orders and augmentations depend on
the seed and the step alone. `--quick`: 20 steps, 3,000 test images; prints what a step costs.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from prune_resnet20 import Block, Pair, accuracy, augmented, images, normalised
from prune_resnet20 import trained as resnet20
from safetensors.numpy import load_file
from shrink_resnet20 import DATA, training_images
from torch import nn
from tqdm import tqdm

import karikomi as kk
from karikomi.pack import inspect
from karikomi.quantize import Coded, RateGoal, UniformGrid, uniform


class ResNet56(nn.Module):
    """The network of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(inputs, width), *(Block(width, width) for _ in range(8)))
            for inputs, width in [(16, 16), (16, 32), (32, 64)]
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (n, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def resnet56() -> nn.Module:
    """Return the network with the published weights, in eval mode."""
    module = ResNet56()
    arrays = load_file(DATA / "resnet56_cifar10.safetensors")
    module.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=False)
    return module.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Epochs and rates; `bytes` of codes is what the penalty aims at, `bits` the width of the grid."""

    bytes: int
    epochs: int
    batch: int = 128
    rate: float = 1e-3
    step_rate: float = 1e-3
    bits: int = 4
    ramp: float = 0.6
    strength: float = 1e-7  # of the penalty at the first step, in loss per bit
    distill: float = 0.7
    heat: float = 3.0
    begin: float | None = None  # bits a number of the codes that training begins at


@dataclass
class Progress:
    """Where a run is: steps done, CPU seconds, the strength of the penalty, the bits at the first step."""

    strength: float
    first: float
    step: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the fields of a checkpoint."""
        vars(self).update(state)


CHOSEN_ON = 2_000
NETWORKS = {"resnet20": resnet20, "resnet56": resnet56}
RECIPES = {
    "resnet20": Recipe(82_800, 5, strength=1e-6, begin=1.6),
    "resnet56": Recipe(185_000, 1),
}


def train_(
    module: nn.Module,
    teacher: nn.Module,
    data: tuple[np.ndarray, np.ndarray],
    recipe: Recipe,
    *,
    limit: int | None,
    kept: Path,
    seed: int = 0,
) -> tuple[Any, float]:
    """Train with rounded weights and a penalty on their bits; return the codes and the CPU seconds of all runs.

    `kept`: the checkpoint, which is gone at the end.
    """
    pixels, labels = data
    norms = [f"{name}.*" for name, layer in module.named_modules() if "bn" in name]
    codes = None if recipe.begin is None else begun(module, pixels, recipe.begin, norms)
    bits = recipe.bits if codes is None else width_of(codes)
    training = kk.torch.quantized_training(module, bits=bits, codes=codes, exclude=norms)
    own = {id(step) for step in training.steps()}
    weights = [item for item in module.parameters() if id(item) not in own]
    optimizer = torch.optim.Adam(
        [{"params": weights}, {"params": training.steps()}], lr=recipe.rate, fused=True
    )
    handle = kk.torch.attach(optimizer, module, clip=kk.clip.ByGlobalNorm(1.0))
    total = limit or recipe.epochs * (len(labels) // recipe.batch)
    last = max(int(total * recipe.ramp), 1)
    goal = RateGoal(8.0 * recipe.bytes, last=last, gain=min(0.1, 20 / last))
    first = training.size().total if codes is None else training.bits().item()
    at = Progress(strength=recipe.strength, first=first)
    parts = {"module": module, "optimizer": optimizer, "progress": at}
    if kept.exists():
        for name, state in torch.load(kept, weights_only=True).items():
            parts[name].load_state_dict(state)
    module.train()
    began, per_epoch = time.process_time(), len(labels) // recipe.batch
    with tqdm(total=total, initial=at.step, desc="quantized training", mininterval=20.0) as bar:
        while at.step < total:
            epoch, place = divmod(at.step, per_epoch)
            order = np.random.default_rng([seed, epoch]).permutation(len(labels))
            chosen = np.array_split(order, per_epoch)[place]
            share = min(1.0, (at.step + 1) / 100)
            share *= 0.5 * (1 + math.cos(math.pi * at.step / total))
            rates = (recipe.rate, recipe.step_rate)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            generator = np.random.default_rng([seed, epoch, place])
            x = normalised(augmented(pixels[chosen], generator))
            loss = loss_of(module(x), teacher, x, labels[chosen], recipe)
            bits = training.bits()
            optimizer.zero_grad()
            (loss + at.strength * bits).backward()
            optimizer.step()
            used = bits.item()
            path = goal.path(at.first, at.step)
            at.strength = goal.next(at.strength, used=used, path=path)
            at.step += 1
            bar.update()
            bar.set_postfix_str(f"{used / 8:,.0f} bytes at {at.strength:.1e}, {loss.item():.3f}")
            if at.step % 50 == 0:
                now = time.process_time()
                at.seconds, began = at.seconds + now - began, now
                write_(kept, {name: part.state_dict() for name, part in parts.items()})
    handle.detach()
    module.eval()
    kept.unlink(missing_ok=True)
    return training.finish_(), at.seconds + time.process_time() - began


def begun(module: nn.Module, pixels: np.ndarray, rate: float, norms: list[str]) -> dict[str, Coded]:
    """Return second-order codes of a copy, from the first 512 training images."""
    images = [normalised(pixels[k : k + 64]) for k in range(0, 512, 64)]
    codes = kk.torch.quantize_(
        copy.deepcopy(module), rate=rate, method="gptq", data=images, exclude=norms, progress=False
    )
    return dict(codes)


def width_of(codes: dict[str, Coded]) -> int:
    """Return the bits of the widest code of a matrix, at most 8."""
    most = max(int(np.abs(coded.codes).max()) for coded in codes.values() if coded.codes.ndim > 1)
    return min(max(math.ceil(math.log2(most + 1)) + 1, 2), 8)


def write_(path: Path, state: Any) -> None:
    """Write a checkpoint, the whole or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def loss_of(
    given: torch.Tensor, teacher: nn.Module, x: torch.Tensor, labels: np.ndarray, recipe: Recipe
) -> torch.Tensor:
    """Return the cross entropy, mixed with the distance to the dense network's outputs."""
    with torch.no_grad():
        taught = teacher(x)
    own, goal = (F.log_softmax(logits / recipe.heat, dim=1) for logits in (given, taught))
    distance = F.kl_div(own, goal, reduction="batchmean", log_target=True)
    loss = F.cross_entropy(given, torch.from_numpy(labels.astype(np.int64)))
    return (1 - recipe.distill) * loss + recipe.distill * recipe.heat**2 * distance


def folded(module: nn.Module, codes: Any) -> dict[str, np.ndarray | Coded]:
    """Return name -> codes or array of the network without batch norms, whose convolutions have biases."""
    tensors: dict[str, np.ndarray | Coded] = dict(codes)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            norm: Any = module.get_submodule(name.replace("conv", "bn"))
            deviation = (norm.running_var + norm.eps).sqrt()
            factor = (norm.weight / deviation).detach().numpy()
            bias = norm.bias.detach().numpy() - norm.running_mean.numpy() * factor
            weight = codes[f"{name}.weight"]
            tensors[f"{name}.weight"] = _scaled(weight, factor)
            tensors[f"{name}.bias"] = uniform(bias, bits=8, axis=None)
    return tensors


def _scaled(weight: Coded, factor: np.ndarray) -> Coded:
    """Return codes of a weight times a factor per channel: the sign goes to the codes, the rest to the scale."""
    signs = np.where(factor < 0, -1, 1).astype(weight.codes.dtype)
    scale = np.maximum(weight.grid.numbers * np.abs(factor), 1e-30).astype(np.float32)
    mantissa, exponent = np.frexp(scale)
    scale = np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)
    return Coded(weight.codes * signs.reshape(-1, 1, 1, 1), UniformGrid(scale, 0, weight.grid.bits))


def without_norms(module: nn.Module) -> nn.Module:
    """Return a copy whose convolutions have biases instead of batch norms after them."""
    module = copy.deepcopy(module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Conv2d):
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
            owner, _, leaf = name.replace("conv", "bn").rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Identity())
    return module


def report(name: str, recipe: Recipe, found: dict[str, float], path: Path) -> str:
    """Return the row of the table, under its head."""
    account = inspect(path)
    names = ["network", "epochs", "rate", "ratio", "drop on 2,000", "drop on 8,000", "accuracy %"]
    names += ["dense %", "bytes", "payload", "tables", "container", "CPU s"]
    drops = [f"{found[f'dense {part}'] - found[part]:.2f}" for part in ("chosen", "judged")]
    row = [name, f"{recipe.epochs}", f"{recipe.rate:g}", f"{found['ratio']:.1f}", *drops]
    row += [f"{found['judged']:.2f}", f"{found['dense judged']:.2f}"]
    row += [f"{account.total:,}", f"{account.payload:,}"]
    row += [f"{account.tables:,}", f"{account.header + account.manifest:,}", f"{found['cpu']:.0f}"]
    return f"| {' | '.join(names)} |\n|{' --- |' * len(names)}\n| {' | '.join(row)} |"


def main() -> None:
    """Train, save, load, evaluate, print."""
    parser = argparse.ArgumentParser(description="Trained ResNets, fine-tuned to a small file")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--bytes", type=int, help="of the codes")
    parser.add_argument("--rate", type=float, help="learning rate at its highest")
    parser.add_argument("--strength", type=float, help="of the penalty at the first step")
    parser.add_argument(
        "--begin", type=float, help="at codes of so many bits a number; 0: at weights"
    )
    parser.add_argument("--quick", action="store_true", help="20 steps, 3,000 test images")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    known = RECIPES[given.network]
    recipe = replace(
        known,
        bytes=given.bytes or known.bytes,
        epochs=given.epochs or known.epochs,
        rate=given.rate or known.rate,
        strength=given.strength or known.strength,
        begin=known.begin if given.begin is None else given.begin or None,
    )
    dense = NETWORKS[given.network]()
    module, limit = copy.deepcopy(dense), 20 if given.quick else None
    test: Pair = images("cifar10_test.npz", slice(0, 3_000 if given.quick else 10_000))
    data = training_images(5_120 if given.quick else None)
    kept = given.out / f"{given.network}-{recipe.bytes}-{recipe.epochs}{'-quick' * given.quick}.pt"
    codes, cpu = train_(module, dense, data, recipe, limit=limit, kept=kept)
    given.out.mkdir(parents=True, exist_ok=True)
    path = kk.save(folded(module, codes), given.out / f"{given.network}-{recipe.bytes}.karikomi")
    stored = kk.load(path, into=without_norms(module)).eval()
    size = 4 * sum(item.numel() for item in dense.parameters())
    parts = {"chosen": slice(CHOSEN_ON), "judged": slice(CHOSEN_ON, None)}
    found = {
        **{
            f"{key}{part}": 100 * accuracy(net, (test[0][which], test[1][which]))
            for key, net in (("", stored), ("dense ", dense))
            for part, which in parts.items()
        },
        "ratio": size / path.stat().st_size,
        "cpu": cpu,
    }
    print(f"\n{len(test[1]):,} test images; trained: {100 * accuracy(module, test):.2f} %\n")
    print(report(given.network, recipe, found, path))
    if limit:
        steps = recipe.epochs * (50_000 // recipe.batch)
        print(f"\n{cpu / limit:.2f} CPU s a step, {cpu / limit * steps / 60:.0f} min in all")


if __name__ == "__main__":
    main()
