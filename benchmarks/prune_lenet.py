"""LeNet-300-100 and LeNet-5 (Caffe) on MNIST, from scratch to a fraction of their weights.

Dense training, then gradual magnitude pruning through `kk.torch.attach`, with clipped gradients and shifts
of one pixel. Trained on all 60,000 training images; the last weights are evaluated once, on all 10,000 test
images. "12x fewer" counts every parameter: all of the network's (266,610 and 431,080, biases included)
divided by the number of nonzero parameters afterwards. Single biases are not pruned, so the weights are pruned
slightly further; in LeNet-5 at 108x whole units are removed first, with their biases. The recipes were chosen on
10,000 held-out training images, as ``--validate`` does.

    python benchmarks/prune_lenet.py [300-100 | 5] [--ratio 12 56] [--seeds 3] [--data mnist.npz]

Finished seeds are stored in ``runs/prune_lenet.json``, so that an interrupted command resumes. Printed
per ratio: mean and range of the error, of the wall and CPU seconds, and each layer's density.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import karikomi as kk
from karikomi.files import write_text
from karikomi.torch.tasks.networks import lenet5, lenet300

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("KARIKOMI_DATA", ROOT.parent / "shared" / "data")) / "mnist.npz"
MEAN, DEVIATION = 33.318421, 78.567490  # of the 60,000 training images
HELD_OUT = 10_000
NETWORKS = {"300-100": lenet300, "5": lenet5}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Epochs, batch size and learning rate; the rate falls along a cosine in both phases."""

    dense: int  # epochs
    pruned: int  # epochs, of which the first `ramp` make masks
    batch: int
    rate: float
    ramp: float = 0.6
    distill: float = 0.0  # share of the distillation loss
    heat: float = 2.0
    # Units of each layer but the last that are kept before single weights are pruned; empty: all.
    units: tuple[int, ...] = ()
    allocation: str = "global"


RECIPES = {
    "300-100": {
        12: Recipe(dense=4, pruned=12, batch=256, rate=2e-3),
        56: Recipe(dense=16, pruned=60, batch=512, rate=3e-3, distill=0.5),
    },
    "5": {
        12: Recipe(dense=2, pruned=6, batch=128, rate=1e-3),
        108: Recipe(
            dense=5,
            pruned=24,
            batch=256,
            rate=3e-3,
            ramp=0.4,
            distill=0.5,
            units=(16, 32, 64),
            allocation="lamp",
        ),
    },
}
PAPERS: dict[tuple[str, float], str] = {
    ("300-100", 12): "1.59 (Han et al. 2015)",
    ("300-100", 56): "1.99 (Guo et al. 2016)",
    ("5", 12): "0.77 (Han et al. 2015)",
    ("5", 108): "0.91 (Guo et al. 2016)",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One training from scratch; with the same versions, its figures repeat on the same machine."""

    network: str
    ratio: float
    seed: int
    recipe: Recipe
    validate: bool
    bfloat16: bool
    threads: int
    versions: str = f"karikomi {kk.__version__}, torch {torch.__version__}"

    def __str__(self) -> str:
        """Return the short name for a progress bar."""
        return f"LeNet-{self.network} {self.ratio:g}x, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Images:
    """Images as bytes, (n, 28, 28), with their labels."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def shifted(self, places: torch.Tensor) -> Images:
        """Return each image shifted by at most one pixel in either direction, to its place of 3 x 3."""
        padded, moved = F.pad(self.pixels, (1, 1, 1, 1)), torch.empty_like(self.pixels)
        for place in range(9):
            chosen = (places == place).nonzero().squeeze(1)
            top, left = divmod(place, 3)
            moved[chosen] = padded[chosen, top : top + 28, left : left + 28]
        return Images(moved, self.labels)

    def inputs(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return these images normalised, (n, 1, 28, 28)."""
        return self.pixels[chosen].float().sub_(MEAN).div_(DEVIATION).unsqueeze(1)


def images(path: Path, *, validate: bool) -> tuple[Images, Images]:
    """Return the training images and the images for evaluation."""
    with np.load(path, allow_pickle=False) as stored:
        train, test = (_images(stored, part) for part in ("train", "test"))
    if not validate:
        return train, test
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train)))
    learned, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    return (
        Images(train.pixels[learned], train.labels[learned]),
        Images(train.pixels[held_out], train.labels[held_out]),
    )


def _images(stored: Any, part: str) -> Images:
    pixels, labels = stored[f"{part}_images"], stored[f"{part}_labels"]
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def loss_of(
    outputs: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None, recipe: Recipe
) -> torch.Tensor:
    """Return the cross entropy, mixed with the distance to the dense network's outputs if given."""
    loss = F.cross_entropy(outputs, labels)
    if taught is None:
        return loss
    heat = recipe.heat
    own, goal = (F.log_softmax(one / heat, dim=1) for one in (outputs, taught))
    distance = F.kl_div(own, goal, reduction="batchmean", log_target=True)
    return (1 - recipe.distill) * loss + recipe.distill * heat * heat * distance


def fit(
    model: nn.Module,
    learned: Images,
    asked: Asked,
    generator: torch.Generator,
    bar: tqdm[Any],
    *,
    dense: nn.Module | None = None,
) -> None:
    """Train in place; given the dense network, prune meanwhile and distil from it."""
    recipe, gradual, taught = asked.recipe, None, None
    epochs = recipe.dense if dense is None else recipe.pruned
    total = epochs * (len(learned) // recipe.batch)
    if dense is not None:
        gradual = gradual_for(model, dense, asked, total)
        taught = lessons(dense, learned, asked) if recipe.distill else None
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate, fused=True)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), prune=gradual)
    for _ in range(epochs):
        order = torch.randperm(len(learned), generator=generator)
        places = torch.randint(0, 9, (len(learned),), generator=generator)
        moved = learned.shifted(places)
        for chosen in order.split(recipe.batch)[: len(order) // recipe.batch]:
            warm = min(1.0, (handle.steps + 1) / 100)
            fallen = 0.5 * (1 + math.cos(math.pi * handle.steps / total))
            optimizer.param_groups[0]["lr"] = recipe.rate * warm * fallen
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=asked.bfloat16):
                own = model(moved.inputs(chosen)).float()
            goal = None if taught is None else taught[places[chosen], chosen]
            loss_of(own, learned.labels[chosen], goal, recipe).backward()
            optimizer.step()
        bar.update()
    handle.detach()


@torch.no_grad()
def outputs(model: nn.Module, shown: Images) -> torch.Tensor:
    """Return the outputs for all images, (n, 10)."""
    rows = torch.arange(len(shown)).split(1_000)
    return torch.cat([model(shown.inputs(chosen)).float() for chosen in rows])


def lessons(dense: nn.Module, learned: Images, asked: Asked) -> torch.Tensor:
    """Return the dense network's outputs for each image at each of its nine places, (9, n, 10)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=asked.bfloat16):
        everywhere = (torch.full((len(learned),), place) for place in range(9))
        return torch.stack([outputs(dense, learned.shifted(places)) for places in everywhere])


def error(model: nn.Module, judged: Images) -> float:
    """Return the percentage of misclassified images."""
    wrong = outputs(model, judged).argmax(1) != judged.labels
    return 100 * int(wrong.sum()) / len(judged)


def gradual_for(model: nn.Module, dense: nn.Module, asked: Asked, total: int) -> kk.prune.Gradual:
    """Return the schedule that leaves a `ratio`-th of the dense network's parameters, biases kept."""
    biases = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    kept, weights = math.floor(size(dense) / asked.ratio) - biases, size(model) - biases
    if not 0 < kept <= weights:
        raise SystemExit(f"{asked.ratio:g}x: the {biases} biases leave room for {kept} weights")
    last = max(int(total * asked.recipe.ramp), 2)
    return kk.prune.Gradual(
        1 - kept / weights,
        steps=(1, last),
        every=max(last // 40, 1),
        allocation=asked.recipe.allocation,
    )


def size(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def narrowed(model: nn.Module, units: tuple[int, ...]) -> nn.Module:
    """Return the network with the smallest units of each layer removed."""
    weights = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    widths = [len(model.get_parameter(name)) for name in weights]
    shares = {
        name: 1 - kept / width for name, kept, width in zip(weights, units, widths, strict=False)
    }
    kk.torch.prune_(model, shares, pattern="units")
    small, _ = kk.torch.shrink(model, torch.zeros(1, 1, 28, 28))
    return small


def run(asked: Asked, data: Path) -> dict[str, Any]:
    """Train, prune and evaluate once; the time of all three is measured."""
    wall, cpu = time.perf_counter(), time.process_time()
    recipe = asked.recipe
    torch.manual_seed(asked.seed)
    generator = torch.Generator().manual_seed(asked.seed)
    learned, judged = images(data, validate=asked.validate)
    model = NETWORKS[asked.network]()
    channels_last_(model)
    with tqdm(total=recipe.dense + recipe.pruned, desc=str(asked), unit="epoch") as bar:
        fit(model, learned, asked, generator, bar)
        dense = copy.deepcopy(model)
        if recipe.units:
            model = narrowed(model, recipe.units)
            channels_last_(model)
        fit(model, learned, asked, generator, bar, dense=dense)
    left = {name: int(one.count_nonzero()) for name, one in model.named_parameters()}
    sizes = {name: one.numel() for name, one in dense.named_parameters()}
    found = {
        "error": error(model, judged),
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "ratio": sum(sizes.values()) / sum(left.values()),
        "density": {name: left[name] / sizes[name] for name in sizes if name.endswith("weight")},
    }
    return found | {"dense_error": error(dense, judged)}


def channels_last_(model: nn.Module) -> None:
    """Store the weights of convolutions with the channels last: nearly twice as fast on a CPU."""
    for layer in model.children():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def finished(asked: Asked, data: Path, store: Path) -> dict[str, Any]:
    """Return the stored result of this training, or run it and store the result."""
    known = json.loads(store.read_text("utf-8")) if store.exists() else {}
    key = json.dumps(asdict(asked))
    if key not in known:
        found = run(asked, data)
        # Read again, since another process may have stored another network meanwhile.
        known = json.loads(store.read_text("utf-8")) if store.exists() else {}
        known[key] = found
        write_text(store, json.dumps(known, indent=1))
    return known[key]


def recipe_for(network: str, ratio: float) -> Recipe:
    """Return the recipe of the next ratio that is not smaller, else the last recipe."""
    known = RECIPES[network]
    return next((known[one] for one in sorted(known) if one >= ratio), known[max(known)])


def row(asked: Asked, runs: list[dict[str, Any]]) -> str:
    """Return one line of the table."""

    def spread(key: str, form: str) -> str:
        values = [run[key] for run in runs]
        return f"{statistics.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"

    densities = (
        f"{name.split('.')[0]} {100 * statistics.mean(run['density'][name] for run in runs):.1f} %"
        for name in runs[0]["density"]
    )
    cells = [
        f"LeNet-{asked.network}",
        f"{min(run['ratio'] for run in runs):.1f}x",
        spread("error", ".2f"),
        PAPERS.get((asked.network, asked.ratio), ""),
        spread("dense_error", ".2f"),
        spread("wall", ".0f"),
        spread("cpu", ".0f"),
        ", ".join(densities),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the missing trainings, then print the table."""
    parser = argparse.ArgumentParser(description="LeNet on MNIST, pruned from scratch")
    parser.add_argument("network", nargs="?", choices=NETWORKS, help="default: both")
    parser.add_argument("--ratio", type=float, nargs="+", help="default: those of the papers")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 100), metavar="N")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--threads", type=int, default=1, help="one is fastest for the small MLP")
    parser.add_argument(
        "--bfloat16", action="store_true", help="train so: twice as fast where the CPU has AMX"
    )
    parser.add_argument("--validate", action="store_true", help="judge on held-out training images")
    parser.add_argument("--out", type=Path, default=Path("runs/prune_lenet.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    how = (given.validate, given.bfloat16, given.threads)
    rows = []
    for network in [given.network] if given.network else NETWORKS:
        for ratio in given.ratio or RECIPES[network]:
            recipe = recipe_for(network, ratio)
            wanted = [
                Asked(network, float(ratio), seed, recipe, *how) for seed in range(given.seeds)
            ]
            rows.append(row(wanted[0], [finished(one, given.data, given.out) for one in wanted]))
    images_of = "10,000 held-out training images" if given.validate else "the 10,000 test images"
    print(f"\n{given.seeds} seeds: mean [range]; errors on {images_of}\n")
    print(
        "| network | fewer weights | error % | the paper's | dense error % | wall s | CPU s | density |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
