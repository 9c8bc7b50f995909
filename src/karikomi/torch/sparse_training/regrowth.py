"""Weights that move: of a masked tensor the smallest are dropped, and as many come back elsewhere.

Apart from `prune_`, because nothing here competes across tensors and the number of kept weights of
each stays exactly what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import numpy as np
import torch

from karikomi.errors import NonFinite, Unsupported
from karikomi.torch.distributed.dtensors import local


def rewired(
    weights: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    worth: Mapping[str, torch.Tensor],
    share: float,
) -> dict[str, torch.Tensor]:
    """Return name -> mask after ``floor(share * kept)`` weights of each tensor have moved.

    The smallest ``|w|`` of the kept go; of all that are masked then, those just dropped included, the ones
    of the largest `worth` come. Ties go by index order. A mask without a worth stays as it is.
    Raises `NonFinite` naming a tensor.

    >>> weight, gradient = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 2.0, 5.0])
    >>> kept = torch.tensor([True, True, False, False])
    >>> rewired({"w": weight}, {"w": kept}, {"w": gradient}, 0.5)["w"].tolist()
    [True, False, False, True]
    """
    moved = {}
    for name, mask in masks.items():
        moved[name] = mask
        if name in worth:
            _check(name, weights[name], worth[name])
            count = int(share * int(mask.count_nonzero()))
            kept = mask & ~lowest(weights[name].detach().abs(), mask, count)
            moved[name] = kept | lowest(-worth[name], ~kept, count)
    return moved


def lowest(numbers: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the `count` smallest of the numbers marked by `among` are, ties by index order.

    Compared in float32.
    """
    if count == 0:
        return torch.zeros_like(among)
    numbers = numbers.float()
    candidates = numbers[among]
    if candidates.is_cpu:
        # On one thread ten times as fast as torch's.
        limit = float(np.partition(candidates.numpy(), count - 1)[count - 1])
    else:
        # Selection without sorting has no deterministic form there.
        limit = candidates.sort().values[count - 1]
    taken = among & (numbers < limit)
    missing = count - int(taken.count_nonzero())
    places = (among & (numbers == limit)).flatten().nonzero().flatten()[:missing]
    flat = taken.flatten()
    flat[places] = True
    return flat.view(among.shape)


def noise(weights: Mapping[str, torch.Tensor], seed: int, step: int) -> dict[str, torch.Tensor]:
    """Return name -> uniform random numbers of the weight's shape, the same for a seed, step and name."""
    found = {}
    for name, weight in weights.items():
        drawn = np.random.default_rng([seed, step, crc32(name.encode())])
        numbers = drawn.random(tuple(weight.shape), dtype=np.float32)
        found[name] = torch.from_numpy(numbers).to(weight.device)
    return found


def forget_moments_(
    optimizer: torch.optim.Optimizer,
    found: Mapping[str, torch.Tensor],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> None:
    """Zero the moments of every weight that is masked, or was before; `before` may lack names."""
    # A moment that outlives its weight would move it again, and one of a weight that comes back is stale.
    for name in after.keys() & found.keys():
        kept = after[name] & before[name] if name in before else after[name]
        for value in optimizer.state.get(found[name], {}).values():
            if isinstance(value, torch.Tensor) and local(value).shape == kept.shape:
                local(value).masked_fill_(~kept, 0.0)


def check_whole(weights: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Refuse sharded weights: the smallest of a shard are not those of the tensor."""
    for name, weight in weights.items():
        if hasattr(weight, "to_local"):
            raise Unsupported(
                "its weights are sharded, and which of them move is a question to the whole tensor",
                where=where,
                got=name,
                hint="Gradual, or DDP",
            )


def _check(name: str, *tensors: torch.Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NonFinite(
            "a weight or its gradient is NaN or infinite",
            where=name,
            hint="go on from a checkpoint before the network diverged",
        )
