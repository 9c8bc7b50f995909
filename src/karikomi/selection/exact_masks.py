"""From scores, an allocation and a target to masks: the one selection that all frameworks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune.allocations.allocation import (
    Allocation,
    Allocator,
    Pool,
    Tensor,
    allocate,
    least_left,
)
from karikomi.prune.facts import PER_UNIT
from karikomi.prune.layout import Coupled
from karikomi.prune.pattern import Blocks, NofM, Pattern, Units, Unstructured
from karikomi.prune.radix_threshold import NOTHING
from karikomi.prune.scores.score import Score
from karikomi.prune.scores.weights import Magnitude
from karikomi.prune.target import Target
from karikomi.selection import granularity
from karikomi.selection.block_scores import BlockScores, check_all, check_blockwise, keep_best
from karikomi.selection.threads import each
from karikomi.selection.weight_source import Source, with_noise
from karikomi.selection.within_rows import divides, keep_n_of_m, keep_within_rows

Masks = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRequest:
    """The input of `find_masks`: which of these weights are removed.

    `sources`: name -> weight, in order. `coupled`: what goes together, for patterns that span tensors.
    `target`: none where the pattern determines how much goes. `rounding`: of whole items to a sparsity, ``up`` or
    ``nearest``. `earlier`: masks (bool, true where kept) whose
    removals stay removed and count. `totals`: the whole model's parameters, macs and bytes, for budgets;
    `outliers`, `curves`: facts of tensors for allocations. `by_hand`: tensor -> the share (float) or the number
    (int) of its items that goes, instead of an allocation.
    """

    sources: Mapping[str, Source]
    score: Score
    pattern: Pattern
    allocation: Allocation
    target: Target | None
    rounding: str = "up"
    coupled: Sequence[Coupled] = ()
    earlier: Mapping[str, np.ndarray] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)
    outliers: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    by_hand: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SelectionResult:
    """`masks`: name -> bool, true where kept. `why`: tensor or group -> the rule by which its items went.

    `left_alone`: tensor -> why nothing of it could go. `removes`: tensor or group -> how many items go.
    """

    masks: Masks
    why: dict[str, str]
    left_alone: dict[str, str]
    removes: dict[str, int]


def find_masks(request: SelectionRequest) -> SelectionResult:
    """Return the masks of a request, with exactly as many items removed as it requires.

    Raises `InvalidArgument` for facts and layouts that are missing, `Unsupported` for a target that cannot be
    met, for combinations that mean nothing and weights that float32 does not hold, `NonFinite` naming a
    tensor.
    """
    check_combination(request.score, request.pattern)
    check_parts(request)
    if not (request.score.of_tensors and isinstance(request.pattern, Unstructured)):
        for source in request.sources.values():
            granularity.check_range(source)
    if "noise" in request.score.needs:
        request = replace(request, sources=with_noise(request.sources, request.score))
    if isinstance(request.pattern, NofM):
        return _n_of_m(request, request.pattern)
    scored = _scored(request, Magnitude() if _within_rows(request) else request.score)
    if request.by_hand and not request.by_hand.keys() & scored.keys():
        raise Unsupported(
            "sparsities by hand go by the names of weights, and what goes here has names of its own",
            where="sparsity",
            got=", ".join(list(scored)[:3]),
            hint="one call per layer, with only=",
        )
    attempt = _Attempt(request, scored)
    return attempt.at(_share(request, attempt))


def find_scores(request: SelectionRequest) -> Masks:
    """Return name -> scores in float32, in the shape of single weights, or one per item of another pattern.

    What `earlier` masks removed scores 0. Raises as `find_masks`, and `Unsupported` for a score that reconstructs.
    """
    check_combination(request.score, request.pattern)
    if request.score.updates:
        raise Unsupported(
            f"{type(request.score).__name__} scores a weight anew after each removal, and not all at once",
            where="score",
            hint='score="magnitude", or "wanda" with data=',
        )
    single = isinstance(request.pattern, Unstructured | NofM)
    if not (single and request.score.of_tensors):
        for source in request.sources.values():
            granularity.check_range(source)
    if "noise" in request.score.needs:
        request = replace(request, sources=with_noise(request.sources, request.score))
    return {
        name: item.values().reshape(request.sources[name].shape if single else -1)
        for name, item in _scored(request, request.score).items()
    }


def check_combination(score: Score, pattern: Pattern) -> None:
    """Raise `Unsupported` for a score that is not defined for the items of a pattern."""
    if isinstance(pattern, Units) and pattern.axis is not None and score.needs & PER_UNIT:
        raise Unsupported(
            f"{type(score).__name__} is of the units that a layer makes, and not of slices along another axis",
            where="Units.axis",
            got=pattern.axis,
            hint='pattern="units"',
        )
    if isinstance(pattern, Units) and pattern.norm is not None and score.of_units_only:
        raise Unsupported(
            f"{type(score).__name__} scores units, and a norm takes scores of single weights",
            where="Units.norm",
            got=pattern.norm,
        )
    if score.of_units_only and not isinstance(pattern, Units):
        raise Unsupported(
            f"{type(score).__name__} scores units, not {type(pattern).__name__}",
            where="score",
            hint='pattern="units"',
        )
    if score.updates and not isinstance(pattern, Unstructured | NofM):
        raise Unsupported(
            f"{type(score).__name__} reconstructs from single weights, and not {type(pattern).__name__}",
            where="score",
            allowed="unstructured, NofM(keep=, of=)",
        )


def check_parts(request: SelectionRequest) -> None:
    """Raise `Unsupported` for a request that is not supported for sharded weights."""
    parts = [name for name, source in request.sources.items() if source.part is not None]
    if not parts:
        return
    check_blockwise(request.score, where=parts[0])
    target = None if request.target is None else request.target.unit
    by_share = target in ("sparsity", "count") or bool(request.by_hand)
    if not isinstance(request.pattern, Unstructured) or not by_share:
        raise Unsupported(
            "of sharded weights, single ones go, by sparsity or count",
            where=parts[0],
            got=f"{type(request.pattern).__name__}, {target or 'no target'}",
            allowed='pattern="unstructured", sparsity=',
        )


class _Attempt:
    """Masks for a share of items that go."""

    def __init__(self, request: SelectionRequest, scored: Mapping[str, BlockScores]) -> None:
        self._request, self._scored = request, scored
        self._tensors = {name: self._facts(name, tensor) for name, tensor in scored.items()}
        self.items = sum(tensor.items for tensor in scored.values())
        # Of tensors without items no allocation is asked; all items of all are never requested.
        some = {n: t for n, t in self._tensors.items() if t.items}
        own = request.allocation
        self.low = own.fewest(some) if isinstance(own, Allocator) else 0
        self.floor = least_left(own, some)

    def at(self, share: float) -> SelectionResult:
        """Return the masks with this share of the items gone."""
        pools = self._pools(share)
        if _within_rows(self._request):
            return self._by_rows(pools)
        out, stays = self._out()
        thresholds = keep_best(self._scored, pools, stays)
        self._spread(stays, out)
        label = type(self._request.score).__name__.lower()
        # Where nothing more goes, nothing is a reason.
        why = {
            name: f"{label} <= {found.value:.4g}"
            for name, found in thresholds.items()
            if found is not NOTHING
        }
        if self._request.pattern.coupled:
            members = {m.name: item.of for item in self._request.coupled for m in item.members}
            goes = {
                name: f"goes with {of}" if of in members else f"{of}: {why[of]}"
                for name, of in members.items()
                if of in why
            }
            why = goes | why
        sizes = sum(item.size for item in stays.values())
        gone = each(
            lambda value: int(value.size - np.count_nonzero(value)),
            list(stays.values()),
            entries=sizes,
        )
        return SelectionResult(out, why, {}, dict(zip(stays, gone, strict=True)))

    def _pools(self, share: float) -> list[Pool]:
        own = self._request.by_hand
        if own:
            return [
                Pool((name,), _number(own.get(name, 0), tensor.items, where=name))
                for name, tensor in self._tensors.items()
            ]
        return allocate(self._request.allocation, self._tensors, share)

    def _by_rows(self, pools: Sequence[Pool]) -> SelectionResult:
        check_all(list(self._scored.values()))
        amounts, out, why = amounts_of(pools, self._request), _fresh(self._request), {}
        score = self._request.score
        for name, amount in amounts.items():
            keep_within_rows(self._request.sources[name], score, amount, out[name])
            why[name] = f"lowest {type(score).__name__.lower()} of each unit"
        return SelectionResult(out, why, {}, amounts)

    def _out(self) -> tuple[Masks, Masks]:
        """Return masks, and a bool per item that stays: of single weights the masks themselves."""
        if isinstance(self._request.pattern, Unstructured):
            sources = self._request.sources
            # Not filled: every entry is written, by threads that then share the page faults too.
            out = {name: np.empty(sources[name].shape, bool) for name in self._scored}
            return out, {name: mask.reshape(-1) for name, mask in out.items()}
        stays = {name: np.ones(tensor.items, bool) for name, tensor in self._scored.items()}
        return _fresh(self._request), stays

    def _spread(self, stays: Masks, out: Masks) -> None:
        pattern = self._request.pattern
        if isinstance(pattern, Blocks):
            for name, source in self._request.sources.items():
                granularity.spread_blocks(source, pattern, stays[name], out[name])
        for coupled in self._request.coupled if pattern.coupled else ():
            granularity.spread_coupled(coupled, stays[coupled.of], out)

    def _facts(self, name: str, scored: BlockScores) -> Tensor:
        request = self._request
        source = request.sources.get(name)
        shape = ()
        if source is not None:
            shape = source.whole
            if source.layout is not None:
                canonical = source.layout.canonical(np.broadcast_to(np.int8(0), shape)).shape
                shape = (canonical[0], canonical[-1], *canonical[1:-1])
        return Tensor(
            items=scored.items,
            gone=scored.gone,
            shape=shape,
            scores=scored.values if scored.part is None else None,
            outliers=request.outliers.get(name),
            curve=request.curves.get(name),
        )


def _number(asked: float, items: int, *, where: str) -> int:
    """Return how many of the items go: a share of them, or a number."""
    if isinstance(asked, float):
        return round(asked * items)
    if asked > items:
        raise InvalidArgument(
            "more are to go than there are",
            where=f"count: {where}",
            got=asked,
            allowed=f"0 to {items}",
        )
    return asked


def amounts_of(pools: Sequence[Pool], request: SelectionRequest) -> dict[str, int]:
    """Return how many weights go from each tensor; a joint pool of scores that do not compare is split by magnitude."""
    amounts = {}
    for pool in pools:
        if len(pool.names) == 1:
            amounts[pool.names[0]] = pool.remove
            continue
        sizes = {
            name: granularity.of_weights(
                request.sources[name], Magnitude(), request.earlier.get(name)
            )
            for name in pool.names
        }
        out = {name: np.ones(size.items, bool) for name, size in sizes.items()}
        keep_best(sizes, [pool], out)
        amounts |= {name: int(array.size - np.count_nonzero(array)) for name, array in out.items()}
    return amounts


def _scored(request: SelectionRequest, score: Score) -> dict[str, BlockScores]:
    pattern, earlier = request.pattern, request.earlier
    if pattern.coupled:
        norm = pattern.norm if isinstance(pattern, Units) else None
        return {
            item.of: granularity.of_coupled(item, request.sources, score, earlier, norm)
            for item in request.coupled
        }
    if isinstance(pattern, Blocks):
        return {
            name: granularity.of_blocks(source, score, pattern, earlier.get(name))
            for name, source in request.sources.items()
        }
    of = granularity.of_tensor if score.of_tensors else granularity.of_weights
    return {name: of(source, score, earlier.get(name)) for name, source in request.sources.items()}


def _within_rows(request: SelectionRequest) -> bool:
    unstructured = isinstance(request.pattern, Unstructured)
    return unstructured and (request.score.within_rows or request.score.updates)


def _n_of_m(request: SelectionRequest, pattern: NofM) -> SelectionResult:
    out, why, left_alone, removes = _fresh(request), {}, {}, {}
    for name, source in request.sources.items():
        if not divides(source, pattern) and not (pattern.pad and not request.score.updates):
            left_alone[name] = f"{pattern.of} does not divide its inputs, {source.shape}"
            if name not in request.earlier:
                del out[name]
            continue
        keep_n_of_m(source, request.score, pattern, out[name])
        why[name] = f"not among the best {pattern.keep} of {pattern.of}"
        removes[name] = source.size - int(np.count_nonzero(out[name]))
    if len(left_alone) == len(request.sources):
        raise Unsupported(
            f"no weight has a multiple of {pattern.of} inputs",
            where="NofM",
            got="; ".join(f"{name} {source.shape}" for name, source in request.sources.items()),
        )
    return SelectionResult(out, why, left_alone, removes)


def _fresh(request: SelectionRequest) -> Masks:
    sources, earlier = request.sources, request.earlier
    return {
        name: earlier[name].copy() if name in earlier else np.ones(source.shape, bool)
        for name, source in sources.items()
    }


def _share(request: SelectionRequest, attempt: _Attempt) -> float:
    """Return the share of items that has to go for the target: given, or the least that meets it."""
    target = request.target
    if request.by_hand:
        return 0.0
    if target is None:
        raise Unsupported(
            "no target is given", where="prune", allowed="sparsity=, width=, macs= ..."
        )
    if target.unit == "width":
        return 1.0 - target.value
    if target.unit == "count":
        return _share_of_count(int(target.value), attempt.items)
    if target.unit == "sparsity" and isinstance(request.pattern, Unstructured):
        return target.value
    cost, budget = _cost_and_budget(request, target)
    nearest = request.rounding == "nearest"
    return _least(attempt, cost, budget, target, nearest=nearest) / attempt.items


def _share_of_count(count: int, items: int) -> float:
    if count >= max(items, 1):
        raise InvalidArgument(
            "a count leaves at least one item",
            where="count",
            got=count,
            allowed=f"0 to {items - 1}",
            hint="count={name: number} empties a tensor",
        )
    return count / max(items, 1)


def _least(
    attempt: _Attempt,
    cost: Callable[[Masks], float],
    budget: float,
    target: Target,
    *,
    nearest: bool = False,
) -> int:
    """Return the least number of items whose removal leaves a cost within the budget, or the nearest to it."""

    def left_by(count: int) -> float:
        return cost(attempt.at(count / attempt.items).masks)

    low, high = attempt.low, attempt.items - attempt.floor
    above, least = left_by(low), left_by(high)
    if least > budget:
        raise Unsupported(
            "the target cannot be met by pruning what is selected",
            where=target.unit,
            got=f"{target.value:g}: {budget:,.0f} may stay, and {least:,.0f} do at least",
            hint="select more, or ask for less",
        )
    if above <= budget:
        return low
    # What is left is nearly a straight line, on which few guesses hit; halving bounds their number.
    guesses = 0
    while high - low > 1:
        guesses += 1
        share = 0.5 if guesses % 3 == 0 else (above - budget) / (above - least)
        middle = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
        if (left := left_by(middle)) <= budget:
            high, least = middle, left
        else:
            low, above = middle, left
    return low if nearest and above - budget < budget - least else high


def _cost_and_budget(
    request: SelectionRequest, target: Target
) -> tuple[Callable[[Masks], float], float]:
    """Return what masks leave in the target's unit, and how much may be left."""
    sources = request.sources
    per_weight = {
        "macs": {name: source.macs for name, source in sources.items()},
        "bytes": {name: float(source.itemsize) for name, source in sources.items()},
    }.get(target.unit, dict.fromkeys(sources, 1.0))
    if not all(np.isfinite(list(per_weight.values()))):
        raise Unsupported(
            "how many multiply-accumulates a weight takes part in is not known",
            where=target.unit,
            hint="give data= (example inputs)",
        )
    masked = sum(source.size for source in sources.values())
    selected = sum(per_weight[name] * source.size for name, source in sources.items())
    total = request.totals.get(target.unit, selected)
    if target.unit == "sparsity":
        total = selected
    bits = masked / 8 if target.unit == "bytes" else 0.0

    def cost(masks: Masks) -> float:
        gone = sum(
            per_weight[name] * (mask.size - np.count_nonzero(mask)) for name, mask in masks.items()
        )
        return total - gone + bits

    if target.unit == "sparsity":
        return cost, total * (1.0 - target.value)
    return cost, float(target.value) if target.absolute else total * target.value
