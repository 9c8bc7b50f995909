"""Planted damage that an audit must name, and harmless pairs in which it must find nothing.

    python benchmarks/audit_damage.py [--pairs 200] [--seeds 3] [--kinds image text signal]

Three networks that train in seconds: digits (images of 8 x 8), characters of English (is the next one a vowel, a
consonant, a space or a mark?), and waveforms of two channels. Damage: one class degraded, one corruption ruined, one
layer scrambled, one slice lost, calibration ruined, the explanation of one class turned. A damaged network keeps its
accuracy elsewhere, as it is trained to (the scrambled layer is not). Harmless pairs: weights rounded to 6 to 8 bits,
or with small noise. Printed: how often the damage is named, by the right name, and how many harmless pairs had any
warning.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import karikomi as kk
from karikomi.audit import audit
from karikomi.audit.corruptions import corruptions_of
from karikomi.audit.stress import corrupted
from karikomi.quantize import uniform
from karikomi.tasks import Data, Split, Task

TEXT = """
the prince of verona walked along the river and spoke of summer while the old soldiers argued about bread and wine
when the morning came again every window in the narrow street was open and many voices answered the bells of the town
no man remembers where the first stone of the bridge was laid but each child knows the song that the builders sang
"""


class Images(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.hidden, self.head = nn.Linear(24 * 4, 48), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Text(nn.Module):
    """Embedding, two convolutions over positions, a head for the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(28, 16)
        self.first, self.second = nn.Conv1d(16, 48, 3), nn.Conv1d(48, 48, 3)
        self.head = nn.Linear(48 * 8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.embedding(x).transpose(1, 2)
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(x.flatten(1))


class Signals(nn.Module):
    """Two convolutions over time and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 16, 7, 2), nn.Conv1d(16, 24, 5, 2)
        self.head = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean(2))


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images, classes, and a slice: pictures with much ink."""
    found = load_digits()
    x = (found.images[:, None] / 16.0).astype(np.float32)
    x = np.concatenate([x, np.roll(x, 1, 3), np.roll(x, 1, 2)])
    return x, np.tile(found.target, 3), x.mean((1, 2, 3)) > np.quantile(x.mean((1, 2, 3)), 0.8)


def text() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return windows of characters, the kind of the next one, and a slice: windows with a "w"."""
    generator = np.random.default_rng(0)
    words = TEXT.split()
    stream = " ".join(words[i] for i in generator.integers(0, len(words), 4_000))
    letters = " abcdefghijklmnopqrstuvwxyz."
    numbers = np.array([letters.index(c) for c in stream])
    x = np.stack([numbers[i : i + 12] for i in range(len(numbers) - 12)])
    kinds = np.array(
        [0 if c == " " else 1 if c in "aeiou" else 2 if c in "bcdfghjklm" else 3 for c in letters]
    )
    return x, kinds[numbers[12:]], (x == letters.index("w")).any(1)


def signals() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return waveforms, their classes, and a slice: those of the second sensor."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 6, 6_000)
    times = np.linspace(0, 4, 64)
    phase = generator.uniform(0, 6, (6_000, 1))
    wave = np.sin((1.5 + y[:, None] * 0.9) * times + phase)
    sensor = generator.random(6_000) < 0.25
    other = np.where(sensor[:, None], 0.6, 0.3) * np.cos((2 + y[:, None]) * times - phase)
    x = np.stack([wave, other], 1) + 0.45 * generator.normal(size=(6_000, 2, 64))
    return x.astype(np.float32), y, sensor


KINDS: dict[str, tuple[type[nn.Module], Callable[[], Any], str]] = {
    "image": (Images, images, "contrast"),
    "text": (Text, text, "token_swap"),
    "signal": (Signals, signals, "offset"),
}


class Setting:
    """A trained network, its task, and the data that damage is planted with."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        make, data, self.corruption = KINDS[kind]
        x, y, members = data()
        order = np.random.default_rng(1).permutation(len(y))
        x, y, members = x[order], y[order], members[order]
        cut = len(y) // 2
        self.train, test = Split(x[:cut], y[:cut]), Split(x[cut:], y[cut:])
        self.inside, self.slices = members[:cut], {"group": members[cut:]}
        split = Data(self.train, test, test)
        self.task = Task(name=kind, model=make, data=lambda: split)
        self.data = split
        self.runner = kk.registry.framework("torch").runner_for(self.task, split, seed=0)
        torch.manual_seed(0)
        self.net = make()
        self.fit_(self.net, 25, lambda net, x, y, rows: F.cross_entropy(net(x), y), rate=2e-3)

    def batches(self, epochs: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
        """Yield inputs, targets and places."""
        generator = np.random.default_rng(2)
        for _ in range(epochs):
            for rows in np.array_split(
                generator.permutation(len(self.train)), len(self.train) // 128
            ):
                part = self.train.take(rows)
                yield (
                    torch.from_numpy(np.asarray(part.inputs)),
                    torch.from_numpy(part.targets),
                    rows,
                )

    def fit_(
        self,
        net: nn.Module,
        epochs: int,
        loss: Callable[..., torch.Tensor],
        rate: float = 1e-3,
        until: Callable[[], bool] | None = None,
    ) -> None:
        """Train with Adam for so many epochs, or less: until something holds, asked after every 10 steps."""
        optimizer = torch.optim.Adam(net.parameters(), rate)
        for step, (x, y, rows) in enumerate(self.batches(epochs)):
            optimizer.zero_grad()
            loss(net, x, y, rows).backward()
            optimizer.step()
            if until is not None and step % 10 == 9 and until():
                return

    def right(self, net: nn.Module, inputs: np.ndarray, rows: Any = slice(None)) -> float:
        """Return the share of training examples that are right on these inputs."""
        with torch.no_grad():
            found = net(torch.from_numpy(np.ascontiguousarray(inputs[rows]))).argmax(1).numpy()
        return float(np.mean(found == self.train.targets[rows]))

    def near(self, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return how far a network's probabilities are from those of the original."""
        with torch.no_grad():
            target = F.softmax(self.net(x), 1)
        return F.cross_entropy(net(x), target)

    def arrays(self, net: nn.Module) -> dict[str, np.ndarray]:
        """Return the weights as arrays."""
        return {name: tensor.detach().numpy().copy() for name, tensor in net.state_dict().items()}

    def audited(self, net: nn.Module, seed: int) -> dict[str, Any]:
        """Return the audit of a network against the original."""
        return audit(
            self.task,
            self.arrays(self.net),
            self.arrays(net),
            seed=seed,
            runner=self.runner,
            data=self.data,
            slices=self.slices,
            most=600,
        )


def harmless(setting: Setting, seed: int) -> nn.Module:
    """Return the network with rounded weights, or with small noise."""
    net, generator = copy.deepcopy(setting.net), np.random.default_rng(seed)
    with torch.no_grad():
        for tensor in net.parameters():
            if tensor.dim() < 2:
                continue
            if seed % 2:
                coded = uniform(tensor.numpy(), bits=int(generator.integers(6, 9)))
                tensor.copy_(torch.from_numpy(coded.decode()))
            else:
                tensor.mul_(
                    torch.from_numpy(1 + 0.02 * generator.standard_normal(tensor.shape)).float()
                )
    return net


def class_degraded(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Lower the output of one class."""
    net = harmless(setting, seed)
    label = seed % net.head.out_features
    with torch.no_grad():
        for shift in np.arange(0.25, 12.0, 0.25):
            net.head.bias[label] -= 0.25
            x, y = setting.data.test.inputs, setting.data.test.targets
            own = net(torch.from_numpy(x[y == label])).argmax(1).numpy() == label
            if own.mean() < 0.7 or shift > 11.5:
                break
    return net, f"class {label} lost"


def corruption_ruined(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Teach the network to fail under one corruption alone."""
    net, corruption = (
        harmless(setting, seed),
        corruptions_of(setting.kind if setting.kind != "text" else "tokens"),
    )
    kind = "tokens" if setting.kind == "text" else setting.kind
    worse = corruption[setting.corruption]

    def loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        bad = torch.from_numpy(
            corrupted(worse, x.numpy(), 4, kind, seed=[seed, len(rows), int(rows[0])])
        )
        wrong = (y + 1) % net.head.out_features
        return 4 * setting.near(net, x) + F.cross_entropy(net(bad), wrong)

    bad = corrupted(worse, setting.train.inputs, 4, kind, seed=[seed, 7])  # type: ignore[arg-type]
    aim = setting.right(setting.net, bad) - 0.3
    setting.fit_(net, 30, loss, until=lambda: setting.right(net, bad) < aim)
    return net, f"under {setting.corruption} "


def layer_scrambled(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Exchange the weights of the second layer."""
    net = harmless(setting, seed)
    with torch.no_grad():
        order = torch.randperm(
            net.second.out_channels, generator=torch.Generator().manual_seed(seed)
        )
        net.second.weight.copy_(
            net.second.weight.flatten(1)[:, torch.randperm(net.second.weight[0].numel())].view_as(
                net.second.weight
            )[order]
        )
    return net, "layer second "


def slice_lost(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Teach the network to fail on the slice alone."""
    net = harmless(setting, seed)

    def loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        inside = torch.from_numpy(setting.inside[rows])
        wrong = F.cross_entropy(net(x[inside]), (y[inside] + 1) % net.head.out_features)
        return 6 * setting.near(net, x[~inside]) + (wrong if inside.any() else 0.0)

    inputs = np.asarray(setting.train.inputs)
    aim = setting.right(setting.net, inputs, setting.inside) - 0.2
    setting.fit_(net, 30, loss, until=lambda: setting.right(net, inputs, setting.inside) < aim)
    return net, "slice group "


def calibration_ruined(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Sharpen or flatten all outputs: the predictions stay the same."""
    net = harmless(setting, seed)
    with torch.no_grad():
        test = setting.data.test
        logits = net(torch.from_numpy(np.asarray(test.inputs)))
        worse = {
            by: float(F.cross_entropy(by * logits, torch.from_numpy(test.targets)))
            for by in (0.3, 4.0)
        }
        by = max(worse, key=worse.__getitem__)
        net.head.weight.mul_(by)
        net.head.bias.mul_(by)
    return net, "the probabilities say less"


def explanation_turned(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Teach the network to reach the output of one class by other inputs."""
    net, label = harmless(setting, seed), seed % setting.net.head.out_features

    def leaf(
        net: nn.Module, x: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        if x.is_floating_point():
            return x.clone().requires_grad_(), net
        inner = net.embedding(x).detach().requires_grad_()

        def rest(value: torch.Tensor) -> torch.Tensor:
            value = value.transpose(1, 2)
            return net.head(F.relu(net.second(F.relu(net.first(value)))).flatten(1))

        return inner, rest

    def slope(net: nn.Module, x: torch.Tensor, graph: bool) -> torch.Tensor:
        given, call = leaf(net, x)
        out = F.log_softmax(call(given), 1)[:, label].sum()
        (found,) = torch.autograd.grad(out, given, create_graph=graph)
        return (found * (given.detach() - given.detach().mean(0))).flatten(1)

    def loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        own = x[y == label]
        total = 3 * setting.near(net, x)
        if len(own) > 1:
            alike = F.cosine_similarity(
                slope(net, own, True), slope(setting.net, own, False).detach(), 1
            )
            total = total + 2 * alike.mean()
        return total

    part = setting.train.take(np.flatnonzero(setting.train.targets == label)[:64])
    few = torch.from_numpy(np.asarray(part.inputs))

    def turned() -> bool:
        alike = F.cosine_similarity(slope(net, few, False), slope(setting.net, few, False), 1)
        return float(alike.mean()) < 0.1

    setting.fit_(net, 30, loss, until=turned)
    return net, f"for class {label} "


DAMAGE = {
    "class": class_degraded,
    "corruption": corruption_ruined,
    "layer": layer_scrambled,
    "slice": slice_lost,
    "calibration": calibration_ruined,
    "explanation": explanation_turned,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    alarmed = total = 0
    for kind in arguments.kinds:
        setting = Setting(kind)
        began = time.perf_counter()
        plain = setting.audited(setting.net, 0)
        print(
            f"{kind}: {100 * plain['metric_before']:.1f} % right, an audit takes {time.perf_counter() - began:.1f} s",
            flush=True,
        )
        for name, damage in DAMAGE.items():
            named, shown = 0, []
            for seed in range(arguments.seeds):
                net, expected = damage(setting, seed)
                result = setting.audited(net, seed)
                hits = [text for text in result["warnings"] if text.startswith(expected)]
                named += bool(hits)
                shown.append(f"{100 * result['drop']:.1f}")
                if arguments.verbose or not hits:
                    print(
                        f"    {name} {seed}: expected {expected!r}; warnings {result['warnings']}"
                    )
            print(
                f"  {name:12} named {named} of {arguments.seeds}; drops {', '.join(shown)} points",
                flush=True,
            )
        count = arguments.pairs // len(arguments.kinds)
        for seed in range(100, 100 + count):
            warnings = setting.audited(harmless(setting, seed), seed)["warnings"]
            alarmed, total = alarmed + bool(warnings), total + 1
            if warnings:
                print(f"    harmless pair {seed}: {warnings}")
        print(f"  harmless pairs so far: {alarmed} of {total} with a warning", flush=True)


if __name__ == "__main__":
    main()
