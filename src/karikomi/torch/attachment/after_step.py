"""Masks and bounds around a step of `attach`: masks are scheduled and applied, weights are bounded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from karikomi.bound import spared
from karikomi.errors import BadFile, InvalidArgument, Unsupported
from karikomi.functional.unit_axes import UnitAxes, resolved_axes
from karikomi.prune.pattern import as_pattern
from karikomi.prune.penalties.penalty import Penalty
from karikomi.prune.schedules.pruning_schedule import PruningSchedule
from karikomi.rule import Rule
from karikomi.rules.checkpoint import forgotten
from karikomi.rules.outcome import Outcome
from karikomi.schedule import whole
from karikomi.select import outright
from karikomi.torch.attachment.held_parameters import Change
from karikomi.torch.attachment.penalty_gradients import add_gradients_, check_effective
from karikomi.torch.bounding.in_place import bound_named, left_alone_in, restored, targets
from karikomi.torch.facts.running_stats import RunningStats, finite, shown_in_training
from karikomi.torch.modules.parameters import keys_by_any_name, named, through_adapters, unwrapped
from karikomi.torch.modules.prunable import prunable
from karikomi.torch.pruning.in_place import prune_
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.sparse_training.regrowth import check_whole, forget_moments_, noise, rewired
from karikomi.torch.sparse_training.rewinding import Rewind

FOREIGN = "not held by this optimizer"
LATE = "it joined the optimizer after these masks were made"
FROZEN = "frozen: it requires no gradient"


class AfterStep:
    """Masks and a bound for what some optimizers move, with their state."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        found: Mapping[str, torch.Tensor],
        bound: Rule | None,
        prune: PruningSchedule | Masks | None,
        *,
        only: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        penalty: Penalty | None,
        unit_axes: UnitAxes | None,
    ) -> None:
        self.last: Outcome | None = None
        self.masks: Masks | None = None
        self.bound_state: dict[str, Any] | None = None
        self._optimizers, self._model, self._found = optimizers, model, found
        self._bound, self._only, self._exclude = bound, only, exclude
        self._penalty, self._unit_axes = penalty, unit_axes
        self._spare = bound is not None and spared.spares(bound, only)
        self._unbounded: dict[str, str] = {}
        self._schedule = prune if isinstance(prune, PruningSchedule) else None
        self._shown = RunningStats(frozenset())
        self._rewind = Rewind(optimizers, model, found)
        self._dense: dict[str, torch.Tensor] = {}
        self._seen, self._due = -1, []
        self._prunable = self._can_be_pruned()
        self._check_targets()
        if self._schedule is not None:
            self._shown = RunningStats(shown_in_training(self._schedule))
            if self._schedule.rewinds_to == 0:
                self._rewind.keep()
        self._given = prune if isinstance(prune, Masks) else Masks()
        if isinstance(prune, Masks):
            self.masks = _held(prune, found, model)
            self.masks.apply_(model)
            for optimizer in optimizers:
                forget_moments_(optimizer, found, {}, self.masks)

    def load_bound(self, state: dict[str, Any] | None) -> None:
        """Continue from the state of a bound that `read` returned."""
        self.bound_state = state
        if self._bound is not None:
            self._spare = spared.spares(self._bound, self._only, state)
            self._select_bounded()

    def take_in(self, change: Change) -> None:
        """Act on the parameters that the optimizers hold now; raises as at the beginning."""
        before = self._found, self._prunable
        self._found = change.found
        self._prunable = self._can_be_pruned()
        try:
            self._check_targets()
        except Unsupported:
            self._found, self._prunable = before
            raise
        gone, new = change.left | change.replaced, change.joined | change.replaced
        self._shown.forget(gone)
        self._rewind.take_in(change.found, change.found.keys() - new)
        if gone and self.bound_state is not None:
            state = forgotten(self.bound_state, gone)
            # A state of nothing but other tensors would be refused.
            names = state.get("names") or change.found
            self.bound_state = state if any(name in change.found for name in names) else None
        if self.masks is not None:
            self.masks = self._masks_after(self.masks, before[0], new)
            self.masks.apply_(self._model)

    def _masks_after(
        self, masks: Masks, before: Mapping[str, torch.Tensor], new: Collection[str]
    ) -> Masks:
        """Return masks without those of tensors that were replaced, and with those given for new ones."""
        present = dict(unwrapped(self._model).named_parameters(remove_duplicate=False))
        kept = {
            name: mask
            for name, mask in masks.items()
            if name in present and present[name] is before.get(name, present[name])
        }
        kept |= {n: self._given[n] for n in new if n in self._given and n not in before}
        late = {name: LATE for name in new if name in self._prunable}
        left_alone = {n: w for n, w in {**masks.left_alone, **late}.items() if n not in kept}
        places = {**self._given.places, **masks.places}
        return Masks(kept, left_alone=left_alone, account=masks.account, places=places)

    def plain(self) -> dict[str, Any] | None:
        """Return the state of the schedule for a checkpoint; masks and bound have entries of their own."""
        if self._schedule is None:
            return None
        tensors = {"shown": self._shown.plain(), "rewind": self._rewind.plain()}
        return {
            "seen": self._seen,
            **{k: tensor for k, tensor in tensors.items() if tensor is not None},
        }

    def read(self, bound: Any, masks: Any) -> tuple[dict[str, Any] | None, Masks | None]:
        """Return the state of the bound and the masks of a checkpoint, checked; nothing is changed."""
        if bound is not None and self._bound is None:
            raise no_rule("bound")
        if bound is not None and self._bound is not None:
            bound = restored(self._bound, bound, list(self._found))
        return bound, None if masks is None else _unpacked(masks)

    def read_schedule(self, plain: Any, steps: int) -> tuple[int, Any, Any]:
        """Return a validated state of `plain`; nothing is changed."""
        if plain is not None and self._schedule is None:
            raise no_rule("prune")
        plain = {"seen": steps} if plain is None else plain
        seen = whole(plain.get("seen")) if isinstance(plain, Mapping) else None
        if seen is None or set(plain) - {"seen", "shown", "rewind"}:
            raise InvalidArgument("this is not a state of a schedule", where="prune")
        kept = self._rewind.read(plain.get("rewind"))
        schedule = self._schedule
        goal = None if schedule is None else schedule.rewinds_to
        if schedule and kept is None and goal is not None and goal <= seen < schedule.last:
            raise InvalidArgument(f"the state has no copy of step {goal}", where="prune: rewind")
        return seen, self._shown.read(plain.get("shown"), self._found), kept

    def load_schedule(self, read: tuple[int, Any, Any]) -> None:
        """Continue from a state that `read_schedule` returned."""
        self._seen, shown, kept = read
        self._shown.load(shown)
        self._rewind.load(kept)

    def weight_norms(self) -> dict[str, float] | None:
        """Return the norms of the weights if the bound has measured them anyway."""
        # A bound that needs more than norms has measured something else.
        if self.last is None or self.last.element_wise or self._bound is None or self._bound.needs:
            return None
        return self.last.tensors()

    def before(self, steps: int, scale: torch.Tensor | None) -> None:
        """Add the gradients of a penalty, accumulate statistics of all, then zero those of masked weights.

        Called before gradients are measured. `scale`: the scale of an AMP scaler that they contain.
        """
        if self._penalty is not None:
            add_gradients_(self._model, self._penalty, self._free(), step=steps - 1, scale=scale)
        if self._schedule is not None:
            self._look(self._schedule, steps, scale)
        if self.masks is not None:
            self.masks.mask_gradients_(self._model)

    def after(self, steps: int, outcome: Outcome) -> None:
        """Renew the masks if they are due and the step was taken, apply them, and bound the weights."""
        if self.masks is not None:
            self.masks.apply_(self._model)
        if self._schedule is not None:
            self._follow(self._schedule, steps, outcome)
        if self._bound is not None:
            found = self._bounded()
            outcome, after = bound_named(
                self._model, found, self._bound, self.bound_state, unit_axes=self._axes(found)
            )
            self.bound_state = spared.marked(after, self._spare)
            left_alone = {**outcome.left_alone, **self._unbounded, **self._others()}
            self.last = replace(outcome, left_alone=left_alone)

    def _look(self, schedule: PruningSchedule, steps: int, scale: torch.Tensor | None) -> None:
        # More than one where steps were skipped; step 0 comes with the first.
        self._due = [step for step in range(self._seen + 1, steps + 1) if schedule.due(step)]
        self._dense = {}
        if self.masks is not None and schedule.regrows_by is not None:
            if self._due and schedule.regrows_by == "gradient":
                pairs = [(n, p.grad) for n, p in self._free().items() if n in self.masks]
                self._dense = {name: grad.abs() for name, grad in pairs if grad is not None}
        elif self._shown.facts and (self._due or steps <= schedule.last):
            self._shown.note(self._scored(schedule), self._rates(), scale)

    def _follow(self, schedule: PruningSchedule, steps: int, outcome: Outcome) -> None:
        if steps == schedule.rewinds_to:
            self._rewind.keep()
        # Read only where it matters: the values may be on a device.
        if self._due or self._shown.waiting:
            taken = not bool(outcome.skipped) and not outcome.nonfinite
            if not (taken and self._shown.finite() and finite(self._dense)):
                self._shown.drop()
                self._dense = {}
                return
        self._shown.take_in()
        if self._due:
            self._renew(schedule, steps)
        self._seen, self._dense = steps, {}

    def _renew(self, schedule: PruningSchedule, steps: int) -> None:
        before, step = self.masks, self._due[-1]
        if before is not None and schedule.regrows_by is not None:
            # Masks that exist before the first step are the first masks.
            after = before if step == 0 else self._moved(schedule, before, step)
        else:
            after = self._pruned(schedule, steps)
            self._shown.restart()
        self.masks = after
        self._rewind.restore_()
        if steps >= schedule.last:
            self._rewind.forget()
        for optimizer in self._optimizers:
            forget_moments_(optimizer, self._found, before or {}, after)
        after.apply_(self._model)

    def _moved(self, schedule: PruningSchedule, masks: Masks, step: int) -> Masks:
        """Return masks with as many kept weights as before; a tensor without a gradient keeps its mask."""
        masked = {name: tensor for name, tensor in self._free().items() if name in masks}
        by_noise = schedule.regrows_by == "noise"
        worth = noise(masked, schedule.seed, step) if by_noise else self._dense
        moved = rewired(masked, masks, worth, schedule.drop_at(step))
        return Masks(moved, left_alone=masks.left_alone)

    def _pruned(self, schedule: PruningSchedule, steps: int) -> Masks:
        others, exclude = self._others(), schedule.exclude or ()
        masks = prune_(
            self._model,
            sparsity=None if schedule.pattern_says else schedule.sparsity_at(steps),
            score=schedule.scored_by(),
            allocation=schedule.allocation,
            pattern=schedule.pattern,
            only=schedule.only,
            exclude=[*([exclude] if isinstance(exclude, str) else exclude), *others] or None,
            masks=None if schedule.from_all else self.masks,
            facts=self._shown.found(self._scored(schedule)) or None,
        )
        reasons = {name: others.get(name, why) for name, why in masks.left_alone.items()}
        return Masks(masks, left_alone=reasons, account=masks.account)

    def _scored(self, schedule: PruningSchedule) -> dict[str, torch.Tensor]:
        """Return the parameters whose facts a score may need."""
        free = self._free()
        if as_pattern(schedule.pattern).coupled:
            return free
        return {name: tensor for name, tensor in free.items() if name in self._prunable}

    def _rates(self) -> dict[str, float]:
        rates = {
            id(parameter): float(group["lr"])
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        return {name: rates[id(parameter)] for name, parameter in self._found.items()}

    def _can_be_pruned(self) -> set[str]:
        """Return the names of what the schedule can act on."""
        if self._schedule is None:
            return set()
        names = dict(unwrapped(self._model).named_parameters(remove_duplicate=False))
        return set(prunable(self._model, named=outright(names, self._schedule.only))[0])

    def _free(self) -> dict[str, torch.Tensor]:
        """Return what this optimizer moves: its parameters without the frozen ones."""
        return {name: item for name, item in self._found.items() if item.requires_grad}

    def _bounded(self) -> dict[str, torch.Tensor]:
        """Return what the bound affects."""
        return {name: item for name, item in self._free().items() if name not in self._unbounded}

    def _select_bounded(self) -> None:
        self._unbounded = left_alone_in(
            self._model,
            only=self._only,
            exclude=self._exclude,
            spare=self._spare,
            where="torch.attach(bound)",
        )

    def _axes(self, found: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]] | None:
        """Return the unit axes by hand of what is bounded, of all names that the optimizer holds."""
        if not self._unit_axes:
            return None
        shapes = {name: tuple(item.shape) for name, item in self._found.items()}
        given = keys_by_any_name(self._model, self._unit_axes)
        axes = resolved_axes(given, shapes, where="torch.attach")
        return {name: own for name, own in axes.items() if name in found}

    def _others(self) -> dict[str, str]:
        """Return name -> why neither bound nor schedule affects this parameter of the model."""
        free = self._free()
        return {
            name: FROZEN if name in self._found else FOREIGN
            for name in named(self._model, where="torch.attach")
            if name not in free
        }

    def _check_targets(self) -> None:
        if self._penalty is not None:
            check_effective(self._model, self._penalty, self._free())
        if self._bound is not None:
            if not self._free():
                raise Unsupported(
                    "the optimizer holds nothing but frozen parameters", where="torch.attach(bound)"
                )
            self._select_bounded()
            if not self._bounded():
                names = list(self._free())[:3]
                raise Unsupported(
                    "of what the optimizer holds nothing is left to bound",
                    where="torch.attach(bound)",
                    got="; ".join(f"{name}: {self._unbounded[name]}" for name in names),
                    hint="only='*' selects all",
                )
            found = self._bounded()
            targets(self._model, self._bound, found, self._axes(found))
        if self._schedule is None:
            return
        chosen = {n: tensor for n, tensor in self._free().items() if n in self._prunable}
        if not chosen:
            raise Unsupported(
                "the optimizer holds no weight of a Linear or Conv layer that could be pruned",
                where="torch.attach(prune)",
            )
        if self._schedule.regrows_by is not None:
            check_whole(chosen, where="torch.attach(prune)")


def _held(masks: Masks, found: Mapping[str, torch.Tensor], model: nn.Module) -> Masks:
    """Return the masks of the optimizer's parameters and frozen ones; others are reported as left alone."""
    known = dict(unwrapped(model).named_parameters(remove_duplicate=False))
    names = {id(item): name for name, item in reversed(known.items())}
    present = through_adapters(masks, known)
    # As the module calls them now, where adapters were added since.
    masks = Masks(
        {
            n if n in known or n not in present else names[id(present[n])]: m
            for n, m in masks.items()
        },
        left_alone=masks.left_alone,
        account=masks.account,
        places=masks.places,
    )
    optimized = {id(parameter) for parameter in found.values()}
    # Frozen ones are held as well: adapters that are merged into them would fill the masked weights.
    foreign = {
        n: FOREIGN
        for n in masks
        if n in known and id(known[n]) not in optimized and known[n].requires_grad
    }
    if foreign and len(foreign) == len(masks):
        raise Unsupported("the optimizer holds no masked parameter", where="torch.attach(prune)")
    kept = {name: mask for name, mask in masks.items() if name not in foreign}
    left_alone = {**masks.left_alone, **foreign}
    return Masks(kept, left_alone=left_alone, account=masks.account, places=masks.places)


def no_rule(where: str) -> InvalidArgument:
    """Return the error for the state of a rule that the handle does not have."""
    return InvalidArgument(
        "the state holds a rule's statistics, the handle has no such rule", where=where
    )


def _unpacked(masks: object) -> Masks:
    if not isinstance(masks, Mapping):
        raise InvalidArgument("these are not masks", where="masks", got=type(masks).__name__)
    try:
        return Masks.from_state_dict(masks)
    except BadFile as error:
        raise InvalidArgument(f"these are not masks: {error}", where="masks") from error
