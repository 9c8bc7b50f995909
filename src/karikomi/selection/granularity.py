"""The items of a pattern: scores of them from those of their weights, and masks of these from theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.prune.facts import PER_UNIT
from karikomi.prune.layout import Coupled, Layout, Member
from karikomi.prune.pattern import Blocks
from karikomi.prune.scores.score import Score
from karikomi.selection.block_scores import BlockScores, check_scores, score_blocks, split
from karikomi.selection.weight_source import Source, with_noise
from karikomi.shrink.labels import Block
from karikomi.shrink.unit_groups import Group


def of_weights(source: Source, score: Score, kept: np.ndarray | None) -> BlockScores:
    """Return the scores of single weights."""
    flat = None if kept is None else kept.reshape(-1)
    facts = {name: whole_fact(source, name) for name in sorted(score.needs)}
    gone = 0 if flat is None else flat.size - int(np.count_nonzero(flat))
    return BlockScores(
        source.label,
        math.prod(source.whole),
        gone if source.part is None else source.part.total(gone)[0],
        lambda stride: score_blocks(
            source.entries(), facts, flat, score, stride, where=source.label
        ),
        source.part,
    )


def of_tensor(source: Source, score: Score, kept: np.ndarray | None) -> BlockScores:
    """Return the scores of single weights, for a score that has to see all of a tensor at once."""
    weights = source.array().astype(np.float64)
    facts = {name: whole_fact(source, name) for name in sorted(score.needs)}
    kept = np.ones(source.shape, bool) if kept is None else kept
    scores = score.of_tensor(np.asarray(weights * kept), facts, xp=np)
    check_scores(score, scores, source.shape, where=source.label)
    return of_values(source.label, scores.reshape(-1), np.asarray(~kept.reshape(-1)))


def check_range(source: Source) -> None:
    """Raise for float64 weights that are out of the range of float32, in which scores are compared.

    `NonFinite` for one above its largest number, `Unsupported` for a tensor all of whose weights are below
    its smallest normal number.
    """
    if source.itemsize <= np.dtype(np.float32).itemsize:
        return
    single, beyond, normal, small = np.finfo(np.float32), 0, 0, 0
    for block in source.entries():
        sizes = np.abs(block)
        beyond += int(np.count_nonzero((sizes > single.max) & np.isfinite(sizes)))
        normal += int(np.count_nonzero(sizes >= single.tiny))
        small += int(np.count_nonzero((sizes > 0.0) & (sizes < single.tiny)))
    if source.part is not None:
        beyond, normal, small = source.part.total(beyond, normal, small)
    hint = "make the masks from all weights times one power of two"
    if beyond:
        raise NonFinite(
            "a weight is infinite in float32, in which scores are compared",
            where=source.label,
            got=f"{beyond} above {single.max:.2g}",
            hint=hint,
        )
    if small and not normal:
        raise Unsupported(
            "all weights are zero in float32, in which scores are compared, or next to it",
            where=source.label,
            got=f"none above {single.tiny:.2g}",
            hint=hint,
        )


def of_values(name: str, values: np.ndarray, gone: np.ndarray) -> BlockScores:
    """Return scores that are in memory; `gone`: bool, of the same length."""
    with np.errstate(over="ignore"):
        scores = np.where(gone, np.float32(np.nan), values.astype(np.float32))
    return BlockScores(
        name,
        len(scores),
        int(np.count_nonzero(gone)),
        lambda stride: [block[::stride] for block in split(scores)],
    )


def of_blocks(
    source: Source, score: Score, pattern: Blocks, kept: np.ndarray | None
) -> BlockScores:
    """Return the scores of the tiles of one weight, in the order of units, kernel positions, inputs."""
    layout = layout_of(source)
    if layout.inputs is None:
        raise InvalidArgument("blocks need an axis of inputs", where=source.label, got=str(layout))
    tiles = _tiles(layout.canonical(source.array()), pattern)
    gone = np.zeros(len(tiles), bool)
    if kept is not None:
        gone = np.asarray(~_tiles(layout.canonical(kept), pattern).any(axis=1))
    facts = {
        name: _tiles(layout.canonical(whole_fact(source, name)), pattern) for name in score.needs
    }
    if pattern.pool == "sum":
        return of_values(source.label, score_groups(score, tiles, facts, where=source.label), gone)
    there = _tiles(layout.canonical(np.broadcast_to(np.int8(1), source.shape)), pattern) > 0
    return of_values(source.label, _pooled(score, tiles, facts, there, pattern.pool), gone)


def _pooled(
    score: Score,
    tiles: np.ndarray,
    facts: Mapping[str, np.ndarray],
    there: np.ndarray,
    pool: str,
) -> np.ndarray:
    """Return the mean or the largest score of the weights of each tile; `there`: which are weights, not filling."""
    scores = _scores_of_weights(score, tiles, facts)
    if pool == "max":
        return np.where(there, scores, -np.inf).max(axis=1)
    return np.where(there, scores, 0.0).sum(axis=1) / there.sum(axis=1)


def _scores_of_weights(
    score: Score, rows: np.ndarray, facts: Mapping[str, np.ndarray]
) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(score.of_weights(rows.astype(np.float64), facts, xp=np), np.float64)


def _norms(scores: np.ndarray, p: float) -> np.ndarray:
    """Return ``(sum |s|^p)^(1/p)`` of each row; the largest is taken out first, so that no power overflows."""
    sizes = np.abs(scores)
    largest = sizes.max(axis=1, initial=0.0)
    if p == math.inf:
        return largest
    with np.errstate(invalid="ignore"):
        scaled = sizes / np.where(largest > 0.0, largest, 1.0)[:, None]
        return largest * np.power(np.power(scaled, p).sum(axis=1), 1.0 / p)


def spread_blocks(source: Source, pattern: Blocks, stays: np.ndarray, out: np.ndarray) -> None:
    """Clear in `out` (bool, the weight's shape) the tiles that do not stay."""
    layout = layout_of(source)
    view = layout.canonical(out)
    units, inputs = _counts(view.shape, pattern)
    tiles = stays.reshape(units, -1, inputs)
    wide = tiles.repeat(pattern.units, 0).repeat(pattern.inputs, 2)
    view &= wide[: view.shape[0], :, : view.shape[-1]].reshape(view.shape)


def of_coupled(
    coupled: Coupled,
    sources: Mapping[str, Source],
    score: Score,
    earlier: Mapping[str, np.ndarray],
    norm: float | None = None,
) -> BlockScores:
    """Return the scores of units, heads or layers: one per item, over all its scored members.

    `norm`: p of the norm over the scores of an item's weights, none for the score of the group.
    """
    scored = [member for member in coupled.members if member.scored]
    # In float64: groups are few, and a sum of many squares leaves float32.
    weights = np.concatenate(
        [_rows(sources[tensor.name].array(), tensor, coupled.items) for tensor in scored], axis=1
    )
    facts = {}
    for name in sorted(score.needs):
        if name in PER_UNIT:
            facts[name] = unit_fact(sources[scored[0].name], name, coupled)
        else:
            parts = [
                _rows(whole_fact(sources[tensor.name], name), tensor, coupled.items)
                for tensor in scored
            ]
            facts[name] = np.concatenate(parts, axis=1)
    gone = np.zeros(coupled.items, bool)
    if all(tensor.name in earlier for tensor in scored):
        alive = [_rows(earlier[tensor.name], tensor, coupled.items) for tensor in scored]
        gone = np.asarray(~np.concatenate(alive, axis=1).any(axis=1))
    if norm is None:
        scores = score_groups(score, weights, facts, where=coupled.of)
    else:
        scores = _norms(_scores_of_weights(score, weights, facts), norm)
    if any(tensor.size == 0 for tensor in scored):
        # Whole tensors of any size are to compare.
        scores = scores / weights.shape[1]
    return of_values(coupled.of, scores, gone)


def spread_coupled(coupled: Coupled, stays: np.ndarray, out: Mapping[str, np.ndarray]) -> None:
    """Clear in `out` every member's part of the items that do not stay."""
    for member in coupled.members:
        array = out[member.name]
        if array.ndim == 0 or member.size == 0:
            array &= bool(stays.all())
            continue
        stop = member.start + coupled.items * member.size
        view = np.moveaxis(array, member.axis, 0)[member.start : stop]
        view &= stays.repeat(member.size).reshape(-1, *[1] * (view.ndim - 1))


def score_groups(
    score: Score, weights: np.ndarray, facts: Mapping[str, np.ndarray], *, where: str
) -> np.ndarray:
    """Return one score per row of `weights`."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = weights.astype(np.float64)
        scores = score.of_groups(wide, facts, xp=np)
    array = isinstance(scores, np.ndarray)
    if not (array and scores.shape == (len(weights),) and scores.dtype.kind in "fiub"):
        raise InvalidArgument(
            f"{type(score).__name__}.of_groups gives one real number per group",
            where=where,
            got=f"{scores.dtype} {scores.shape}" if array else type(scores).__name__,
            allowed=f"an array of shape ({len(weights)},)",
        )
    return scores


def whole_fact(source: Source, name: str) -> np.ndarray:
    """Return a fact of weights, broadcast to the weight's shape."""
    values = _fact(source, name)
    try:
        return np.broadcast_to(values, source.shape)
    except ValueError:
        raise InvalidArgument(
            f"the fact {name!r} does not fit its weight",
            where=source.label,
            got=np.shape(values),
            allowed=source.shape,
        ) from None


def unit_fact(source: Source, name: str, coupled: Coupled) -> np.ndarray:
    """Return a fact of units, one number per item of a group."""
    values = np.asarray(_fact(source, name)).view()
    values.flags.writeable = False
    if values.shape != (coupled.items,):
        raise InvalidArgument(
            f"the fact {name!r} has one number per unit",
            where=source.label,
            got=values.shape,
            allowed=f"({coupled.items},)",
        )
    return values


def _fact(source: Source, name: str) -> np.ndarray:
    if name not in source.facts:
        raise InvalidArgument(
            f"the score needs the fact {name!r}, which is not there",
            where=source.label,
            hint="give data= (and loss= for gradients), or the fact itself in facts=",
        )
    return source.facts[name]


def layout_of(source: Source) -> Layout:
    """Return which axes of a weight are units and inputs; raises `InvalidArgument` if unknown."""
    if source.layout is None:
        raise InvalidArgument(
            "which axis of this weight are its units is not known",
            where=source.label,
            hint="give layouts={name: kk.prune.Layout(units=0, inputs=1)}",
        )
    return source.layout


def _rows(array: np.ndarray, member: Member, items: int) -> np.ndarray:
    """Return a member's part of each item as one row."""
    if array.ndim == 0 or member.size == 0:
        return array.reshape(items, -1)
    stop = member.start + items * member.size
    return np.moveaxis(array, member.axis, 0)[member.start : stop].reshape(items, -1)


def _tiles(canonical: np.ndarray, pattern: Blocks) -> np.ndarray:
    """Return an array of shape (tiles, weights of a tile), edges filled with zeros."""
    units, inputs = _counts(canonical.shape, pattern)
    whole = canonical.reshape(canonical.shape[0], -1, canonical.shape[-1])
    missing = units * pattern.units - whole.shape[0], inputs * pattern.inputs - whole.shape[2]
    whole = np.pad(whole, ((0, missing[0]), (0, 0), (0, missing[1])))
    tiles = whole.reshape(units, pattern.units, whole.shape[1], inputs, pattern.inputs)
    return tiles.transpose(0, 2, 3, 1, 4).reshape(units * whole.shape[1] * inputs, -1)


def _counts(shape: Sequence[int], pattern: Blocks) -> tuple[int, int]:
    return -(-shape[0] // pattern.units), -(-shape[-1] // pattern.inputs)


Part = tuple[Block, np.ndarray, Source]


def check_of_units(score: Score, *, where: str) -> None:
    """Raise `Unsupported` for a score that re-fits weights."""
    if score.updates:
        raise Unsupported(
            f"{type(score).__name__} re-fits single weights, not units",
            where=f"{where}: score",
            hint="compensate=True re-fits what reads the removed units",
        )


def group_scores(
    groups: Sequence[Group],
    score: Score,
    sources: Mapping[str, Source],
    units: Mapping[str, int],
    measured: frozenset[str],
) -> list[np.ndarray]:
    """Return one score per unit of each group, over all weights that the units are found in.

    `sources`: weights by name, in the shape that the labels have. `units`: name -> axis of the units that a
    weight makes. `measured`: facts that a weight must have to count. A score of units is the mean over the layers
    whose outputs they are. Raises `Unsupported` for one that is defined for no weight of a group, `NonFinite`.
    """
    if "noise" in score.needs:
        sources = with_noise(sources, score)
    return [_scored_group(group, score, sources, units, measured) for group in groups]


def _scored_group(
    group: Group,
    score: Score,
    sources: Mapping[str, Source],
    units: Mapping[str, int],
    measured: frozenset[str],
) -> np.ndarray:
    parts = [
        (block, places, sources[block.owner])
        for block, places in group.members
        if block.owner in sources and measured <= {*sources[block.owner].facts, *PER_UNIT}
    ]
    if score.of_units_only or score.needs & PER_UNIT:
        found = [
            _of_parts(score, [part]) for part in parts if units.get(part[0].owner) == part[0].axis
        ]
        result = np.mean(found, axis=0) if found else None
    else:
        result = _of_parts(score, parts) if parts else None
    if result is None:
        raise Unsupported(
            f"{type(score).__name__} is not defined for these units",
            where=group.name,
            hint='score="magnitude" is defined for all; exclude= leaves them alone',
        )
    if not np.isfinite(result).all():
        raise NonFinite("the score of a unit is NaN or infinite", where=group.name)
    return result


def _of_parts(score: Score, parts: Sequence[Part]) -> np.ndarray:
    weights = np.concatenate(
        [_unit_rows(s.array(), block.axis, p) for block, p, s in parts], axis=1
    )
    facts: dict[str, np.ndarray] = {}
    for name in score.needs:
        if name in PER_UNIT:
            (_, places, source), *_ = parts
            facts[name] = np.asarray(source.facts[name], np.float64)[places].mean(axis=1)
        else:
            facts[name] = np.concatenate(
                [_unit_rows(whole_fact(s, name), block.axis, p) for block, p, s in parts], axis=1
            )
    with np.errstate(over="ignore"):
        return np.asarray(score.of_groups(weights, facts, xp=np), np.float64)


def _unit_rows(array: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Return the entries of each unit as a row."""
    moved = np.moveaxis(np.asarray(array, np.float64), axis, 0)
    return moved[places].reshape(len(places), -1)
