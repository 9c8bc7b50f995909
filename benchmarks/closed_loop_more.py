"""The closed loop on tasks that chose nothing: ``python benchmarks/closed_loop_more.py``.

Like `closed_loop.py`, on trainings so small that all limits and seeds are trained at once, as one batch of matrices.
What `kk.clip.Recommended` does in its warm-up, and where usual norms move, was chosen on the first two tasks (with
other seeds) and those of `closed_loop.py`; the others were held out:

* ``outliers``: regression by an MLP, 1 % of the targets with 30 times the noise; ``plateau``: a deep MLP on
  scikit-learn's digits whose norms rise tenfold when it leaves the plateau it starts on;
* ``heavy``: noise of Student's t with 1.5 degrees of freedom; ``rare``: one target in 2,000 with 100 times the noise;
  ``clean``: no outliers; ``early``: inputs times 30 in steps 3, 7, 12 and 20;
* ``digits``; ``small``: batches of 4; ``flipped``: a fifth of the labels drawn at random; ``rows``: a tanh RNN over
  rows.

The learning rate is the best of several without a clip (two seeds of their own); the limit of `kk.advise`'s arithmetic
is read from that training. Printed: the mean loss of the seeds over that of the best of ten limits.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

import karikomi as kk
from karikomi.advising.limits import gathered
from karikomi.clip.recommended import typical

LIMITS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, math.inf)
FIRST_SEED, TUNING = 20, (1000, 1001)
Params = list[torch.Tensor]
Pair = tuple[np.ndarray, np.ndarray]


def uniform(generator: torch.Generator, bound: float, *shape: int) -> torch.Tensor:
    """Return values between -bound and bound."""
    return (torch.rand(*shape, generator=generator) * 2 - 1) * bound


@dataclass(frozen=True)
class Mlp:
    """Linear layers with an activation between them; weights of `gain` times torch's scale."""

    sizes: tuple[int, ...]
    activation: Callable[[torch.Tensor], torch.Tensor]
    gain: float = 1.0

    def start(self, seed: int) -> Params:
        """Return the parameters of a seed."""
        generator, found = torch.Generator().manual_seed(seed), []
        for fan, out in zip(self.sizes, self.sizes[1:], strict=False):
            bound = 1 / math.sqrt(fan)
            found.append(uniform(generator, self.gain * bound, fan, out))
            found.append(uniform(generator, bound, 1, out))
        return found

    def outputs(self, params: Params, x: torch.Tensor) -> torch.Tensor:
        """Return outputs, shape (M, n, out), of M networks for inputs of shape (M, n, in)."""
        for place in range(0, len(params), 2):
            x = torch.bmm(x, params[place]) + params[place + 1]
            x = self.activation(x) if place + 2 < len(params) else x
        return x


@dataclass(frozen=True)
class Rows:
    """A tanh RNN over rows of 8 values; recurrent weights of `gain` times torch's scale."""

    width: int = 24
    gain: float = 1.6

    def start(self, seed: int) -> Params:
        """Return the parameters of a seed."""
        generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(self.width)
        shapes = (
            (8, self.width),
            (self.width, self.width),
            (1, self.width),
            (self.width, 10),
            (1, 10),
        )
        found = [uniform(generator, bound, *shape) for shape in shapes]
        found[1] *= self.gain
        return found

    def outputs(self, params: Params, x: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (M, n, 10), for inputs of shape (M, n, 64)."""
        inputs, recurrent, bias, head, shift = params
        x = x.unflatten(-1, (8, 8))
        h = torch.zeros(*x.shape[:2], self.width)
        for row in x.unbind(2):
            h = torch.tanh(torch.bmm(row, inputs) + torch.bmm(h, recurrent) + bias)
        return torch.bmm(h, head) + shift


@dataclass(frozen=True)
class Case:
    """A network with its data, batches and learning rates."""

    net: Mlp | Rows
    train: Pair
    judged: Pair
    rates: dict[str, tuple[float, ...]]
    batch: int = 32
    steps: int = 300
    spoilt: tuple[int, ...] = ()

    def drawn(self, generator: np.random.Generator, step: int) -> Pair:
        """Return a batch."""
        x, y = self.train
        rows = generator.integers(0, len(x), self.batch)
        return (30.0 if step in self.spoilt else 1.0) * x[rows], y[rows]

    def losses(self, params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of each network, shape (M,)."""
        found = self.net.outputs(params, x)
        if y.is_floating_point():
            return torch.square(found - y).mean((1, 2))
        return -torch.log_softmax(found, -1).gather(2, y[:, :, None])[:, :, 0].mean(1)


RATES = {"SGD": (0.003, 0.01, 0.03, 0.1), "AdamW": (1e-3, 3e-3, 1e-2)}
Noise = Callable[[np.random.Generator, int], np.ndarray]


def normal(sd: float, share: float = 0.0, times: float = 1.0) -> Noise:
    """Return noise of which a share is larger by a factor."""
    return lambda g, n: sd * g.standard_normal(n) * np.where(g.random(n) < share, times, 1.0)


def regression(noise: Noise, **more: Any) -> Case:
    """Return the regression y = x1 + sin(2 x2) + x3 x4 / 2 + noise; judged without outliers."""
    generator = np.random.default_rng(0)

    def drawn(count: int, noise: Noise) -> Pair:
        x = generator.standard_normal((count, 8)).astype(np.float32)
        y = x[:, 0] + np.sin(2 * x[:, 1]) + x[:, 2] * x[:, 3] / 2 + noise(generator, count)
        return x, y.astype(np.float32)[:, None]

    net = Mlp((8, 48, 1), torch.tanh)
    return Case(net, drawn(20_000, noise), drawn(3_000, normal(0.7)), RATES, steps=400, **more)


def digits(net: Mlp | Rows, rates: tuple[float, ...], flipped: float = 0.0, **more: Any) -> Case:
    """Return the classification of digits: 1,200 to train on, 597 to judge."""
    data: Any = load_digits()
    generator = np.random.default_rng(0)
    order = generator.permutation(len(data.target))
    x, y = (data.data / 16).astype(np.float32)[order], data.target[order]
    labels = np.where(generator.random(1200) < flipped, generator.integers(0, 10, 1200), y[:1200])
    rates_of = {**RATES, "SGD": rates}
    return Case(net, (x[:1200], labels), (x[1200:], y[1200:]), rates_of, **more)


CASES: dict[str, Callable[[], Case]] = {
    "outliers": lambda: regression(normal(0.7, 0.01, 30.0)),
    "plateau": lambda: digits(Mlp((64, 24, 24, 24, 10), torch.relu, 0.7), (0.01, 0.03, 0.1, 0.3)),
    "heavy": lambda: regression(lambda g, n: 0.7 * g.standard_t(1.5, n)),
    "rare": lambda: regression(normal(0.7, 0.0005, 100.0)),
    "clean": lambda: regression(normal(0.7)),
    "early": lambda: regression(normal(0.7), spoilt=(3, 7, 12, 20)),
    "digits": lambda: digits(Mlp((64, 32, 10), torch.tanh), (0.03, 0.1, 0.3, 1.0)),
    "small": lambda: digits(Mlp((64, 32, 10), torch.relu), (0.01, 0.03, 0.1), batch=4),
    "flipped": lambda: digits(Mlp((64, 32, 10), torch.relu), (0.03, 0.1, 0.3), flipped=0.2),
    "rows": lambda: digits(Rows(), (0.01, 0.03, 0.1, 0.3)),
}


class Clipped:
    """A rule for one network of the batch, decided by the package's own `decide`."""

    def __init__(self, rule: Any) -> None:
        self.rule, self.state = rule, None

    def factor(self, norm: float) -> float:
        """Return the factor for a gradient of this norm; 0 for one that is not finite."""
        if not math.isfinite(norm):
            return 0.0
        if isinstance(self.rule, float):
            return min(1.0, self.rule / norm) if norm > 0.0 else 1.0
        _, outcome, self.state = kk.numpy.clip({"w": np.array([norm])}, self.rule, self.state)
        return outcome.factor


class Stepper:
    """SGD with momentum 0.9, or AdamW, for M networks with rates of their own."""

    def __init__(self, kind: str, params: Params) -> None:
        self.kind, self.params, self.time = kind, params, 0
        self.first = [torch.zeros_like(item) for item in params]
        self.second = [torch.zeros_like(item) for item in params]

    @torch.no_grad()
    def step(self, grads: Sequence[torch.Tensor], rates: torch.Tensor) -> None:
        """Take one step; `rates` of shape (M, 1, 1)."""
        self.time += 1
        for value, grad, first, second in zip(
            self.params, grads, self.first, self.second, strict=True
        ):
            if self.kind == "SGD":
                value.sub_(rates * first.mul_(0.9).add_(grad))
                continue
            first.mul_(0.9).add_(grad, alpha=0.1)
            second.mul_(0.999).addcmul_(grad, grad, value=0.001)
            mean, square = first / (1 - 0.9**self.time), second / (1 - 0.999**self.time)
            value.mul_(1 - 0.01 * rates).sub_(rates * mean / (square.sqrt() + 1e-8))


def trained(
    case: Case, kind: str, rules: Sequence[Any], rates: Sequence[float], seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Train each rule with each seed; return losses, shape (rules, seeds), and norms, (steps, rules, seeds)."""
    starts = [case.net.start(seed) for seed in seeds]
    params = [
        torch.stack(parts).repeat(len(rules), 1, 1).requires_grad_()
        for parts in zip(*starts, strict=True)
    ]
    clips = [Clipped(rule) for rule in rules for _ in seeds]
    generators = [np.random.default_rng(seed) for seed in seeds]
    rate = torch.tensor([rate for rate in rates for _ in seeds])[:, None, None]
    stepper, seen = Stepper(kind, params), []
    for step in range(case.steps):
        pairs = [case.drawn(generator, step) for generator in generators]
        x, y = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        x, y = (part.repeat(len(rules), *[1] * (part.dim() - 1)) for part in (x, y))
        grads = torch.autograd.grad(case.losses(params, x, y).sum(), params)
        squares = torch.stack([grad.double().square().sum((1, 2)) for grad in grads])
        norms = squares.sum(0).sqrt().numpy()
        seen.append(norms)
        factors = torch.tensor(
            [clip.factor(float(n)) for clip, n in zip(clips, norms, strict=True)]
        )
        scaled = [torch.nan_to_num(grad * factors[:, None, None], 0.0, 0.0, 0.0) for grad in grads]
        stepper.step(scaled, 0.5 * rate * (1 + math.cos(math.pi * step / case.steps)))
    x, y = (torch.from_numpy(part).expand(len(clips), *part.shape) for part in case.judged)
    with torch.no_grad():
        losses = case.losses(params, x, y).double().numpy()
    all_norms = np.array(seen)
    losses = np.where(np.isfinite(losses) & np.isfinite(all_norms).all(0), losses, np.inf)
    shape = (len(rules), len(seeds))
    return losses.reshape(shape), all_norms.reshape(-1, *shape)


def advised(norms: np.ndarray) -> float:
    """Return the limit that `kk.advise` reads from the last half of the norms of a run."""
    late = norms[len(norms) // 2 :]
    found = typical(gathered(late[late > 0]), xp=np)
    return float(f"{float(kk.clip.Recommended().limit_of(*map(np.asarray, found), xp=np)):.2g}")


def row(name: str, kind: str, seeds: Sequence[int], plain: bool) -> tuple[str, list[float]]:
    """Return the row of a task and optimizer, and the two ratios of the recommendations."""
    case = CASES[name]()
    rates = case.rates[kind]
    tuning, norms = trained(case, kind, [math.inf] * len(rates), rates, TUNING)
    best_rate = int(np.argmin(tuning.mean(1)))
    rate, limit = rates[best_rate], advised(norms[:, best_rate, 0])
    rules: list[Any] = [*LIMITS, limit, kk.clip.Recommended()]
    rules += [kk.clip.Recommended(early=math.inf)] if plain else []
    losses, _ = trained(case, kind, rules, [rate] * len(rules), seeds)
    means = losses.mean(1)
    best = int(np.argmin(means[: len(LIMITS)]))
    error = losses[best].std(ddof=1) / math.sqrt(len(seeds)) / means[best]
    ratios = means / means[best] - 1.0
    good = [f"{k:g}" for k, ratio in zip(LIMITS, ratios, strict=False) if ratio <= 0.02]
    cells = [f"{ratio:+.1%}" if ratio < 9 else "diverges" for ratio in ratios[len(LIMITS) :]]
    free = "diverges" if np.isinf(ratios[len(LIMITS) - 1]) else f"{ratios[len(LIMITS) - 1]:+.1%}"
    text = f"| {name} | {kind} {rate:g} | {good[0]}..{good[-1]} | {error:.1%} | {limit:g} | "
    return text + " | ".join([*cells, free]) + " |", list(ratios[len(LIMITS) :])


def main() -> None:
    """Print the table, and how many end within 2 % of the best limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[*CASES], help=", ".join(CASES))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--kind", action="append", choices=["SGD", "AdamW"])
    parser.add_argument("--plain", action="store_true", help="also without a clip in the warm-up")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, rows = time.process_time(), list[tuple[str, list[float]]]()
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {given.seeds} seeds\n")
    more = " early=inf |" if given.plain else ""
    head = "| task | optimizer, rate | within 2 % of the best | se | advised | at it | `Recommended()` |"
    print(f"{head}{more} without |\n|{' --- |' * (head.count('|') + len(more[:1]))}")
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    for kind in given.kind or ("SGD", "AdamW"):
        for name in given.tasks:
            text, ratios = row(name, kind, seeds, given.plain)
            rows.append((kind, ratios))
            print(text, flush=True)
    for kind in dict.fromkeys(kind for kind, _ in rows):
        own = np.array([ratios for key, ratios in rows if key == kind])
        near = (own <= 0.02).sum(0)
        print(
            f"{kind}: within 2 % of the best limit at the advised limit {near[0]} of {len(own)}, ",
            end="",
        )
        print(f"Recommended() {near[1]}" + (f", with early=inf {near[2]}" if given.plain else ""))
    print(f"{time.process_time() - start:.0f} s of CPU time")


if __name__ == "__main__":
    main()
