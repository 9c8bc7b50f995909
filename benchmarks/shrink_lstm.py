"""A character LSTM with half of its hidden units: ``python benchmarks/shrink_lstm.py``.

Tiny Shakespeare, the first 90 % to train on, perplexity on the rest; two layers of 512 hidden units, embedding 64.
The dense network is trained for `--epochs` and, from these weights, for one more epoch. Beside it: half of the
hidden units go, what is left is compensated on training text and trained for one epoch by `kk.torch.recover_`, on the
characters alone and distilled from the dense network, before and after its own epoch; and a network of that size
is trained from scratch for as many epochs in all. Each epoch, of each network, has the same batches and the same
learning rate, which falls to zero; last weights. The weights are stored in ``runs/`` after each epoch.

    python benchmarks/shrink_lstm.py [--quick] [--epochs 2] [--rate 4e-3] [--batch 32] [--hidden 512] [--seed 0]
"""

from __future__ import annotations

import argparse
import copy
import lzma
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import karikomi as kk
from karikomi.torch.shrinking.costs import milliseconds

DATA = Path(os.environ.get("KARIKOMI_DATA") or Path(__file__).parents[2] / "shared" / "data")
STEPS = 64


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
    numbers: torch.Tensor, batch: int, seed: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of inputs and next characters: each place once, in random order if there is a seed."""
    count = (len(numbers) - 1) // STEPS
    x = numbers[: count * STEPS].reshape(count, STEPS)
    y = numbers[1 : count * STEPS + 1].reshape(count, STEPS)
    order = torch.arange(count)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(batch) if len(part) == batch]
    return [(x[part], y[part]) for part in parts]


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of characters."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def epoch_(
    module: nn.Module,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    rate: float,
    teacher: nn.Module | None = None,
) -> None:
    """Train for an epoch with Adam and a rate that falls to zero, distilled from a teacher if there is one."""
    kk.torch.recover_(
        module,
        None,
        batches,
        loss=loss,
        optimizer=torch.optim.Adam(module.parameters(), rate),
        clip=kk.clip.ByGlobalNorm(1.0),
        teacher=teacher,
        temperature=1.0,
        axis=-1,
    )
    module.eval()


@torch.no_grad()
def perplexity(module: nn.Module, numbers: torch.Tensor) -> float:
    """Return the perplexity per character."""
    found = [float(loss(module(x), y)) for x, y in windows(numbers, 64)]
    return math.exp(sum(found) / len(found))


class Comparison:
    """The text, the options, and the networks trained from scratch, each epoch of which is stored."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.train, self.valid, self.kinds = text()
        if given.quick:
            self.train = self.train[: len(self.train) // 20]
            self.valid = self.valid[: len(self.valid) // 10]

    def batches(self, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the training batches of an epoch."""
        return windows(self.train, self.given.batch, 1000 * self.given.seed + epoch)

    def trained(self, hidden: int, epochs: int) -> nn.Module:
        """Return a network after some epochs."""
        g = self.given
        name = f"{hidden}_{len(self.train)}_{g.batch}_{g.rate:g}_{g.seed}_{epochs}"
        path = Path("runs") / f"shrink_lstm_{name}.safetensors"
        torch.manual_seed(g.seed)
        module = Characters(self.kinds, hidden) if epochs < 2 else self.trained(hidden, epochs - 1)
        if path.exists():
            module.load_state_dict(load_file(path))
            return module.eval()
        epoch_(module, self.batches(epochs - 1), g.rate)
        path.parent.mkdir(exist_ok=True)
        save_file(module.state_dict(), path)
        return module

    def show(self, what: str, module: nn.Module, beside: float | None = None) -> float:
        """Print and return the perplexity of a network."""
        found = perplexity(module, self.valid)
        apart = "" if beside is None else f", {found / beside - 1:+.2%} (at most +3 %)"
        print(f"{what}: {found:.3f}{apart}", flush=True)
        return found

    def run(self) -> None:
        """Print the comparison."""
        hidden, epochs, rate = self.given.hidden, self.given.epochs, self.given.rate
        dense = self.trained(hidden, epochs)
        self.show(f"dense, {epochs} epochs", dense)
        calibration = windows(self.train, 64, self.given.seed)[:8]
        settings = {"width": 0.5, "exclude": "embedding.*"}
        plain, _ = kk.torch.shrink(dense, calibration[0][0], **settings)
        self.show("half of the units", plain)
        small, report = kk.torch.shrink(
            dense, calibration[0][0], data=calibration, loss=loss, **settings
        )
        self.show("half of the units, compensated", small)
        share = report.parameters_after / report.parameters_before
        example = torch.zeros(1, 1, dtype=torch.int64)
        times = [milliseconds(network, (example,), {}, runs=101) for network in (dense, small)]
        print(f"parameters: {share:.3f} (at most 0.35)")
        print(f"a step: {times[1] / times[0]:.2f} of the time (at most 0.6)", flush=True)
        longer = self.trained(hidden, epochs + 1)
        goal = self.show("dense, one more epoch", longer)
        for how, teacher in (
            ("on the characters", None),
            ("distilled from the dense one", dense),
            ("distilled from the dense one after its epoch", longer),
        ):
            module = copy.deepcopy(small)
            epoch_(module, self.batches(epochs), rate, teacher)
            self.show(f"shrunk, one epoch, {how}", module, goal)
        self.show("half width from scratch", self.trained(hidden // 2, epochs + 1), goal)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the text")
    parser.add_argument("--epochs", type=int, default=2, help="before the shrink")
    parser.add_argument("--rate", type=float, default=4e-3, help="of each epoch, for all")
    parser.add_argument("--batch", type=int, default=32, help="sequences of 64 characters")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    Comparison(parser.parse_args()).run()


if __name__ == "__main__":
    main()
