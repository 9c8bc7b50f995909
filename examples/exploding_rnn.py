"""A recurrent network with exploding gradients, trained with and without clipping.

The temporal-order task of Pascanu, Mikolov and Bengio (2013), scaled down: sequences of 10 to 30 symbols
instead of 50 and more, at most 6,000 steps instead of millions, 5 seeds, 1,000 test sequences instead of
10,000. As in the paper are the task, the network (tanh, 50 units, weights from N(0, 0.1), biases 0), plain SGD on
20 sequences a step, the limit of 1 on the global norm, and "solved": a test error under 1 %. Both arms use every
learning rate, and for one seed the same initial weights, sequences and test. Under five minutes on two cores;
``--quick`` takes seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy, embedding
from tqdm import tqdm

import karikomi as kk

UNITS, BATCH, TEST, CHECK_EVERY = 50, 20, 1_000, 100
LIMITS = {"none": math.inf, "1": 1.0}  # an infinite limit only measures
FULL = {"lengths": [10, 20, 30], "rates": [0.03, 0.1, 0.3], "seeds": range(5), "steps": [6_000]}
QUICK = {"lengths": [20], "rates": [0.3], "seeds": range(2), "steps": [600]}


class Network(torch.nn.Module):
    """A tanh RNN on symbols (length, count) with the logits of 4 classes after the last symbol."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.inward, self.recurrent, self.outward = (
            torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator))
            for shape in ((6, UNITS), (UNITS, UNITS), (UNITS, 4))
        )
        self.hidden_bias = torch.nn.Parameter(torch.zeros(UNITS))
        self.output_bias = torch.nn.Parameter(torch.zeros(4))

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """Return one output per class, shape (count, 4)."""
        hidden = torch.zeros(symbols.shape[1], UNITS)
        for drive in embedding(symbols, self.inward) + self.hidden_bias:
            hidden = torch.addmm(drive, hidden, self.recurrent).tanh()
        return hidden @ self.outward + self.output_bias


def sequences(
    length: int, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return symbols 2 to 5, with a 0 or 1 in the second tenth and another in the sixth, and the classes."""
    symbols = torch.randint(2, 6, (length, count), generator=generator)
    first, second = torch.randint(2, (2, count), generator=generator)
    early, late = torch.randint(length // 10, (2, count), generator=generator)
    symbols[length // 10 + early, torch.arange(count)] = first
    symbols[length // 2 + late, torch.arange(count)] = second
    return symbols, first + 2 * second


def step(
    network: Network,
    optimizer: torch.optim.Optimizer,
    symbols: torch.Tensor,
    classes: torch.Tensor,
    limit: float,
) -> float:
    """Take one step and return the norm before clipping; non-finite gradients are applied, in both arms."""
    optimizer.zero_grad()
    cross_entropy(network(symbols), classes).backward()
    outcome, _ = kk.torch.clip_(network, kk.clip.ByGlobalNorm(limit), nonfinite="pass")
    optimizer.step()
    return outcome.pre


def trained(job: tuple[int, float, str, int, int]) -> dict[str, Any]:
    """Train once and return the result; training ends when solved, at a non-finite norm or after all steps."""
    length, rate, limit, seed, steps = job
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    network = Network(generator)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    test, answers = sequences(length, TEST, generator)
    run = {"length": length, "rate": rate, "limit": limit, "seed": seed, "steps": steps}
    run |= {"solved_at": None, "largest_norm": 0.0, "nan": False}
    for taken in range(1, steps + 1):
        batch = sequences(length, BATCH, generator)
        norm = step(network, optimizer, *batch, limit=LIMITS[limit])
        if not math.isfinite(norm):
            return run | {"nan": True}
        run["largest_norm"] = max(run["largest_norm"], norm)
        if taken % CHECK_EVERY == 0:
            with torch.no_grad():
                wrong = (network(test).argmax(1) != answers).sum().item()
            if wrong < 0.01 * TEST:
                return run | {"solved_at": taken}
    return run


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per length, learning rate and limit."""
    rows = []
    for key in dict.fromkeys((run["length"], run["rate"], run["limit"]) for run in runs):
        arm = [run for run in runs if (run["length"], run["rate"], run["limit"]) == key]
        solved = [run["solved_at"] for run in arm if run["solved_at"]]
        row = dict(zip(("length", "rate", "limit"), key, strict=True))
        row |= {"solved": len(solved), "of": len(arm)}
        row |= {"median steps": round(median(solved)) if solved else None}
        row |= {"largest norm": round(max(run["largest_norm"] for run in arm), 1)}
        rows.append(row | {"NaN runs": sum(run["nan"] for run in arm)})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the success rates: a panel per length, two bars per learning rate."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    figure = Figure(figsize=(3 * len(lengths) + 1, 3.6), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for (panel, length), limit in product(zip(panels, lengths, strict=True), LIMITS):
        arm = [row for row in rows if (row["length"], row["limit"]) == (length, limit)]
        side, colour = (-0.2, "#b5b5b5") if limit == "none" else (0.2, "#2c7a51")
        heights = [row["solved"] / row["of"] for row in arm]
        places = [place + side for place in range(len(arm))]
        bars = panel.bar(places, heights, width=0.38, color=colour, label=f"limit: {limit}")
        panel.bar_label(bars, [f"{row['solved']}/{row['of']}" for row in arm])
        panel.set_xticks(range(len(arm)), [row["rate"] for row in arm])
        panel.set(title=f"{length} symbols", xlabel="learning rate", ylim=(0, 1.1))
    panels[0].set_ylabel("share of seeds solved")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Temporal order, scaled down: tanh RNN of 50 units, plain SGD")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train in two processes, print the table, write the figures and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one length, one rate, two seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/exploding_rnn"), help="folder")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    jobs = list(product(plan["lengths"], plan["rates"], LIMITS, plan["seeds"], plan["steps"]))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        # The longest first, so that both processes end together.
        runs = list(tqdm(pool.map(trained, jobs[::-1]), total=len(jobs), disable=None))[::-1]
    rows = table(runs)
    print("Temporal order, scaled down; the limit is on the global norm of the gradient")
    for line in (rows[0], *(row.values() for row in rows)):
        print("".join(f"{'-' if cell is None else cell:>14}" for cell in line))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "figures.json").write_text(json.dumps({"table": rows, "runs": runs}, indent=1))
    draw(rows, options.out / "success.png")


if __name__ == "__main__":
    main()
