"""Does training at the recommended limit end as at the best of ten? ``python benchmarks/closed_loop.py``.

Four small tasks, each with SGD (momentum 0.9) and AdamW, learning rates falling by a cosine:

* ``rnn``: a tanh RNN on the next character of tiny Shakespeare;
* ``transformer``: a character transformer of two blocks on the same text;
* ``cnn``: two convolutions on MNIST;
* ``outliers``: regression by an MLP; in one training target of a hundred the noise is 30 times as large.

For each: the learning rate is the best of several without a clip (``--faster 3``: three times that one); that training,
of a seed of its own, is recorded, and `kk.advise` reads a limit from the record. Then the same seeds are trained at ten
limits, at the recommended one, and with `kk.clip.Recommended()`, and the validation loss at the end, the mean
over the seeds, is compared with that of the best limit of the ten. The best of ten means is too good by its noise: its
standard error is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import NonFinite

DATA = Path(os.environ.get("KARIKOMI_DATA") or Path(__file__).parents[2] / "shared" / "data")
LIMITS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, math.inf)
RECORDED_SEED = 1000
WITHIN = 0.02

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A task: its network, the batch of a step, what is judged at the end, and the rates that are tried."""

    make: Callable[[], nn.Module]
    batch: Callable[[np.random.Generator], Pair]
    judged: Callable[[], Pair]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    steps: int
    rates: dict[str, tuple[float, ...]]


class Characters:
    """The characters of tiny Shakespeare as numbers: the first nine tenths to train on, the rest to judge."""

    def __init__(self) -> None:
        text = lzma.open(DATA / "tiny_shakespeare.txt.xz", "rt", encoding="utf-8").read()
        letters = sorted(set(text))
        numbers = {letter: place for place, letter in enumerate(letters)}
        self.values = np.array([numbers[letter] for letter in text])
        self.count, self.split = len(letters), int(0.9 * len(text))

    def drawn(self, starts: np.ndarray, length: int) -> Pair:
        """Return inputs and next characters, (n, length) each, from `starts` on."""
        rows = self.values[starts[:, None] + np.arange(length + 1)]
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())

    def batch(self, generator: np.random.Generator, size: int, length: int) -> Pair:
        """Return a batch of the training part."""
        return self.drawn(generator.integers(0, self.split - length - 1, size), length)

    def judged(self, length: int, count: int = 128) -> Pair:
        """Return evenly spaced windows of the other part."""
        starts = np.linspace(self.split, len(self.values) - length - 2, count).astype(np.int64)
        return self.drawn(starts, length)


class Recurrent(nn.Module):
    """A tanh RNN over embedded characters."""

    def __init__(self, letters: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, 24)
        self.rnn = nn.RNN(24, width, batch_first=True)
        self.head = nn.Linear(width, letters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, letters, length)."""
        return self.head(self.rnn(self.embed(x))[0]).transpose(1, 2)


class Transformer(nn.Module):
    """A causal transformer of two blocks over characters."""

    def __init__(self, letters: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, letters, length)."""
        y = self.blocks(self.embed(x) + self.places, mask=self.mask, is_causal=True)
        return self.head(self.norm(y)).transpose(1, 2)


def convolutional() -> nn.Module:
    """Return a CNN with two convolutions for images of 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def text_case(make: Callable[[Characters], nn.Module], length: int, **more: Any) -> Case:
    """Return a task on the next character."""
    text = Characters()
    return Case(
        make=lambda: make(text),
        batch=lambda generator: text.batch(generator, 16, length),
        judged=lambda: text.judged(length),
        loss=nn.functional.cross_entropy,
        **more,
    )


def images_case() -> Case:
    """Return the task on MNIST: 20,000 images to train on, 2,000 others to judge."""
    with np.load(DATA / "mnist.npz") as stored:
        images = torch.from_numpy(stored["train_images"][:22_000, None] / np.float32(255))
        labels = torch.from_numpy(stored["train_labels"][:22_000].astype(np.int64))

    def batch(generator: np.random.Generator) -> Pair:
        rows = torch.from_numpy(generator.integers(0, 20_000, 64))
        return images[rows], labels[rows]

    rates = {"SGD": (0.003, 0.01, 0.03), "AdamW": (3e-4, 1e-3, 3e-3)}
    judged = images[20_000:], labels[20_000:]
    return Case(convolutional, batch, lambda: judged, nn.functional.cross_entropy, 200, rates)


def outliers_case() -> Case:
    """Return the regression: y = x1 + sin(2 x2) + x3 x4 / 2 + noise, outliers in the training targets only."""
    generator = np.random.default_rng(0)

    def drawn(count: int, share: float) -> Pair:
        x = generator.standard_normal((count, 8)).astype(np.float32)
        y = x[:, 0] + np.sin(2 * x[:, 1]) + x[:, 2] * x[:, 3] / 2
        noise = 0.7 * generator.standard_normal(count)
        noise[generator.random(count) < share] *= 30.0
        return torch.from_numpy(x), torch.from_numpy((y + noise).astype(np.float32)[:, None])

    x, y = drawn(20_000, 0.01)
    judged = drawn(5_000, 0.0)

    def batch(generator: np.random.Generator) -> Pair:
        rows = torch.from_numpy(generator.integers(0, len(x), 32))
        return x[rows], y[rows]

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

    rates = {"SGD": (0.003, 0.01, 0.03), "AdamW": (1e-3, 3e-3, 1e-2)}
    return Case(make, batch, lambda: judged, nn.functional.mse_loss, 600, rates)


CASES: dict[str, Callable[[], Case]] = {
    "rnn": lambda: text_case(
        lambda text: Recurrent(text.count),
        24,
        steps=200,
        rates={"SGD": (0.1, 0.3, 1.0), "AdamW": (1e-3, 3e-3, 1e-2)},
    ),
    "transformer": lambda: text_case(
        lambda text: Transformer(text.count, 24),
        24,
        steps=200,
        rates={"SGD": (0.03, 0.1, 0.3), "AdamW": (1e-3, 3e-3, 1e-2)},
    ),
    "cnn": images_case,
    "outliers": outliers_case,
}


def trained(
    case: Case,
    kind: str,
    rate: float,
    clip: Any,
    seed: int,
    *,
    record: Any = None,
    norms: list[float] | None = None,
) -> float:
    """Train, and return the loss on what is judged; infinity where the training diverged."""
    torch.manual_seed(seed)
    model = case.make()
    optimizer: torch.optim.Optimizer
    if kind == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / case.steps))
    )
    generator = np.random.default_rng(seed)
    handle = kk.torch.attach(optimizer, model, clip=clip, record=record)
    try:
        for _ in range(case.steps):
            inputs, targets = case.batch(generator)
            optimizer.zero_grad()
            loss = case.loss(model(inputs), targets)
            loss.backward()
            if record is not None:
                handle.note(loss=float(loss.detach()))
            optimizer.step()
            falling.step()
            if norms is not None and handle.last is not None:
                norms.append(float(handle.last.pre))
    except NonFinite:
        return math.inf
    finally:
        handle.detach()
    model.eval()
    inputs, targets = case.judged()
    with torch.no_grad():
        found = float(case.loss(model(inputs), targets))
    return found if math.isfinite(found) else math.inf


def mean(values: Sequence[float]) -> float:
    """Return the mean; infinity where one training diverged."""
    return statistics.fmean(values)


@dataclass(frozen=True)
class Outcome:
    """One task with one optimizer: losses by limit, and those at the recommended one."""

    case: str
    kind: str
    rate: float
    regime: str
    limit: float
    multiple: float
    by_limit: dict[str, list[float]]
    advised: list[float]
    learned: list[float]

    @property
    def best(self) -> str:
        """The best limit of the sweep."""
        return min(self.by_limit, key=lambda limit: mean(self.by_limit[limit]))

    def ratio(self, losses: Sequence[float]) -> float:
        """Return the mean of losses over that of the best limit."""
        return mean(losses) / mean(self.by_limit[self.best])

    def plateau(self) -> str:
        """Return the limits whose mean loss is within 2 % of the best."""
        good = [k for k, v in self.by_limit.items() if self.ratio(v) <= 1.0 + WITHIN]
        return good[0] if len(good) == 1 else f"{good[0]}..{good[-1]}"


def tuned(case: Case, kind: str) -> float:
    """Return the learning rate of the lowest loss without a clip."""
    losses = {rate: trained(case, kind, rate, None, RECORDED_SEED) for rate in case.rates[kind]}
    return min(losses, key=lambda rate: losses[rate])


def outcome(
    name: str, kind: str, seeds: Sequence[int], faster: float, known: Outcome | None = None
) -> Outcome:
    """Record, advise, and train at all limits; at the ten limits not again where they are `known`."""
    case = CASES[name]()
    rate = faster * tuned(case, kind) if known is None else known.rate
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.jsonl"
        with kk.record.Recorder(path) as recorder:
            trained(case, kind, rate, None, RECORDED_SEED, record=recorder)
        advice = kk.advise(path)
    if advice.limit is None:
        raise SystemExit(f"{name}, {kind}: the record has too few norms for a limit")
    return Outcome(
        case=name,
        kind=kind,
        rate=rate,
        regime=advice.regime,
        limit=advice.limit.value,
        multiple=advice.limit.multiple,
        by_limit=by_limit(case, kind, rate, seeds) if known is None else known.by_limit,
        advised=[
            trained(case, kind, rate, kk.clip.ByGlobalNorm(advice.limit.value), seed)
            for seed in seeds
        ],
        learned=[trained(case, kind, rate, kk.clip.Recommended(), seed) for seed in seeds],
    )


def by_limit(case: Case, kind: str, rate: float, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Return limit -> the loss of each seed."""
    free, largest = {}, {}
    for seed in seeds:
        norms: list[float] = []
        free[seed] = trained(case, kind, rate, None, seed, norms=norms)
        largest[seed] = max(norms) if all(map(math.isfinite, norms)) else math.inf
    # A limit above all norms leaves every step as it is without: the same training to the bit.
    return {
        f"{limit:g}": [
            free[seed]
            if limit > largest[seed]
            else trained(case, kind, rate, kk.clip.ByGlobalNorm(limit), seed)
            for seed in seeds
        ]
        for limit in LIMITS
    }


HEAD = (
    "| task | optimizer, rate | regime | limit (x median) | best of 10 | within 2 % of it | loss at best "
    "| at the limit | `Recommended()` | without |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def line(found: Outcome) -> str:
    """Return the row of the table."""
    best = found.by_limit[found.best]
    error = statistics.stdev(best) / math.sqrt(len(best)) if len(best) > 1 else math.nan
    share = [f"{found.ratio(v) - 1.0:+.1%}" for v in (found.advised, found.learned)]
    free = found.ratio(found.by_limit["inf"])
    without = "diverges" if math.isinf(free) else f"{free - 1.0:+.1%}"
    return (
        f"| {found.case} | {found.kind} {found.rate:g} | {found.regime} | {found.limit:g} ({found.multiple:.2g}) "
        f"| {found.best} | {found.plateau()} | {mean(best):.4f} +- {error:.4f} | {share[0]} | {share[1]} | {without} |"
    )


def main() -> None:
    """Print the table, and how many of the recommended limits end within 2 % of the best."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[*CASES], help=", ".join(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--faster", type=float, default=1.0, help="factor on the tuned rate")
    parser.add_argument("--json", type=Path, help="a file of results: what it has is not run again")
    parser.add_argument(
        "--again",
        action="store_true",
        help="recommend and train anew where the ten limits are known",
    )
    parser.add_argument("--kind", action="append", choices=["SGD", "AdamW"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    known: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        known = json.loads(options.json.read_text())
    print(f"torch {torch.__version__}, {platform.machine()}, one thread\n\n{HEAD}")
    rows = []
    for name in options.tasks:
        for kind in options.kind or ("SGD", "AdamW"):
            key = f"{name} {kind} x{options.faster:g}, {options.seeds} seeds"
            if key not in known or options.again:
                before = Outcome(**known[key]) if key in known else None
                found = outcome(name, kind, range(options.seeds), options.faster, before)
                known[key] = vars(found)
                if options.json is not None:
                    options.json.write_text(json.dumps(known))
            rows.append(Outcome(**known[key]))
            print(line(rows[-1]), flush=True)
    for label, of in (("advise", "advised"), ("Recommended()", "learned")):
        near = sum(row.ratio(getattr(row, of)) <= 1.0 + WITHIN for row in rows)
        print(f"{label}: {near} of {len(rows)} within 2 % of the best limit")
    print(f"{time.process_time() - start:.0f} s of CPU time")


if __name__ == "__main__":
    main()
