"""Four kinds of networks through `kk.compress`, as their users write them: ``python benchmarks/compress_kinds.py``.

A character LSTM and a small transformer on Tiny Shakespeare (metric: the mean cross-entropy of a character, which
falls), a segmenter of drawn shapes (pixel accuracy), and a regression of Friedman's first function with noise (mean
absolute error, which falls). Each is trained here for a minute, compressed within 1 % of its metric, and put
beside ``pack`` alone: the least file of codebooks of 64, 32, 16 and 8 values, or of grids of 8, 6 and 5 bits, that
holds the same budget on the validation examples.

    python benchmarks/compress_kinds.py [lstm transformer segmenter regression] [--out runs/kinds] [--preset storage]
"""

from __future__ import annotations

import argparse
import copy
import lzma
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import karikomi as kk

DATA = Path(os.environ.get("KARIKOMI_DATA") or Path(__file__).parents[2] / "shared" / "data")
STEPS = 48


class CharacterLSTM(nn.Module):
    """Logits (n, steps, characters) of the next character."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, 64)
        self.lstm = nn.LSTM(64, 192, batch_first=True)
        self.head = nn.Linear(192, kinds)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.head(self.lstm(self.embedding(characters))[0])


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states after the block."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.first(states)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.out(mixed.transpose(1, 2).flatten(-2))
        return states + self.down(F.gelu(self.up(self.second(states))))


class CharacterTransformer(nn.Module):
    """Logits (n, steps, characters) of the next character."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(kinds, 96), nn.Embedding(STEPS, 96)
        self.blocks = nn.Sequential(Block(96, 4), Block(96, 4))
        self.norm, self.head = nn.LayerNorm(96), nn.Linear(96, kinds)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        places = torch.arange(characters.shape[1], device=characters.device)
        return self.head(self.norm(self.blocks(self.embedding(characters) + self.places(places))))


class Segmenter(nn.Module):
    """Logits (n, classes, height, width): down once, up once, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.down = nn.Sequential(
            nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU()
        )
        self.up = nn.ConvTranspose2d(48, 24, 2, stride=2)
        self.head = nn.Conv2d(48, 3, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        stem = self.stem(images)
        return self.head(torch.cat([stem, F.relu(self.up(self.down(stem)))], 1))


def text_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of a character."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def nats(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean cross-entropy of a character, in NumPy."""
    shifted = outputs - outputs.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(-np.take_along_axis(logs, targets[..., None], -1).mean())


def absolute_error(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean absolute error."""
    return float(np.abs(outputs.reshape(targets.shape) - targets).mean())


def absolute_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the smooth absolute error."""
    return F.smooth_l1_loss(outputs.flatten(), targets.flatten())


def text() -> tuple[list[torch.Tensor], int]:
    """Return windows of train, validation and test text, each (n, STEPS + 1), and the number of characters."""
    with lzma.open(DATA / "tiny_shakespeare.txt.xz", "rt", encoding="utf-8") as file:
        content = file.read()
    kinds = sorted(set(content))
    codes = torch.tensor([kinds.index(c) for c in content[:300_000]])
    rows = codes[: len(codes) // (STEPS + 1) * (STEPS + 1)].view(-1, STEPS + 1)
    return [rows[:5000], rows[5000:5400], rows[5400:]], len(kinds)


def characters(
    kind: Callable[[int], nn.Module],
) -> tuple[nn.Module, list[TensorDataset], dict[str, Any]]:
    """Return a network on text, its data, and what `compress` is told of it."""
    splits, kinds = text()
    data = [TensorDataset(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in splits]
    return kind(kinds), data, {"loss": text_loss, "metric": nats, "goal": "min"}


def shapes(count: int, seed: int) -> TensorDataset:
    """Return images with a disc and a box, and the class of each pixel."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:24, :24]
    images = random.normal(0, 0.35, (count, 1, 24, 24)).astype(np.float32)
    labels = np.zeros((count, 24, 24), np.int64)
    for k in range(count):
        y, x, r = random.uniform(5, 19), random.uniform(5, 19), random.uniform(3, 6)
        labels[k][(rows - y) ** 2 + (columns - x) ** 2 < r * r] = 1
        top, left = random.integers(1, 16, 2)
        labels[k, top : top + 7, left : left + 7] = 2
    images[:, 0] += labels == 1
    images[:, 0] -= labels == 2
    return TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))


def segmenter() -> tuple[nn.Module, list[TensorDataset], dict[str, Any]]:
    """Return a network on drawn shapes, its data, and its loss."""
    data = [shapes(1500, 0), shapes(400, 1), shapes(800, 2)]
    return Segmenter(), data, {"loss": "cross_entropy", "metric": "accuracy"}


def regression() -> tuple[nn.Module, list[TensorDataset], dict[str, Any]]:
    """Return a network on Friedman's first function of ten features with noise, its data, and its error."""
    random = np.random.default_rng(0)
    x = random.uniform(0, 1, (6000, 10)).astype(np.float32)
    y = (
        10 * np.sin(np.pi * x[:, 0] * x[:, 1])
        + 20 * (x[:, 2] - 0.5) ** 2
        + 10 * x[:, 3]
        + 5 * x[:, 4]
    )
    y = (y + random.normal(0, 1, len(y))).astype(np.float32)
    whole = [
        TensorDataset(*(torch.from_numpy(a[part]) for a in (x, y)))
        for part in (slice(0, 4000), slice(4000, 4800), slice(4800, 6000))
    ]
    net = nn.Sequential(
        nn.Linear(10, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 1),
        nn.Flatten(0),
    )
    return net, whole, {"loss": absolute_loss, "metric": absolute_error, "goal": "min"}


KINDS: dict[str, tuple[Callable[[], Any], int, float]] = {
    "lstm": (lambda: characters(CharacterLSTM), 6, 4e-3),
    "transformer": (lambda: characters(CharacterTransformer), 6, 2e-3),
    "segmenter": (segmenter, 6, 3e-3),
    "regression": (regression, 40, 3e-3),
}


def train_(net: nn.Module, data: TensorDataset, loss: Any, epochs: int, rate: float) -> None:
    """Train a network as its user would."""
    criterion = F.cross_entropy if loss == "cross_entropy" else loss
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    loader = DataLoader(
        data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * len(loader)
    )
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(net(inputs), targets).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    net.eval()


def pack_alone(
    net: nn.Module, data: TensorDataset, judge: Callable[[nn.Module], float], limit: float
) -> int:
    """Return the least bytes of a quantized and packed network whose metric is within a limit."""
    least = 2**62
    choices: list[dict[str, int]] = [{"entries": n} for n in (64, 32, 16, 8)] + [
        {"bits": 8},
        {"bits": 6},
        {"bits": 5},
    ]
    for choice in choices:
        other = copy.deepcopy(net)
        kk.torch.quantize_(other, **choice)
        if judge(other) <= limit:
            with tempfile.TemporaryDirectory() as folder:
                size = kk.save(other, Path(folder) / "a.karikomi").stat().st_size
            least = min(least, size)
    return least


def main() -> None:
    """Print a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("runs/kinds"))
    parser.add_argument("--preset", default=None)
    parser.add_argument("--epochs", type=int, default=3, help="of each step of the search")
    parser.add_argument("--quick", action="store_true", help="a tenth of the data: whether it runs")
    arguments = parser.parse_args()
    for name in arguments.kinds:
        make, epochs, rate = KINDS[name]
        torch.manual_seed(0)
        net, data, told = make()
        if arguments.quick:
            data = [TensorDataset(*(t[: len(t) // 10] for t in item.tensors)) for item in data]
        start = time.process_time()
        train_(net, data[0], told["loss"], epochs, rate)
        trained = time.process_time() - start
        loaders = [DataLoader(item, batch_size=100, shuffle=k == 0) for k, item in enumerate(data)]
        metric = kk.tasks.accuracy if told["metric"] == "accuracy" else told["metric"]
        sign = 1 if told.get("goal") == "min" else -1

        @torch.no_grad()
        def judge(
            module: nn.Module, part: TensorDataset = data[1], metric: Any = metric, sign: int = sign
        ) -> float:
            inputs, targets = part.tensors
            return sign * metric(module(inputs).numpy(), targets.numpy())

        drop = 0.01 * abs(judge(net))
        start = time.process_time()
        result = kk.compress(
            net,
            train=loaders[0],
            validation=loaders[1],
            test=loaders[2],
            max_drop=drop,
            preset=arguments.preset,
            out=arguments.out / name,
            progress=False,
            config={
                "prune_epochs": arguments.epochs,
                "tune_epochs": 2,
                "batch_size": 64,
                "learning_rate": rate / 2,
            },
            **told,
        )
        spent = time.process_time() - start
        alone = pack_alone(net, data[1], judge, judge(net) + drop)
        print(
            f"{name}: {result['metric']} {result['metric_before']:.4f} -> {result['metric_after']:.4f}"
            f" (limit {drop:.4f}), {result['bytes_dense']:,} -> {result['bytes_packed']:,} bytes,"
            f" {result['ratio']:.1f}x (6x asked; pack alone {result['bytes_dense'] / alone:.1f}x),"
            f" {result['verdict']}, {result['certificate']['status']}; {result['running']}"
            f" (1.3x in three of four asked) processor seconds: {trained:.0f} to train, {spent:.0f} to compress",
            flush=True,
        )
        for text in result["warnings"]:
            print(f"  {text}", flush=True)


if __name__ == "__main__":
    main()
