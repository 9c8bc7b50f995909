"""How a clip threshold, a sparsity and a penalty bear on accuracy, cost, training speed and generalisation.

    KARIKOMI_DATA=../shared/data python benchmarks/questions.py [--seeds 1] [--out FILE] [--docs docs/questions.md]

Four networks on small parts of real data: a perceptron (MNIST), a convolutional network (CIFAR-10), a recurrent
network and a transformer (characters of Shakespeare). Each is trained with every combination of three clips, two
sparsities and two penalties, and along a ladder of sparsities. Each training is a line of `--out` as soon as it is
made: the same command resumes. `--docs` writes the page of tables and answers.
"""

from __future__ import annotations

import argparse
import functools
import json
import lzma
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import karikomi as kk

DATA = Path(os.environ.get("KARIKOMI_DATA") or Path(__file__).parents[2] / "shared" / "data")
STREAM = 32
"""Characters in a window."""

Split = tuple[torch.Tensor, torch.Tensor]


class Recurrent(nn.Module):
    """Logits of the next character by tanh units that see their own last values (Elman 1990)."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.embedding, self.inputs = nn.Embedding(kinds, 32), nn.Linear(32, 128)
        self.states, self.head = nn.Linear(128, 128), nn.Linear(128, kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, kinds, steps)."""
        given = self.inputs(self.embedding(x))
        state, states = given.new_zeros(len(x), 128), []
        for part in given.unbind(1):
            state = torch.tanh(part + self.states(state))
            states.append(state)
        return self.head(torch.stack(states, 1)).transpose(1, 2)


class Block(nn.Module):
    """Causal attention of four heads and a feed-forward part, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, steps, width)."""
        n = self.norms[0](x)
        parts = (
            layer(n).unflatten(2, (4, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Logits of the next character by two blocks."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(kinds, 64), nn.Embedding(STREAM, 64)
        self.blocks, self.head = nn.Sequential(Block(64), Block(64)), nn.Linear(64, kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, kinds, steps)."""
        x = self.embedding(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.blocks(x)).transpose(1, 2)


def perceptron() -> nn.Module:
    """Return 784-128-64-10."""
    layers = (nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional() -> nn.Module:
    """Return three convolutions of stride 2 and a head."""
    parts: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        parts += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(32 * 16, 10))


@functools.cache
def mnist() -> tuple[Split, Split]:
    """Return 6,000 images to train with and 2,000 to test with."""
    with np.load(DATA / "mnist.npz") as stored:
        images = torch.from_numpy(stored["train_images"][:8_000]).float()[:, None] / 255 - 0.13
        labels = torch.from_numpy(stored["train_labels"][:8_000]).long()
    return (images[:6_000], labels[:6_000]), (images[6_000:], labels[6_000:])


@functools.cache
def cifar() -> tuple[Split, Split]:
    """Return 4,000 images to train with and 2,000 to test with, of the smaller file."""
    with np.load(DATA / "cifar10_test.npz") as stored:
        images = torch.from_numpy(stored["images"][:6_000]).float().permute(0, 3, 1, 2) / 255 - 0.47
        labels = torch.from_numpy(stored["labels"][:6_000]).long()
    return (images[:4_000] / 0.25, labels[:4_000]), (images[4_000:] / 0.25, labels[4_000:])


@functools.cache
def characters() -> tuple[Split, Split]:
    """Return windows of the first 200,000 characters to train with, and some of the last 20,000 to test with."""
    with lzma.open(DATA / "tiny_shakespeare.txt.xz", "rt") as file:
        text = file.read()
    kinds = sorted(set(text))
    numbers = torch.tensor([kinds.index(c) for c in text[:200_000] + text[-20_000:]])

    def windows(part: torch.Tensor) -> Split:
        count = (len(part) - 1) // STREAM
        rows = part[: count * STREAM + 1]
        return rows[:-1].view(count, STREAM), rows[1:].view(count, STREAM)

    return windows(numbers[:200_000]), windows(numbers[200_000:])


@dataclass(frozen=True)
class Subject:
    """A network, its data, and how it is trained."""

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Split, Split]]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    steps: int
    batch: int
    penalty: float
    about: str


def sgd(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a maker of SGD with momentum."""
    return lambda net: torch.optim.SGD(net.parameters(), rate, momentum=0.9)


def adam(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a maker of AdamW."""
    return lambda net: torch.optim.AdamW(net.parameters(), rate)


SUBJECTS = {
    "MLP": Subject(perceptron, mnist, sgd(0.1), 250, 64, 3e-5, "784-128-64-10, MNIST, SGD 0.1"),
    "CNN": Subject(
        convolutional, cifar, sgd(0.05), 250, 32, 3e-5, "three convolutions, CIFAR-10, SGD 0.05"
    ),
    "RNN": Subject(
        lambda: Recurrent(65),
        characters,
        sgd(0.5),
        300,
        32,
        1e-5,
        "128 tanh units, characters, SGD 0.5",
    ),
    "transformer": Subject(
        lambda: Transformer(65),
        characters,
        adam(3e-3),
        300,
        16,
        1e-5,
        "two blocks of width 64, characters, AdamW 3e-3",
    ),
}
CLIPS = {"none": math.inf, "median": 1.0, "tenth": 0.1}
"""Name -> limit by the median norm of the training without a clip."""
SPARSITIES, LADDER, BITS = (0.0, 0.9), (0.5, 0.8, 0.95), 6

Cell = tuple[str, str, float, bool, int]
KEYS = ("network", "clip", "sparsity", "penalty", "seed")


def cells(networks: Sequence[str], seeds: int) -> Iterator[Cell]:
    """Yield the trainings, those without a clip first: the limits are relative to their norms."""
    for seed in range(seeds):
        for name in networks:
            for sparsity in SPARSITIES:
                for clip in CLIPS:
                    for penalty in (False, True):
                        yield name, clip, sparsity, penalty, seed
            for sparsity in LADDER:
                yield name, "median", sparsity, False, seed


def trained(cell: Cell, median: float | None) -> dict[str, Any]:
    """Train and measure one cell."""
    name, clip, sparsity, penalty, seed = cell
    subject = SUBJECTS[name]
    train, test = subject.data()
    torch.manual_seed(seed)
    net = subject.make()
    optimizer = subject.optimizer(net)
    limit = CLIPS[clip] * median if median is not None and clip != "none" else math.inf
    last = subject.steps // 2
    prune = kk.prune.Gradual(sparsity, steps=(last // 4, last), every=10) if sparsity else None
    rule = kk.prune.L1(subject.penalty) if penalty else None
    handle = kk.torch.attach(
        optimizer, net, clip=kk.clip.ByGlobalNorm(limit), prune=prune, penalty=rule
    )
    norms, engaged, spent, halfway = [], 0, 0.0, 0.0
    generator = torch.Generator().manual_seed(seed)
    for step in range(subject.steps):
        rows = torch.randint(len(train[0]), (subject.batch,), generator=generator)
        began = time.process_time()
        loss = F.cross_entropy(net(train[0][rows]), train[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent += time.process_time() - began
        norms.append(float(handle.last.pre))
        engaged += bool(handle.last.engaged)
        if step == last:
            halfway = accuracy(net, test)
    handle.detach()
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {
        **dict(zip(KEYS, cell, strict=True)),
        "test": accuracy(net, test),
        "train": accuracy(net, (train[0][: len(test[0])], train[1][: len(test[0])])),
        "halfway": halfway,
        "median": statistics.median(finite) if finite else None,
        "largest": max(finite, default=None),
        "limit": limit if math.isfinite(limit) else None,
        "clipped": engaged / subject.steps,
        "ms": 1e3 * spent / subject.steps,
        **sizes(net),
        "packed_test": accuracy(net, test),
    }


def sizes(net: nn.Module) -> dict[str, Any]:
    """Round the weights to 6 bits, and return the bytes of the dense network and of the packed file."""
    dense = sum(4 * tensor.numel() for tensor in net.parameters())
    left = sum(int(tensor.count_nonzero()) for tensor in net.parameters())
    kk.torch.quantize_(net, bits=BITS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.karikomi"
        kk.save(net, path)
        return {"dense": dense, "left": left, "bytes": path.stat().st_size}


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Return the share of right predictions, in evaluation mode."""
    net.eval()
    right = [
        net(x).argmax(1) == y for x, y in zip(*(part.split(500) for part in split), strict=True)
    ]
    net.train()
    return float(torch.cat(right).float().mean())


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Return the mean of a key over seeds."""
    return statistics.fmean(row[key] for row in rows)


def of(rows: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Return the rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def table(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Return the table of a network: clip x sparsity x penalty."""
    lines = [
        "| clip | clipped | sparsity | penalty | test % | gap | half way % | ms a step | file | smaller |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for sparsity in SPARSITIES:
        for clip in CLIPS:
            for penalty in (False, True):
                own = of(rows, network=name, clip=clip, sparsity=sparsity, penalty=penalty)
                if own:
                    lines.append(_line(own, clip, sparsity, penalty))
    return lines


def _line(own: Sequence[dict[str, Any]], clip: str, sparsity: float, penalty: bool) -> str:
    limit = "none" if clip == "none" else f"{mean(own, 'limit'):.3g} ({clip})"
    gap = 100 * (mean(own, "train") - mean(own, "test"))
    size = mean(own, "bytes")
    return (
        f"| {limit} | {100 * mean(own, 'clipped'):.0f} % | {100 * sparsity:g} % | {'L1' if penalty else 'none'} |"
        f" {100 * mean(own, 'test'):.1f} | {gap:+.1f} | {100 * mean(own, 'halfway'):.1f} | {mean(own, 'ms'):.2f} |"
        f" {size / 1e3:.1f} kB | {mean(own, 'dense') / size:.1f}x |"
    )


def ladder(rows: Sequence[dict[str, Any]], networks: Sequence[str]) -> list[str]:
    """Return the table of sparsities: bytes and accuracy of the packed file."""
    steps = (0.0, *LADDER[:2], 0.9, LADDER[2])
    lines = [
        f"| network | {' | '.join(f'{100 * s:g} %' for s in steps)} |",
        "| --- |" + " --- |" * len(steps),
    ]
    for name in networks:
        texts = []
        for sparsity in steps:
            own = of(rows, network=name, clip="median", sparsity=sparsity, penalty=False)
            known = (
                f"{100 * mean(own, 'packed_test'):.1f} %, {mean(own, 'bytes') / 1e3:.1f} kB"
                if own
                else "not run"
            )
            texts.append(known)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def noise(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Return the deviation of the test accuracy between seeds of the same cell, in points; NaN for one seed."""
    by_cell: dict[Any, list[float]] = {}
    for row in of(rows, network=name):
        by_cell.setdefault((row["clip"], row["sparsity"], row["penalty"]), []).append(row["test"])
    several = [statistics.variance(found) for found in by_cell.values() if len(found) > 1]
    return 100 * math.sqrt(statistics.fmean(several)) if several else math.nan


EFFECTS = {
    "What does a clip threshold do?": [
        ("none -> median", {"clip": "none"}, {"clip": "median"}),
        ("none -> a tenth of it", {"clip": "none"}, {"clip": "tenth"}),
    ],
    "What does a sparse network cost, and is it faster or better on new data?": [
        ("dense -> 90 % sparse", {"sparsity": 0.0}, {"sparsity": 0.9}),
    ],
    "What does a penalty do?": [
        (
            "none -> L1, dense",
            {"penalty": False, "sparsity": 0.0},
            {"penalty": True, "sparsity": 0.0},
        ),
        (
            "none -> L1, 90 % sparse",
            {"penalty": False, "sparsity": 0.9},
            {"penalty": True, "sparsity": 0.9},
        ),
    ],
}
"""Question -> what is compared with what, all else equal."""


def effects(
    rows: Sequence[dict[str, Any]], networks: Sequence[str], pairs: Sequence[Any]
) -> list[str]:
    """Return a table of main effects: the mean change from one setting to another, all else equal."""
    lines = [
        "| network | from -> to | test, points | half way, points | gap, points | time of a step | file |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    grid = [row for row in rows if row["sparsity"] in SPARSITIES]
    for name in networks:
        for words, first, second in pairs:
            both = [
                (row, other[0])
                for row in of(grid, network=name, **first)
                if (other := of(grid, **{key: row[key] for key in KEYS} | second))
            ]
            if not both:
                continue
            before, after = (list(side) for side in zip(*both, strict=True))
            test, half = (
                100 * (mean(after, key) - mean(before, key)) for key in ("test", "halfway")
            )
            gap = test_gap(after) - test_gap(before)
            times, size = (mean(after, key) / mean(before, key) for key in ("ms", "bytes"))
            lines.append(
                f"| {name} | {words} | {test:+.1f} | {half:+.1f} | {gap:+.1f} | x {times:.2f} | x {size:.2f} |"
            )
    return lines


def test_gap(rows: Sequence[dict[str, Any]]) -> float:
    """Return training less test accuracy, in points."""
    return 100 * (mean(rows, "train") - mean(rows, "test"))


def page(rows: Sequence[dict[str, Any]], networks: Sequence[str], seconds: float) -> str:
    """Return the page."""
    seeds = len({row["seed"] for row in rows})
    parts = [INTRODUCTION.format(command=COMMAND, bits=BITS, seeds=seeds, seconds=seconds)]
    for question, pairs in EFFECTS.items():
        parts += [f"## {question}\n", *effects(rows, networks, pairs), ""]
    spread = ", ".join(f"{name} {noise(rows, name):.1f}" for name in networks)
    if seeds > 1:
        parts.append(
            f"Two trainings that differ by the seed alone deviate by so many points: {spread}. Smaller effects than"
            " that are not shown to be any.\n"
        )
    else:
        parts.append(
            "One seed does not show how much of an effect is chance: effects below a point or so should not be relied"
            " on.\n`--seeds 2` prints the deviation between seeds.\n"
        )
    parts += [
        "## How small, at which accuracy?\n",
        f"Clipped at the median norm, without penalty; the file holds weights of {BITS} bits, entropy coded,"
        "\nand its accuracy is that of the rounded network.\n",
        *ladder(rows, networks),
        "",
    ]
    for name in networks:
        parts += [f"## {name}: {SUBJECTS[name].about}\n", *table(rows, name), ""]
    return "\n".join(parts) + "\n"


COMMAND = "python benchmarks/questions.py --docs docs/questions.md"
INTRODUCTION = """# How thresholds, sparsity and penalties bear on a network

Tutorials ask it of every training: what does a clip threshold do to accuracy and speed, what does a smaller network
cost, does it generalise better? Here each question has a measured answer for four small networks; this page is
written by `{command}`.

**Scaled down**: parts of the data (6,000 images of MNIST, 4,000 of CIFAR-10, 200,000 characters of Shakespeare),
networks of 20 to 110 thousand weights, 250 to 300 steps, seeds: {seeds}; in all {seconds:.0f} s of one processor.
Large networks that train long lose less by pruning, and more by spikes that are not clipped. A limit is the median
norm of the same training without a clip, or a tenth of it.

*clipped*: share of steps. *gap*: accuracy on training data less that on test data, in points. *half way*: test
accuracy after half of the steps, when pruning has just ended. *ms a step*: time of one processor, in dense arithmetic:
masks and clips cost time, zeros save none. *file*: weights of {bits} bits, packed; *smaller*: than float32.
"""


def main() -> None:
    """Train what is missing, print the tables, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/questions.jsonl"))
    parser.add_argument("--docs", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.out.read_text("utf-8").splitlines() if arguments.out.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {tuple(row[key] for key in KEYS) for row in rows}
    for cell in cells(arguments.networks, arguments.seeds):
        if cell in done:
            continue
        name, _, _, _, seed = cell
        plain = of(rows, network=name, clip="none", sparsity=0.0, penalty=False, seed=seed)
        began = time.process_time()
        row = trained(cell, plain[0]["median"] if plain else None)
        rows.append(row | {"seconds": time.process_time() - began})
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(rows[-1]) + "\n")
    text = page(rows, arguments.networks, sum(row["seconds"] for row in rows))
    print(text)
    print(platform.processor() or platform.machine())
    if arguments.docs:
        arguments.docs.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
