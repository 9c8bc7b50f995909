"""Deep Compression's LeNets, from scratch to a file: ``python benchmarks/deep_compression.py lenet300 --seed 0``.

MNIST. Dense training, then quantized training with a penalty on the bits of the codes (`kk.torch.quantized_training`),
whose strength follows a goal in bytes; the last weights go through `kk.save`, and the file is filled into a fresh
network, which is evaluated once on all 10,000 test images. Ratios are the float32 bytes of all parameters of
the network (1,066,440 and 1,724,320) divided by the bytes of the file, container included.

    python benchmarks/deep_compression.py lenet300|lenet5 [--seed 0 1 2] [--bytes 5332] [--plain] [--validate]

`--plain`: without shifts of the images and without distillation. `--validate`: judged on 10,000 held-out training
images, as the recipes were. Finished seeds are stored, so that an interrupted command resumes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from prune_lenet import DATA, Images, channels_last_, error, images, narrowed, outputs
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import karikomi as kk
from karikomi.files import write_text
from karikomi.pack import inspect
from karikomi.torch.tasks.networks import lenet5, lenet300

NETWORKS = {"lenet300": lenet300, "lenet5": lenet5}
PEERS = {
    "lenet300": "Han et al. 40x at 1.58 %, EPR 124x at 1.9 %",
    "lenet5": "Han et al. 39x at 0.74 %, MIRACLE 555x at 0.69 % and 1110x at 0.96 %",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Epochs, batch size and rates of both phases; `bytes` of codes is what the penalty aims at."""

    bytes: int  # of the codes, without tables and container
    dense: int  # epochs
    coded: int  # epochs
    batch: int
    rate: float
    coded_rate: float
    step_rate: float = 3e-3
    bits: int = 4
    ramp: float = 0.6
    gain: float = 0.02
    strength: float = 1e-6
    distill: float = 0.5
    heat: float = 2.0
    shifts: bool = True
    units: tuple[int, ...] = ()  # kept of each layer but the last, before single weights


RECIPES = {
    "lenet300": Recipe(4_600, 12, 50, 512, 3e-3, 3e-3, units=(128, 64)),
    "lenet5": Recipe(2_700, 4, 24, 256, 3e-3, 3e-3, units=(10, 24, 48)),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One training from scratch."""

    network: str
    seed: int
    recipe: Recipe
    validate: bool
    versions: str = f"karikomi {kk.__version__}, torch {torch.__version__}"


def loss_of(
    given: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None, recipe: Recipe
) -> torch.Tensor:
    """Return the cross entropy, mixed with the distance to the dense network's outputs if given."""
    loss = F.cross_entropy(given, labels)
    if taught is None:
        return loss
    own, goal = (F.log_softmax(logits / recipe.heat, dim=1) for logits in (given, taught))
    distance = F.kl_div(own, goal, reduction="batchmean", log_target=True)
    return (1 - recipe.distill) * loss + recipe.distill * recipe.heat**2 * distance


def fit_dense(
    model: nn.Module, learned: Images, recipe: Recipe, generator: torch.Generator, title: str
) -> None:
    """Train in place by Adam with clipped gradients; the rate falls along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate, fused=True)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    steps = recipe.dense * (len(learned) // recipe.batch)
    for moved, _, chosen in batches(learned, recipe, recipe.dense, generator, title):
        set_rates(optimizer, [recipe.rate], handle.steps, steps)
        optimizer.zero_grad()
        loss_of(model(moved.inputs(chosen)), learned.labels[chosen], None, recipe).backward()
        optimizer.step()
    handle.detach()


def dense_network(
    asked: Asked, learned: Images, generator: torch.Generator, folder: Path, title: str
) -> tuple[nn.Module, torch.Tensor | None, dict[str, float]]:
    """Return a dense network, its outputs for distillation, and what making them took, in an earlier run if stored."""
    recipe, model = asked.recipe, NETWORKS[asked.network]()
    channels_last_(model)
    made_by = f"{recipe.dense}-{recipe.batch}-{recipe.rate:g}-{recipe.shifts:d}-{asked.validate:d}"
    path = folder / f"{asked.network}-{asked.seed}-{made_by}.pt"
    wall, cpu = time.perf_counter(), time.process_time()
    stored: dict[str, Any] = {"wall": 0.0, "cpu": 0.0}
    if path.exists():
        stored = torch.load(path, weights_only=True)
    if "model" in stored:
        model.load_state_dict(stored["model"])
        generator.set_state(stored["generator"])
    else:
        fit_dense(model, learned, recipe, generator, title)
    if "lessons" not in stored and recipe.distill:
        stored["lessons"] = lessons(model, learned, recipe)
    stored |= {"model": model.state_dict(), "generator": generator.get_state()}
    stored["wall"] += time.perf_counter() - wall
    stored["cpu"] += time.process_time() - cpu
    torch.save(stored, path)
    seconds = {key: stored[key] for key in ("wall", "cpu")}
    return model, stored["lessons"] if recipe.distill else None, seconds


def fit_coded(
    model: nn.Module,
    taught: torch.Tensor | None,
    learned: Images,
    recipe: Recipe,
    generator: torch.Generator,
    title: str,
) -> Any:
    """Train in place with rounded weights and a penalty on their bits; return the codes."""
    training = kk.torch.quantized_training(model, bits=recipe.bits)
    steps_of = {id(step) for step in training.steps()}
    weights = [item for item in model.parameters() if id(item) not in steps_of]
    optimizer = torch.optim.Adam(
        [{"params": weights}, {"params": training.steps()}], lr=recipe.coded_rate, fused=True
    )
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    steps = recipe.coded * (len(learned) // recipe.batch)
    goal = kk.quantize.RateGoal(8.0 * recipe.bytes, last=int(steps * recipe.ramp), gain=recipe.gain)
    strength, first = recipe.strength, training.size().total
    bar = batches(learned, recipe, recipe.coded, generator, title)
    for moved, places, chosen in bar:
        set_rates(optimizer, [recipe.coded_rate, recipe.step_rate], handle.steps, steps)
        optimizer.zero_grad()
        goals = None if taught is None else taught[places[chosen], chosen]
        loss = loss_of(model(moved.inputs(chosen)), learned.labels[chosen], goals, recipe)
        bits = training.bits()
        (loss + strength * bits).backward()
        optimizer.step()
        used = bits.item()
        strength = goal.next(strength, used=used, path=goal.path(first, handle.steps))
        if handle.steps % 100 == 0:
            bar.set_postfix_str(f"{used / 8:,.0f} bytes at {strength:.1e}, loss {loss.item():.4f}")
    handle.detach()
    return training.finish_()


def batches(
    learned: Images, recipe: Recipe, epochs: int, generator: torch.Generator, title: str
) -> Any:
    """Return a bar over (images of the epoch, places of the shifts, indices of the batch)."""
    whole = len(learned) // recipe.batch

    def each() -> Any:
        for _ in range(epochs):
            order = torch.randperm(len(learned), generator=generator)
            places = torch.full((len(learned),), 4)
            if recipe.shifts:
                places = torch.randint(0, 9, (len(learned),), generator=generator)
            moved = learned.shifted(places) if recipe.shifts else learned
            for chosen in order.split(recipe.batch)[:whole]:
                yield moved, places, chosen

    return tqdm(each(), total=epochs * whole, desc=title, mininterval=5.0)


def set_rates(optimizer: torch.optim.Optimizer, rates: list[float], step: int, steps: int) -> None:
    """Set the learning rates: up in 100 steps, then down along a cosine."""
    share = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * share


def lessons(dense: nn.Module, learned: Images, recipe: Recipe) -> torch.Tensor:
    """Return the dense network's outputs for each image at each of its places, (9, n, 10)."""
    centre = outputs(dense, learned)
    if not recipe.shifts:
        return centre.expand(9, -1, -1)
    places = (torch.full((len(learned),), place) for place in range(9))
    return torch.stack([outputs(dense, learned.shifted(place)) for place in places])


def run(asked: Asked, data: Path, folder: Path) -> dict[str, Any]:
    """Train, save, load into a fresh network and evaluate once; the time of the training is measured."""
    recipe, title = asked.recipe, f"{asked.network}, seed {asked.seed}"
    torch.manual_seed(asked.seed)
    generator = torch.Generator().manual_seed(asked.seed)
    learned, judged = images(data, validate=asked.validate)
    dense, taught, seconds = dense_network(asked, learned, generator, folder, f"{title}: dense")
    wall, cpu = time.perf_counter(), time.process_time()
    model = copy.deepcopy(dense)
    if recipe.units:
        model = narrowed(model, recipe.units)
        channels_last_(model)
    codes = fit_coded(model, taught, learned, recipe, generator, f"{title}: coded")
    seconds["wall"] += time.perf_counter() - wall
    seconds["cpu"] += time.process_time() - cpu
    plain = "" if recipe.shifts and recipe.distill else "-plain"
    path = folder / f"{asked.network}-{recipe.bytes}-{asked.seed}{plain}.karikomi"
    kk.save(model, path)
    stored = kk.load(path, into=NETWORKS[asked.network]())
    account = inspect(path)
    return {
        "error": error(stored, judged),
        "dense_error": error(dense, judged),
        "bytes": path.stat().st_size,
        "ratio": 4 * sum(item.numel() for item in dense.parameters()) / path.stat().st_size,
        "payload": account.payload,
        "tables": account.tables,
        "container": account.header + account.manifest,
        "nonzero": sum(int((tensor.codes != 0).sum()) for tensor in codes.values()),
        **seconds,
    }


def finished(asked: Asked, data: Path, store: Path) -> dict[str, Any]:
    """Return the stored result of this training, or run it and store the result."""
    key = json.dumps(asdict(asked))
    known = json.loads(store.read_text("utf-8")) if store.exists() else {}
    if key not in known:
        store.parent.mkdir(parents=True, exist_ok=True)
        found = run(asked, data, store.parent)
        # Read again, since another process may have stored another network meanwhile.
        known = json.loads(store.read_text("utf-8")) if store.exists() else {}
        known[key] = found
        write_text(store, json.dumps(known, indent=1))
    return known[key]


def row(asked: Asked, runs: list[dict[str, Any]]) -> str:
    """Return one line of the table."""

    def spread(key: str, form: str) -> str:
        values = [run[key] for run in runs]
        if len(values) == 1:
            return f"{values[0]:{form}}"
        return f"{statistics.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"

    recipe = asked.recipe
    tricks = [
        *(["shifts of a pixel"] if recipe.shifts else []),
        *([f"distillation {recipe.distill:g}"] if recipe.distill else []),
        *([f"units {recipe.units} first"] if recipe.units else []),
    ]
    cells = [asked.network, spread("ratio", ".0f"), spread("error", ".2f"), spread("bytes", ",.0f")]
    cells += [spread(key, ",.0f") for key in ("payload", "tables", "container", "nonzero")]
    cells += [spread("dense_error", ".2f"), spread("wall", ".0f"), spread("cpu", ".0f")]
    return f"| {' | '.join([*cells, ', '.join(tricks) or 'none'])} |"


def main() -> None:
    """Run the missing trainings, then print the table."""
    parser = argparse.ArgumentParser(description="LeNet on MNIST, from scratch to a small file")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of the recipe")
    parser.add_argument("--plain", action="store_true", help="no shifts, no distillation")
    parser.add_argument("--validate", action="store_true", help="judge on held-out training images")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/deep_compression.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    changes = dict(text.split("=", 1) for text in given.set)
    recipe = replace(
        RECIPES[given.network], **{name: json.loads(text) for name, text in changes.items()}
    )
    recipe = replace(recipe, units=tuple(recipe.units))
    if given.plain:
        recipe = replace(recipe, shifts=False, distill=0.0)
    asked = [Asked(given.network, seed, recipe, given.validate) for seed in given.seed]
    runs = [finished(item, given.data, given.out) for item in asked]
    judged = "10,000 held-out training images" if given.validate else "the 10,000 test images"
    print(f"\nerrors on {judged}; seeds {given.seed}: mean [range]; peers: {PEERS[given.network]}")
    print(f"one thread; {platform.machine()}, {platform.processor()}\n")
    print(
        "| network | ratio | error % | bytes | payload | tables | container | not zero | dense error % "
        "| wall s | CPU s | in training |"
    )
    print(f"|{' --- |' * 12}")
    print(row(asked[0], runs))


if __name__ == "__main__":
    main()
