"""Measure scores and apply masks: pruning of torch modules, in place, without wrapping a layer.

The threshold is found from histograms of float bits (`niwaki.prune.threshold`), in blocks, so that
exactly the asked number of weights goes, ties fall the same way everywhere, and memory stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from niwaki import registry
from niwaki.errors import InvalidArgument, NonFinite, Refused
from niwaki.prune import Gradual, allocate, threshold
from niwaki.prune.selection import BINS
from niwaki.select import select
from niwaki.torch.masks import Masks
from niwaki.torch.tensors import unwrapped

PRUNED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layer types whose ``weight`` is pruned."""

# Scores, their bits and a histogram's index stand in memory for one block at a time.
BLOCK = 1 << 20

Score = Callable[..., torch.Tensor]


@torch.no_grad()
def prune_(
    module: nn.Module,
    *,
    sparsity: float,
    score: str = "magnitude",
    allocation: str = "global",
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    masks: Masks | None = None,
) -> Masks:
    """Set the least important weights of a module to zero, in place, and return the masks.

    The weights of Linear, Conv and ConvTranspose layers are scored in float32; of each pool of the
    allocation exactly the asked number goes, ties by parameter order, then index order. Biases,
    normalisation, embeddings (and a weight tied to one) and recurrent cells are left alone:
    ``masks.left_alone`` says why. Tensors that lost every weight stand in ``masks.emptied``.

    `sparsity`: the share of all selected weights that is zero afterwards, in [0, 1). `score`,
    `allocation`: registered names. `only`, `exclude`: globs over parameter names. `masks`: earlier
    masks; what they removed stays removed and counts towards the sparsity.

    Raises `InvalidArgument` for the sparsity, `UnknownName` for a name or a glob, `Refused` when
    nothing can be pruned, `NonFinite` naming a tensor with NaN or infinite weights.

    >>> import torch, niwaki as nw
    >>> layer = torch.nn.Linear(4, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
    >>> masks = nw.torch.prune_(layer, sparsity=0.5)
    >>> layer.weight.tolist(), masks.counts(), masks.left_alone
    ([[3.0, 0.0, 0.0, -4.0]], {'weight': (2, 4)}, {'bias': 'a bias'})

    Source: Han et al. 2015 (magnitude); Frankle and Carbin 2019 (global). Deviation from
    ``torch.nn.utils.prune``: exact counts under ties, no parametrization, a few MiB of memory.
    """
    scored: Score = registry.find("score", score)
    weights, left_alone = _selected(module, only, exclude)
    kept = _earlier(weights, masks)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    for name, weight in weights.items():
        _check_scores(name, weight, scored)
    for pool in allocate(allocation, sizes, sparsity):
        _prune_pool({name: weights[name] for name in pool.names}, kept, pool.remove, scored)
    found = Masks(kept, left_alone={k: v for k, v in left_alone.items() if k not in kept})
    found.apply_(module)
    return found


def update(module: nn.Module, gradual: Gradual, step: int, masks: Masks | None = None) -> Masks:
    """Prune further when `gradual` is due at `step`, else only re-apply the masks; return them.

    To be called after each optimizer step. Raises what `prune_` raises.

    >>> import torch, niwaki as nw
    >>> layer, masks = torch.nn.Linear(10, 10), None
    >>> rule = nw.prune.Gradual(0.8, steps=(0, 4), every=2)
    >>> for step in range(6):
    ...     masks = update(layer, rule, step, masks)
    ...     print(masks.sparsity, end=" ")
    0.0 0.0 0.7 0.7 0.8 0.8

    Source: Zhu and Gupta 2017, "To prune, or not to prune".
    """
    if not gradual.due(step):
        masks = masks or Masks()
        masks.apply_(module)
        return masks
    return prune_(
        module,
        sparsity=gradual.sparsity_at(step),
        score=gradual.score,
        allocation=gradual.allocation,
        only=gradual.only,
        exclude=gradual.exclude,
        masks=masks,
    )


def prunable(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return ``(name -> weight that can be pruned, name -> why a parameter cannot)``.

    A parameter with several owners (tied weights) counts once, under its first name, and only if
    each owner is a layer whose weights are pruned.
    """
    reasons: dict[int, str] = {}
    module = unwrapped(module)
    for layer in module.modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            reason = _why_not(layer, leaf, parameter)
            if reason:
                reasons.setdefault(id(parameter), reason)
    named = dict(module.named_parameters())
    weights: dict[str, torch.Tensor] = {
        name: one for name, one in named.items() if id(one) not in reasons
    }
    return weights, {n: reasons[id(one)] for n, one in named.items() if id(one) in reasons}


def _why_not(layer: nn.Module, leaf: str, parameter: torch.Tensor) -> str | None:
    if leaf.startswith("bias"):
        return "a bias"
    if not isinstance(layer, PRUNED) or leaf != "weight":
        return f"{leaf} of {type(layer).__name__}: no weight of a Linear or Conv layer"
    if isinstance(parameter, nn.UninitializedParameter) or parameter.is_meta:
        return "it has no values yet"
    if parameter.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"its dtype is {parameter.dtype}"
    return None


def _selected(
    module: nn.Module, only: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weights, left_alone = prunable(module)
    chosen = set(select([*weights, *left_alone], only=only, exclude=exclude, where="torch.prune_"))
    if not chosen & set(weights):
        raise Refused(
            "nothing of this can be pruned",
            where="torch.prune_",
            got="; ".join(f"{k}: {why}" for k, why in list(left_alone.items())[:3]),
            allowed="weights of Linear and Conv layers",
        )
    left_alone |= {name: "not selected" for name in weights if name not in chosen}
    return {name: weight for name, weight in weights.items() if name in chosen}, left_alone


def _earlier(weights: Mapping[str, torch.Tensor], masks: Masks | None) -> dict[str, torch.Tensor]:
    """Return new masks to be written into: what earlier ones kept, or everything."""
    kept = {name: mask.clone() for name, mask in (masks or {}).items()}
    for name, weight in weights.items():
        if name not in kept:
            kept[name] = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        if kept[name].shape != weight.shape:
            raise InvalidArgument(
                "the earlier mask does not fit its parameter",
                where=name,
                got=tuple(kept[name].shape),
                allowed=tuple(weight.shape),
            )
        kept[name] = kept[name].to(weight.device).contiguous()
    return kept


def _prune_pool(
    weights: Mapping[str, torch.Tensor],
    kept: Mapping[str, torch.Tensor],
    remove: int,
    score: Score,
) -> None:
    """Clear so many more entries of the masks that `remove` are cleared, if fewer are now."""
    gone = sum(kept[name].numel() - int(kept[name].count_nonzero()) for name in weights)
    found = threshold(_counter(weights, kept, score), max(remove - gone, 0))
    ties = found.ties
    for name, weight in weights.items():
        for bits, still in _blocks(weight, kept[name], score):
            equal = (bits == found.bits) & still
            still &= bits >= found.bits
            if ties and equal.any():
                first = equal & (equal.cumsum(0, dtype=torch.int32) <= ties)
                ties -= int(first.count_nonzero())
                still &= ~first


def _counter(
    weights: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor], score: Score
) -> Callable[[int | None], np.ndarray]:
    def count(prefix: int | None) -> np.ndarray:
        total = np.zeros(BINS, dtype=np.int64)
        for name, weight in weights.items():
            for bits, still in _blocks(weight, kept[name], score):
                high = bits >> 16
                if prefix is None:
                    # The last bin, of no float, takes what is gone; no rank reaches it.
                    bins = high.masked_fill_(~still, BINS - 1)
                else:
                    bins = bits[(high == prefix) & still] & (BINS - 1)
                total += torch.bincount(bins, minlength=BINS).cpu().numpy()
        return total

    return count


def _check_scores(name: str, weight: torch.Tensor, score: Score) -> None:
    for block in _flat(weight):
        if not (block.isfinite().all() and (score(block.float(), xp=torch) >= 0).all()):
            raise NonFinite(
                "a weight or its score is NaN, infinite or negative",
                where=name,
                hint="prune from a checkpoint before the network diverged",
            )


def _blocks(
    weight: torch.Tensor, kept: torch.Tensor, score: Score
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(bits of the scores, view of the mask)`` block by block, in index order."""
    mask, start = kept.view(-1), 0
    for block in _flat(weight):
        # abs: a score of -0.0 has to sort as zero.
        bits = score(block.float(), xp=torch).abs().view(torch.int32)
        yield bits, mask[start : start + len(block)]
        start += len(block)


def _flat(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor's entries in index order, at most `BLOCK` at a time, whatever its strides."""
    if weight.is_contiguous() or weight.numel() <= BLOCK:
        yield from weight.detach().reshape(-1).split(BLOCK)
    elif len(weight) == 1:
        yield from _flat(weight[0])
    else:
        for part in weight.split(max(BLOCK // weight[0].numel(), 1)):
            yield from _flat(part)
