"""Drop and regrow: the smallest weights of a masked tensor are dropped, and as many regrown elsewhere."""

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

    The smallest ``|w|`` of the kept are dropped; of all that are then masked, those just dropped included, the
    ones of the largest `worth` are regrown. Ties are broken by index order. A mask without a worth is not
    changed. Raises `NonFinite` naming a tensor.

    >>> weight, gradient = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 2.0, 5.0])
    >>> kept = torch.tensor([True, True, False, False])
    >>> rewired({"w": weight}, {"w": kept}, {"w": gradient}, 0.5)["w"].tolist()
    [True, False, False, True]
    """
    moved = {}
    for name, mask in masks.items():
        moved[name] = mask
        if name in worth:
            if not all(bool(tensor.isfinite().all()) for tensor in (weights[name], worth[name])):
                raise NonFinite(
                    "a weight or its gradient is NaN or infinite",
                    where=name,
                    hint="continue from a checkpoint before the network diverged",
                )
            count = int(share * int(mask.count_nonzero()))
            kept = mask & ~lowest(weights[name].detach().abs(), mask, count)
            moved[name] = kept | lowest(-worth[name], ~kept, count)
    return moved


def lowest(numbers: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the `count` smallest (in float32) of the numbers marked by `among` are, ties by index order."""
    if count == 0:
        return torch.zeros_like(among)
    numbers = numbers.float()
    candidates = numbers[among]
    if candidates.is_cpu:
        # On one thread ten times as fast as torch's.
        limit = float(np.partition(candidates.numpy(), count - 1)[count - 1])
    else:
        # On a device, selection without sorting has no deterministic form.
        limit = candidates.sort().values[count - 1]
    taken = among & (numbers < limit)
    missing = count - int(taken.count_nonzero())
    places = (among & (numbers == limit)).flatten().nonzero().flatten()[:missing]
    flat = taken.flatten()
    flat[places] = True
    return flat.view(among.shape)


def noise(weights: Mapping[str, torch.Tensor], seed: int, step: int) -> dict[str, torch.Tensor]:
    """Return name -> uniform random numbers of the weight's shape, the same for a seed, step and name."""
    numbers = {}
    for name, weight in weights.items():
        generator = np.random.default_rng([seed, step, crc32(name.encode())])
        drawn = generator.random(tuple(weight.shape), dtype=np.float32)
        numbers[name] = torch.from_numpy(drawn).to(weight.device)
    return numbers


def forget_moments_(
    optimizer: torch.optim.Optimizer,
    found: Mapping[str, torch.Tensor],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> None:
    """Zero the moments of every weight that is masked, or was before; `before` may lack names."""
    # The moment of a masked weight would change it again, and that of a regrown weight is stale.
    for name in after.keys() & found.keys():
        kept = after[name] & before[name] if name in before else after[name]
        for value in optimizer.state.get(found[name], {}).values():
            if isinstance(value, torch.Tensor) and local(value).shape == kept.shape:
                local(value).masked_fill_(~kept, 0.0)


def check_whole(weights: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Raise `Unsupported` for sharded weights: the smallest of a shard are not those of the tensor."""
    for name, weight in weights.items():
        if hasattr(weight, "to_local"):
            raise Unsupported(
                "its weights are sharded, and drop and regrow need the whole tensor",
                where=where,
                got=name,
                hint="Gradual, or DDP",
            )
