"""karikomi on one GPU beside its peers, in less than 8 minutes: clip, select, masked step, shrink, quantized inference.

Each row times ours and the peer's in alternation, waits for the device around each round, and prints the median of the
paired ratios. Steps for which no host sync is promised (a clip, masks, or both around a fused optimizer) also run under
``torch.cuda.set_sync_debug_mode("error")``: a sync is named in the table, and the exit code is then 1.

    python benchmarks/gpu.py                 on a device with CUDA
    python benchmarks/gpu.py --dry-run       tiny sizes, two rounds, on whatever is there: whether it runs at all
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

import karikomi as kk

SPARSITY = 0.9
ROW_SECONDS = 15.0
Side = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large what is measured is, and for how long."""

    layers: int = 24
    width: int = 2048
    selected: tuple[int, ...] = (10_000_000, 100_000_000)
    channels: int = 128
    side: int = 32
    batch: int = 256
    rounds: int = 40
    seconds: float = ROW_SECONDS


DRY = Sizes(2, 32, (10_000,), 8, 8, 4, 2, 0.5)


@dataclass(slots=True)
class Row:
    """One comparison: milliseconds of both sides, the ratio, and what was seen of host syncs."""

    what: str
    peer: str
    times: dict[str, list[float]]
    sync: str = ""
    note: str = ""

    def __str__(self) -> str:
        ours, theirs = self.times["karikomi"], self.times["peer"]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        both = [1e3 * statistics.median(side) for side in (ours, theirs)]
        return (
            f"{self.what:<40}{self.peer:<34}{both[0]:>10.3f}{both[1]:>10.3f}{ratio:>8.2f}  "
            f"{self.sync:<8}{self.note}"
        ).rstrip()


@dataclass(slots=True)
class Bench:
    """Where and how large, and the rows so far."""

    device: torch.device
    sizes: Sizes
    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, peer: str, sides: tuple[Side, Side], **more: str) -> None:
        """Time ours and the peer's, and print the row."""
        ours, theirs = sides
        times = self.paired({"karikomi": ours, "peer": theirs})
        self.rows.append(Row(what, peer, times, **more))
        print(self.rows[-1], flush=True)

    def paired(self, sides: dict[str, Side]) -> dict[str, list[float]]:
        """Return the seconds of each side in each round; the first rounds warm up."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side()
        repeats = {name: self._repeats(side) for name, side in sides.items()}
        until = time.perf_counter() + self.sizes.seconds
        for turn in range(self.sizes.rounds):
            names = list(sides) if turn % 2 else list(sides)[::-1]
            for name in names:
                times[name].append(self._seconds(sides[name], repeats[name]))
            if time.perf_counter() > until and turn:
                break
        return times

    def _repeats(self, side: Side) -> int:
        # Many short steps share one wait for the device.
        return max(1, min(100, int(0.02 / max(self._seconds(side, 1), 1e-6))))

    def _seconds(self, side: Side, repeats: int) -> float:
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            side()
        self.wait()
        return (time.perf_counter() - started) / repeats

    def wait(self) -> None:
        """Wait until the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sync_of(self, step: Side) -> str:
        """Return whether a step, warmed up, waits for the device: ``none``, ``SYNC``, or ``unseen`` without CUDA."""
        for _ in range(3):
            step()
        self.wait()
        try:
            with syncs_forbidden(self.device):
                for _ in range(3):
                    step()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            print(f"  host sync: {str(error).splitlines()[0]}", file=sys.stderr)
            return "SYNC"
        return "none" if self.device.type == "cuda" else "unseen"


@contextmanager
def syncs_forbidden(device: torch.device) -> Iterator[None]:
    """Make each wait of the host for the device an error, where the device is CUDA."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def linears(bench: Bench, layers: int, width: int) -> nn.Sequential:
    """Return linear layers, with gradients."""
    torch.manual_seed(0)
    made = [nn.Linear(width, width, bias=False, device=bench.device) for _ in range(layers)]
    for layer in made:
        layer.weight.grad = torch.randn_like(layer.weight) / (layers * width)
    return nn.Sequential(*made)


class ConvNet(nn.Module):
    """Three stages of convolutions with batch norms, and a head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths, stages = (3, channels, 2 * channels, 4 * channels), []
        for before, after in zip(widths, widths[1:], strict=False):
            stages += [
                nn.Conv2d(before, after, 3, 2, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
            stages += [
                nn.Conv2d(after, after, 3, 1, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(4 * channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.head(self.stages(x).mean((2, 3)))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return a fused AdamW, whose step needs no host."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def clips(bench: Bench) -> None:
    """Clip by the global norm: in a fused step, and alone; by the norm of each tensor."""
    sizes = bench.sizes
    for rule, peer in (
        (kk.clip.ByGlobalNorm(1e-3), "clip_grad_norm_, fused AdamW"),
        (kk.clip.ByValue(1e-6), "clip_grad_value_, fused AdamW"),
    ):
        ours, theirs = (linears(bench, sizes.layers, sizes.width) for _ in range(2))
        optimizer, other = adam(ours), adam(theirs)
        kk.torch.attach(optimizer, ours, clip=rule)
        weights = list(theirs.parameters())

        def torch_step(rule: Any = rule, weights: Any = weights, other: Any = other) -> None:
            if isinstance(rule, kk.clip.ByValue):
                nn.utils.clip_grad_value_(weights, rule.limit, foreach=True)
            else:
                nn.utils.clip_grad_norm_(weights, rule.limit, foreach=True)
            other.step()

        name = f"{type(rule).__name__}, fused AdamW, {count(ours)}"
        promised = isinstance(rule, kk.clip.ByGlobalNorm)
        sync = bench.sync_of(optimizer.step) if promised else ""
        bench.add(name, peer, (optimizer.step, torch_step), sync=sync)
    ours, theirs = (linears(bench, sizes.layers, sizes.width) for _ in range(2))
    limit, weights = 1e6, list(theirs.parameters())
    bench.add(
        f"clip_, not engaged, {count(ours)}",
        "clip_grad_norm_",
        (
            lambda: kk.torch.clip_(ours, kk.clip.ByGlobalNorm(limit)),
            lambda: nn.utils.clip_grad_norm_(weights, limit, foreach=True),
        ),
        note="ours reads the norms on the host",
    )


def selections(bench: Bench) -> None:
    """Find the smallest 90 % of all weights."""
    for weights in bench.sizes.selected:
        width = int((weights / 12) ** 0.5)
        model = linears(bench, 12, width)

        def ours(model: nn.Module = model) -> Any:
            return kk.torch.prune_(copy.deepcopy(model), sparsity=SPARSITY)

        def by_torch(model: nn.Sequential = model) -> None:
            chosen = [(layer, "weight") for layer in copy.deepcopy(model)]
            torch_prune.global_unstructured(chosen, torch_prune.L1Unstructured, amount=SPARSITY)

        removed = sum(int((~mask).sum()) for mask in ours().values())
        exact = removed == round(SPARSITY * 12 * width * width)
        bench.add(
            f"prune_ 90 %, global, {count(model)}",
            "global_unstructured",
            (ours, by_torch),
            note="both copy the model first" + ("" if exact else "; NOT the exact number"),
        )


def trained(bench: Bench, model: nn.Module, optimizer: torch.optim.Optimizer) -> Side:
    """Return one training step on a batch that is on the device."""
    x, y = batch(bench)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def batch(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and classes."""
    torch.manual_seed(1)
    sizes = bench.sizes
    x = torch.randn(sizes.batch, 3, sizes.side, sizes.side, device=bench.device)
    return x, torch.arange(sizes.batch, device=bench.device) % 10


def network(bench: Bench) -> ConvNet:
    """Return the network, the same each time."""
    torch.manual_seed(0)
    return ConvNet(bench.sizes.channels).to(bench.device)


def masked_steps(bench: Bench) -> None:
    """Train with masks of 90 %: beside torch's parametrization, and beside no masks."""
    ours, by_torch, plain = (network(bench) for _ in range(3))
    masks = kk.torch.prune_(ours, sparsity=SPARSITY)
    chosen = [(m, "weight") for m in by_torch.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    torch_prune.global_unstructured(chosen, torch_prune.L1Unstructured, amount=SPARSITY)
    optimizer = adam(ours)
    kk.torch.attach(optimizer, ours, clip=kk.clip.ByGlobalNorm(1.0), prune=masks)
    others = {"torch.nn.utils.prune": by_torch, "no masks": plain}
    step = trained(bench, ours, optimizer)
    sync = bench.sync_of(step)
    for name, model in others.items():
        theirs, weights = adam(model), list(model.parameters())

        def clip(*_: Any, weights: Any = weights) -> None:
            nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)

        theirs.register_step_pre_hook(clip)
        what = f"training step, clip + masks, {count(ours)}"
        bench.add(what, name, (step, trained(bench, model, theirs)), sync=sync)


@torch.no_grad()
def shrunk(bench: Bench) -> None:
    """Run a network with half of its units beside all of them masked or not."""
    model, (x, _) = network(bench).eval(), batch(bench)
    small, report = kk.torch.shrink(model, x[:2], width=0.5)
    masked = network(bench).eval()
    for layer in masked.modules():
        if isinstance(layer, nn.Conv2d):
            torch_prune.ln_structured(layer, "weight", amount=0.5, n=1, dim=0)
            torch_prune.remove(layer, "weight")
    note = f"{report.macs_after / report.macs_before:.2f} of the multiply-accumulates"
    for name, other in {"ln_structured 50 %": masked, "the network before": model}.items():
        bench.add(
            f"forward, shrunk to width 0.5, {count(small)}",
            name,
            (lambda: small(x), lambda other=other: other(x)),
            note=note,
        )


@torch.no_grad()
def quantized(bench: Bench) -> None:
    """Round weights to 8 bits, and run the rounded network in floats, which is what a device does with it here."""
    x, _ = batch(bench)
    ours, theirs = network(bench).eval(), network(bench).eval()

    def round_ours() -> None:
        kk.torch.quantize_(copy.deepcopy(ours), bits=8, progress=False)

    def round_theirs(model: nn.Module = theirs) -> nn.Module:
        other = copy.deepcopy(model)
        for weight in [p for p in other.parameters() if p.dim() > 1]:
            scale = weight.flatten(1).abs().amax(1) / 127
            zero = torch.zeros_like(scale, dtype=torch.int32)
            weight.copy_(torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -128, 127))
        return other

    bench.add(
        f"quantize_ 8 bits, {count(ours)}", "fake_quantize_per_channel", (round_ours, round_theirs)
    )
    kk.torch.quantize_(ours, bits=8, progress=False)
    rounded = round_theirs()
    difference = float((ours(x) - rounded(x)).abs().max() / rounded(x).abs().max())
    bench.add(
        "forward of the quantized network",
        "fake-quantized network",
        (lambda: ours(x), lambda: rounded(x)),
        note=f"floats on both sides; outputs differ by {difference:.1e} of the largest",
    )


def count(model: nn.Module) -> str:
    """Return the number of weights, as a short text."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    return f"{weights / 1e6:.1f} M" if weights >= 1e5 else f"{weights:,}"


def facts(device: torch.device) -> list[str]:
    """Return what the times depend on."""
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} processors, {torch.get_num_threads()} threads"
    ]
    if device.type != "cuda":
        return [*lines, "no CUDA device: times and syncs of a device are NOT measured"]
    own = torch.cuda.get_device_properties(device)
    return [
        *lines,
        f"{own.name}, {own.total_memory / 2**30:.0f} GiB, capability {own.major}.{own.minor}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    ]


LANES = (clips, selections, masked_steps, shrunk, quantized)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a step waits for the device that must not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on whatever is there")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.dry_run:
        print("there is no CUDA device; --dry-run tries the script without one", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    bench = Bench(device, DRY if options.dry_run else Sizes())
    print("\n".join(facts(device)))
    print(f"{'':<40}{'peer':<34}{'ours, ms':>10}{'peer, ms':>10}{'ratio':>8}  {'sync':<8}")
    for lane in LANES:
        lane(bench)
    print(f"{time.perf_counter() - started:.0f} seconds in all")
    return int(any(row.sync == "SYNC" for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
