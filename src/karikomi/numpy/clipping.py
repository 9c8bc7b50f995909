"""Clip trees of gradients held as NumPy arrays: a pure function that returns new arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from karikomi import tree
from karikomi.numpy.arrays import Arrays, beside, check_entries, like, named
from karikomi.numpy.norms import check_finite, norm, peak, unit_norms
from karikomi.numpy.projections import as_rows, from_rows
from karikomi.numpy.scaling import clamped, representable, scaled, scaled_units
from karikomi.numpy.unit_axes import Axes, resolved_axes
from karikomi.rule import Composite, Quantity, Rule, State
from karikomi.rules import decide
from karikomi.rules.checkpoint import from_plain, to_plain
from karikomi.rules.outcome import Outcome
from karikomi.rules.ranked_units import ranked_axes
from karikomi.rules.stages import PEAKS, RELATIVE, Kind, Stage, stages

Named = Mapping[str, np.ndarray | None]
WHERE = "numpy.clip"


def clip(
    grads: Arrays,
    rule: Rule | Composite,
    state: State | None = None,
    *,
    nonfinite: str = "skip",
    weights: Iterable[Any] | None = None,
    unit_axes: Mapping[str, int | Sequence[int]] | None = None,
    second_moments: Iterable[Any] | None = None,
) -> tuple[Arrays, Outcome, State]:
    """Return ``(clipped gradients, outcome, state)``; the input is left alone.

    `grads`: any tree of dicts, lists, tuples and named tuples of floating arrays, which comes back as
    the same containers; a generator as a list. The name of an array is the path to it, such as
    ``layers.0.weight``. ``None`` is a missing gradient and stays ``None``. For rules on updates
    (`BlockRMS`): the updates, in units of the learning rate.
    `state`: what the last call returned, plain data that JSON takes, or ``None`` for a fresh one; what
    was learned of a tensor is stored by its name. `nonfinite`: ``skip`` returns
    zeros for the whole step, ``zero`` zeroes only the bad tensors, ``zero_entries`` only their bad entries, ``pass``
    leaves them, ``raise``
    raises `NonFinite` naming them. A plain update with zeros is no update; moments still move.
    `weights`: for rules that compare with them (`AGC`), a tree with the same names. `unit_axes`: for
    rules per unit, name or glob -> the axis whose index is one output unit, or the axes that together name one; a
    name takes precedence over a glob, an earlier glob over a later one, and a tensor without an entry is one unit.
    `second_moments`: for `SPAM`, the running means of squares as of before this step, a tree as `weights`.

    Raises `InvalidArgument` for an object that is not such a tree, for arrays that are not floating or do not fit
    together, `UnknownName` for a name or glob that matches nothing, and `Unsupported` for a rule that
    does not act on gradients or needs a fact that was not given.

    >>> import numpy as np, karikomi as kk
    >>> grads, outcome, state = clip({"w": np.full(4, 10.0)}, kk.clip.ByGlobalNorm(1.0))
    >>> grads["w"].tolist(), outcome.pre, outcome.action
    ([0.5, 0.5, 0.5, 0.5], 20.0, 'clipped')
    >>> layers = [{"weight": np.ones((2, 2)), "bias": None}, {"weight": np.ones((1, 2))}]
    >>> clipped, outcome, state = clip(layers, kk.clip.ByNorm(1.0))
    >>> outcome.names, clipped[0]["weight"].tolist()
    (('0.weight', '0.bias', '1.weight'), [[0.5, 0.5], [0.5, 0.5]])
    """
    given = {"weights": weights, "second_moment": second_moments}
    available = _available(rule, given)
    decide.check_rule(rule, Quantity.GRADIENT, Quantity.UPDATE, where=WHERE, available=available)
    decide.check_policy(nonfinite, where=WHERE)
    grads = tree.collected(grads)
    found: dict[str, np.ndarray | None] = named(grads, where=WHERE)
    companions = _companions(given, found)
    # Where weights are given, units are counted on them: the weights of an absent gradient have units too.
    shaped = {name: companions.get("weights", found)[name] for name in found}
    shapes = {name: np.shape(array) for name, array in _present(shaped)}
    ranked = ranked_axes(rule, shapes, where=WHERE)
    axes = resolved_axes(unit_axes, shaped, where=WHERE) if ranked is None else dict(ranked)
    units = {n: len(as_rows(array, axes[n])) for n, array in _present(shaped) if n in axes}
    plan = stages(rule, list(found), units=units)
    before = from_plain(plan, state)
    learned: State = {}
    outcomes: list[Outcome] = []
    bad, skip = np.False_, False
    for stage in plan:
        _check(stage, found)
        norms = _numbers(stage, found, axes, companions.get("second_moment"))
        raw = norms
        if nonfinite == "zero_entries":
            bad = bad | np.any(~np.isfinite(norms))
            found = {name: _mended(array) for name, array in found.items()}
            norms = _numbers(stage, found, axes, companions.get("second_moment"))
        verdict, after = decide.decide_stage(
            stage,
            norms,
            before,
            present=_spread(stage, [g is not None for g in found.values()]),
            xp=np,
            nonfinite=nonfinite,
            facts=_facts(stage, found, axes, companions),
        )
        verdict = representable(verdict, [found[name] for name in stage.owners])
        if nonfinite == "raise":
            check_finite(stage.owners, ~verdict.bad, where=WHERE)
        learned |= after
        bad, skip = bad | np.any(verdict.bad), bool(verdict.skip)
        found = _applied(stage, found, axes, norms, verdict, skip, companions)
        outcome = decide.outcome_of(
            stage,
            norms,
            verdict,
            skip=skip,
            nonfinite=nonfinite,
            earlier=tuple(outcomes),
            raw=raw,
            xp=np,
        )
        outcomes.append(outcome)
        if skip:
            break
    state = decide.committed(before, learned, skip=np.asarray(skip), any_bad=bad, xp=np)
    return like(grads, found, where=WHERE), outcomes[-1], to_plain(plan, state)


def _available(rule: Rule | Composite, given: Mapping[str, object]) -> list[str]:
    """Return the facts that are available for a rule."""
    names = ["sizes", *(name for name, arrays in given.items() if arrays is not None)]
    if getattr(rule, "of", None) is Quantity.UPDATE and "second_moment" in names:
        # Such a rule measures the gradients by them, and these are not given here.
        names.remove("second_moment")
    return names


def _companions(
    given: Mapping[str, Iterable[Any] | None], found: Named
) -> dict[str, dict[str, np.ndarray]]:
    return {
        name: beside(arrays, found, where=f"{WHERE}({name})")
        for name, arrays in given.items()
        if arrays is not None
    }


def _present(found: Named) -> list[tuple[str, np.ndarray]]:
    return [(name, array) for name, array in found.items() if array is not None]


def _mended(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else np.where(np.isfinite(array), array, np.zeros_like(array))


def _check(stage: Stage, found: Named) -> None:
    for part in stage.parts:
        members = set(stage.owners)
        if part.members is not None:
            members = {name for name, own in zip(stage.owners, part.members, strict=True) if own}
        chosen = {name: array for name, array in _present(found) if name in members}
        check_entries(part.rule, chosen, where=WHERE)


def _spread(stage: Stage, values: Sequence[float | bool]) -> np.ndarray:
    return np.repeat(np.asarray(values), stage.counts)


def _numbers(
    stage: Stage, found: Named, axes: Mapping[str, Axes], moments: Named | None
) -> np.ndarray:
    parts = []
    for name, kind, count in zip(stage.names, stage.kinds, stage.counts, strict=True):
        array = found[name]
        if array is None:
            parts.append(np.zeros(count))
            continue
        if kind in RELATIVE:
            array = _relative(array, moments, name)
        if kind is Kind.UNITS and name in axes:
            parts.append(unit_norms(as_rows(array, axes[name]), 0, stage.order))
        else:
            by_peak = kind in PEAKS
            parts.append(np.array([peak(array) if by_peak else norm(array, stage.order)]))
    return np.concatenate(parts)


def _relative(array: np.ndarray, moments: Named | None, name: str) -> np.ndarray:
    root = np.sqrt(np.asarray((moments or {})[name], dtype=np.float64))
    finite = np.where(np.isfinite(array), np.abs(array) / np.where(root > 0, root, 1.0), array)
    return np.where((root > 0) | ~np.isfinite(array), finite, 0.0)


def _facts(
    stage: Stage, found: Named, axes: Mapping[str, Axes], companions: Mapping[str, Named]
) -> dict[str, np.ndarray]:
    facts = {}
    if "weights" in stage.needs:
        facts["weights"] = _numbers(stage, companions["weights"], axes, None)
    if "sizes" in stage.needs:
        sizes = [
            0.0 if (array := found[name]) is None else array.size / count
            for name, count in zip(stage.names, stage.counts, strict=True)
        ]
        facts["sizes"] = _spread(stage, sizes)
    return facts


def _applied(
    stage: Stage,
    found: Named,
    axes: Mapping[str, Axes],
    norms: np.ndarray,
    verdict: decide.StageDecision,
    skip: bool,
    companions: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray | None]:
    applied, start = dict(found), 0
    for name, kind, count in zip(stage.names, stage.kinds, stage.counts, strict=True):
        part = slice(start, start + count)
        start, array = part.stop, found[name]
        if array is None:
            continue
        factors, bad = verdict.factor[part], verdict.bad[part].any()
        if skip or (bad and np.any(factors == 0.0)):
            applied[name] = np.zeros_like(array)
        elif bad:
            continue
        elif verdict.limit is not None and verdict.limit[part][0] < np.inf:
            largest, limit = float(norms[part][0]), float(verdict.limit[part][0])
            if kind is Kind.PEAK:
                applied[name] = clamped(array, largest, limit)
            elif largest > limit:
                most = limit * np.sqrt(companions["second_moment"][name].astype(np.float64))
                limited = np.where(most > 0, np.clip(array, -most, most), array)
                applied[name] = limited.astype(array.dtype)
        elif count == 1:
            applied[name] = scaled(array, float(factors[0]))
        elif np.any(factors != 1.0):
            rows = scaled_units(as_rows(array, axes[name]), factors, 0)
            applied[name] = from_rows(rows, axes[name], array.shape)
    return applied
