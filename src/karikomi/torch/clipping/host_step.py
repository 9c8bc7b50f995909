"""Clipping steps of torch tensors that are decided on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.functional.unit_axes import UnitAxes, resolved_axes
from karikomi.rule import Composite, Rule, Scope, State
from karikomi.rules import decide
from karikomi.rules.checkpoint import from_plain, to_plain
from karikomi.rules.outcome import Outcome
from karikomi.rules.ranked_units import ranked_axes
from karikomi.rules.stages import stages
from karikomi.rules.step import CompletedStep, StepTensors, run_step
from karikomi.select import TiedNames
from karikomi.torch.clipping.fold import Fold
from karikomi.torch.clipping.host_tensors import GradientTensors, HostTensors
from karikomi.torch.clipping.joint_norms import Sharding
from karikomi.torch.clipping.second_moments import Moments
from karikomi.torch.modules.parameters import keys_by_any_name, other_names, unit_axes
from karikomi.torch.numerics.namespace import DeviceNamespace

AVAILABLE = ("sizes", "weights", "second_moment")


@dataclass(frozen=True)
class PlacedState:
    """The state of the rules of a clip, on the host or on a device."""

    values: State
    on_device: bool = False

    def on_host(self) -> State:
        """Return the state as NumPy arrays."""
        if not self.on_device:
            return self.values
        return {key: value.cpu().numpy() for key, value in self.values.items()}

    def on(self, xp: DeviceNamespace) -> State:
        """Return the state as tensors on the device of a namespace."""
        if self.on_device:
            return self.values
        return {key: xp.asarray(np.asarray(value)) for key, value in self.values.items()}


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
        unit_axes: UnitAxes | None = None,
        where: str,
    ) -> None:
        self.parameters = dict(found)
        self.nonfinite, self.where = nonfinite, where
        self.moments, self.sharding = moments, sharding
        if sharding is not None and sharding.elsewhere:
            _check_no_joint_norms_inside(rule, where=where)
        self.axes = _unit_axes(rule, found, module, unit_axes, where=where)
        units = {name: found[name].shape[axis] for name, axis in self.axes.items()}
        others = {} if module is None else other_names(module)
        names = TiedNames(found, {n: first for n, first in others.items() if first in found})
        self.stages = stages(rule, names, units=units)
        if sharding is not None:
            self.stages = sharding.extended(self.stages)
        self.keeps_moments = any("second_moment" in stage.needs for stage in self.stages)
        self.weights: Outcome | None = None
        """The norms of the weights, where the rule needed them."""
        self._state = PlacedState(from_plain(self.stages, None))

    @property
    def bad_in_a_row(self) -> Any:
        """The number of steps in a row with non-finite gradients, where the state is."""
        return self._state.values["bad_in_a_row"]

    def load(self, plain: Mapping[str, Any] | None) -> None:
        """Continue from plain data, or start afresh; raises `InvalidArgument` for another rule's."""
        rest = dict(plain) if isinstance(plain, Mapping) else plain
        kept = rest.pop("second_moment", None) if isinstance(rest, dict) else None
        state = from_plain(self.stages, rest)
        self.moments.load(kept, self.parameters)
        self._state = PlacedState(state)

    def plain(self) -> dict[str, Any]:
        """Return the state as plain data, with tensors where second moments are kept here."""
        plain = to_plain(self.stages, self._state.on_host())
        kept = self.moments.kept()
        return {**plain, "second_moment": kept} if kept else plain

    def step(
        self,
        *,
        scale: float = 1.0,
        overflow: bool = False,
        fold: Fold | None = None,
        where: str | None = None,
    ) -> Outcome:
        """Clip the gradients of one step; `where` is the place that errors name from now on.

        `scale`: the factor of an AMP scaler on the gradients. `overflow`: whether the scaler is going to
        skip the step. `fold`: takes a single factor for all gradients, in place of a multiplication.
        """
        self.where = self.where if where is None else where
        if self.sharding is not None:
            self.sharding.settle_(self.parameters.values())
        done = self.run_on_host(GradientTensors(self, scale, fold), overflow=overflow)
        if self.keeps_moments and not (done.skip or done.any_bad):
            self.moments.follow(self.parameters, scale=None if scale == 1.0 else scale)
        return done.outcomes[-1]

    def run_on_host(self, tensors: HostTensors, *, overflow: bool = False) -> CompletedStep:
        """Run the stages on tensors, decided on the host; raises `NonFinite` where the policy asks for it."""
        done = run_step(
            self.stages,
            self._state.on_host(),
            tensors,
            xp=np,
            nonfinite=self.nonfinite,
            stop_at_skip=True,
            overflow=np.asarray(True) if overflow else None,
        )
        self._state = PlacedState(done.state)
        if self.nonfinite == "raise" and done.any_bad and not overflow:
            raise NonFinite(
                f"non-finite gradient in {', '.join(done.outcomes[-1].nonfinite[:5])}",
                where=self.where,
                hint="nothing was changed",
            )
        if done.skip:
            tensors.discard()
            tensors.join_remaining(self.stages[len(done.outcomes) :])
        return done

    def run_on_device(
        self,
        tensors: StepTensors,
        xp: DeviceNamespace,
        *,
        overflow: torch.Tensor | None,
        members: Mapping[str, torch.Tensor],
        view: Callable[[torch.Tensor], Any],
    ) -> CompletedStep:
        """Run the stages on tensors, decided on their device; arguments as for `run_step`."""
        done = run_step(
            self.stages,
            self._state.on(xp),
            tensors,
            xp=xp,
            nonfinite=self.nonfinite,
            overflow=overflow,
            members=members,
            view=view,
        )
        self._state = PlacedState(done.state, on_device=True)
        return done

    def count_attempt(self) -> None:
        """Count a step that was not taken, and change nothing else."""
        state = self._state.on_host()
        self._state = PlacedState({**state, "attempted": state["attempted"] + 1})


def _check_no_joint_norms_inside(rule: Rule | Composite, *, where: str) -> None:
    for leaf in decide.leaves(rule):
        if getattr(leaf, "adds_up_itself", False):
            raise Unsupported(
                f"{type(leaf).__name__} adds up the norms of the tensors itself, without those of "
                "other ranks",
                where=f"{where}(process_group)",
                hint="use a rule of one scope, such as ByNorm or EMARatio",
            )


def _single(name: str, axes: tuple[int, ...], where: str) -> int:
    if len(axes) == 1:
        return axes[0]
    raise Unsupported("a unit along several axes", where=f"{where}: {name}", got=axes)


def _unit_axes(
    rule: Rule | Composite,
    found: Mapping[str, torch.Tensor],
    module: nn.Module | None,
    given: UnitAxes | None,
    *,
    where: str,
) -> dict[str, int]:
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    by_hand = given if module is None else keys_by_any_name(module, given)
    several = resolved_axes(by_hand, shapes, where=where)
    if all(leaf.scope is not Scope.UNIT for leaf in decide.leaves(rule)):
        return {}
    ranked = ranked_axes(rule, shapes, where=where)
    several = several if ranked is None else ranked
    named = {name: _single(name, axes, where) for name, axes in several.items()}
    if ranked is not None:
        return named
    if module is None and given:
        return named
    if module is None:
        raise InvalidArgument(
            "the unit axis of a parameter is known from its module only",
            where=where,
            hint="pass the module instead of its parameters, or unit_axes=",
        )
    axes, _ = unit_axes(module)
    return {name: axis for name, axis in {**axes, **named}.items() if name in found}
