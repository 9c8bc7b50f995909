"""Base of the optimizers that wrap another one: what both share, and what is left to the inner one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import keras

from karikomi.errors import InvalidArgument
from karikomi.keras import internals
from karikomi.keras.optimizers.conditional_step import branching_for


class OuterOptimizer(keras.optimizers.Optimizer):
    """An optimizer around `inner_optimizer`, which makes the updates and owns moments and learning rate."""

    where: ClassVar[str]
    """The place that errors name."""

    def __init__(self, inner_optimizer: Any, name: str | None) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self._branching = branching_for(lambda: [*self.variables, *self.trained])

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the inner optimizer."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.set_learning_rate(learning_rate)

    def set_learning_rate(self, learning_rate: Any) -> None:
        """Set the learning rate of the inner optimizer, unless it is this one already."""
        if learning_rate is not internals.learning_rate_of(self.inner_optimizer):
            self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The number of updates that the inner optimizer has made; skipped steps are not counted."""
        return self.inner_optimizer.iterations

    @property
    def variables(self) -> list[Any]:
        """The variables of both optimizers, those of the inner one last."""
        return [*super().variables, *self.inner_optimizer.variables]

    @property
    def trained(self) -> list[Any]:
        """The variables that the optimizer was built for."""
        return internals.trained_variables(self)

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers inside of a `MultiOptimizer`, whose learning rates Keras' callbacks set one by one."""
        return self.inner_optimizer.optimizers

    def __getattr__(self, name: str) -> Any:
        if name == internals.AVERAGES:  # `SwapEMAWeights` looks for them in one optimizer inside
            return getattr(self.inner_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def build(self, variables: Sequence[Any]) -> None:
        """Create the variables of both optimizers for these trained variables."""
        variables = list(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the variables of both optimizers, given in the order of `variables`."""
        weights, own = list(weights), len(super().variables)
        if self.built and len(weights) != len(self.variables):
            raise InvalidArgument(
                "these are not the variables of such an optimizer",
                where=f"{self.where} (set_weights)",
                got=f"{len(weights)} of them",
                allowed=f"{len(self.variables)}, in the order of optimizer.variables",
                hint="those of the optimizer inside alone: optimizer.inner_optimizer.set_weights",
            )
        super().set_weights(weights[:own])
        self.inner_optimizer.set_weights(weights[own:])

    def resolved(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> list[Any]:
        """Return the variables of a call of ``apply``, and build the optimizer if it is not yet built."""
        if variables is not None and not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(list(variables))
        if not self.built:
            raise InvalidArgument(
                "the optimizer does not know the variables yet",
                where=self.where,
                hint="optimizer.build(model.trainable_variables) first",
            )
        known = list(self.trained if variables is None else variables)
        internals.check_known(self, known)
        if len(known) != len(grads):
            raise InvalidArgument(
                "there must be one gradient for each variable",
                where=self.where,
                got=f"{len(grads)} gradients, {len(known)} variables",
            )
        return known

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Set the final values of variables, as the inner optimizer does."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from the weight decay of the inner optimizer."""
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)
