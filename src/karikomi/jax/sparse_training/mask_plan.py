"""What a schedule does to the leaves of one tree, settled before compilation: names, tables of numbers, axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.jax.sparse_training import device_masks
from karikomi.prune import Layout, Pattern, Score, Tensor, Unstructured
from karikomi.prune.pattern import NofM
from karikomi.prune.schedules.pool_counts import PoolCounts, due_steps, pool_counts
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, check_fields
from karikomi.select import spread
from karikomi.selection.request import check_masks_alone, scheduled, selected

Named = Mapping[str, jax.Array]
Facts = Mapping[str, Named]

SHOWN = {"gradient": lambda g: g, "squared_gradient": lambda g: g * g}
"""Facts that training steps show, with their term of one step; scores get the mean since the last masks."""


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """One schedule on the leaves of one tree; compared by identity, so that what is compiled for it is found again.

    `places`: the positions of the names of each pool. `drops`: int64, shape (steps, names): how many weights move.
    """

    schedule: PruningSchedule
    names: tuple[str, ...]
    score: Score
    pattern: Pattern
    layouts: Mapping[str, Layout]
    counts: PoolCounts
    places: tuple[tuple[int, ...], ...]
    drops: np.ndarray

    @property
    def due(self) -> np.ndarray:
        """The steps at which masks change."""
        return np.array(self.counts.due, np.int32)

    @property
    def facts(self) -> tuple[str, ...]:
        """The facts that training steps have to show."""
        return tuple(sorted(self.score.needs & SHOWN.keys()))

    def row(self, step: jax.Array) -> jax.Array:
        """Return the number of the last change of masks at or before a step, -1 before the first."""
        return jnp.searchsorted(self.due, step, side="right").astype(jnp.int32) - 1

    @functools.partial(jax.jit, static_argnums=0)
    def made(
        self, weights: Named, kept: Named, facts: Facts, row: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return ``(masks, whether all scores were finite)``; what is not `kept` stays gone, and counts."""
        among = [kept[name] for name in self.names]
        scores = [self._scores(name, weights[name], facts) for name in self.names]
        good = device_masks.finite(scores, among)
        if isinstance(self.pattern, NofM):
            stays = [
                device_masks.best_of_groups(own, mask, self.layouts[name], self.pattern)
                for name, own, mask in zip(self.names, scores, among, strict=True)
            ]
        else:
            left = device_masks.counted(among)
            pools = [list(pool) for pool in self.places]
            there = jnp.stack([jnp.sum(left[np.array(pool)]) for pool in pools])
            sizes = np.array([sum(scores[place].size for place in pool) for pool in pools])
            remove = jnp.asarray(self.counts.remove, jnp.int32)[row]
            more = jnp.maximum(remove - (sizes.astype(np.int32) - there), 0)
            gone = device_masks.lowest(scores, among, more, pools)
            stays = [mask & ~lost for mask, lost in zip(among, gone, strict=True)]
        return dict(zip(self.names, stays, strict=True)), good

    @functools.partial(jax.jit, static_argnums=0)
    def moved(
        self, weights: Named, masks: Named, gradients: Named, row: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return ``(masks, whether all that was compared was finite)`` after weights have moved.

        A leaf without a gradient keeps its mask where the gradient decides.
        """
        names = self.names
        if self.schedule.regrows_by == "noise":
            step = jnp.asarray(self.due)[row]
            worth = {n: noise(n, weights[n].shape, self.schedule.seed, step) for n in names}
        else:
            worth = {name: jnp.abs(gradients[name]) for name in names if name in gradients}
        chosen = [name for name in names if name in worth]
        if not chosen:
            return dict(masks), jnp.array(True)
        own = [masks[name] for name in chosen]
        columns = np.array([names.index(name) for name in chosen])
        counts = jnp.asarray(self.drops, jnp.int32)[row][columns]
        counts = jnp.minimum(counts, device_masks.counted(own))
        after, good = device_masks.moved(
            [weights[name] for name in chosen], own, [worth[name] for name in chosen], counts
        )
        return {**masks, **dict(zip(chosen, after, strict=True))}, good

    def _scores(self, name: str, weight: jax.Array, facts: Facts) -> jax.Array:
        own = {fact: facts[fact][name] for fact in self.score.needs if fact != "noise"}
        own = {fact: values.astype(jnp.float32) for fact, values in own.items()}
        if "noise" in self.score.needs:
            own["noise"] = 1.0 - noise(name, weight.shape, getattr(self.score, "seed", 0))
        scores = self.score.of_weights(weight.astype(jnp.float32), own, xp=jnp)
        shape = getattr(scores, "shape", None)
        if shape != weight.shape or not jnp.issubdtype(scores.dtype, jnp.floating):
            raise InvalidArgument(
                f"{type(self.score).__name__} gives one real number per weight, in their shape",
                where=name,
                got=type(scores).__name__ if shape is None else f"{scores.dtype} {shape}",
                allowed=f"an array of shape {weight.shape}",
            )
        return scores


def noise(name: str, shape: Sequence[int], seed: int, step: Any = None) -> jax.Array:
    """Return uniform random numbers in [0, 1), the same for a seed, step and name, on every device and sharding."""
    key = jax.random.key(seed & 0xFFFFFFFF, impl="threefry2x32")
    for part in (seed >> 32, crc32(name.encode()), *([] if step is None else [step])):
        key = jax.random.fold_in(key, part)
    return jax.random.uniform(key, tuple(shape), jnp.float32)


def plan_of(
    schedule: PruningSchedule,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    layouts: Mapping[str, Layout] | None,
    given: Mapping[str, Any] | None,
    anew: bool = False,
    first: int = 0,
    where: str,
) -> MaskPlan:
    """Return what a schedule does to leaves of these shapes.

    `layouts`: name or glob -> axes. `given`: masks that exist before the first step. `anew`, `first`: see
    `pool_counts`.
    Raises `Unsupported` for what needs more than weights and gradients, `UnknownName` for a glob.
    """
    check_fields(schedule, where=where)
    check_supported(schedule, where=where)
    request = scheduled(where, schedule, schedule.last)
    names, _ = selected(
        shapes, {}, only=schedule.only, exclude=schedule.exclude, where=where, allowed="arrays"
    )
    if given and schedule.regrows_by is not None:
        names = [name for name in names if name in given]
    axes = spread("layouts", layouts, shapes, where=where)
    for name, layout in axes.items():
        if not isinstance(layout, Layout):
            raise InvalidArgument(
                "not a layout",
                where=f"{where}: layouts, {name}",
                got=repr(layout)[:80],
                allowed="such as kk.prune.Layout(units=-1, inputs=-2)",
            )
        layout.check(shapes[name], where=f"{where}: {name}")
    if isinstance(request.pattern, NofM):
        names = divisible(names, shapes, axes, request.pattern, where=where)
        counts = PoolCounts(due_steps(schedule, where=where), (), np.zeros((0, 0), np.int64))
        return MaskPlan(
            schedule, tuple(names), request.score, request.pattern, axes, counts, (), counts.remove
        )
    kept = {name: int(np.count_nonzero(np.asarray(mask))) for name, mask in (given or {}).items()}
    tensors = {
        name: Tensor(
            items=math.prod(shapes[name]),
            shape=_of_units(shapes[name], axes.get(name)),
            gone=0 if name not in kept else math.prod(shapes[name]) - kept[name],
        )
        for name in names
    }
    counts = pool_counts(schedule, request.allocation, tensors, first=first, anew=anew, where=where)
    order = {name: place for place, name in enumerate(names)}
    places = tuple(tuple(order[name] for name in pool) for pool in counts.pools)
    drops = _drops(schedule, names, tensors, counts, kept) if schedule.regrows_by else _NO_DROPS
    return MaskPlan(
        schedule, tuple(names), request.score, request.pattern, axes, counts, places, drops
    )


_NO_DROPS = np.zeros((0, 0), np.int64)


def check_supported(schedule: PruningSchedule, *, where: str) -> None:
    """Raise `Unsupported` for what compiled masks cannot do, with what can."""
    kind = type(schedule).__name__
    between = "karikomi.jax.update_masks makes masks between steps"
    if schedule.rewinds_to is not None:
        raise Unsupported(
            f"{kind} with rewind keeps a copy of weights and moments",
            where=where,
            allowed="OneShot, Gradual, Iterative without rewind, SET, RigL",
            hint="kk.torch.attach rewinds",
        )
    request = scheduled(where, schedule, schedule.last)
    check_masks_alone(request.score, where=where)
    if not isinstance(request.pattern, Unstructured | NofM):
        raise Unsupported(
            f"{type(request.pattern).__name__} are not masked in compiled code",
            where=f"{where}: pattern",
            allowed="unstructured, NofM(keep=, of=)",
            hint=between,
        )
    score = request.score
    missing = sorted(score.needs - SHOWN.keys() - {"noise"})
    whole = score.of_tensors or score.of_units_only or score.within_rows
    if missing or whole:
        raise Unsupported(
            f"{type(score).__name__} needs {', '.join(missing) or 'all weights of a tensor at once'}",
            where=f"{where}: score",
            allowed=f"what needs no more than a weight, noise, {', '.join(SHOWN)}",
            hint=between,
        )


def divisible(
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, Layout],
    pattern: NofM,
    *,
    where: str,
) -> list[str]:
    """Return the names of weights whose inputs `of` divides; the others have no mask, as in `karikomi.jax.prune`."""
    for name in names:
        if name not in layouts:
            raise InvalidArgument(
                "which axis of this weight are its units is not known",
                where=f"{where}: {name}",
                hint='give layouts={"*kernel": kk.prune.Layout(units=-1, inputs=-2)}',
            )
    found = []
    for name in names:
        inputs = layouts[name].inputs
        if inputs is not None and shapes[name][inputs] % pattern.of == 0:
            found.append(name)
    if not found:
        raise Unsupported(
            f"no weight has a multiple of {pattern.of} inputs",
            where=f"{where}: NofM",
            got="; ".join(f"{name} {shapes[name]}" for name in names[:5]),
        )
    return found


def _of_units(shape: tuple[int, ...], layout: Layout | None) -> tuple[int, ...]:
    """Return a shape in the order (units, inputs, kernel ...), as allocations get it."""
    if layout is None:
        return shape
    canonical = layout.canonical(np.broadcast_to(np.int8(0), shape)).shape
    return (canonical[0], canonical[-1], *canonical[1:-1])


def _drops(
    schedule: PruningSchedule,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    counts: PoolCounts,
    given: Mapping[str, int],
) -> np.ndarray:
    """Return how many weights of each tensor move at each step; the first masks do not move at step 0."""
    kept = dict(given)
    if not given and any(len(pool) > 1 for pool in counts.pools):
        raise Unsupported(
            "how many weights of a tensor a shared threshold keeps is not known before it is found",
            where=f"{type(schedule).__name__}: allocation {schedule.allocation!r}",
            allowed='"uniform", "erk", or masks= that exist',
        )
    if not given:
        for pool, removed in zip(counts.pools, counts.remove[0], strict=True):
            kept[pool[0]] = tensors[pool[0]].items - int(removed)
    return np.array(
        [
            [int(schedule.drop_at(step) * kept[name]) if step else 0 for name in names]
            for step in counts.due
        ],
        np.int64,
    )
