"""Planted causes, and those that `karikomi.advise` finds: ``python benchmarks/post_mortem.py --seeds 5``.

Three networks on scikit-learn's digits: an RNN over rows, a CNN, and a transformer of two layers over rows; SGD
with momentum for the first two, AdamW for the third, every second seed with a clip. Each run is recorded by
`Recorder` with its defaults, and the record alone is read. Printed: the confusion matrix, how often the cause is
right, how often the first suspect is the tensor in which it was planted, and how many healthy runs are given
a cause. The causes are planted as their names say, so the figures are about these networks and faults and no others.

``--bounds`` instead sweeps the two networks with vanishing gradients with and without bounds on their weights, and
prints whether these help.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import karikomi as kk
from karikomi.advising.causes.asking import CAUSES
from karikomi.tasks import Data, Recipe, Split, Task

STEPS, BATCH, QUIET = 320, 32, 120
SPOILT_STEPS = 12


class Rows(nn.Module):
    """A tanh RNN over the eight rows of an image; several layers for the planted vanishing of gradients."""

    def __init__(self, layers: int = 1, width: int = 32) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, width, layers, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits for images of shape (n, 8, 8)."""
        return self.head(self.rnn(x)[0][:, -1])


class Pixels(nn.Module):
    """A CNN with two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2)
        self.fc, self.head = nn.Linear(144, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits for images of shape (n, 8, 8)."""
        x = torch.relu(self.conv2(torch.relu(self.conv1(x[:, None]))))
        return self.head(torch.relu(self.fc(x.flatten(1))))


class Block(nn.Module):
    """A block of a transformer with one attention of two heads, normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features of the shape of `x`, (n, rows, width)."""
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (2, -1)).transpose(1, 2) for p in self._projections())
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))

    def _projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.q_proj, self.k_proj, self.v_proj


class Tokens(nn.Module):
    """A transformer of two blocks over the rows of an image."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, width)
        self.places = nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits for images of shape (n, 8, 8)."""
        x = self.inputs(x) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def sigmoid_mlp() -> nn.Module:
    """Return eight sigmoid layers in torch's initialisation, whose gradients vanish."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (64, *[32] * 7):
        layers += [nn.Linear(width, 32), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def deep_rnn() -> nn.Module:
    """Return a tanh RNN of six layers with weights of a quarter of torch's scale, whose gradients vanish."""
    model = Rows(layers=6)
    with torch.no_grad():
        for parameter in model.rnn.parameters():
            parameter.mul_(0.25)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "RNN": Rows,
    "CNN": Pixels,
    "transformer": Tokens,
}
EXPECTED = {
    "healthy": "none",
    "NaN batch": "nonfinite_batch",
    "batch x 100": "bad_batch",
    "weights x 100": "changed_weights",
    "rate x 10": "learning_rate",
    "quiet phase": "moment_lag",
    "float16": "loss_scale",
    "q/k growth": "slow_growth",
    "shifted data": "data_shift",
    "vanishing": "vanishing",
}
IN_ONE_TENSOR = ("weights x 100", "float16", "q/k growth")


@dataclass
class Planted:
    """A training with a fault: where it is, and what it has done so far."""

    fault: str
    network: str
    seed: int
    model: nn.Module = field(init=False)
    at: int = field(init=False)
    tensor: str = ""
    scale: float = 65536.0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        made = NETWORKS[self.network]
        if self.fault == "vanishing":
            made = deep_rnn if self.network == "RNN" else sigmoid_mlp
        self.model = made()
        generator = np.random.default_rng([self.seed, 1])
        self.at = QUIET if self.fault == "quiet phase" else int(generator.integers(140, 240))
        matrices = [name for name, p in self.model.named_parameters() if p.dim() > 1]
        self.tensor = matrices[int(generator.integers(len(matrices)))]
        adam = self.network == "transformer" or self.fault == "quiet phase"
        self.optimizer: torch.optim.Optimizer
        if adam:
            beta = 0.9999 if self.fault == "quiet phase" else 0.999
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, beta))
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def step(self, t: int, x: torch.Tensor, y: torch.Tensor, handle: kk.torch.Handle) -> None:
        """Take step t on a batch, with the fault where it is due."""
        fault, due, since = self.fault, t == self.at, t >= self.at
        if fault == "NaN batch" and due:
            x[0, 0, 0] = math.nan
        if fault == "batch x 100" and due:
            x = 100.0 * x
        if fault == "shifted data" and since:
            x, y = 1.0 - x, (y + 3) % 10
        if fault == "rate x 10" and due:
            for group in self.optimizer.param_groups:
                group["lr"] *= 10.0
        with torch.no_grad():
            if fault == "weights x 100" and due:
                self.model.get_parameter(self.tensor).mul_(100.0)
            if fault == "q/k growth" and since:
                for name, parameter in self.model.named_parameters():
                    if name.startswith("blocks.1") and name.endswith(
                        ("q_proj.weight", "k_proj.weight")
                    ):
                        parameter.mul_(1.015)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        if fault == "quiet phase" and not since:
            loss = 0.02 * loss  # most of the batch is padding
        loss.backward()
        if fault == "float16":
            self._scaled(t)
            handle.note(loss_scale=self.scale)
        handle.note(loss=float(loss))
        self.optimizer.step()

    def _scaled(self, t: int) -> None:
        """Halve the scale of a float16 training at each of some steps, in which one tensor overflows."""
        if self.at <= t < self.at + SPOILT_STEPS:
            grad = self.model.get_parameter(self.tensor).grad
            assert grad is not None
            grad.view(-1)[0] = math.inf
            self.scale /= 2.0


def batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of digits, shuffled by the seed."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    generator = np.random.default_rng([seed, 2])
    for _ in range(STEPS):
        rows = torch.from_numpy(generator.integers(0, len(labels), BATCH))
        yield images[rows].clone(), labels[rows]


def recorded(fault: str, network: str, seed: int, path: Path) -> Planted:
    """Train with a planted fault, and return it; the record is written to `path`."""
    planted = Planted(fault, network, seed)
    clip = kk.clip.ByGlobalNorm(5.0) if seed % 2 else None
    with kk.record.Recorder(path) as recorder:
        handle = kk.torch.attach(
            planted.optimizer, planted.model, clip=clip, record=recorder, stop_after=1000
        )
        for t, (x, y) in enumerate(batches(seed), start=1):
            planted.step(t, x, y, handle)
        handle.detach()
    return planted


def pairs() -> list[tuple[str, str]]:
    """Return the faults and networks that go together."""
    found = [(fault, network) for fault in EXPECTED for network in NETWORKS]
    only = {"q/k growth": ("transformer",), "vanishing": ("RNN", "CNN")}
    return [(f, n) for f, n in found if n in only.get(f, tuple(NETWORKS))]


@dataclass(frozen=True)
class Judged:
    """What was planted in a run, and what was found."""

    fault: str
    network: str
    seed: int
    cause: str
    tensor_right: bool | None

    @property
    def right(self) -> bool:
        """Whether the cause is the planted one; a limit that is always met is no fault."""
        wanted = EXPECTED[self.fault]
        return self.cause == wanted or (wanted == "none" and self.cause == "always_clipped")


def judged(fault: str, network: str, seed: int, folder: Path) -> Judged:
    """Train, read the record, and compare."""
    path = folder / f"{fault.replace('/', '_')}-{network}-{seed}.jsonl"
    planted = recorded(fault, network, seed, path)
    advice = kk.advise(path)
    path.unlink()
    first = advice.findings[0].tensors[:1] if advice.findings else ()
    tensor_right = None
    if fault == "q/k growth":
        tensor_right = (
            bool(first)
            and first[0].startswith("blocks.1")
            and first[0][-13:-8] in ("q_pro", "k_pro")
        )
    elif fault in IN_ONE_TENSOR:
        tensor_right = first == (planted.tensor,)
    return Judged(fault, network, seed, advice.cause, tensor_right)


def matrix(rows: list[Judged]) -> str:
    """Return the confusion matrix: what was planted by what was found."""
    found = [cause for cause in CAUSES if any(row.cause == cause for row in rows)]
    lines = [f"{'planted':<15}" + "".join(f"{cause:>18}" for cause in found)]
    for fault in EXPECTED:
        counts = Counter(row.cause for row in rows if row.fault == fault)
        lines.append(f"{fault:<15}" + "".join(f"{counts[cause] or '.':>18}" for cause in found))
    return "\n".join(lines)


def account(rows: list[Judged]) -> str:
    """Return the shares beside their aims."""
    lines = [matrix(rows), ""]
    faults = [row for row in rows if row.fault != "healthy"]
    for fault in EXPECTED:
        own = [row for row in rows if row.fault == fault]
        tensors = [row.tensor_right for row in own if row.tensor_right is not None]
        text = f"{fault:<15}{sum(row.right for row in own):>5} of {len(own):<4} right"
        if tensors:
            text += f", first suspect {sum(tensors)} of {len(tensors)}"
        lines.append(text)
    tensors = [row.tensor_right for row in rows if row.tensor_right is not None]
    healthy = [row for row in rows if row.fault == "healthy"]
    lines += [
        f"right cause {sum(row.right for row in faults) / max(len(faults), 1):.1%} (aim 80 %)",
        f"right tensor {sum(tensors) / max(len(tensors), 1):.1%} (aim 90 %)",
        f"healthy runs given a cause {sum(not row.right for row in healthy)} of {len(healthy)} (aim 5 of 100)",
    ]
    return "\n".join(lines)


def rows_of_digits() -> Data:
    """Return the splits of the task `digits` as images of shape (n, 8, 8)."""
    plain = kk.tasks.load("digits").data()
    splits = [
        Split(np.asarray(split.inputs).reshape(-1, 8, 8), split.targets)
        for split in (plain.train, plain.validation, plain.test)
    ]
    return Data(*splits)


def bounds(seeds: int) -> None:
    """Sweep the networks whose gradients vanish with and without bounds, and print the answers."""
    recipe = Recipe(batch_size=BATCH, learning_rate=2e-3, threads=1)
    for name, make in (("deep-tanh-rnn", deep_rnn), ("sigmoid-mlp", sigmoid_mlp)):
        task = Task(name=name, model=make, data=rows_of_digits, recipe=recipe)
        with tempfile.TemporaryDirectory() as folder:
            result = kk.sweep(
                task,
                limits=(None,),
                bounds=(None, "UnitNorm(1.0)", "SpectralCap(1.0)"),
                sparsities=(0.0,),
                seeds=seeds,
                epochs=8,
                out=Path(folder) / "sweep",
                progress=False,
            )
        print(f"{name}: {' '.join(result['answer']['sentences'])}", flush=True)


def main() -> None:
    """Print the confusion matrix and the shares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--fault", action="append", choices=[*EXPECTED], help="only this one")
    parser.add_argument("--json", type=Path, help="a file of results, which is added to")
    parser.add_argument("--bounds", action="store_true", help="sweep bounds on vanishing gradients")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.bounds:
        bounds(options.seeds)
        return
    start, rows = time.process_time(), list[Judged]()
    if options.json is not None and options.json.exists():
        rows = [Judged(**row) for row in json.loads(options.json.read_text())]
    known = {(row.fault, row.network, row.seed) for row in rows}
    wanted = [pair for pair in pairs() if pair[0] in (options.fault or EXPECTED)]
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first, options.first + options.seeds):
            for pair in wanted:
                if (*pair, seed) in known:
                    continue
                rows.append(judged(*pair, seed, Path(folder)))
                if options.json is not None:
                    options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    print(account(rows))
    print(f"{len(rows)} runs of {STEPS} steps; {time.process_time() - start:.0f} s of CPU time now")


if __name__ == "__main__":
    main()
