"""The handle that `attach` returns: the hooks around a step, the last outcome, the state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, SupportsIndex
from weakref import WeakSet, finalize

import torch
from torch import nn

from karikomi.clip import ByGlobalNorm
from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.functional.unit_axes import UnitAxes
from karikomi.prune.penalties.penalty import Penalty
from karikomi.prune.schedules.pruning_schedule import PruningSchedule
from karikomi.record import Recorder, check_facts
from karikomi.rule import Composite, Rule, Scope
from karikomi.rules.checkpoint import forgotten
from karikomi.rules.decide import leaves
from karikomi.rules.outcome import Outcome
from karikomi.schedule import whole
from karikomi.torch.attachment.after_step import AfterStep, no_rule
from karikomi.torch.attachment.copies import unwatch_copies, watch_copies
from karikomi.torch.attachment.held_parameters import HeldParameters
from karikomi.torch.attachment.joint_step import JointStep
from karikomi.torch.attachment.limit_warnings import LimitWarnings
from karikomi.torch.attachment.mask_check import MaskCheck
from karikomi.torch.attachment.run_facts import rates, run_facts
from karikomi.torch.attachment.step_norms import StepNorms
from karikomi.torch.clipping.device_step import AsyncReadback, DeviceStep
from karikomi.torch.clipping.fold import Fold
from karikomi.torch.clipping.host_step import Clipping
from karikomi.torch.clipping.joint_norms import Groups, Sharding
from karikomi.torch.clipping.second_moments import Moments
from karikomi.torch.clipping.updates import Updates
from karikomi.torch.internals import StepCalls, in_backward, still_scaled, within_step
from karikomi.torch.modules.kept_units import Move
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.pruning.masks import Masks

_PARTS = {"steps", "clip", "update", "bound", "masks", "prune"}
_LATER = {"update", "prune"}  # parts that states of earlier versions lack

_LOST = object()

attached: WeakSet[torch.optim.Optimizer] = WeakSet()
"""The optimizers that have a handle."""


class Rules(NamedTuple):
    """What a handle applies: clips of gradients and updates, a bound of some weights, masks, a penalty."""

    clip: Rule | Composite | None
    update: Rule | Composite | None
    bound: Rule | None
    prune: PruningSchedule | Masks | None
    only: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    penalty: Penalty | None = None
    unit_axes: UnitAxes | None = None


class Handle:
    """The result of `attach`: outcomes of the last step, the state for checkpoints, and `detach`."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        rules: Rules,
        *,
        nonfinite: str,
        stop_after: int,
        record: Recorder | None,
        process_group: Groups | None,
        check_ranks: bool,
    ) -> None:
        self._rules = rules
        self._settings: dict[str, Any] = {
            "nonfinite": nonfinite,
            "stop_after": stop_after,
            "record": record,
            "process_group": process_group,
            "check_ranks": check_ranks,
        }
        self.last: Outcome | None = None
        """The outcome of the clip in the last step."""
        self.last_update: Outcome | None = None
        """The outcome of the clip of updates in the last step."""
        self.steps = 0
        """Attempted steps."""
        self._optimizers, self._model = list(optimizers), model
        self._nonfinite, self._stop_after = nonfinite, stop_after
        self._record, self._facts = record, {}
        self._rules, self._process_group, self._check_ranks = rules, process_group, check_ranks
        self._held = HeldParameters(self._optimizers, model)
        found = self._held.found
        self._after_step = AfterStep(
            optimizers,
            model,
            found,
            rules.bound,
            rules.prune,
            only=rules.only,
            exclude=rules.exclude,
            penalty=rules.penalty,
            unit_axes=rules.unit_axes,
        )
        self._mask_check = MaskCheck(model, lambda: self._after_step.masks)
        clips = [] if rules.clip is None else list(leaves(rules.clip))
        self._warnings = LimitWarnings(clips, found)
        self._needs_all = len(optimizers) > 1 or any(leaf.scope is Scope.GLOBAL for leaf in clips)
        self._readback = AsyncReadback()
        self._decided_on_device = False
        self._on_device: DeviceStep | None = None
        self._clipping, self._updates = self._clips_of(found)
        self._step_norms, self._described = self._norms_for_record(found), False
        self._prepare_device()
        self._joint_step = JointStep(optimizers)
        self._step_calls = StepCalls()
        if len(self._optimizers) > 1:
            self._step_calls.record_scalers()
        # Optimizers own the hooks, and so the handle: both may go without a detach.
        finalize(self, self._step_calls.release).atexit = False
        attached.update(optimizers)
        for optimizer in optimizers:
            watch_copies(optimizer)
        # In a step that is compiled as a whole Dynamo would trace what they do.
        before: Any = torch.compiler.disable(self._before)
        after: Any = torch.compiler.disable(self._after)
        self._hooks = [
            hook
            for optimizer in optimizers
            for hook in (
                optimizer.register_step_pre_hook(before),
                optimizer.register_step_post_hook(after),
            )
        ]
        if rules.prune is not None:
            self._mask_check.begin()

    def _clips_of(self, found: Mapping[str, torch.Tensor]) -> tuple[Clipping, Updates | None]:
        """Return the clips of gradients and of updates for these parameters, with fresh states."""
        rules, optimizers, model = self._rules, self._optimizers, self._model
        sharding = Sharding.of(
            found, self._process_group, check_ranks=self._check_ranks, module=model
        )
        clipping = Clipping(
            found,
            ByGlobalNorm(math.inf) if rules.clip is None else rules.clip,
            module=model if isinstance(model, nn.Module) else None,
            nonfinite=self._nonfinite,
            moments=Moments(*optimizers),
            sharding=sharding,
            unit_axes=rules.unit_axes,
            where="torch.attach",
        )
        if rules.update is None:
            return clipping, None
        where = "torch.attach(update)"
        axes = rules.unit_axes
        updates = Updates(optimizers, model, found, rules.update, sharding, axes, where=where)
        return clipping, updates

    def _norms_for_record(self, found: Mapping[str, torch.Tensor]) -> StepNorms | None:
        wanted = self._record is not None and self._record.weights_every
        return StepNorms(found) if wanted else None

    def _prepare_device(self) -> None:
        """Prepare what a fused optimizer does by itself."""
        optimizers, before = self._optimizers, self._on_device
        self._fold = Fold(optimizers[0]) if len(optimizers) == 1 else None
        self._on_device = None
        if DeviceStep.possible(self._clipping, optimizers):
            self._on_device = DeviceStep(self._clipping, optimizers[0], before)

    def _take_in_changes(self) -> None:
        """Act on the parameters that the optimizers hold now; others keep their state."""
        change = self._held.change()
        if change is None:
            return
        if self._joint_step.partly_done:
            self._finish()
        stays = [name for name in change.found if name not in change.joined | change.replaced]
        clipping, updates = self._clips_of(change.found)
        for new, old in ((clipping, self._clipping), (updates, self._updates)):
            if new is not None and old is not None and stays:
                new.load(forgotten(old.plain(), change.replaced))
        self._after_step.take_in(change)
        self._clipping, self._updates = clipping, updates
        self._step_norms, self._described = self._norms_for_record(change.found), False
        self._prepare_device()
        self._warnings.watch(change.found)
        self._held.accept(change)

    @property
    def masks(self) -> Masks | None:
        """The masks that are applied after each step."""
        return self._after_step.masks

    @masks.setter
    def masks(self, masks: Masks | None) -> None:
        self._after_step.masks = masks
        if self._hooks:
            self._mask_check.begin()

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers around whose steps it acts."""
        return tuple(self._optimizers)

    @property
    def last_bound(self) -> Outcome | None:
        """The outcome of the bound in the last step."""
        return self._after_step.last

    @property
    def sparsity(self) -> float:
        """The share of the weights with a mask that are masked and zero now.

        It is counted in the model when it is read. Warns once if masked weights are not zero, since something
        other than the step has written them.
        """
        return self._mask_check.sparsity()

    def note(self, **facts: Any) -> None:
        """Add facts (the loss, the epoch) to the record's row of the coming step.

        Raises `InvalidArgument` for names that the record uses itself (``norm``, ``step``, ...), and for
        values that JSON cannot represent.
        """
        check_facts(facts, where="Handle.note")
        self._facts.update(facts)

    def detach(self) -> None:
        """Remove the hooks.

        Masked weights that were written since the last step (by a checkpoint of the best epoch, an
        average of weights) are masked again, with a warning; nothing else of the model and the
        optimizer changes.
        """
        was_attached = bool(self._hooks)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._warnings.detach()
        self._joint_step.drop()
        self._step_calls.release()
        self._unfold()
        if was_attached:
            for optimizer in self._optimizers:
                attached.discard(optimizer)
                unwatch_copies(optimizer)
            self._mask_check.end()

    def following(self, move: Move) -> Callable[[], None]:
        """Return a function that attaches this handle to a smaller copy of its module; `shrink` calls it.

        The state is cut along; power iterations of cut weights begin anew. Raises `Unsupported` for the handle of
        another module.
        """
        if unwrapped(self._model) is not move.before:
            raise Unsupported(
                "the handle is of another module", where="torch.shrink: follow: Handle"
            )
        state: dict[str, Any] = _cut_state(self.state_dict(), move)
        masks, prune = self.masks, self._rules.prune
        moving = [held for held in (masks, prune) if isinstance(held, Masks)]
        commits = [held.following(move) for held in {id(item): item for item in moving}.values()]

        def commit() -> None:
            if not self._hooks:
                self._model = move.after
                return
            self.detach()
            for own in commits:
                own()
            state["masks"] = None if masks is None else masks.state_dict()
            self.__init__(self._optimizers, move.after, self._rules, **self._settings)
            self.load_state_dict(state)

        return commit

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse copies: a copy would hook nothing, or other parameters than its model's."""
        raise Unsupported(
            "a handle is tied to its optimizer and is neither copied nor pickled",
            where="torch.Handle",
            hint="save handle.state_dict(), attach to the other optimizer and load it there",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is needed to continue, as plain data and tensors.

        Warns once if masked weights are not zero: a model that is saved beside it would not be pruned.
        """
        self._mask_check.warn()
        return {
            "steps": self.steps,
            "clip": self._clipping.plain() if self.steps else None,
            "update": self._updates.plain() if self._updates is not None and self.steps else None,
            "bound": self._after_step.bound_state,
            "masks": None if self.masks is None else self.masks.state_dict(),
            "prune": self._after_step.plain(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned, bit for bit as if training had not stopped.

        Raises `InvalidArgument` for any other value, and then changes nothing.
        """
        if not isinstance(state, Mapping) or not _PARTS - _LATER <= set(state) <= _PARTS:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise InvalidArgument("not the state of a handle", where="load_state_dict", got=got)
        steps = whole(state["steps"])
        if steps is None or steps < 0:
            raise InvalidArgument("not a number of steps", where="steps", got=state["steps"])
        self._take_in_changes()
        bound, masks = self._after_step.read(state["bound"], state["masks"])
        schedule = self._after_step.read_schedule(state.get("prune"), steps)
        update = state.get("update")
        if update is not None and self._updates is None:
            raise no_rule("update")
        before = self._clipping.plain()
        self._clipping.load(state["clip"])
        try:
            if self._updates is not None:
                self._updates.load(update)
            if masks is not None:
                masks.apply_(self._model)
        except Exception:
            self._clipping.load(before)
            raise
        self.steps = steps
        self._readback = AsyncReadback()
        self._joint_step.drop()
        self._after_step.masks = masks
        self._after_step.load_bound(bound)
        self._after_step.load_schedule(schedule)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if within_step(optimizer):
            return None
        self._step_calls.record_parents(optimizer)
        self._unfold()
        closures = [
            argument
            for argument in (*args, *kwargs.values())
            if callable(argument) and not isinstance(argument, torch.optim.Optimizer)
        ]
        if not closures:
            self._prepare(optimizer)
            return None
        swap = {id(closures[0]): self._wrapped(optimizer, closures[0])}
        args = tuple(swap.get(id(argument), argument) for argument in args)
        return args, {key: swap.get(id(value), value) for key, value in kwargs.items()}

    def _wrapped(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]
    ) -> Callable[[], Any]:
        called = False
        prepare: Any = torch.compiler.disable(self._prepare)

        def clipped() -> Any:
            nonlocal called
            if called:
                raise Unsupported(
                    f"{type(optimizer).__name__} calls its closure more than once a step, and would "
                    "mix gradients of several clips",
                    where="torch.attach",
                    hint="call kk.torch.clip_ inside the closure, after backward(), if that is meant",
                )
            called = True
            loss = closure()
            prepare(optimizer)
            return loss

        return clipped

    @torch.no_grad()
    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self._take_in_changes()
        if self._needs_all and in_backward():
            raise Unsupported(
                "the optimizer steps inside backward(), where the gradients of other parameters are not "
                "known yet",
                where="torch.attach",
                hint="use a rule per tensor there, such as ByNorm, AdaGC or AGC, and a handle for each "
                "optimizer",
            )
        self._warnings.stepped()
        if self._joint_step.joined(optimizer):
            return
        if self._joint_step.partly_done:
            # Another joint step begins before all optimizers have stepped in the last one.
            self._finish()
        if len(self._optimizers) > 1 and getattr(optimizer, "grad_scale", None) is None:
            others = [item for item in self._optimizers if item is not optimizer]
            if still_scaled(others):
                raise Unsupported(
                    "the AMP scaler has unscaled the gradients of one optimizer, those of the others not yet",
                    where="torch.attach",
                    hint="call scaler.unscale_(each optimizer) before the first scaler.step",
                )
        try:
            self._clip(optimizer)
        except BaseException:
            self._joint_step.drop()
            self._unfold()
            raise

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        self._joint_step.begin(optimizer)
        self.steps += 1
        self._after_step.before(self.steps, getattr(optimizer, "grad_scale", None))
        if self._updates is not None:
            self._updates.remember()
        if self._step_norms is not None and self._record is not None:
            if self.steps % self._record.weights_every == 0:
                self._step_norms.remember()
        self._decided_on_device = self._on_device is not None and self._on_device.ready()
        if self._on_device is not None and self._fold is not None and self._decided_on_device:
            self._step_on_device(self._on_device, self._fold)
            return
        found_inf, scale = (getattr(optimizer, n, None) for n in ("found_inf", "grad_scale"))
        overflow = found_inf is not None and bool(found_inf)
        self.last = self._clipping.step(
            scale=1.0 if scale is None else float(scale),
            overflow=overflow,
            fold=self._fold,
            where=f"torch.attach, step {self.steps}",
        )
        self._joint_step.clipped()
        self._check_in_a_row(0 if overflow else int(self._clipping.bad_in_a_row))

    def _step_on_device(self, device: DeviceStep, fold: Fold) -> None:
        self.last = device.step(fold)
        arrived = self._readback.come()
        self._readback.send(device.counts())
        if arrived is not None:
            self._check_in_a_row(arrived[0])
            self._warnings.judge(accepted=arrived[1], engaged=arrived[2])

    def _check_in_a_row(self, in_a_row: int) -> None:
        if self._nonfinite == "skip" and in_a_row >= self._stop_after and self.last is not None:
            names = ", ".join(self.last.nonfinite[:3]) or "(a step before this one)"
            raise NonFinite(
                f"{in_a_row} step(s) in a row with non-finite gradients, first in {names}",
                where=f"torch.attach, step {self.steps}",
                hint="lower the learning rate or look at the inputs of that layer",
            )

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if within_step(optimizer):
            return
        self._unfold()
        if self._joint_step.end(optimizer):
            self._finish()

    def _finish(self) -> None:
        self._joint_step.drop()
        outcome = self.last
        assert outcome is not None  # noqa: S101  (a step was prepared)
        if self._updates is not None and bool(outcome.skipped):
            self.last_update = None
            self._updates.pass_over()
        elif self._updates is not None:
            self.last_update = self._updates.clip()
        self._after_step.after(self.steps, outcome)
        if not self._decided_on_device:
            self._warnings.count(engaged=outcome.engaged, skipped=bool(outcome.skipped))
        noted, self._facts = self._facts, {}
        if self._record is not None:
            self._write(self._record, outcome, noted)

    def _write(self, record: Recorder, outcome: Outcome, noted: Mapping[str, Any]) -> None:
        if not self._described:
            found, norms = self._held.found, self._step_norms
            record.describe(run_facts(self._optimizers, found, self._rules.clip, norms))
            self._described = True
        moved = (None, None) if self._step_norms is None else self._step_norms.measure()
        updates = moved[1] if self.last_update is None else self.last_update.tensors()
        measured = self._clipping.weights
        weights = self._after_step.weight_norms() or (measured and measured.tensors()) or moved[0]
        # The masks were applied just now.
        facts = {"sparsity": 0.0 if self.masks is None else self.masks.sparsity}
        facts |= {**rates(self._optimizers), **noted}
        record.step(self.steps, outcome, facts, weights=weights, updates=updates)

    def _unfold(self) -> None:
        if self._fold is not None:
            self._fold.restore()


def _cut_state(state: Any, move: Move, name: str | None = None) -> Any:
    """Return the state of a handle with what belongs to a tensor cut along; of another shape, it is left out."""
    if isinstance(state, Mapping):
        cut = {
            key: _cut_state(value, move, key if key in move.old else name)
            for key, value in state.items()
        }
        return {key: value for key, value in cut.items() if value is not _LOST}
    if not isinstance(state, torch.Tensor) or name is None or not move.axes.get(name):
        return state
    try:
        return move.cut(name, state, what="the state")
    except Unsupported:
        return _LOST
