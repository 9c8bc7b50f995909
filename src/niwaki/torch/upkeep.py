"""What `attach` does after a step: masks by schedule, masks held, weights bounded.

All of it speaks of the parameters that the optimizer holds and moves, and of no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from niwaki.errors import BadFile, InvalidArgument, Refused
from niwaki.outcome import Outcome
from niwaki.prune import Gradual
from niwaki.rule import Rule
from niwaki.torch.bound import bound_named, restored, targets
from niwaki.torch.prune import Masks, prunable, prune_
from niwaki.torch.tensors import named, unwrapped

FOREIGN = "not held by this optimizer"
FROZEN = "frozen: it requires no gradient"


class Upkeep:
    """Masks and a bound for what some optimizers move, with their state."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        found: Mapping[str, torch.Tensor],
        bound: Rule | None,
        prune: Gradual | Masks | None,
    ) -> None:
        self.last: Outcome | None = None
        self.masks: Masks | None = None
        self.bound_state: dict[str, Any] | None = None
        self._optimizers, self._model, self._found = optimizers, model, found
        self._bound = bound
        self._schedule = prune if isinstance(prune, Gradual) else None
        self._check_targets()
        if isinstance(prune, Masks):
            self.masks = _held(prune, found, model)
            self.masks.apply_(model)

    def read(self, bound: Any, masks: Any) -> tuple[dict[str, Any] | None, Masks | None]:
        """Return the state of the bound and the masks of a checkpoint, checked; nothing is changed."""
        if bound is not None and self._bound is None:
            raise no_rule("bound")
        if bound is not None and self._bound is not None:
            bound = restored(self._bound, bound, list(self._found))
        return bound, None if masks is None else _unpacked(masks)

    def weight_norms(self) -> dict[str, float] | None:
        """Return the norms of the weights if the bound has measured them anyway."""
        # A bound that needs more than norms has measured something else.
        if self.last is None or self.last.element_wise or self._bound is None or self._bound.needs:
            return None
        return self.last.tensors()

    def mask_gradients_(self) -> None:
        """Zero the gradients of what is masked, before they are measured."""
        if self.masks is not None:
            self.masks.mask_gradients_(self._model)

    def after(self, steps: int) -> None:
        """Renew the masks if they are due, apply them, and bound the weights."""
        if self._schedule is not None and self._due(self._schedule, steps):
            self.masks = self._pruned(self._schedule, steps)
            for optimizer in self._optimizers:
                _forget_masked(optimizer, self._found, self.masks)
        if self.masks is not None:
            self.masks.apply_(self._model)
        if self._bound is not None:
            outcome, self.bound_state = bound_named(
                self._model, self._free(), self._bound, self.bound_state
            )
            left_alone = {**outcome.left_alone, **self._others()}
            self.last = replace(outcome, left_alone=left_alone)

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

    def _due(self, schedule: Gradual, steps: int) -> bool:
        # Steps count from 1 here, so masks that were due before the first step are made after it.
        first, last = schedule.steps
        late = self.masks is None and first < steps <= last
        return late or schedule.due(steps)

    def _pruned(self, schedule: Gradual, steps: int) -> Masks:
        others, exclude = self._others(), schedule.exclude or ()
        masks = prune_(
            self._model,
            sparsity=schedule.sparsity_at(steps),
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


def _forget_masked(
    optimizer: torch.optim.Optimizer, found: Mapping[str, torch.Tensor], masks: Masks
) -> None:
    # A moment that outlives its weight would move it again, or dominate it if it regrows.
    for name in masks.keys() & found.keys():
        mask = masks[name]
        for value in optimizer.state.get(found[name], {}).values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                value.mul_(mask)


def no_rule(where: str) -> InvalidArgument:
    """Return the error for the state of a rule that the handle does not have."""
    return InvalidArgument(
        "the state holds a rule's statistics, the handle has no such rule", where=where
    )


def _unpacked(masks: object) -> Masks:
    if not isinstance(masks, Mapping):
        raise InvalidArgument("these are no masks", where="masks", got=type(masks).__name__)
    try:
        return Masks.from_state_dict(masks)
    except BadFile as error:
        raise InvalidArgument(f"these are no masks: {error}", where="masks") from error
