"""Clip named gradients: measure, decide, apply, stage by stage, without a branch on any value.

The same steps as `karikomi.numpy.clipping`, in a form that can be traced; it returns new arrays and a new
state, and what it measured, from which an `Outcome` is made where that is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from karikomi.functional.library import Library
from karikomi.functional.norms import Axes, size
from karikomi.rule import Array, Namespace, State
from karikomi.rules import decide
from karikomi.rules.stages import PEAKS, RELATIVE, Kind, Stage

Named = Mapping[str, Array | None]
"""Name -> array, ``None`` for what took no part."""

MOMENT_DECAY = 0.999  # Adam's default


class Companions(NamedTuple):
    """What rules are told besides gradients, each with the names of the gradients.

    `axes`: of tensors that have several output units. `weights`: for rules that need them. `moments`: running
    means of squares, for rules that judge entries by them.
    """

    axes: Mapping[str, Axes]
    weights: Named
    moments: Mapping[str, Array]


class Measured(NamedTuple):
    """What one stage saw, and what it left: numbers in the order of ``stage.owners``."""

    norms: Array
    after: Array


class StepResult(NamedTuple):
    """What came of one step.

    `skip`: whether no step is to be taken; gradients are then zeros if that was asked for. `learned`:
    the state as it is after this step, skipped or not.
    """

    arrays: dict[str, Array | None]
    state: State
    moments: dict[str, Array]
    stages: tuple[Measured, ...]
    bad: Array
    skip: Array


def fresh_state(plan: Sequence[Stage], *, library: Library) -> State:
    """Return the state of a plan before its first step."""
    vectors = [library.constants([0.0] * sum(stage.counts)) for stage in plan]
    return decide.begin_stages(plan, vectors, xp=library.xp)


def clip_named(
    plan: Sequence[Stage],
    found: Named,
    state: State,
    companions: Companions,
    *,
    nonfinite: str,
    zero_skipped: bool,
    library: Library,
) -> StepResult:
    """Return what a plan makes of these gradients, which are those that it was made for.

    `zero_skipped`: whether a skipped step leaves zeros, for callers who cannot leave a step out.
    """
    xp, arrays = library.xp, dict(found)
    learned: State = {}
    stages: list[Measured] = []
    bad = skip = xp.asarray(False)
    for place, stage in enumerate(plan):
        norms = _numbers(stage, arrays, companions, library)
        present = [arrays[name] is not None for name in stage.owners]
        verdict, after = decide.decide_stage(
            stage,
            norms,
            state,
            present=library.flags(present),
            xp=xp,
            nonfinite=nonfinite,
            facts=_facts(stage, arrays, companions, library),
        )
        if verdict.limit is not None:
            dtypes = [None if (a := arrays[n]) is None else a.dtype for n in stage.owners]
            verdict = verdict._replace(limit=library.representable(verdict.limit, dtypes))
        learned |= after
        bad, skip = bad | xp.any(verdict.bad), skip | verdict.skip
        last = place == len(plan) - 1
        kill = skip if zero_skipped and last else None
        arrays = _applied(stage, arrays, verdict, companions, kill, nonfinite, library)
        stages.append(Measured(norms, decide.norms_after(norms, verdict, xp=xp)))
    moments = _followed(companions.moments, arrays, bad | skip, library)
    after = decide.committed(state, learned, skip=skip, any_bad=bad, xp=xp)
    settled = {key: xp.astype(value, state[key].dtype) for key, value in after.items()}
    return StepResult(arrays, settled, moments, tuple(stages), bad, skip)


def _numbers(stage: Stage, found: Named, companions: Companions, library: Library) -> Array:
    """Return the numbers that a stage wants, one vector."""
    parts: dict[str, Array] = {}
    wholes: list[str] = []
    for name, kind, count in zip(stage.names, stage.kinds, stage.counts, strict=True):
        array = found[name]
        if array is None:
            parts[name] = library.constants([0.0] * count)
        elif kind in PEAKS:
            entries = _relative(array, kind, name, companions, library)
            parts[name] = library.widened(library.peak(entries))
        elif kind is Kind.UNITS and name in companions.axes:
            parts[name] = library.unit_norms(array, companions.axes[name])
        else:
            wholes.append(name)
    kinds = dict(zip(stage.names, stage.kinds, strict=True))
    measured = [_relative(found[n], kinds[n], n, companions, library) for n in wholes]
    if not parts:
        return library.norm_vector(measured)
    if measured:
        norms = library.norm_vector(measured)
        parts |= {name: norms[place] for place, name in enumerate(wholes)}
    return library.vector([parts[name] for name in stage.names])


def _relative(
    array: Array, kind: Kind, name: str, companions: Companions, library: Library
) -> Array:
    if kind not in RELATIVE:
        return array
    xp = library.xp
    root = xp.sqrt(companions.moments[name])
    entries = xp.astype(array, root.dtype)
    divided = entries / xp.where(root > 0, root, xp.ones_like(root))
    keep = (root > 0) | ~xp.isfinite(entries)
    return xp.where(keep, divided, xp.zeros_like(divided))


def _facts(
    stage: Stage, found: Named, companions: Companions, library: Library
) -> dict[str, Array]:
    facts = {}
    if "weights" in stage.needs:
        facts["weights"] = _numbers(stage, companions.weights, companions, library)
    if "sizes" in stage.needs:
        sizes = {n: 0.0 if (a := found[n]) is None else float(size(a)) for n in stage.names}
        counts = dict(zip(stage.names, stage.counts, strict=True))
        facts["sizes"] = library.constants([sizes[name] / counts[name] for name in stage.owners])
    return facts


def _applied(
    stage: Stage,
    found: Named,
    verdict: decide.StageDecision,
    companions: Companions,
    kill: Array | None,
    nonfinite: str,
    library: Library,
) -> dict[str, Array | None]:
    xp, zero_bad = library.xp, nonfinite == "zero"
    applied, start = dict(found), 0
    factors = verdict.factor if kill is None else _unless(kill, verdict.factor, xp)
    places: dict[str, int] = {}
    for name, kind, count in zip(stage.names, stage.kinds, stage.counts, strict=True):
        part = slice(start, start + count)
        start, array = part.stop, found[name]
        if array is None:
            continue
        if kind in PEAKS and verdict.limit is not None:
            applied[name] = _clamped(array, kind, name, verdict.limit[part], companions, library)
            if kill is not None or zero_bad:
                places[name] = part.start
        elif count == 1:
            places[name] = part.start
        else:
            own = _of_units(verdict.factor[part], verdict.bad[part], zero_bad, xp)
            own = own if kill is None else _unless(kill, own, xp)
            applied[name] = library.scaled_units(array, own, companions.axes[name])
    wanted = library.picked(factors, list(places.values()))
    done = library.scaled([applied[name] for name in places], wanted)
    return applied | dict(zip(places, done, strict=True))


def _of_units(factors: Array, bad: Array, zero_bad: bool, xp: Namespace) -> Array:
    """Return the factors of one tensor's units; one bad unit makes the tensor bad as a whole."""
    whole = xp.zeros_like(factors) if zero_bad else xp.ones_like(factors)
    return xp.where(xp.any(bad), whole, factors)


def _unless(kill: Array, factors: Array, xp: Namespace) -> Array:
    return xp.where(kill, xp.zeros_like(factors), factors)


def _clamped(
    array: Array, kind: Kind, name: str, limit: Array, companions: Companions, library: Library
) -> Array:
    if kind is Kind.PEAK:
        return library.clamped(array, limit[0])
    moments = companions.moments[name]
    most = library.xp.astype(limit[0], moments.dtype) * library.xp.sqrt(moments)
    return library.xp.where(most > 0, library.clamped(array, most), array)


def _followed(
    moments: Mapping[str, Array], found: Named, still: Array, library: Library
) -> dict[str, Array]:
    """Return the running means of squares after a step, which a skipped or non-finite one leaves alone."""
    xp, after = library.xp, dict(moments)
    for name, kept in moments.items():
        array = found[name]
        if array is not None:
            squares = xp.square(xp.abs(xp.astype(array, kept.dtype)))
            learned = MOMENT_DECAY * kept + (1.0 - MOMENT_DECAY) * squares
            after[name] = xp.where(still, kept, learned)
    return after
