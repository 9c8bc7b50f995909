"""One line for any training loop: clip before every step, mask and bound after it.

Hooks on the optimizer make the order impossible to get wrong: gradients are masked, then clipped,
then the optimizer steps, then masks are renewed and re-applied, then weights are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from niwaki import conduct
from niwaki.errors import InvalidArgument, NonFinite, Refused
from niwaki.outcome import Outcome
from niwaki.prune import Gradual
from niwaki.record import Recorder
from niwaki.rule import Quantity, Rule, State
from niwaki.torch.bound import bound_
from niwaki.torch.clip import apply_gradients, describe, judge_gradients, measure_gradients
from niwaki.torch.prune import Masks, update
from niwaki.torch.tensors import named


def attach(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    clip: Rule | None = None,
    bound: Rule | None = None,
    prune: Gradual | Masks | None = None,
    nonfinite: str = "skip",
    stop_after: int = 10,
    record: Recorder | None = None,
) -> Handle:
    """Clip before, mask and bound after every ``optimizer.step()``, and return the handle.

    `clip`, `bound`: rules of `niwaki.clip` and `niwaki.bound`. `prune`: a `Gradual` schedule, or
    `Masks` to hold. `nonfinite`: what a step with NaN or infinite gradients does; ``skip`` (default)
    takes no step and leaves moments alone. `stop_after`: raise `NonFinite`, naming the
    tensors, after that many bad steps in a row. `record`: gets one row per step.

    Raises `Refused` at the step for closures (LBFGS: the hook runs before the gradients exist) and
    for gradients that an AMP scaler has not unscaled.

    >>> import torch, niwaki as nw
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = attach(optimizer, model, clip=nw.clip.ByGlobalNorm(1.0), bound=nw.bound.Clamp(0.5))
    >>> model(torch.full((1, 4), 100.0)).sum().backward()
    >>> optimizer.step()
    >>> handle.last.action, bool(model.weight.abs().max() <= 0.5)
    ('clipped', True)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgument(
            "this is no torch optimizer", where="torch.attach", got=type(optimizer).__name__
        )
    if clip is not None:
        conduct.check_rule(clip, Quantity.GRADIENT, where="torch.attach(clip)")
    if bound is not None:
        conduct.check_rule(bound, Quantity.WEIGHT, where="torch.attach(bound)")
    if prune is not None and not isinstance(prune, Gradual | Masks):
        raise InvalidArgument(
            "prune takes a schedule or masks",
            where="torch.attach",
            got=type(prune).__name__,
            allowed="nw.prune.Gradual(...), or the masks that nw.torch.prune_ returned",
        )
    conduct.check_policy(nonfinite, where="torch.attach")
    if stop_after < 1:
        raise InvalidArgument("stop_after must be >= 1", where="torch.attach", got=stop_after)
    return Handle(optimizer, model, clip, bound, prune, nonfinite, stop_after, record)


class Handle:
    """What `attach` returns: the last outcome, the state for checkpoints, and the way out."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        clip: Rule | None,
        bound: Rule | None,
        prune: Gradual | Masks | None,
        nonfinite: str,
        stop_after: int,
        record: Recorder | None,
    ) -> None:
        self.last: Outcome | None = None
        """What the clip did in the last step."""
        self.last_bound: Outcome | None = None
        """What the bound did in the last step."""
        self.masks: Masks | None = prune if isinstance(prune, Masks) else None
        self.steps = 0
        """Attempted steps."""
        self._optimizer, self._model = optimizer, model
        self._clip, self._bound = clip, bound
        self._schedule = prune if isinstance(prune, Gradual) else None
        self._nonfinite, self._stop_after = nonfinite, stop_after
        self._record, self._facts = record, {}
        self._clip_state: State | None = None
        self._bound_state: State | None = None
        self._found = _optimized(optimizer, model)
        self._held = _count(optimizer)
        if self.masks is not None:
            self.masks.apply_(model)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def sparsity(self) -> float:
        """The share of maskable weights that are masked now."""
        return 0.0 if self.masks is None else self.masks.sparsity

    def note(self, **facts: Any) -> None:
        """Add facts (the loss, the epoch) to the record's row of the coming step."""
        self._facts.update(facts)

    def detach(self) -> None:
        """Remove the hooks; the model and the optimizer stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continuing needs, as plain data and tensors."""
        return {
            "steps": self.steps,
            "clip": None if self._clip_state is None else conduct.to_plain(self._clip_state),
            "bound": None if self._bound_state is None else conduct.to_plain(self._bound_state),
            "masks": None if self.masks is None else self.masks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit as if never stopped."""
        if set(state) != {"steps", "clip", "bound", "masks"}:
            raise InvalidArgument("not the state of a handle", got=sorted(state))
        self.steps = int(state["steps"])
        self._clip_state = _restored(self._clip, state["clip"], len(self._found))
        self._bound_state = _restored(self._bound, state["bound"], len(self._found))
        self.masks = None if state["masks"] is None else Masks.from_state_dict(state["masks"])
        if self.masks is not None:
            self.masks.apply_(self._model)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        _refuse_closure(args, kwargs)
        if getattr(optimizer, "grad_scale", None) is not None:
            raise Refused(
                "the gradients are still scaled by an AMP scaler",
                where="torch.attach",
                hint="call scaler.unscale_(optimizer) before scaler.step(optimizer)",
            )
        if _count(optimizer) != self._held:
            raise Refused(
                "the optimizer has got other parameters since attach",
                where="torch.attach",
                hint="detach() the handle and attach again",
            )
        if self.masks is not None:
            self.masks.mask_gradients_(self._model)
        self.steps += 1
        if self._clip is not None:
            self._clip_gradients(self._clip)

    def _clip_gradients(self, rule: Rule) -> None:
        names, norms, present = measure_gradients(self._found, rule, where="torch.attach")
        if self._clip_state is None:
            self._clip_state = conduct.begin(rule, norms, xp=np)
        verdict, self._clip_state = judge_gradients(
            self._found, norms, rule, self._clip_state, present, self._nonfinite
        )
        skip = bool(verdict.skip)
        self.last = describe(rule, names, norms, verdict, skip=skip, nonfinite=self._nonfinite)
        in_a_row = int(self._clip_state["bad_in_a_row"])
        allowed = 1 if self._nonfinite == "raise" else self._stop_after
        if self._nonfinite in ("skip", "raise") and in_a_row >= allowed:
            raise NonFinite(
                f"{in_a_row} step(s) in a row with non-finite gradients, "
                f"first in {', '.join(self.last.nonfinite[:3])}",
                where=f"torch.attach, step {self.steps}",
                hint="lower the learning rate or look at the inputs of that layer",
            )
        apply_gradients(self._found, norms, verdict, skip=skip)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._schedule is not None and self._schedule.due(self.steps):
            self.masks = update(self._model, self._schedule, self.steps, self.masks)
            _forget_masked(optimizer, self._found, self.masks)
        if self.masks is not None:
            self.masks.apply_(self._model)
        if self._bound is not None:
            self.last_bound, self._bound_state = bound_(self._model, self._bound, self._bound_state)
        if self._record is not None:
            row = {} if self.last is None else self.last.as_row()
            self._record.write(
                {
                    "event": "step",
                    "step": self.steps,
                    **row,
                    "sparsity": self.sparsity,
                    **self._facts,
                }
            )
        self._facts = {}


def _count(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _optimized(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    chosen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {
        name: parameter
        for name, parameter in named(model, where="torch.attach").items()
        if id(parameter) in chosen
    }
    foreign = len(chosen) - len(found)
    if foreign:
        raise Refused(
            f"the optimizer holds {foreign} parameter(s) that the model does not",
            where="torch.attach",
            hint="attach the module that owns all of them",
        )
    return found


def _refuse_closure(args: Any, kwargs: Any) -> None:
    if any(callable(argument) for argument in (*args, *kwargs.values())):
        raise Refused(
            "this step takes a closure, which computes the gradients after the hook has run",
            where="torch.attach",
            hint="call nw.torch.clip_ inside the closure, after backward()",
        )


def _restored(rule: Rule | None, plain: Mapping[str, Any] | None, count: int) -> State | None:
    if plain is None:
        return None
    if rule is None:
        raise InvalidArgument("the state holds a rule's statistics, the handle has no such rule")
    fresh = conduct.begin(rule, np.zeros(count), xp=np)
    return conduct.from_plain(plain, fresh, xp=np)


def _forget_masked(
    optimizer: torch.optim.Optimizer, found: Mapping[str, torch.Tensor], masks: Masks
) -> None:
    # A moment that outlives its weight would move it again, or dominate it if it regrows.
    for name in masks.keys() & found.keys():
        mask = masks[name]
        for value in optimizer.state.get(found[name], {}).values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                value.mul_(mask)
