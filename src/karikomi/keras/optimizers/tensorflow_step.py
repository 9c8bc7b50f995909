"""Conditional optimizer steps in TensorFlow, with one replica or several.

A branch inside of a replica may not synchronise with the other replicas, as an optimizer does: the
replicas are merged first, and the branch is taken outside of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from karikomi.errors import Unsupported
from karikomi.keras.internals import needs_merge_call
from karikomi.keras.optimizers.branching import Step, StepBranching


class Replicated(StepBranching):
    """TensorFlow under any strategy whose optimizers run in replicas."""

    @property
    def replicas(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How many replicas add up their gradients."""
        return _replica().num_replicas_in_sync

    def outside(self) -> AbstractContextManager[Any]:
        """Return a context in which values are known, even while a graph is being built."""
        return tf.init_scope()

    def either(self, predicate: Any, left: Step, other: Step, arrays: Sequence[Any]) -> None:
        """Call one of two functions with these arrays."""
        if not _merges():
            keras.ops.cond(predicate, lambda: left(arrays), lambda: other(arrays))
            return

        def apart(strategy: Any, predicate: Any, arrays: Any) -> None:
            again = strategy.extended.call_for_each_replica
            # The same number on each of them.
            first = strategy.experimental_local_results(predicate)[0]
            tf.cond(
                first,
                lambda: _nothing(again(left, args=(arrays,))),
                lambda: _nothing(again(other, args=(arrays,))),
            )

        _replica().merge_call(apart, args=(predicate, list(arrays)))

    def assign(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        """Write variables, on each replica its own value."""
        own = [v.value if isinstance(v, keras.Variable) else v for v in variables]
        if not _merges():
            for variable, value in zip(own, values, strict=True):
                variable.assign(tf.cast(value, variable.dtype))
            return

        def together(strategy: Any, values: Any) -> None:
            for variable, value in zip(own, values, strict=True):
                strategy.extended.update(variable, _write, args=(value,), group=False)

        _replica().merge_call(together, args=(list(values),))

    def added_up(self, grads: Sequence[Any], concerned: Sequence[bool]) -> list[Any]:
        """Return gradients, those concerned as the sum of those of all replicas."""
        if self.replicas == 1:
            return list(grads)
        pairs = list(zip(grads, concerned, strict=True))
        present = [grad for grad, adds in pairs if grad is not None and adds]
        sums = iter(_replica().all_reduce(tf.distribute.ReduceOp.SUM, present))
        return [grad if grad is None or not adds else next(sums) for grad, adds in pairs]


def _replica() -> Any:
    context = tf.distribute.get_replica_context()
    if context is None:
        raise Unsupported(
            "the step of a clipped optimizer is taken inside of the replicas",
            where="keras.clipped",
            hint="strategy.run(step)",
        )
    return context


def _merges() -> bool:
    return _replica().num_replicas_in_sync > 1 and needs_merge_call()


def _write(variable: Any, value: Any) -> None:
    variable.assign(tf.cast(value, variable.dtype))


def _nothing(_: Any) -> None:
    return None
