"""What clipping costs beside torch's own, paired in one run: ``python benchmarks/clip_overhead.py``.

Every round times each side once, in a random order, so that a slow moment and what the side before left in the caches
affect all alike (in a fixed order of three, a side beside itself had a ratio of 1.35); printed are medians and the
median of the paired ratios. The floor is one read pass over memory of the same size: a BLAS dot per tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import karikomi as kk

Shapes = Sequence[tuple[int, ...]]
Side = Callable[[], object]


def gpt2_small() -> Shapes:
    """Return the shapes of GPT-2 small, 124.4 M parameters in 148 tensors."""
    width, layers = 768, 12
    block: list[tuple[int, ...]] = [(width,), (width,), (3 * width, width), (3 * width,)]
    block += [(width, width), (width,), (width,), (width,), (4 * width, width), (4 * width,)]
    block += [(width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


def resnet50() -> Shapes:
    """Return the shapes of ResNet-50, 25.6 M parameters in 161 tensors."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for place in range(blocks):
            outputs = 4 * width
            kernels = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if place == 0:
                kernels.append((outputs, inputs, 1, 1))
            for kernel in kernels:
                shapes += [kernel, (kernel[0],), (kernel[0],)]
            inputs = outputs
    return [*shapes, (1000, 2048), (1000,)]


SIZES: dict[str, Shapes] = {
    "124 M (GPT-2 small)": gpt2_small(),
    "26 M (ResNet-50)": resnet50(),
    "0.4 M (100 x 4096)": [(4096,)] * 100,
}
TARGETS = {"unclipped": 0.35, "unclipped + fused AdamW": 0.75, "clipped + fused AdamW": 0.90}
SMALL_TARGET = 1.0
ORDERS = {1.0: 1.0, math.inf: 1.0, 3.0: 2.0}
"""The p of a norm -> the most of the time of our own 2-norm that it may take."""


def model_of(shapes: Shapes) -> torch.nn.Module:
    """Return a module with one parameter of each shape, and gradients of joint norm 1."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.weights = torch.nn.ParameterList([torch.randn(shape) * 0.02 for shape in shapes])
    scale = sum(parameter.numel() for parameter in model.parameters()) ** -0.5
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape) * scale
    return model


def paired(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every side in every round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order, draw = list(sides.items()), random.Random(0)
    for turn in range(rounds + 2):
        draw.shuffle(order)
        for name, side in order:
            start = time.perf_counter()
            side()
            took = time.perf_counter() - start
            if turn >= 2:  # the first rounds touch fresh memory
                times[name].append(took)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


class Row:
    """One comparison: both sides' medians in ms, their ratio, and the target if there is one."""

    def __init__(
        self, size: str, what: str, times: dict[str, list[float]], target: float | None
    ) -> None:
        self.size, self.what, self.target = size, what, target
        self.ours = statistics.median(times["karikomi"]) * 1e3
        self.theirs = statistics.median(times["peer"]) * 1e3
        self.ratio = ratio(times["karikomi"], times["peer"])
        self.to_floor = ratio(times["karikomi"], times["floor"]) if "floor" in times else None
        self.floor = ratio(times["floor"], times["peer"]) if "floor" in times else None

    def __str__(self) -> str:
        target = "" if self.target is None else f"<= {self.target:.2f}"
        floor = ""
        if self.to_floor is not None and self.floor is not None:
            floor = f"{self.to_floor:.2f} of the floor, which is {self.floor:.2f} of the peer"
        return (
            f"{self.size:<22}{self.what:<34}{self.ours:>9.2f}{self.theirs:>9.2f}"
            f"{self.ratio:>8.2f}  {target:<9}{floor}"
        )


def norm_only(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """Time a clip that does not engage."""
    ours, theirs, floors = model_of(shapes), model_of(shapes), model_of(shapes)
    step = attached(ours, kk.clip.ByGlobalNorm(1e6), None)
    parameters = list(theirs.parameters())
    # Separate memory for each side: memory that another side has just read would be in the cache.
    flat = [p.grad.view(-1) for p in floors.parameters() if p.grad is not None]
    return paired(
        {
            "karikomi": step,
            "peer": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e6),
            "floor": lambda: [float(torch.dot(gradient, gradient)) for gradient in flat],
        },
        rounds,
    )


def other_order(shapes: Shapes, order: float, rounds: int) -> dict[str, list[float]]:
    """Time a clip by a p-norm that does not engage beside our own by the 2-norm, and torch's by the same p."""
    ours, two, theirs = model_of(shapes), model_of(shapes), model_of(shapes)
    parameters = list(theirs.parameters())
    return paired(
        {
            "karikomi": attached(ours, kk.clip.ByGlobalNorm(1e9, norm=order), None),
            "peer": attached(two, kk.clip.ByGlobalNorm(1e9), None),
            "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e9, norm_type=order),
        },
        rounds,
    )


def each_tensor(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """Time a rule per tensor beside torch's clip called for every parameter, half of them clipped."""
    ours, theirs = model_of(shapes), model_of(shapes)
    sizes = [float(p.grad.norm()) for p in ours.parameters() if p.grad is not None]
    limit = statistics.median(sizes)
    step = attached(ours, kk.clip.ByNorm(limit), None)

    def peer() -> None:
        for parameter in theirs.parameters():
            torch.nn.utils.clip_grad_norm_(parameter, limit)

    return paired_fresh({"karikomi": step, "peer": peer}, (ours, theirs), rounds)


def each_unit(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """Time AGC beside the operations of timm's, all units of matrices and kernels clipped or not."""
    ours, theirs = model_of(shapes), model_of(shapes)
    layered = Layered(ours)
    step = attached(layered, kk.clip.AGC(0.01), None)

    def peer() -> None:
        for parameter in theirs.parameters():
            _timm_agc(parameter)

    return paired_fresh({"karikomi": step, "peer": peer}, (ours, theirs), rounds)


class Layered(torch.nn.Module):
    """The same parameters as layers, which define the unit axes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(map(_layer, model.parameters()))


def _layer(parameter: torch.nn.Parameter) -> torch.nn.Module:
    if parameter.dim() < 2:
        holder = torch.nn.Module()
    elif parameter.dim() == 2:
        holder = torch.nn.Linear(1, 1, bias=False)
    else:
        holder = torch.nn.Conv2d(1, 1, 1, bias=False)
    holder.weight = parameter
    return holder


def _timm_agc(parameter: torch.Tensor) -> None:
    weight, gradient = parameter.detach(), parameter.grad
    assert gradient is not None  # noqa: S101
    most = _unit_norms(weight).clamp_(min=1e-3).mul_(0.01)
    size = _unit_norms(gradient)
    clipped = gradient * (most / size.clamp(min=1e-6))
    gradient.copy_(torch.where(size < most, gradient, clipped))


def _unit_norms(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 2:
        return tensor.norm(2.0)
    return tensor.norm(2.0, dim=tuple(range(1, tensor.dim())), keepdim=True)


def attached(model: torch.nn.Module, rule: Any, optimizer: torch.optim.Optimizer | None) -> Side:
    """Return the timed function: the optimizer's step with the hooks, or the hooks alone."""
    if optimizer is not None:
        kk.torch.attach(optimizer, model, clip=rule)
        return optimizer.step
    idle = Idle(model.parameters(), {"lr": 0.0})
    kk.torch.attach(idle, model, clip=rule)
    return idle.step


class Idle(torch.optim.Optimizer):
    """An optimizer that does nothing, so that only the hooks around its step are timed."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do nothing."""


def with_step(shapes: Shapes, limit: float, rounds: int) -> dict[str, list[float]]:
    """Time clip and fused AdamW step together, on both sides."""
    ours, theirs = model_of(shapes), model_of(shapes)
    options = {"lr": 1e-8, "fused": True}
    step = attached(
        ours, kk.clip.ByGlobalNorm(limit), torch.optim.AdamW(ours.parameters(), **options)
    )
    other = torch.optim.AdamW(theirs.parameters(), **options)
    parameters = list(theirs.parameters())
    refill = limit < 1.0

    def peer() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, limit)
        other.step()

    sides: dict[str, Side] = {"karikomi": step, "peer": peer}
    if not refill:
        return paired(sides, rounds)
    return paired_fresh(sides, (ours, theirs), rounds)


def paired_fresh(
    sides: dict[str, Side], models: tuple[torch.nn.Module, torch.nn.Module], rounds: int
) -> dict[str, list[float]]:
    """Like `paired`, but gradients are refilled before each turn, outside the timing."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    kept = [[p.grad.clone() for p in model.parameters() if p.grad is not None] for model in models]
    for turn in range(rounds + 2):
        for (name, side), model, gradients in zip(sides.items(), models, kept, strict=True):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                assert parameter.grad is not None  # noqa: S101
                parameter.grad.copy_(gradient)
            start = time.perf_counter()
            side()
            took = time.perf_counter() - start
            if turn >= 2:
                times[name].append(took)
    return times


def main() -> None:
    """Run all comparisons and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds, median ms"
    )
    print(f"{'parameters':<22}{'step':<34}{'karikomi':>9}{'torch':>9}{'ratio':>8}  target")
    rows: list[Row] = []
    for size, shapes in SIZES.items():
        small = "100 x" in size
        if arguments.quick and not small:
            continue
        own = rounds * 20 if small else rounds
        cases = {
            "unclipped": norm_only(shapes, own),
            "unclipped + fused AdamW": with_step(shapes, 1e6, own),
            "clipped + fused AdamW": with_step(shapes, 0.1, own),
            "per tensor (ByNorm)": each_tensor(shapes, own),
            "per unit (AGC, timm's)": each_unit(shapes, own),
        }
        for what, times in cases.items():
            target = TARGETS.get(what)
            rows.append(Row(size, what, times, SMALL_TARGET if small and target else target))
            print(rows[-1], flush=True)
        for order, most in ORDERS.items():
            times = other_order(shapes, order, own)
            rows.append(Row(size, f"{order:g}-norm beside our 2-norm", times, most))
            print(rows[-1], flush=True)
            beside = {"karikomi": times["karikomi"], "peer": times["torch"]}
            rows.append(Row(size, f"{order:g}-norm beside torch's", beside, None))
            print(rows[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
