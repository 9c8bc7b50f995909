"""Prune while `fit` runs: a callback that follows a schedule, and an optimizer that holds the masks.

Masks change between two batches, here; that they hold in every step is the optimizer's part, since a step, or
several of them, are compiled as one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import keras

from niwaki.errors import InvalidArgument, Refused
from niwaki.keras.facts import check as check_facts
from niwaki.keras.masked_optimizer import MaskedOptimizer, accumulation
from niwaki.keras.masks import Masks
from niwaki.keras.prunable import check_protect, is_weight, oriented
from niwaki.keras.questions import Facts, Request
from niwaki.numpy.masks import asked, default_allocation
from niwaki.prune import as_pattern
from niwaki.prune.timetable import Timetable

WHERE = "keras.Pruning"


class Pruning(keras.callbacks.Callback):
    """Prune in ``fit`` by a schedule, or hold given masks, on every backend, also in compiled steps.

    ``model.fit(x, y, callbacks=[nw.keras.Pruning(nw.prune.Gradual(0.9, steps=(100, 1_000)))])``. After each
    step masked weights are exactly zero, with ``steps_per_execution`` and ``jit_compile`` as well; their
    gradients are zeroed before the optimizer (and a clip in `nw.keras.clipped`) sees them, and their
    moments when masks change. Layers, their names and the config of the model stay.

    Masks live in the optimizer of the compiled model, which is stood around for that: so they are saved
    with it, a bit per weight, by ``model.save``, ``ModelCheckpoint`` and ``BackupAndRestore``, and a
    training that is killed and goes on with the same callback is the training that was not killed. A
    model that was pruned by another schedule keeps its masks, and the steps of this one begin.
    ``import niwaki.keras`` before loading such a file; ``load_model(path, compile=False)`` and `strip_` need
    nothing. Steps are attempted updates, counted from the first batch that a schedule saw; with
    ``steps_per_execution`` masks change after the execution in which they are due.

    `schedule`: `OneShot`, `Gradual` or `Iterative` of `niwaki.prune`. `masks`: to begin with; without a
    schedule they stay. `data`, `loss`, `facts`, `protect`: as for `nw.keras.prune_`, for scores that need
    them. ``.masks``: those of now.

    Raises `InvalidArgument` without a schedule or masks; `Refused` for schedules that rewind or regrow, scores that
    reconstruct or need what Keras cannot measure, a model that is not compiled, and under
    `tf.distribute` with several replicas.

    >>> import keras, numpy as np, niwaki as nw
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    >>> model.compile("adam", "mse")
    >>> pruning = Pruning(nw.prune.OneShot(0.75))
    >>> history = model.fit(np.ones((4, 8)), np.ones((4, 8)), verbose=0, callbacks=[pruning])
    >>> pruning.masks.sparsity, int(np.count_nonzero(model.layers[0].get_weights()[0]))
    (0.75, 16)
    """

    def __init__(
        self,
        schedule: Timetable | None = None,
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
        self._measure: dict[str, Any] = {"data": data, "loss": loss, "facts": facts or {}}
        self._protect = protect
        self._latest = masks or Masks()
        self._begin = self._calls = 0
        self._optimizer: MaskedOptimizer | None = None

    @property
    def masks(self) -> Masks:
        """The masks of now."""
        return self._latest

    def set_model(self, model: Any) -> None:
        """Stand around the optimizer of a model before its step is compiled."""
        super().set_model(model)
        if getattr(model, "optimizer", None) is None:
            raise Refused("the model is not compiled", where=WHERE, hint="model.compile(...) first")
        strategy = getattr(model, "distribute_strategy", None)
        if strategy is not None and strategy.num_replicas_in_sync > 1:
            raise Refused(
                "masks are not kept equal over replicas",
                where=WHERE,
                got=f"{strategy.num_replicas_in_sync} replicas",
            )
        self._optimizer, self._latest = None, self._given or Masks()
        if model.built:
            self._place(model)

    def on_train_begin(self, logs: Any = None) -> None:
        """See that there is an optimizer that holds masks."""
        if self._optimizer is None:
            self._place(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Do what was due when training was left: by now every other callback has restored what it does."""
        self._follow(self.model)
        self._calls = self._own.attempts

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Note where this execution begins."""
        self._begin = batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Make new masks if they are due."""
        self._calls += max(batch - self._begin, 0) + 1
        # To ask for the model makes JAX bring its variables up to date, so it is not asked each time.
        if self._is_due(self._calls // self._per_step):
            self._follow(self.model)
            self._calls = self._own.attempts

    def on_train_end(self, logs: Any = None) -> None:
        """Note the masks that training ended with."""
        self._follow(self.model)

    @property
    def _own(self) -> MaskedOptimizer:
        if self._optimizer is None:
            raise Refused("training has not begun", where=WHERE)
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
                self._renew(self._schedule, model, steps)
            own.seen = self._seen = steps

    def _renew(self, schedule: Timetable, model: Any, steps: int) -> None:
        made = self._request(schedule, model, schedule.sparsity_at(steps)).find(self._latest)
        self._hold(model, made)
        self._latest = made

    def _request(self, schedule: Timetable, model: Any, sparsity: float | None) -> Request:
        pattern = as_pattern(schedule.pattern)
        share = None if schedule.pattern_says else sparsity
        return Request(
            model=model,
            score=schedule.scored_by(),
            pattern=pattern,
            allocation=schedule.allocation or default_allocation(pattern),
            target=asked(pattern, WHERE, sparsity=share),
            only=schedule.only,
            exclude=schedule.exclude,
            protect=self._protect,
            frozen=_untrained(model),
            **self._measure,
        )

    def _held(self, model: Any) -> Masks:
        """Return the masks that the optimizer holds, by path."""
        names, masks = _names(model), self._own.masks()
        trained = model.trainable_variables
        kept = {names[id(trained[place])]: mask for place, mask in masks.items()}
        return Masks(kept, left_alone=self._latest.left_alone, account=self._latest.account)

    def _hold(self, model: Any, masks: Masks) -> None:
        places = _places(model)
        pairs = masks.pairs(model.weights)
        self._own.hold({places[id(v)]: mask for v, mask in pairs if id(v) in places})

    def _place(self, model: Any) -> None:
        scale, before = _optimizers(model)
        told = "" if self._schedule is None else repr(self._schedule)
        places = self._wanted(model)
        held = isinstance(before, MaskedOptimizer)
        goes_on = held and before.schedule == told
        if goes_on and places <= set(before.places):
            own = before
        else:
            inner = before.inner_optimizer if held else before
            places |= set(before.places) if held else set()
            began = (before.attempts, before.seen) if goes_on else (0, -1)
            own = MaskedOptimizer(inner, places=sorted(places), schedule=told, began=began)
            own.build(model.trainable_variables)
            own.hold(before.masks() if held else {})
            _put(model, scale, own)
        self._optimizer, self._per_step, self._seen = own, accumulation(own), own.seen
        if len(self._latest) and not (goes_on and told):
            self._hold(model, self._latest)

    def _wanted(self, model: Any) -> set[int]:
        """Return the places of the trained variables that masks may speak of."""
        places = _places(model)
        found = {id(variable) for variable, _ in self._latest.pairs(model.weights)}
        if self._schedule is not None:
            known, names, _ = self._request(self._schedule, model, 0.0).selected()
            coupled = as_pattern(self._schedule.pattern).coupled
            found |= {id(known[name].variable) for name in (known if coupled else names)}
        return {places[identity] for identity in found if identity in places}


def strip_(model: Any) -> None:
    """Put the optimizer of a compiled model back as it was before `Pruning`; weights stay as they are.

    Nothing holds the masks from then on, and a file of the model needs no niwaki. A model that was not
    pruned in training is left as it is.
    """
    scale, before = _optimizers(model)
    if isinstance(before, MaskedOptimizer):
        _put(model, scale, before.inner_optimizer)


def _optimizers(model: Any) -> tuple[Any, Any]:
    """Return the loss scale of mixed precision, if there is one, and the optimizer inside of it."""
    optimizer = getattr(model, "optimizer", None)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer, optimizer.inner_optimizer
    return None, optimizer


def _put(model: Any, scale: Any, optimizer: Any) -> None:
    """Give a compiled model another optimizer, and forget the step that was compiled with the one before."""
    if scale is None:
        model.optimizer = optimizer
    else:
        scale.inner_optimizer = optimizer
    model.train_function = None
    if hasattr(model, "_compile_config"):
        # What a file of the model will say of it.
        model._compile_config.config["optimizer"] = model.optimizer


def _names(model: Any) -> dict[int, str]:
    known = oriented(model, where=WHERE)
    return {id(one.variable): name for name, one in known.items()}


def _places(model: Any) -> dict[int, int]:
    return {id(one): place for place, one in enumerate(model.trainable_variables)}


def _untrained(model: Any) -> Mapping[str, str]:
    found = oriented(model, where=WHERE)
    trained = {id(one) for one in model.trainable_variables}
    return {
        name: "it is not trained"
        for name, one in found.items()
        if is_weight(one) and id(one.variable) not in trained
    }


def _check(schedule: Any, masks: Any, data: Any, loss: Any, facts: Mapping[str, Any]) -> None:
    if schedule is None and masks is None:
        raise InvalidArgument("a schedule or masks are to be given", where=WHERE)
    if masks is not None and not isinstance(masks, Masks):
        raise InvalidArgument(
            "masks are those of Keras",
            where=WHERE,
            got=type(masks).__name__,
            allowed="nw.keras.Masks",
        )
    if schedule is None:
        return
    if not isinstance(schedule, Timetable):
        raise InvalidArgument(
            "this is no schedule of pruning",
            where=WHERE,
            got=repr(schedule)[:80],
            allowed="such as nw.prune.Gradual(0.9, steps=(100, 1_000))",
        )
    name = type(schedule).__name__
    if schedule.regrows_by is not None:
        raise Refused(
            f"{name} lets weights come back, which is done within the step",
            where=WHERE,
            hint="Gradual, OneShot or Iterative; or nw.torch.attach",
        )
    if schedule.rewinds_to is not None:
        raise Refused(
            f"{name} rewinds, which takes a second copy of the training's state",
            where=WHERE,
            hint="rewind=None, or nw.torch.attach",
        )
    score = schedule.scored_by()
    if score.rounds > 1:
        raise Refused(
            f"{type(score).__name__} measures in rounds", where=WHERE, hint="nw.keras.prune_"
        )
    needs = frozenset(score.needs) - {"noise"} - facts.keys()
    if needs:
        check_facts(needs, data, loss, where=WHERE)
