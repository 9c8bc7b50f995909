"""Clip named gradients in a form that can be traced: no branch on a value, no item assignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from karikomi.functional.library import Library
from karikomi.functional.norms import Axes, size
from karikomi.rule import Array, Namespace, State
from karikomi.rules import decide
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import PEAKS, RELATIVE, Kind, Stage
from karikomi.rules.step import run_step

Named = Mapping[str, Array | None]
"""Name -> array, ``None`` for an array without a gradient."""

MOMENT_DECAY = 0.999  # Adam's default


class Companions(NamedTuple):
    """What rules need besides gradients, under the names of the gradients.

    `axes`: of tensors that have several output units. `weights`: for rules that need them. `moments`: running
    means of squares, for rules that are relative to them.
    """

    axes: Mapping[str, Axes]
    weights: Named
    moments: Mapping[str, Array]


class StepResult(NamedTuple):
    """The result of one step.

    `arrays`: the clipped gradients. `state`: after this step, skipped or not. `stages`: the outcome of each
    stage. `bad`: whether an array has non-finite entries. `skip`: whether the step is to be skipped.
    """

    arrays: dict[str, Array | None]
    state: State
    moments: dict[str, Array]
    stages: tuple[Outcome, ...]
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
    """Return the result of a plan for its gradients; `zero_skipped`: whether those of a skipped step are zeros."""
    tensors = _NamedArrays(dict(found), companions, nonfinite, zero_skipped, library)
    xp = library.xp
    done = run_step(plan, state, tensors, xp=xp, nonfinite=nonfinite)
    arrays, skip, bad = tensors.arrays, done.skip, done.any_bad
    moments = _followed(companions.moments, arrays, bad | skip, library)
    settled = {key: xp.astype(value, state[key].dtype) for key, value in done.state.items()}
    return StepResult(arrays, settled, moments, done.outcomes, bad, skip)


@dataclass
class _NamedArrays:
    """The arrays of one step; `arrays` are replaced as stages are applied."""

    arrays: dict[str, Array | None]
    companions: Companions
    nonfinite: str
    zero_skipped: bool
    library: Library

    def measure(self, stage: Stage) -> tuple[Array, Array]:
        present = [self.arrays[name] is not None for name in stage.owners]
        return self._numbers(stage, self.arrays), self.library.flags(present)

    def mend(self, stage: Stage, numbers: Array) -> Array:
        found = self.arrays.items()
        self.arrays = {n: None if a is None else self.library.finite(a) for n, a in found}
        return self._numbers(stage, self.arrays)

    def facts(self, stage: Stage) -> dict[str, Array]:
        facts = {}
        if "weights" in stage.needs:
            facts["weights"] = self._numbers(stage, self.companions.weights)
        if "sizes" in stage.needs:
            present = {name: self.arrays[name] for name in stage.names}
            sizes = {n: 0.0 if a is None else float(size(a)) for n, a in present.items()}
            counts = dict(zip(stage.names, stage.counts, strict=True))
            entries = [sizes[name] / counts[name] for name in stage.owners]
            facts["sizes"] = self.library.constants(entries)
        return facts

    def representable(self, stage: Stage, decision: decide.StageDecision) -> decide.StageDecision:
        if decision.limit is None:
            return decision
        arrays = [self.arrays[name] for name in stage.owners]
        dtypes = [None if array is None else array.dtype for array in arrays]
        return decision._replace(limit=self.library.representable(decision.limit, dtypes))

    def apply(
        self,
        stage: Stage,
        decision: decide.StageDecision,
        outcome: Outcome,
        *,
        skip: Array,
        last: bool,
    ) -> None:
        library, xp, zero_bad = self.library, self.library.xp, self.nonfinite == "zero"
        zeroed = skip if self.zero_skipped and last else None
        start = 0
        factors = _zeroed(decision.factor, zeroed, xp)
        places: dict[str, int] = {}
        for name, kind, count in zip(stage.names, stage.kinds, stage.counts, strict=True):
            part = slice(start, start + count)
            start, array = part.stop, self.arrays[name]
            if array is None:
                continue
            if kind in PEAKS and decision.limit is not None:
                self.arrays[name] = self._clamped(array, kind, name, decision.limit[part])
                if zeroed is not None or zero_bad:
                    places[name] = part.start
            elif count == 1:
                places[name] = part.start
            else:
                own = _of_units(decision.factor[part], decision.bad[part], zero_bad, xp)
                own = _zeroed(own, zeroed, xp)
                self.arrays[name] = library.scaled_units(array, own, self.companions.axes[name])
        wanted = library.picked(factors, list(places.values()))
        done = library.scaled([self.arrays[name] for name in places], wanted)
        self.arrays |= dict(zip(places, done, strict=True))

    def _numbers(self, stage: Stage, arrays: Named) -> Array:
        library, parts = self.library, dict[str, Array]()
        wholes: dict[str, Array] = {}
        for name, kind, count in zip(stage.names, stage.kinds, stage.counts, strict=True):
            array = arrays[name]
            if array is None:
                parts[name] = library.constants([0.0] * count)
            elif kind in PEAKS:
                parts[name] = library.widened(library.peak(self._relative(array, kind, name)))
            elif kind is Kind.UNITS and name in self.companions.axes:
                axes = self.companions.axes[name]
                parts[name] = library.unit_norms(array, axes, stage.order)
            else:
                wholes[name] = self._relative(array, kind, name)
        if not parts:
            return library.norm_vector(list(wholes.values()), stage.order)
        if wholes:
            norms = library.norm_vector(list(wholes.values()), stage.order)
            parts |= {name: norms[place] for place, name in enumerate(wholes)}
        return library.vector([parts[name] for name in stage.names])

    def _relative(self, array: Array, kind: Kind, name: str) -> Array:
        if kind not in RELATIVE:
            return array
        xp = self.library.xp
        root = xp.sqrt(self.companions.moments[name])
        entries = xp.astype(array, root.dtype)
        divided = entries / xp.where(root > 0, root, xp.ones_like(root))
        keep = (root > 0) | ~xp.isfinite(entries)
        return xp.where(keep, divided, xp.zeros_like(divided))

    def _clamped(self, array: Array, kind: Kind, name: str, limit: Array) -> Array:
        library, xp = self.library, self.library.xp
        if kind is Kind.PEAK:
            return library.clamped(array, limit[0])
        moments = self.companions.moments[name]
        most = xp.astype(limit[0], moments.dtype) * xp.sqrt(moments)
        return xp.where(most > 0, library.clamped(array, most), array)


def _of_units(factors: Array, bad: Array, zero_bad: bool, xp: Namespace) -> Array:
    """Return the factors of the units of a tensor; a bad unit makes the whole tensor bad."""
    whole = xp.zeros_like(factors) if zero_bad else xp.ones_like(factors)
    return xp.where(xp.any(bad), whole, factors)


def _zeroed(factors: Array, zeroed: Array | None, xp: Namespace) -> Array:
    return factors if zeroed is None else xp.where(zeroed, xp.zeros_like(factors), factors)


def _followed(
    moments: Mapping[str, Array], found: Named, unchanged: Array, library: Library
) -> dict[str, Array]:
    """Return the running means of squares after a step; a skipped or non-finite one changes none."""
    xp, after = library.xp, dict(moments)
    for name, kept in moments.items():
        array = found[name]
        if array is not None:
            squares = xp.square(xp.abs(xp.astype(array, kept.dtype)))
            learned = MOMENT_DECAY * kept + (1.0 - MOMENT_DECAY) * squares
            after[name] = xp.where(unchanged, kept, learned)
    return after
