"""One line for any training loop: clip before every step, mask and bound after it.

Hooks on the optimizer make the order impossible to get wrong: gradients are masked, then clipped,
then the optimizer steps, then masks are renewed and re-applied, then weights are bounded. All of it
speaks of the parameters that this optimizer holds, and of no others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn, SupportsIndex
from weakref import WeakSet

import torch
from torch import nn

from niwaki import conduct
from niwaki.clip import ByGlobalNorm
from niwaki.errors import BadFile, InvalidArgument, NonFinite, Refused
from niwaki.outcome import Outcome
from niwaki.prune import Gradual
from niwaki.record import Recorder
from niwaki.rule import Quantity, Rule
from niwaki.schedule import whole
from niwaki.torch.bound import bound_named, targets
from niwaki.torch.clip import apply_gradients, describe, judge_gradients, measure_gradients
from niwaki.torch.prune import Masks, prunable, prune_
from niwaki.torch.tensors import named, unwrapped

FOREIGN = "not held by this optimizer"
FROZEN = "frozen: it requires no gradient"
_attached: WeakSet[torch.optim.Optimizer] = WeakSet()


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

    `clip`, `bound`: rules of `niwaki.clip` and `niwaki.bound`; without a `clip`, gradients are still
    measured and bad steps skipped. `prune`: a `Gradual` schedule, or `Masks` to hold. Bounds and
    schedules leave alone what the optimizer does not hold or what is frozen: ``handle.last_bound`` and
    ``handle.masks`` say so in their ``left_alone``. `nonfinite`: what a step with NaN or infinite
    gradients does; ``skip`` (default) takes no step and leaves moments alone. `stop_after`: raise
    `NonFinite`, naming the tensors, after that many bad steps in a row. `record`: gets one row per step.

    Raises `Refused` at the step for closures (LBFGS: the hook runs before the gradients exist) and
    for gradients that an AMP scaler has not unscaled; at once for an optimizer that has a handle, for
    parameters that the model does not have, and for a bound or schedule that has nothing to act on.
    Raises `InvalidArgument` for arguments of another kind. A step that an AMP scaler skips counts as
    attempted, and not as a bad one in a row.

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
    bad_steps = whole(stop_after)
    if bad_steps is None or bad_steps < 1:
        raise InvalidArgument("stop_after must be >= 1", where="torch.attach", got=repr(stop_after))
    if (bound is not None or prune is not None) and not isinstance(model, nn.Module):
        raise InvalidArgument(
            "bounds and masks need the module", where="torch.attach", got=type(model).__name__
        )
    if optimizer in _attached:
        raise Refused(
            "this optimizer has a handle already: every step would be clipped twice",
            where="torch.attach",
            hint="detach() the other handle first",
        )
    return Handle(optimizer, model, clip, bound, prune, nonfinite, bad_steps, record)


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
        self.masks: Masks | None = None
        self.steps = 0
        """Attempted steps."""
        self._optimizer, self._model = optimizer, model
        self._clip = ByGlobalNorm(math.inf) if clip is None else clip
        self._bound = bound
        self._schedule = prune if isinstance(prune, Gradual) else None
        self._nonfinite, self._stop_after = nonfinite, stop_after
        self._record, self._facts = record, {}
        self._clip_state: dict[str, Any] | None = None
        self._bound_state: dict[str, Any] | None = None
        self._found = _optimized(optimizer, model)
        self._held = _count(optimizer)
        self._check_targets()
        if isinstance(prune, Masks):
            self.masks = _held(prune, self._found, model)
            self.masks.apply_(model)
        _attached.add(optimizer)
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
        if self._hooks:
            _attached.discard(self._optimizer)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse copies: a copy would hook nothing, or other parameters than its model's."""
        raise Refused(
            "a handle is tied to its optimizer and is neither copied nor pickled",
            where="torch.Handle",
            hint="save handle.state_dict(), attach to the other optimizer and load it there",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continuing needs, as plain data and tensors."""
        return {
            "steps": self.steps,
            "clip": self._clip_state,
            "bound": self._bound_state,
            "masks": None if self.masks is None else self.masks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit as if never stopped.

        Raises `InvalidArgument` for what is no state of such a handle, and then changes nothing.
        """
        if not isinstance(state, Mapping) or set(state) != {"steps", "clip", "bound", "masks"}:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise InvalidArgument("not the state of a handle", where="load_state_dict", got=got)
        steps = whole(state["steps"])
        if steps is None or steps < 0:
            raise InvalidArgument("not a number of steps", where="steps", got=state["steps"])
        clip = _restored(self._clip, state["clip"], list(self._found), where="clip")
        bound = _restored(self._bound, state["bound"], list(self._found), where="bound")
        masks = None if state["masks"] is None else _unpacked(state["masks"])
        if masks is not None:
            masks.apply_(self._model)
        self.steps, self._clip_state, self._bound_state, self.masks = steps, clip, bound, masks

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        _refuse_closure(args, kwargs)
        if getattr(optimizer, "grad_scale", None) is not None:
            # The scaler would take them back only after the step, and without them is asked again.
            for left_behind in ("grad_scale", "found_inf"):
                optimizer.__dict__.pop(left_behind, None)
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
        self._clip_gradients(self._clip, overflow=_overflowed(optimizer))

    def _clip_gradients(self, rule: Rule, *, overflow: bool) -> None:
        names, norms, present = measure_gradients(self._found, rule, where="torch.attach")
        verdict, after = judge_gradients(
            self._found, norms, rule, self._clip_state, present, self._nonfinite
        )
        skip = bool(verdict.skip) or overflow
        self.last = describe(rule, names, norms, verdict, skip=skip, nonfinite=self._nonfinite)
        if overflow:
            # The scaler tries its scale: a step that is not taken, but says nothing of the run.
            before = self._clip_state or conduct.to_plain(
                rule, conduct.from_plain(rule, None, names), names
            )
            after = {**before, "attempted": after["attempted"]}
        self._clip_state = after
        in_a_row = 0 if overflow else after["bad_in_a_row"]
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
        if self._schedule is not None and self._due(self._schedule):
            self.masks = self._pruned(self._schedule)
            _forget_masked(optimizer, self._found, self.masks)
        if self.masks is not None:
            self.masks.apply_(self._model)
        if self._bound is not None:
            outcome, self._bound_state = bound_named(
                self._model, self._free(), self._bound, self._bound_state
            )
            left_alone = {**outcome.left_alone, **self._others()}
            self.last_bound = replace(outcome, left_alone=left_alone)
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

    def _free(self) -> dict[str, torch.Tensor]:
        """Return what this optimizer moves: its parameters without the frozen ones."""
        return {name: one for name, one in self._found.items() if one.requires_grad}

    def _others(self) -> dict[str, str]:
        """Return name -> why neither bound nor schedule touches this parameter of the model."""
        free = self._free()
        return {
            name: FROZEN if name in self._found else FOREIGN
            for name in named(self._model, where="torch.attach")
            if name not in free
        }

    def _check_targets(self) -> None:
        if self._bound is not None:
            if not self._free():
                raise Refused(
                    "the optimizer holds nothing but frozen parameters", where="torch.attach(bound)"
                )
            targets(self._model, self._bound, self._free())
        if self._schedule is not None and not prunable(self._model)[0].keys() & self._free().keys():
            raise Refused(
                "the optimizer holds no weight of a Linear or Conv layer that could be pruned",
                where="torch.attach(prune)",
            )

    def _due(self, schedule: Gradual) -> bool:
        # Steps count from 1 here, so masks that were due before the first step are made after it.
        first, last = schedule.steps
        late = self.masks is None and first < self.steps <= last
        return late or schedule.due(self.steps)

    def _pruned(self, schedule: Gradual) -> Masks:
        others, exclude = self._others(), schedule.exclude or ()
        masks = prune_(
            self._model,
            sparsity=schedule.sparsity_at(self.steps),
            score=schedule.score,
            allocation=schedule.allocation,
            only=schedule.only,
            exclude=[*([exclude] if isinstance(exclude, str) else exclude), *others] or None,
            masks=self.masks,
        )
        reasons = {name: others.get(name, why) for name, why in masks.left_alone.items()}
        return Masks(masks, left_alone=reasons)


def _held(masks: Masks, found: Mapping[str, torch.Tensor], model: nn.Module) -> Masks:
    """Return the masks of what the optimizer holds; the others are said to be left alone."""
    own = {id(parameter) for parameter in found.values()}
    known = dict(unwrapped(model).named_parameters(remove_duplicate=False))
    foreign = {name: FOREIGN for name in masks if name in known and id(known[name]) not in own}
    if foreign and len(foreign) == len(masks):
        raise Refused("the optimizer holds no masked parameter", where="torch.attach(prune)")
    kept = {name: mask for name, mask in masks.items() if name not in foreign}
    return Masks(kept, left_alone={**masks.left_alone, **foreign})


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


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


def _restored(
    rule: Rule | None, plain: Mapping[str, Any] | None, names: list[str], *, where: str
) -> dict[str, Any] | None:
    if plain is None:
        return None
    if rule is None:
        raise InvalidArgument(
            "the state holds a rule's statistics, the handle has no such rule", where=where
        )
    # For the very names that it has, if any; the step brings its own, and realigns.
    own = plain.get("names") if isinstance(plain, Mapping) else None
    names = own if own and isinstance(own, list) else names
    return conduct.to_plain(rule, conduct.from_plain(rule, plain, names), names)


def _unpacked(masks: object) -> Masks:
    if not isinstance(masks, Mapping):
        raise InvalidArgument("these are no masks", where="masks", got=type(masks).__name__)
    try:
        return Masks.from_state_dict(masks)
    except BadFile as error:
        raise InvalidArgument(f"these are no masks: {error}", where="masks") from error


def _forget_masked(
    optimizer: torch.optim.Optimizer, found: Mapping[str, torch.Tensor], masks: Masks
) -> None:
    # A moment that outlives its weight would move it again, or dominate it if it regrows.
    for name in masks.keys() & found.keys():
        mask = masks[name]
        for value in optimizer.state.get(found[name], {}).values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                value.mul_(mask)
