"""An optimizer of Keras that keeps masked weights at zero around another one.

Masks are optimizer variables, so that they change without a new compilation, hold within
`steps_per_execution`, and are saved with the optimizer, one bit per weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.keras import internals
from karikomi.keras.arrays.library import as_it_is
from karikomi.keras.arrays.variables import as_gradient, masked, on_host, value_of
from karikomi.keras.optimizers.accumulation import is_overwritten
from karikomi.keras.optimizers.outer_optimizer import OuterOptimizer
from karikomi.keras.optimizers.saved_state import warn_unread
from karikomi.prune import pack_mask, unpack_mask

WHERE = "keras.Pruning"
_STEP, _SEEN, _MASK = "iteration", "seen", "mask_"


@keras.saving.register_keras_serializable(package="karikomi")
class MaskedOptimizer(OuterOptimizer):
    """`inner_optimizer`, with masks for the trained variables at `places`.

    Before a step the gradients of masked weights are set to zero, so that they count for no norm and no
    moment; after it the weights are. `schedule`: what is followed, for whoever goes on with it. `began`:
    calls of ``apply`` before, and the step up to which the schedule was followed.
    """

    where = WHERE

    def __init__(
        self,
        inner_optimizer: Any,
        *,
        places: Sequence[int],
        schedule: str = "",
        began: tuple[int, int] = (0, -1),
        name: str | None = None,
    ) -> None:
        inner: Any = keras.optimizers.get(inner_optimizer)
        super().__init__(inner, name)
        self.places = tuple(places)
        self.schedule, self._began = schedule, began
        self._warned = False
        # A list, since `tf.train.Checkpoint` saves no mapping from numbers.
        self._mask_list: list[Any] = []

    @property
    def _masks(self) -> dict[int, Any]:
        return dict(zip(self.places, self._mask_list, strict=False))

    @property
    def attempts(self) -> int:
        """Calls of ``apply`` so far."""
        return int(on_host(internals.apply_count(self)))

    @property
    def steps(self) -> int:
        """Attempted updates: calls of ``apply``, or as many as accumulation makes one of."""
        return self.attempts // accumulation(self)

    @property
    def seen(self) -> int:
        """The step up to which a schedule was followed, -1 before the first."""
        return int(on_host(self._seen))

    @seen.setter
    def seen(self, step: int) -> None:
        self._seen.assign(step)

    def build(self, variables: Sequence[Any]) -> None:
        """Create the variables of both optimizers, and masks that keep every weight, once."""
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        self._seen = self.add_variable((), "zeros", dtype="int32", name=_SEEN)
        self._mask_list = [
            self.add_variable(
                variables[place].shape,
                "ones",
                dtype="bool",
                layout=internals.layout_of(variables[place]),
                name=f"{_MASK}{place}",
            )
            for place in self.places
        ]
        attempts, seen = self._began
        internals.apply_count(self).assign(attempts)
        self._seen.assign(seen)

    def masks(self) -> dict[int, np.ndarray]:
        """Return place of a variable -> its mask, true where a weight is kept."""
        found = {place: np.asarray(on_host(mask), bool) for place, mask in self._masks.items()}
        return {place: mask for place, mask in found.items() if not mask.all()}

    def hold(self, masks: Mapping[int, np.ndarray]) -> None:
        """Set the masks of variables by place, and zero the moments of masked weights."""
        for place, mask in masks.items():
            if place not in self._masks:
                raise InvalidArgument(
                    "the optimizer has no mask for this weight",
                    where=f"{WHERE}: {self.trained[place].path}",
                )
            self._masks[place].assign(mask)
        _forget(self.inner_optimizer, len(self.trained), masks)
        self.enforce()

    def enforce(self) -> None:
        """Set masked weights to zero."""
        self._mask_weights([self.trained[place] for place in self._masks])

    def warn_of_written(self) -> None:
        """Warn once if masked weights are not zero: something other than a step has written them."""
        written = {
            self.trained[place].path: int(np.count_nonzero(on_host(self.trained[place])[~mask]))
            for place, mask in self.masks().items()
        }
        names = [name for name, count in written.items() if count]
        if names and not self._warned:
            self._warned = True
            warnings.warn(
                f"karikomi: {sum(written.values()):,} masked weight(s) of {', '.join(names[:3])} are not "
                "zero: something other than a step has written them, such as loaded weights or a callback "
                "after kk.keras.Pruning; pruning.masks.apply_(model) masks them again",
                stacklevel=3,
            )

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Take a step of the inner optimizer, with masked gradients and weights."""
        grads = list(grads)
        if grads:
            # AutoGraph would rewrite the code of a tf.function, and has nothing to do here.
            as_it_is(self._apply)(grads, self.resolved(grads, trainable_variables))

    def _apply(self, grads: list[Any], variables: list[Any]) -> None:
        pairs = zip(grads, variables, strict=True)
        masked_grads = [self._masked(as_gradient(g, v), v) for g, v in pairs]
        self.inner_optimizer.apply(masked_grads, variables)
        self._mask_weights(variables)
        internals.apply_count(self).assign_add(1)

    def _masked(self, grad: Any, variable: Any) -> Any:
        mask = self._masks.get(internals.place_of(self, variable))
        # The rows of a sparse gradient are few, and the weights are masked after the step anyway.
        if grad is None or mask is None or hasattr(grad, "dense_shape") or is_overwritten(variable):
            return grad
        return masked(mask, grad)

    def _mask_weights(self, variables: Sequence[Any]) -> None:
        places = [internals.place_of(self, variable) for variable in variables]
        pairs = [
            (v, self._masks[n]) for v, n in zip(variables, places, strict=True) if n in self._masks
        ]
        values = [masked(mask, value_of(variable)) for variable, mask in pairs]
        self._branching.assign([variable for variable, _ in pairs], values)

    @property
    def loss_scale_factor(self) -> float | None:
        """The loss scale of the inner optimizer, which takes it out of the gradients."""
        inner = getattr(self, "inner_optimizer", None)
        return None if inner is None else inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        if hasattr(self, "inner_optimizer"):  # which the initialization of Keras precedes
            self.inner_optimizer.loss_scale_factor = factor

    def scale_loss(self, loss: Any) -> Any:
        """Scale the loss as the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Set the final values of variables, as the inner optimizer does, and mask them."""
        super().finalize_variable_values(var_list)
        self.enforce()

    def save_own_variables(self, store: Any) -> None:
        """Write the counts and the masks, a bit per weight; Keras saves the inner optimizer beside it."""
        if self.built:
            self.warn_of_written()
        store[_STEP] = on_host(internals.apply_count(self))
        if self.built:
            store[_SEEN] = on_host(self._seen)
        for place, mask in self._masks.items():
            store[f"{_MASK}{place}"] = pack_mask(np.asarray(on_host(mask), bool))

    def load_own_variables(self, store: Any) -> None:
        """Read what `save_own_variables` wrote, or warn as Keras does."""
        wanted = {_SEEN, *(f"{_MASK}{place}" for place in self._masks)}
        if not self.built or wanted - set(store.keys()):
            warn_unread(self.name, "the file holds other masks or none", built=self.built)
            return
        for place, mask in self._masks.items():
            bits = np.asarray(store[f"{_MASK}{place}"])
            mask.assign(unpack_mask(bits, tuple(mask.shape)))
        self._seen.assign(np.asarray(store[_SEEN]))
        internals.apply_count(self).assign(np.asarray(store[_STEP]))

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, as plain data."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "places": list(self.places),
            "schedule": self.schedule,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> MaskedOptimizer:
        """Return the optimizer of a configuration."""
        given = dict(config)
        inner: Any = keras.saving.deserialize_keras_object(
            given.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **given)


def accumulation(optimizer: Any) -> int:
    """Return how many calls of ``apply`` make one update."""
    while optimizer is not None:
        if optimizer.gradient_accumulation_steps:
            return optimizer.gradient_accumulation_steps
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return 1


def _forget(optimizer: Any, count: int, masks: Mapping[int, np.ndarray]) -> None:
    """Zero the moments of masked weights: what optimizers keep in lists with a variable for each weight."""
    while optimizer is not None:
        for kept in internals.moments_of(optimizer, count):
            for place, mask in masks.items():
                moment = kept[place]
                if isinstance(moment, keras.Variable) and tuple(moment.shape) == mask.shape:
                    moment.assign(masked(mask, value_of(moment)))
        optimizer = getattr(optimizer, "inner_optimizer", None)
