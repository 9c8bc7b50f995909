"""A character LSTM with half of its hidden units: ``python benchmarks/shrink_lstm.py``.

Tiny Shakespeare, the first 90 % to train on, perplexity on the rest; two layers of 512 hidden units, embedding 64.
The dense network is trained for `--epochs` and, from these weights, for one more epoch. Beside it: half of the
hidden units go, what is left is compensated on training text and trained for one epoch by `kk.torch.recover_`, on the
characters alone and distilled from the dense network, before and after its own epoch; and a network of that size
is trained from scratch for as many epochs in all. Each epoch has the same batches and the same learning rate, which
falls to zero; last weights. The dense weights are stored in ``runs/``.

    python benchmarks/shrink_lstm.py [--quick] [--epochs 2] [--rate 5e-3] [--hidden 512] [--seed 0]
"""

from __future__ import annotations

import argparse
import copy
import lzma
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import karikomi as kk
from karikomi.torch.shrinking.costs import milliseconds

DATA = Path(os.environ.get("KARIKOMI_DATA") or Path(__file__).parents[2] / "shared" / "data")
STREAMS, STEPS = 64, 64


class Characters(nn.Module):
    """Logits of the next character."""

    def __init__(self, kinds: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, 64)
        self.lstm = nn.LSTM(64, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, steps, kinds) for characters (batch, steps)."""
        return self.head(self.lstm(self.embedding(x))[0])


def text() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return training and validation characters as numbers, and how many there are."""
    with lzma.open(DATA / "tiny_shakespeare.txt.xz", "rt") as file:
        characters = file.read()
    kinds = sorted(set(characters))
    numbers = torch.tensor([kinds.index(one) for one in characters])
    cut = int(len(numbers) * 0.9)
    return numbers[:cut], numbers[cut:], len(kinds)


def windows(
    numbers: torch.Tensor, seed: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of inputs and next characters: each place once, in random order if there is a seed."""
    count = (len(numbers) - 1) // STEPS
    x = numbers[: count * STEPS].reshape(count, STEPS)
    y = numbers[1 : count * STEPS + 1].reshape(count, STEPS)
    order = torch.arange(count)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(STREAMS) if len(part) == STREAMS]
    return [(x[part], y[part]) for part in parts]


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of characters."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def train_(module: nn.Module, numbers: torch.Tensor, epochs: int, rate: float, seed: int) -> None:
    """Train with Adam and a rate that falls to zero; the last weights are kept."""
    batches = [one for epoch in range(epochs) for one in windows(numbers, 1000 * seed + epoch)]
    optimizer = torch.optim.Adam(module.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    module.train()
    for x, y in tqdm(batches, "train"):
        optimizer.zero_grad()
        loss(module(x), y).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    module.eval()


def recover_(
    small: nn.Module, numbers: torch.Tensor, rate: float, seed: int, teacher: nn.Module | None
) -> None:
    """Train a smaller network for an epoch as `train_` does, distilled from a teacher if there is one."""
    kk.torch.recover_(
        small,
        None,
        windows(numbers, 1000 * seed),
        loss=loss,
        optimizer=torch.optim.Adam(small.parameters(), rate),
        clip=kk.clip.ByGlobalNorm(1.0),
        teacher=teacher,
        temperature=1.0,
        axis=-1,
    )
    small.eval()


def stored(path: Path, hidden: int, kinds: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Return a network whose weights are in a file, or make it and store them."""
    module = Characters(kinds, hidden)
    if path.exists():
        module.load_state_dict(load_file(path))
        return module.eval()
    path.parent.mkdir(exist_ok=True)
    module = make()
    save_file(module.state_dict(), path)
    return module.eval()


@torch.no_grad()
def perplexity(module: nn.Module, numbers: torch.Tensor) -> float:
    """Return the perplexity per character."""
    found = [float(loss(module(x), y)) for x, y in windows(numbers)]
    return math.exp(sum(found) / len(found))


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the text")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5e-3, help="of the last epoch, for all")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seed, epochs, hidden, rate = (
        arguments.seed,
        arguments.epochs,
        arguments.hidden,
        arguments.rate,
    )
    train, valid, kinds = text()
    if arguments.quick:
        train, valid = train[: len(train) // 20], valid[: len(valid) // 10]
    torch.set_num_threads(1)
    width = "" if hidden == 512 else f"_{hidden}"
    path = Path("runs") / f"shrink_lstm_{len(train)}_{epochs}_{seed}{width}.safetensors"

    def first() -> nn.Module:
        torch.manual_seed(seed)
        module = Characters(kinds, hidden)
        train_(module, train, epochs, 2e-3, seed)
        return module

    def second() -> nn.Module:
        module = copy.deepcopy(dense)
        train_(module, train, 1, rate, seed + 1)
        return module

    dense = stored(path, hidden, kinds, first)
    example = torch.zeros(1, 1, dtype=torch.int64)
    calibration = windows(train, seed)[:8]
    plain, _ = kk.torch.shrink(dense.eval(), calibration[0][0], width=0.5, exclude="embedding.*")
    small, report = kk.torch.shrink(
        dense, calibration[0][0], width=0.5, exclude="embedding.*", data=calibration, loss=loss
    )
    print(f"dense, {epochs} epochs: {perplexity(dense, valid):.3f}")
    print(
        f"half of the units: {perplexity(plain, valid):.3f}, compensated: {perplexity(small, valid):.3f}"
    )
    share = report.parameters_after / report.parameters_before
    times = [milliseconds(one, (example,), {}, runs=101) for one in (dense, small)]
    print(
        f"parameters: {share:.3f} (at most 0.35); a step: {times[1] / times[0]:.2f} of the time (at most 0.6)"
    )
    longer = stored(path.with_stem(f"{path.stem}_more_{rate:g}"), hidden, kinds, second)
    goal = perplexity(longer, valid)
    print(f"dense, one more epoch: {goal:.3f}", flush=True)
    for name, teacher in (
        ("on the characters", None),
        ("distilled from the dense one", dense),
        ("distilled from the dense one after its epoch", longer),
    ):
        module = copy.deepcopy(small)
        recover_(module, train, rate, seed + 1, teacher)
        reached = perplexity(module, valid)
        print(
            f"shrunk, one epoch, {name}: {reached:.3f}, {reached / goal - 1:+.1%} (at most +3 %)",
            flush=True,
        )
    scratch = Characters(kinds, hidden // 2)
    train_(scratch, train, epochs + 1, 2e-3, seed + 1)
    print(f"half width from scratch: {perplexity(scratch, valid):.3f}")


if __name__ == "__main__":
    main()
