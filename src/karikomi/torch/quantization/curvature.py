"""How much the loss minds an error of each weight: squared gradients of a loss that the network draws itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from karikomi.errors import InvalidArgument
from karikomi.torch.facts.gradients import Gradients, Loss
from karikomi.torch.tracing.batches import MISSING, Batch, batches_of, leaves, length_of
from karikomi.torch.tracing.eval_mode import steady
from karikomi.torch.tracing.isolation import isolated

Draw = Callable[[Any, Any], torch.Tensor]


def squared_gradients(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    data: Iterable[Any],
    loss: Loss | None,
    *,
    draws: int = 2,
    seed: int = 0,
    progress: bool = True,
    where: str,
) -> dict[str, torch.Tensor]:
    """Return weight name -> mean over examples of the squared gradient, of the weight's shape, float32.

    Without a `loss`, that of ``sum(outputs * noise)`` with standard normal noise, whose expectation is the diagonal of
    ``J^T J``: the change of the outputs. With a `loss` and targets in the data, that of the loss. With cross-entropy
    and data without targets, labels are drawn from the network's own softmax, which gives the Fisher information.
    `draws`: passes over the data with other noise or labels; one where the data has targets. A drawn gradient has mean
    zero in each example, so that the square for a batch is the sum of those of its examples.

    Raises `InvalidArgument` for a loss that needs targets where there are none and none can be drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    total: dict[str, torch.Tensor] = {}
    examples, drawn = 0, True
    with isolated(seed, 0), steady(module):
        for _ in range(draws):
            batches = batches_of(data, module, where=f"{where}: data")
            hidden = None if progress else True
            for batch in tqdm(
                batches, "curvature", total=length_of(data), disable=hidden, leave=False
            ):
                drawn = loss is None or batch.targets is MISSING
                meter = Gradients(
                    module,
                    weights,
                    frozenset({"squared_gradient"}),
                    _sum(loss, batch, generator, where),
                )
                meter.see(replace(batch, targets=None) if drawn else batch, 0)
                for name, square in meter.result()["squared_gradient"].items():
                    total[name] = total[name] + square if name in total else square
                examples += batch.examples
            if not drawn:
                break
    return {name: square / max(examples, 1) for name, square in total.items()}


def _sum(loss: Loss | None, batch: Batch, generator: torch.Generator, where: str) -> Loss:
    """Return a loss whose squared gradient is, in the mean, that of the examples, summed."""
    if loss is None:
        return lambda outputs, _: _noisy(outputs, generator)
    if batch.targets is not MISSING:
        # A mean over n examples: of the sum, the squares are n^2 times, in the mean n times those of each.
        return lambda outputs, targets: loss(outputs, targets) * batch.examples
    if loss is not F.cross_entropy and not isinstance(loss, nn.CrossEntropyLoss):
        raise InvalidArgument(
            "this loss takes targets, and the data has none",
            where=f"{where}: data",
            allowed="batches (inputs, targets); without them loss=None, or cross_entropy, whose labels are drawn",
        )
    return lambda outputs, _: _drawn(outputs, generator)


def _noisy(outputs: Any, generator: torch.Generator) -> torch.Tensor:
    floating = [tensor.float() for tensor in leaves(outputs) if tensor.is_floating_point()]
    terms = []
    for tensor in floating:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        terms.append((tensor * noise).sum())
    if not terms:
        raise InvalidArgument("the network has no floating outputs", where="curvature")
    return torch.stack(terms).sum()


def _drawn(outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    logits = outputs.movedim(1, -1).flatten(0, -2) if outputs.dim() > 2 else outputs
    shares = logits.detach().float().softmax(-1).cpu()
    labels = torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")
