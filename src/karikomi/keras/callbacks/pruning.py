"""Prune during `fit`: a callback for the schedule, around an optimizer that applies the masks."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import keras

from karikomi.errors import InvalidArgument, KarikomiError, Unsupported
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.callbacks.schedule_fingerprint import described
from karikomi.keras.facts.measure import check_measurable
from karikomi.keras.layers.prunable import check_protect, is_weight, oriented, prunable
from karikomi.keras.optimizers.masking_optimizer import MaskedOptimizer, accumulation
from karikomi.keras.optimizers.optimizer_swap import (
    OptimizerSlot,
    before_first_step,
    is_unbuilt,
    optimizers,
    put,
    standing,
)
from karikomi.keras.pruning.masks import Masks
from karikomi.keras.pruning.request import ModelRequest
from karikomi.keras.pruning.variable_matching import places_of
from karikomi.prune import as_pattern
from karikomi.prune.facts import Facts
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, check_fields
from karikomi.selection.request import scheduled

WHERE = "keras.Pruning"
_PRUNED = 0.05  # of a kernel, exactly zero: no initialiser draws that

# Model -> who changes its masks: of several in one `fit` the last.
_FOLLOWERS: WeakKeyDictionary[Any, ReferenceType[Pruning]] = WeakKeyDictionary()


class Pruning(keras.callbacks.Callback):
    """Prune in ``fit`` by a schedule, or hold given masks, on every backend, also in compiled steps.

    ``model.fit(x, y, callbacks=[kk.keras.Pruning(kk.prune.Gradual(0.9, steps=(100, 1_000)))])``. After each
    step masked weights are exactly zero, with ``steps_per_execution`` and ``jit_compile`` as well; their
    gradients are zeroed before the optimizer (and a clip in `kk.keras.clipped`) sees them, and their
    moments when masks change. Layers, their names and the config of the model stay.

    Masks are variables of the optimizer of the compiled model, which is wrapped for that. They are saved
    with it, one bit per weight, by ``model.save``, ``ModelCheckpoint`` and ``BackupAndRestore``, and a
    training that is killed and resumed with the same callback equals one that was not killed. A
    model that was pruned by another schedule keeps its masks, and the steps of this schedule start at 0. After
    another ``compile``, which drops them, the same callback applies its masks again if the masked weights are
    still zero. If weights are zero and there are no masks, it warns: pass `masks`.
    ``import karikomi.keras`` before loading such a file; ``load_model(path, compile=False)`` and `strip_` need
    nothing. Steps are attempted updates, counted from the first batch that a schedule saw; with
    ``steps_per_execution`` masks change after the execution in which they are due. Callbacks that set
    weights when training ends (``EarlyStopping(restore_best_weights=True)``) come before this one, which
    masks what they have restored. Averages of weights (``use_ema``, ``SwapEMAWeights``) are masked as well. If
    masked weights are written after training, ``.masks`` and ``model.save`` warn.

    `schedule`: `OneShot`, `Gradual` or `Iterative` of `karikomi.prune`. `masks`: to begin with; without a
    schedule they stay. `data`, `loss`, `facts`, `protect`: as for `kk.keras.prune_`, for scores that need
    them. ``.masks``: those of now.

    Raises `InvalidArgument` without a schedule or masks, or for a score whose fields do not tell it from
    others after a restart; `Unsupported` for a second one in the same ``fit``, for schedules that rewind or
    regrow, scores that reconstruct or need what Keras cannot measure, a model that is not compiled, and
    under `tf.distribute` with several replicas.

    >>> import keras, numpy as np, karikomi as kk
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    >>> model.compile("adam", "mse")
    >>> pruning = Pruning(kk.prune.OneShot(0.75))
    >>> history = model.fit(np.ones((4, 8)), np.ones((4, 8)), verbose=0, callbacks=[pruning])
    >>> pruning.masks.sparsity, int(np.count_nonzero(model.layers[0].get_weights()[0]))
    (0.75, 16)
    """

    def __init__(
        self,
        schedule: PruningSchedule | None = None,
        *,
        masks: Masks | None = None,
        data: Iterable[Any] | None = None,
        loss: Any = None,
        facts: Facts | None = None,
        protect: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        _check(schedule, masks, data, loss, facts or {})
        if protect is not None:
            check_protect(protect)
        self._schedule, self._given = schedule, masks
        self._data, self._loss, self._facts = data, loss, facts or {}
        self._protect = protect
        self._schedule_text = (
            "" if schedule is None else described(schedule, where=f"{WHERE}: schedule")
        )
        self._latest = self._start = masks or Masks()
        self._begin = self._calls = 0
        self._ended = False
        self._optimizer: MaskedOptimizer | None = None
        self._undo: tuple[OptimizerSlot, MaskedOptimizer | None] | None = None

    @property
    def masks(self) -> Masks:
        """The current masks; after training it warns if masked weights have been written since."""
        if self._ended and self._optimizer is not None:
            self._optimizer.warn_of_written()
        return self._latest

    def set_model(self, model: Any) -> None:
        """Wrap the optimizer of a model before its step is compiled."""
        super().set_model(model)
        if getattr(model, "optimizer", None) is None:
            raise Unsupported(
                "the model is not compiled", where=WHERE, hint="model.compile(...) first"
            )
        strategy = getattr(model, "distribute_strategy", None)
        if strategy is not None and strategy.num_replicas_in_sync > 1:
            raise Unsupported(
                "masks are not kept equal over replicas",
                where=WHERE,
                got=f"{strategy.num_replicas_in_sync} replicas",
            )
        _FOLLOWERS[model] = ref(self)
        # Here, as what other callbacks restore when training begins holds masks; undone if no training begins.
        self._undo, self._optimizer = (standing(model), self._optimizer), None
        if not is_unbuilt(model):
            self._place(model, self._undo[1])

    def on_train_begin(self, logs: Any = None) -> None:
        """Set the masks of the optimizer before the first step."""
        self._ended = False
        model, before = self.model, self._undo[1] if self._undo else None
        self._undo = None
        if _FOLLOWERS[model]() is not self:
            raise Unsupported(
                "two of these callbacks in one fit",
                where=WHERE,
                hint="one Pruning(schedule, masks=masks), or one fit after the other",
            )
        if self._optimizer is not None:
            self._hold_first(model)
            return

        def begin() -> None:
            self._place(model, before)
            self._hold_first(model)

        before_first_step(model, begin, where=WHERE)

    def on_test_begin(self, logs: Any = None) -> None:
        """Restore the optimizer of a model that is only evaluated, or only predicts."""
        if self._undo is not None:
            before, self._optimizer = self._undo
            before.restore()
            self._undo = None

    on_predict_begin = on_test_begin

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Make masks that were due when training was interrupted, after other callbacks have restored state."""
        if self._optimizer is not None:
            self._follow(self.model)
            self._calls = self._own.attempts

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Record the first step of this execution."""
        self._begin = batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Make new masks if they are due."""
        self._calls += max(batch - self._begin, 0) + 1
        # Reading the model makes JAX update its variables, so it is not read at each step.
        if self._is_due(self._calls // self._per_step):
            self._follow(self.model)
            self._calls = self._own.attempts

    def on_train_end(self, logs: Any = None) -> None:
        """Mask weights that earlier callbacks have restored, and record the final masks."""
        if self._optimizer is not None:
            self._optimizer.enforce()
            self._follow(self.model)
            self._ended = True

    @property
    def _own(self) -> MaskedOptimizer:
        if self._optimizer is None:
            raise Unsupported("training has not begun", where=WHERE)
        return self._optimizer

    def _is_due(self, steps: int) -> bool:
        schedule = self._schedule
        if schedule is None or steps < 1:
            return False
        return any(schedule.due(step) for step in range(self._seen + 1, steps + 1))

    def _follow(self, model: Any) -> None:
        own = self._own
        self._seen, steps = own.seen, own.steps
        self._latest = self._held(model)
        if steps > self._seen and self._schedule is not None and steps:
            if self._is_due(steps):
                before = Masks() if self._schedule.from_all else self._latest
                made = self._request(self._schedule, model, steps).find(before)
                self._hold(model, made)
                self._latest = made
            own.seen = self._seen = steps

    def _request(self, schedule: PruningSchedule, model: Any, steps: int) -> ModelRequest:
        return ModelRequest(
            model=model,
            request=scheduled(WHERE, schedule, steps, facts=self._facts, protect=self._protect),
            frozen=_untrained(model),
            data=self._data,
            loss=self._loss,
        )

    def _held(self, model: Any) -> Masks:
        """Return the masks that the optimizer holds, by path."""
        variables = {name: item.variable for name, item in oriented(model, where=WHERE).items()}
        names = {id(variable): name for name, variable in variables.items()}
        trained, masks = model.trainable_variables, self._own.masks()
        kept = {names[id(trained[place])]: mask for place, mask in masks.items()}
        return Masks(
            kept,
            left_alone=self._latest.left_alone,
            account=self._latest.account,
            places=places_of(variables),
        )

    def _hold(self, model: Any, masks: Masks) -> None:
        places = _places(model)
        pairs = masks.pairs(model.weights)
        self._own.hold({places[id(v)]: mask for v, mask in pairs if id(v) in places})

    def _place(self, model: Any, last: MaskedOptimizer | None) -> None:
        """Wrap the optimizer of a model; `last`: that of the previous training with this callback."""
        scale, before = optimizers(model)
        held = isinstance(before, MaskedOptimizer)
        goes_on = held and before.schedule == self._schedule_text
        kept = None if held else self._kept(model)
        self._start = kept or self._given or Masks()
        if not held and not len(self._start):
            _warn_of_zeros(model)
        places = self._wanted(model)
        if goes_on and places <= set(before.places):
            own = before
        else:
            inner = before.inner_optimizer if held else before
            places |= set(before.places) if held else set()
            began = (before.attempts, before.seen) if goes_on else (0, -1)
            if kept and last is not None:
                began = (last.steps * accumulation(inner), last.seen)
            own = MaskedOptimizer(
                inner, places=sorted(places), schedule=self._schedule_text, began=began
            )
            own.build(model.trainable_variables)
            own.hold(before.masks() if held else {})
            put(model, scale, own)
        self._optimizer, self._per_step = own, accumulation(own)
        self._seen, self._calls = own.seen, own.attempts

    def _kept(self, model: Any) -> Masks | None:
        """Return the masks of the previous training, if the masked weights are still zero."""
        if not len(self._latest):
            return None
        try:
            pairs = self._latest.pairs(model.weights)
        except KarikomiError:
            return None
        are_zero = all(not on_host(variable)[~mask].any() for variable, mask in pairs)
        return self._latest if are_zero else None

    def _hold_first(self, model: Any) -> None:
        """Apply the initial masks, and with a schedule those that were restored as well."""
        if not len(self._start):
            # Results of an earlier training do not hold for the one that begins.
            self._latest = Masks() if self._seen < 0 else self._latest
            self._latest = self._held(model)
            return
        pairs, places = self._start.pairs(model.weights), _places(model)
        held = self._own.masks() if self._schedule is not None else {}
        masks = {places[id(v)]: mask for v, mask in pairs if id(v) in places}
        self._own.hold({place: mask & held.get(place, True) for place, mask in masks.items()})
        self._latest = self._start

    def _wanted(self, model: Any) -> set[int]:
        """Return the places of the trained variables that can be masked."""
        places = _places(model)
        found = {id(variable) for variable, _ in self._start.pairs(model.weights)}
        if self._schedule is not None:
            known, names, *_ = self._request(self._schedule, model, 0).chosen()
            coupled = as_pattern(self._schedule.pattern).coupled
            found |= {id(known[name].variable) for name in (known if coupled else names)}
        return {places[identity] for identity in found if identity in places}


def _warn_of_zeros(model: Any) -> None:
    """Warn that a model has the zeros of a pruned one, but no masks."""
    found = oriented(model, where=WHERE)
    for name in prunable(found, ("norms", "embeddings"))[0]:
        share = float((on_host(found[name].variable) == 0).mean())
        # A kernel of nothing but zeros was made so by its initialiser.
        if _PRUNED <= share < 1.0:
            text = (
                f"karikomi: {share:.0%} of {name} is zero, and no masks are known that hold it so: "
                "load the model with its optimizer, or pass masks= to kk.keras.Pruning"
            )
            warnings.warn(text, stacklevel=2)
            return


def _places(model: Any) -> dict[int, int]:
    return {id(variable): place for place, variable in enumerate(model.trainable_variables)}


def _untrained(model: Any) -> Mapping[str, str]:
    found = oriented(model, where=WHERE)
    trained = {id(variable) for variable in model.trainable_variables}
    return {
        name: "it is not trained"
        for name, item in found.items()
        if is_weight(item) and id(item.variable) not in trained
    }


def _check(schedule: Any, masks: Any, data: Any, loss: Any, facts: Mapping[str, Any]) -> None:
    if schedule is None and masks is None:
        raise InvalidArgument("a schedule or masks are to be given", where=WHERE)
    if masks is not None and not isinstance(masks, Masks):
        raise InvalidArgument(
            "masks are those of Keras",
            where=WHERE,
            got=type(masks).__name__,
            allowed="kk.keras.Masks",
        )
    if schedule is None:
        return
    check_fields(schedule, where=WHERE)
    name = type(schedule).__name__
    if schedule.regrows_by is not None:
        raise Unsupported(
            f"{name} lets weights come back, which is done within the step",
            where=WHERE,
            hint="Gradual, OneShot or Iterative; or kk.torch.attach",
        )
    if schedule.rewinds_to is not None:
        raise Unsupported(
            f"{name} rewinds, which takes a second copy of the training's state",
            where=WHERE,
            hint="rewind=None, or kk.torch.attach",
        )
    score = schedule.scored_by()
    if score.rounds > 1:
        raise Unsupported(
            f"{type(score).__name__} measures in rounds", where=WHERE, hint="kk.keras.prune_"
        )
    needs = frozenset(score.needs) - {"noise"} - facts.keys()
    if needs:
        check_measurable(needs, data, loss, where=WHERE)
