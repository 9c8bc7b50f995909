"""Planted damage that an audit must name, and harmless pairs in which it must find nothing.

    python benchmarks/audit_damage.py [--pairs 200] [--seeds 3] [--kinds image text signal] [--out FILE]

Three networks that train in seconds: digits (images of 8 x 8), characters of English (is the next one a vowel, a
consonant, a space or a mark?), and waveforms of two channels. Damage: one class degraded, one corruption ruined, one
layer scrambled, one slice lost, calibration ruined, the explanation of one class turned. A damaged network keeps its
accuracy elsewhere, as it is trained to (the scrambled layer is not). Siblings that the audit was not made for: two
classes swapped, the bias of the head shifted, a layer of 1 bit, a part of the inputs ignored, a slice of 30 examples.
Harmless pairs: weights rounded to 6 to 8 bits, or with small noise. Printed: how often the damage is named, by the
right name, how often anything was, and how many harmless pairs had any warning. Each audit is a line of `--out` as soon
as it is made: the same command resumes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from karikomi.audit import audit
from karikomi.audit.corruptions import corruptions_of
from karikomi.audit.stress import corrupted
from karikomi.quantize import uniform
from karikomi.tasks import Data, Split, Task

MOST_TEST = 1_500
DRAWS = 4
"""Draws of corruptions and explained examples, which audits take in turn: the original is run once on each."""
MOST_ELSEWHERE = 0.015
"""What damage to one corruption may cost on clean inputs: else it is another damage, and rightly named otherwise."""
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
    "signal": (Signals, signals, "gain"),
}


class Remembering:
    """A runner that runs the original, and an untrained network, once on the same inputs: all audits share them."""

    def __init__(self, make: Callable[[], nn.Module], original: dict[str, np.ndarray]) -> None:
        torch.manual_seed(0)
        self._net = make()
        self._untrained = arrays_of(self._net)
        self._known = {id(original): "original", id(self._untrained): "untrained"}
        self._found: dict[tuple[Any, ...], Any] = {}
        self._filled: Any = None

    def fresh(self) -> dict[str, np.ndarray]:
        """Return the untrained network, always the same object."""
        return self._untrained

    def outputs(self, arrays: Any, inputs: np.ndarray) -> np.ndarray:
        """Return outputs."""
        with torch.no_grad():
            return self._once(arrays, inputs, lambda net, x: net(x).numpy())

    def input_gradients(self, arrays: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return the slopes of the loss."""

        def slopes(net: nn.Module, x: torch.Tensor) -> np.ndarray:
            loss = F.cross_entropy(net(x.requires_grad_()), torch.from_numpy(targets))
            return torch.autograd.grad(loss, x)[0].numpy()

        return self._once(arrays, inputs, slopes, targets)

    def layer_outputs(self, arrays: Any, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs of layers."""

        def layers(net: nn.Module, x: torch.Tensor) -> dict[str, np.ndarray]:
            found: dict[str, np.ndarray] = {}
            hooks = [
                layer.register_forward_hook(
                    lambda _, __, out, name=name: found.update({name: out.numpy()})
                )
                for name, layer in net.named_children()
            ]
            net(x)
            for hook in hooks:
                hook.remove()
            return found

        with torch.no_grad():
            return self._once(arrays, inputs, layers)

    def _once(self, arrays: Any, inputs: np.ndarray, call: Any, *more: np.ndarray) -> Any:
        key = None
        if id(arrays) in self._known:
            content = [hashlib.blake2b(np.ascontiguousarray(a)).digest() for a in (inputs, *more)]
            key = (call.__qualname__, self._known[id(arrays)], *content)
            if key in self._found:
                return self._found[key]
        if arrays is not self._filled:
            self._net.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()})
            self._filled = arrays
        found = call(self._net, torch.from_numpy(np.ascontiguousarray(inputs)))
        if key is not None:
            self._found[key] = found
        return found


def arrays_of(net: nn.Module) -> dict[str, np.ndarray]:
    """Return the weights as arrays."""
    return {name: tensor.detach().numpy().copy() for name, tensor in net.state_dict().items()}


class Setting:
    """A trained network, its task, and the data that damage is planted with."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        make, data, self.corruption = KINDS[kind]
        x, y, members = data()
        order = np.random.default_rng(1).permutation(len(y))
        x, y, members = x[order], y[order], members[order]
        cut = len(y) // 2
        last = cut + MOST_TEST
        self.train, test = Split(x[:cut], y[:cut]), Split(x[cut:last], y[cut:last])
        self.inside, self.slices = members[:cut], {"group": members[cut:last]}
        split = Data(self.train, test, test)
        self.task = Task(name=kind, model=make, data=lambda: split)
        self.data = split
        torch.manual_seed(0)
        self.net = make()
        self.fit_(self.net, 25, lambda net, x, y, rows: F.cross_entropy(net(x), y), rate=2e-3)
        self.before = arrays_of(self.net)
        self.runner: Any = Remembering(make, self.before)

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

    def right(self, net: nn.Module, split: Split, rows: Any = slice(None)) -> float:
        """Return the share of examples of a split that are right."""
        with torch.no_grad():
            inputs = np.ascontiguousarray(np.asarray(split.inputs)[rows])
            found = net(torch.from_numpy(inputs)).argmax(1).numpy()
        return float(np.mean(found == split.targets[rows]))

    def near(self, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return how far a network's probabilities are from those of the original."""
        with torch.no_grad():
            target = F.softmax(self.net(x), 1)
        return F.cross_entropy(net(x), target)

    def audited(self, net: nn.Module, seed: int) -> dict[str, Any]:
        """Return the audit of a network against the original."""
        return audit(
            self.task,
            self.before,
            arrays_of(net),
            seed=seed % DRAWS,
            runner=self.runner,
            data=self.data,
            slices=self.slices,
            most=400,
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
    """Teach the network to fail under one corruption, and to be right on clean inputs as before."""
    net, kind = harmless(setting, seed), "tokens" if setting.kind == "text" else setting.kind
    worse, test = corruptions_of(kind)[setting.corruption], setting.data.test

    def loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        bad = torch.from_numpy(
            corrupted(worse, x.numpy(), 4, kind, seed=[seed, len(rows), int(rows[0])])
        )
        wrong = (y + 1) % net.head.out_features
        return 10 * setting.near(net, x) + F.cross_entropy(net(bad), wrong)

    bad = Split(corrupted(worse, np.asarray(test.inputs), 4, kind, seed=[seed, 7]), test.targets)
    aim, kept = (
        setting.right(setting.net, bad) - 0.3,
        setting.right(setting.net, test) - MOST_ELSEWHERE,
    )

    def planted() -> bool:
        return setting.right(net, bad) < aim and setting.right(net, test) > kept

    setting.fit_(net, 100, loss, 3e-3, until=planted)
    return net, f"under {setting.corruption} "


def layer_scrambled(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Exchange the weights of the second layer."""
    net = harmless(setting, seed)
    with torch.no_grad():
        drawn, weight = torch.Generator().manual_seed(seed), net.second.weight
        rows = torch.randperm(len(weight), generator=drawn)
        columns = torch.randperm(weight[0].numel(), generator=drawn)
        weight.copy_(weight.flatten(1)[rows][:, columns].view_as(weight))
    return net, "layer second "


def slice_lost(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Teach the network to fail on the slice alone, until a fifth of its test examples is lost."""
    net = harmless(setting, seed)
    test, members = setting.data.test, setting.slices["group"]

    def loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        inside = torch.from_numpy(setting.inside[rows])
        wrong = F.cross_entropy(net(x[inside]), (y[inside] + 1) % net.head.out_features)
        return 6 * setting.near(net, x[~inside]) + (wrong if inside.any() else 0.0)

    aim = setting.right(setting.net, test, members) - 0.2
    setting.fit_(net, 60, loss, 2e-3, until=lambda: setting.right(net, test, members) < aim)
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
    """Teach the network to reach the output of one class by other inputs, until its attributions have turned."""
    net, label = harmless(setting, seed), seed % setting.net.head.out_features
    middle = torch.from_numpy(np.asarray(setting.train.inputs, np.float64).mean(0)).float()

    def attributions(net: nn.Module, x: torch.Tensor, y: torch.Tensor, graph: bool) -> torch.Tensor:
        def score(given: torch.Tensor) -> torch.Tensor:
            return F.log_softmax(net(given), 1).gather(1, y[:, None])[:, 0]

        if not x.is_floating_point():
            whole, parts = score(x), []
            for place in range(x.shape[1]):
                without = x.clone()
                without[:, place] = x[:, place - 1]
                parts.append(whole - score(without))
            return torch.stack(parts, 1)
        total = torch.zeros_like(x)
        nodes, weights = np.polynomial.legendre.leggauss(4)
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            leaf = (middle + float(node) * (x - middle)).requires_grad_()
            (slope,) = torch.autograd.grad(score(leaf).sum(), leaf, create_graph=graph)
            total = total + float(weight) * slope
        return (total * (x - middle)).flatten(1)

    def alike(x: torch.Tensor, y: torch.Tensor, graph: bool) -> torch.Tensor:
        known = attributions(setting.net, x, y, False).detach()
        return F.cosine_similarity(attributions(net, x, y, graph), known, 1)

    def loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        own, others = (torch.nonzero(part)[:32, 0] for part in (y == label, y != label))
        some = torch.cat([own, others])
        found = alike(x[some], y[some], True)
        turned, kept = found[: len(own)], found[len(own) :]
        total = 3 * setting.near(net, x) - 2 * kept.mean()
        return total + 2 * turned.mean() if len(own) > 1 else total

    test = setting.data.test
    few = test.take(np.flatnonzero(test.targets == label)[:64])
    pair = torch.from_numpy(np.asarray(few.inputs)), torch.from_numpy(few.targets)
    setting.fit_(net, 60, loss, 2e-3, until=lambda: alike(*pair, False).mean().item() < 0.0)
    return net, f"for class {label} "


DAMAGE = {
    "class": class_degraded,
    "corruption": corruption_ruined,
    "layer": layer_scrambled,
    "slice": slice_lost,
    "calibration": calibration_ruined,
    "explanation": explanation_turned,
}


def classes_swapped(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Exchange the outputs of two classes."""
    net, count = harmless(setting, seed), setting.net.head.out_features
    pair = [seed % count, (seed + 1) % count]
    with torch.no_grad():
        for tensor in (net.head.weight, net.head.bias):
            tensor[pair] = tensor[pair[::-1]].clone()
    return net, f"class {min(pair)} lost"


def bias_shifted(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Raise the output of one class, until a twentieth of all examples is lost to it."""
    net, label = harmless(setting, seed), seed % setting.net.head.out_features
    aim = setting.right(setting.net, setting.data.test) - 0.05
    with torch.no_grad():
        for _ in range(60):
            net.head.bias[label] += 0.25
            if setting.right(net, setting.data.test) < aim:
                break
    return net, f"class {label} is predicted|to class {label} "


def one_bit(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Round the second layer to signs, a scale per unit."""
    net = harmless(setting, seed)
    with torch.no_grad():
        weight = net.second.weight
        weight.copy_(
            weight.sign() * weight.abs().flatten(1).mean(1).view(-1, *(1,) * (weight.dim() - 1))
        )
    return net, "layer second "


def input_ignored(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Cut off a part of the inputs: one token, the last channel, or (with a single channel) the lower half."""
    net = harmless(setting, seed)
    with torch.no_grad():
        if setting.kind == "text":
            net.embedding.weight[1 + seed % 26] = 0.0
            return net, "layer embedding "
        if setting.kind == "signal":
            net.first.weight[:, 1] = 0.0
            return net, "layer first "
        net.hidden.weight.view(48, 24, 2, 2)[:, :, 1] = 0.0
        return net, "layer hidden "


def small_slice_lost(setting: Setting, seed: int) -> tuple[nn.Module, str]:
    """Make a slice of 30 test examples, half of which the network has wrong since."""
    test = setting.data.test
    with torch.no_grad():
        before, after = (
            n(torch.from_numpy(np.asarray(test.inputs))).argmax(1).numpy() == test.targets
            for n in (setting.net, bias_shifted(setting, seed)[0])
        )
    lost, kept = np.flatnonzero(before & ~after)[:15], np.flatnonzero(before & after)[:15]
    setting.slices["small"] = np.isin(np.arange(len(test)), [*lost, *kept])
    return bias_shifted(setting, seed)[0], "slice small "


SIBLINGS = {
    "two classes swapped": classes_swapped,
    "bias of the head": bias_shifted,
    "a layer of 1 bit": one_bit,
    "an input ignored": input_ignored,
    "a small slice": small_slice_lost,
}


class Settings:
    """The trained networks, made when they are needed, and what an earlier run has done."""

    def __init__(self, out: Path) -> None:
        self.made: dict[str, Setting] = {}
        lines = out.read_text("utf-8").splitlines() if out.exists() else []
        self.rows = [json.loads(line) for line in lines]
        self.done = {(row["kind"], row["what"], row["seed"]) for row in self.rows}

    def of(self, kind: str) -> Setting:
        """Return the trained network of a kind."""
        if kind not in self.made:
            self.made[kind] = Setting(kind)
        return self.made[kind]


def audits(settings: Settings, kind: str, seeds: int, pairs: int) -> Iterator[dict[str, Any]]:
    """Yield what each audit of a kind of network found, those of harmless pairs last."""
    for name, damage in (DAMAGE | SIBLINGS).items():
        for seed in range(seeds):
            if (kind, name, seed) in settings.done:
                continue
            setting = settings.of(kind)
            net, expected = damage(setting, seed)
            result = setting.audited(net, seed)
            setting.slices.pop("small", None)
            hit = any(part in text for text in result["warnings"] for part in expected.split("|"))
            yield row_of(kind, name, seed, result) | {"expected": expected, "named": hit}
    for seed in range(100, 100 + pairs):
        if (kind, "harmless", seed) not in settings.done:
            setting = settings.of(kind)
            yield row_of(kind, "harmless", seed, setting.audited(harmless(setting, seed), seed))


def row_of(kind: str, what: str, seed: int, result: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of an audit."""
    facts = {"right": result["metric_before"], "drop": result["drop"]}
    return {"kind": kind, "what": what, "seed": seed, **facts, "warnings": result["warnings"]}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table: one per kind of damage, and the harmless pairs."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = [f"| damage | {' | '.join(kinds)} |", "| --- |" + " --- |" * len(kinds)]
    for what in (*DAMAGE, *SIBLINGS, "harmless"):
        cells = []
        for kind in kinds:
            own = [row for row in rows if (row["kind"], row["what"]) == (kind, what)]
            alarmed = sum(bool(row["warnings"]) for row in own)
            hits = sum(row.get("named", False) for row in own)
            text = (
                f"named {hits}, alarmed {alarmed}" if what != "harmless" else f"alarmed {alarmed}"
            )
            cells.append(f"{text} of {len(own)}" if own else "not run")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Audit, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("runs/audit_damage.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(arguments.out)
    rows, began = settings.rows, time.process_time()
    for number, kind in enumerate(arguments.kinds):
        pairs = arguments.pairs * (number + 1) // len(arguments.kinds)
        pairs -= arguments.pairs * number // len(arguments.kinds)
        for row in audits(settings, kind, arguments.seeds, pairs):
            rows.append(row)
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            if not row.get("named", not row["warnings"]):
                print(f"{kind} {row['what']} {row['seed']}: {row['warnings']}", flush=True)
    print("\n".join(table(rows)))
    harmless_rows = [row for row in rows if row["what"] == "harmless"]
    alarmed = sum(bool(row["warnings"]) for row in harmless_rows)
    print(f"{alarmed} of {len(harmless_rows)} harmless pairs have a warning")
    print(
        f"{time.process_time() - began:.0f} s of processor; {platform.processor() or platform.machine()}"
    )


if __name__ == "__main__":
    main()
