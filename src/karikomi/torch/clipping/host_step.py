"""One clipping step for torch gradients: measure, judge and apply every stage of a rule, decided on the host.

Shared by `clip_`, which does it once, and `attach`, which keeps the state between steps.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.rule import Composite, Rule, Scope, State
from karikomi.rules import decide
from karikomi.rules.checkpoint import from_plain, to_plain
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import PEAKS, RELATIVE, Kind, Stage, stages
from karikomi.torch.clipping.fold import Fold
from karikomi.torch.clipping.joint_norms import Sharding
from karikomi.torch.clipping.second_moments import Moments, relative
from karikomi.torch.distributed.dtensors import local, own_units
from karikomi.torch.modules.parameters import unit_axes
from karikomi.torch.numerics.norms import norms, on_host, peak, unit_norms
from karikomi.torch.numerics.scaling import clamp_, representable, scale_, scale_all_, scale_units_

AVAILABLE = ("sizes", "weights", "second_moment")


class Clipping:
    """A rule resolved for named parameters, with its state between steps."""

    def __init__(
        self,
        found: Mapping[str, torch.Tensor],
        rule: Rule | Composite,
        *,
        module: nn.Module | None,
        nonfinite: str,
        moments: Moments,
        sharding: Sharding | None = None,
        where: str,
    ) -> None:
        self.parameters = dict(found)
        self.nonfinite, self.where = nonfinite, where
        self.moments, self.sharding = moments, sharding
        if sharding is not None and sharding.elsewhere:
            _refuse_joint_norms_inside(rule, where=where)
        self.axes = _unit_axes(rule, found, module, where=where)
        units = {name: found[name].shape[axis] for name, axis in self.axes.items()}
        self.stages = stages(rule, list(found), units=units)
        if sharding is not None:
            self.stages = sharding.extended(self.stages)
        self.keeps_moments = any("second_moment" in stage.needs for stage in self.stages)
        self.weights: Outcome | None = None
        """The norms of the weights, where the rule needed them."""
        self.state = from_plain(self.stages, None)

    def load(self, plain: Mapping[str, Any] | None) -> None:
        """Continue from plain data, or start afresh; raises `InvalidArgument` for another rule's."""
        if plain is None:
            self.moments.load(None, self.parameters)
            self.state = from_plain(self.stages, None)
            return
        rest = dict(plain) if isinstance(plain, Mapping) else plain
        kept = rest.pop("second_moment", None) if isinstance(rest, dict) else None
        state = from_plain(self.stages, rest)
        self.moments.load(kept, self.parameters)
        self.state = state

    def plain(self) -> dict[str, Any]:
        """Return the state as plain data, and tensors where the rule needs second moments of our own."""
        plain = to_plain(self.stages, self._on_host())
        kept = self.moments.kept()
        return {**plain, "second_moment": kept} if kept else plain

    def step(
        self, *, scale: float = 1.0, overflow: bool = False, fold: Fold | None = None
    ) -> Outcome:
        """Clip the gradients of one step.

        `scale`: what an AMP scaler has multiplied the gradients by. `overflow`: whether it is going
        to skip the step. `fold`: takes a factor that is one number, in place of a multiplication.
        """
        if self.sharding is not None:
            self.sharding.settle_(self.parameters.values())
        gradients = [parameter.grad for parameter in self.parameters.values()]
        self.state = self._on_host()
        learned: State = {}
        earlier: tuple[Outcome, ...] = ()
        outcome = None
        skip = any_bad = False
        for place, stage in enumerate(self.stages):
            numbers, present = self._measured(stage, gradients)
            numbers = numbers if scale == 1.0 else numbers / scale
            verdict, after = decide.decide_stage(
                stage,
                numbers,
                self.state,
                present=present,
                xp=np,
                nonfinite=self.nonfinite,
                facts=self._facts(stage),
            )
            verdict = self._representable(stage, verdict)
            learned |= after
            any_bad = any_bad or bool(verdict.bad.any())
            skip = bool(verdict.skip) or overflow
            outcome = decide.outcome_of(
                stage,
                numbers,
                verdict,
                skip=skip,
                nonfinite=self.nonfinite,
                earlier=earlier,
                xp=np,
            )
            earlier = (*earlier, outcome)
            if self.sharding is not None:
                self.sharding.check(stage, outcome)
            if self.nonfinite == "raise" and any_bad and not overflow:
                self._commit(learned, skip=True, any_bad=True, overflow=False)
                raise self._nonfinite(outcome)
            self._apply(stage, gradients, numbers, verdict, skip=skip, scale=scale, fold=fold)
            if skip:
                self._keep_company(self.stages[place + 1 :])
                break
        self._commit(learned, skip=skip, any_bad=any_bad, overflow=overflow)
        if self.keeps_moments and not skip:
            self.moments.follow(self.parameters, scale=None if scale == 1.0 else scale)
        assert outcome is not None  # noqa: S101  (every rule has a stage)
        return outcome

    def _keep_company(self, rest: Sequence[Stage]) -> None:
        # Other ranks may go on, if a gradient that should be equal everywhere was not: they would wait.
        if self.sharding is not None:
            for stage in rest:
                self._measured(stage, [None] * len(self.parameters))
                self._facts(stage)

    def _on_host(self) -> State:
        # Steps that are decided on a device leave their state there.
        if not isinstance(self.state["attempted"], torch.Tensor):
            return self.state
        return {key: value.cpu().numpy() for key, value in self.state.items()}

    def _commit(self, learned: State, *, skip: bool, any_bad: bool, overflow: bool) -> None:
        if overflow:
            # The scaler tries its scale: a step that is not taken, but says nothing of the run.
            self.state = {**self.state, "attempted": self.state["attempted"] + 1}
        else:
            self.state = decide.committed(
                self.state, learned, skip=np.asarray(skip), any_bad=np.asarray(any_bad), xp=np
            )

    def _nonfinite(self, outcome: Outcome) -> NonFinite:
        return NonFinite(
            f"non-finite gradient in {', '.join(outcome.nonfinite[:5])}",
            where=self.where,
            hint="nothing was changed",
        )

    def _measured(
        self, stage: Stage, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        missing = any(map(operator.is_, gradients, repeat(None)))
        present = np.full(len(gradients), True)
        if missing:
            present = np.array([gradient is not None for gradient in gradients])
        if stage.norms_only:
            chosen: Any = gradients
            if missing:
                chosen = [gradient for gradient in gradients if gradient is not None]
            numbers = norms(chosen if self.sharding is None else [local(item) for item in chosen])
            if missing:
                found, numbers = numbers, np.zeros(len(gradients))
                numbers[present] = found
        else:
            numbers = self._mixed(stage, gradients)
            present = np.repeat(present, stage.counts[: len(gradients)])
        if self.sharding is not None:
            return self.sharding.combined(stage, numbers, present)
        return numbers, present

    def _mixed(self, stage: Stage, gradients: Sequence[torch.Tensor | None]) -> np.ndarray:
        peaks: dict[int, torch.Tensor] = {}
        plain: dict[int, torch.Tensor] = {}
        vectors: dict[int, np.ndarray] = {}
        pairs = zip(self.parameters.items(), gradients, stage.kinds, stage.counts, strict=False)
        for place, ((name, parameter), gradient, kind, count) in enumerate(pairs):
            if gradient is None:
                vectors[place] = np.zeros(count)
            elif kind is Kind.UNITS and name in self.axes:
                vectors[place] = self._units(name, gradient)
            elif kind in PEAKS:
                peaks[place] = peak(self._entries(name, parameter, gradient, kind))
            elif kind in RELATIVE:
                # At once, since the quotient is a tensor of its own.
                vectors[place] = norms([self._entries(name, parameter, gradient, kind)])
            else:
                plain[place] = local(gradient)
        found = dict(zip(plain, norms(list(plain.values())), strict=True))
        found |= dict(zip(peaks, on_host(list(peaks.values())), strict=True))
        vectors |= {place: np.array([number]) for place, number in found.items()}
        return np.concatenate([vectors[place] for place in range(len(gradients))])

    def _entries(
        self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, kind: Kind
    ) -> torch.Tensor:
        entries = local(gradient)
        if kind in PEAKS and entries.is_complex():
            raise Unsupported(
                "complex entries have no order to clamp by",
                where=f"{self.where}: {name}",
                hint="use a rule by norm",
            )
        if kind in RELATIVE:
            return relative(entries, self.moments.of(name, parameter))
        return entries

    def _units(self, name: str, tensor: torch.Tensor) -> np.ndarray:
        if self.sharding is not None and self.sharding.is_split(tensor):
            return self.sharding.unit_norms(tensor, self.axes[name])
        return unit_norms(_dense(local(tensor)), self.axes[name]).cpu().double().numpy()

    def _facts(self, stage: Stage) -> dict[str, np.ndarray]:
        facts = {}
        if "weights" in stage.needs:
            facts["weights"] = self._weights(stage)
        if "sizes" in stage.needs:
            tensors = list(self.parameters.values())
            sizes = [t.numel() / n for t, n in zip(tensors, stage.counts, strict=False)]
            sizes += self.sharding.sizes if self.sharding is not None else ()
            facts["sizes"] = np.repeat(sizes, stage.counts)
        return facts

    def _weights(self, stage: Stage) -> np.ndarray:
        kinds = [kind if kind is Kind.UNITS else Kind.NORM for kind in stage.kinds]
        numbers = self._mixed(replace(stage, kinds=tuple(kinds)), list(self.parameters.values()))
        if self.sharding is not None:
            numbers, _ = self.sharding.combined(stage, numbers, np.full(numbers.shape, True))
        self.weights = Outcome(stage.owners, numbers, numbers, False)
        return numbers

    def _representable(self, stage: Stage, verdict: decide.StageDecision) -> decide.StageDecision:
        if verdict.limit is None:
            return verdict
        tensors = {name: p.grad for name, p in self.parameters.items()}
        limits = [
            limit if (own := tensors.get(name)) is None else representable(limit, own)
            for name, limit in zip(stage.owners, verdict.limit.tolist(), strict=True)
        ]
        return verdict._replace(limit=np.array(limits, dtype=np.float64))

    def _apply(
        self,
        stage: Stage,
        gradients: Sequence[torch.Tensor | None],
        numbers: np.ndarray,
        verdict: decide.StageDecision,
        *,
        skip: bool,
        scale: float,
        fold: Fold | None,
    ) -> None:
        if skip:
            for parameter in self.parameters.values():
                parameter.grad = None
            return
        factor = verdict.factor
        if verdict.limit is None and not np.any(factor != 1.0):
            return
        if stage.single and verdict.limit is None and _uniform(factor, gradients):
            number = float(factor[next(i for i, g in enumerate(gradients) if g is not None)])
            last = stage is self.stages[-1] and not self.keeps_moments
            if fold is not None and last and fold.take(number, scale):
                return
            scale_all_(self.parameters.values(), number)
            return
        self._apply_each(stage, numbers, verdict, scale)

    def _apply_each(
        self, stage: Stage, numbers: np.ndarray, verdict: decide.StageDecision, scale: float
    ) -> None:
        start = 0
        triples = zip(self.parameters.items(), stage.kinds, stage.counts, strict=False)
        for (name, parameter), kind, count in triples:
            part = slice(start, start + count)
            start = part.stop
            factors, limits = verdict.factor[part], verdict.limit
            if parameter.grad is None:
                continue
            if verdict.bad[part].any():
                # A policy zeroes a bad tensor as a whole, or leaves it alone as a whole.
                if factors.min() == 0.0:
                    scale_(parameter, 0.0)
            elif count > 1:
                self._scale_units_(name, parameter, factors)
            elif factors[0] != 1.0:
                scale_(parameter, float(factors[0]))
            elif limits is not None and numbers[part][0] > limits[part][0]:
                self._clamp_(name, parameter, kind, float(limits[part][0]) * scale)

    def _clamp_(self, name: str, parameter: torch.Tensor, kind: Kind, limit: float) -> None:
        if kind is Kind.RELATIVE_PEAK:
            clamp_(parameter, limit, self.moments.of(name, parameter))
        else:
            clamp_(parameter, limit)

    def _scale_units_(self, name: str, parameter: torch.Tensor, factors: np.ndarray) -> None:
        if not np.any(factors != 1.0):
            return
        gradient, axis = parameter.grad, self.axes[name]
        assert gradient is not None  # noqa: S101  (the caller has looked)
        if self.sharding is not None and self.sharding.is_split(gradient):
            factors = factors[own_units(gradient, axis)]
        scale_units_(parameter, axis, factors)


def _refuse_joint_norms_inside(rule: Rule | Composite, *, where: str) -> None:
    for leaf in decide.leaves(rule):
        if getattr(leaf, "adds_up_itself", False):
            raise Unsupported(
                f"{type(leaf).__name__} adds up the norms of the tensors itself, and those of other "
                "ranks are not among them",
                where=f"{where}(process_group)",
                hint="use a rule of one scope, such as ByNorm or EMARatio",
            )


def _uniform(factor: np.ndarray, gradients: Sequence[torch.Tensor | None]) -> bool:
    kept = [place for place, gradient in enumerate(gradients) if gradient is not None]
    own = factor if len(kept) == len(factor) else factor[kept]
    return own.size > 0 and bool(np.all(own == own[0]))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor


def _unit_axes(
    rule: Rule | Composite,
    found: Mapping[str, torch.Tensor],
    module: nn.Module | None,
    *,
    where: str,
) -> dict[str, int]:
    if all(leaf.scope is not Scope.UNIT for leaf in decide.leaves(rule)):
        return {}
    if module is None:
        raise InvalidArgument(
            "which axis of a parameter is one unit, only its module says",
            where=where,
            hint="pass the module instead of its parameters",
        )
    axes, _ = unit_axes(module)
    return {name: axes[name] for name in found if name in axes}
