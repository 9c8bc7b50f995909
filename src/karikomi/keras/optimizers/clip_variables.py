"""Rules resolved for the variables of a clipped optimizer, and the variables of their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from karikomi.keras.arrays.library import library
from karikomi.keras.arrays.variables import on_host, value_of
from karikomi.keras.bounding.after_step import StandingBound, bound_for
from karikomi.keras.clipping.named_clip import Clip, clip_for
from karikomi.keras.internals import stored_value
from karikomi.keras.optimizers.inner_optimizer import WHERE, by_name
from karikomi.keras.optimizers.saved_state import BOUND
from karikomi.rule import Array, State


@dataclass(frozen=True)
class ClipVariables:
    """`names`: of all variables. `weights`: name -> variable, of those that are clipped. `entries`: the state."""

    names: list[str]
    weights: dict[str, Any]
    clip: Clip
    bound: StandingBound | None
    entries: dict[str, Any]

    def state(self, prefix: str = "") -> State:
        """Return the values of the entries of the clip, or of the bound."""
        return {
            key[len(prefix) :]: value_of(variable)
            for key, variable in self.entries.items()
            if key.startswith(BOUND) == (prefix == BOUND)
        }

    def values(self) -> dict[str, Array]:
        """Return the weights that are clipped."""
        return {name: value_of(variable) for name, variable in self.weights.items()}

    def steps(self, prefix: str = "") -> int:
        """Return how many steps the clip, or the bound, has seen."""
        return int(on_host(self.entries[f"{prefix}attempted"]))

    def bad_in_a_row(self) -> int:
        """Return how many steps in a row were not finite, up to the last one."""
        entry = self.entries["bad_in_a_row"]
        # On JAX an error in the first step leaves variables without values, and fit reads this before it raises.
        return 0 if stored_value(entry) is None else int(on_host(entry))


def rules_for(
    optimizer: Any, names: Sequence[str], weights: Mapping[str, Any]
) -> tuple[Clip, StandingBound | None]:
    """Return the clip and the bound of a clipped optimizer, resolved for these variables."""
    shapes = {name: tuple(map(int, v.shape)) for name, v in weights.items()}
    if not shapes:  # a frozen model, where no name can match
        return Clip(optimizer.rule, optimizer.nonfinite, {}, {}, (), frozenset()), None
    axes = by_name(optimizer.unit_axes, names, shapes, argument="unit_axes")
    clip = clip_for(
        optimizer.rule, shapes, nonfinite=optimizer.nonfinite, unit_axes=axes, where=WHERE
    )
    if optimizer.bound is None:
        return clip, None
    inputs = by_name(optimizer.fan_in, names, shapes, argument="fan_in")
    return clip, bound_for(
        optimizer.bound,
        shapes,
        axes,
        inputs,
        only=optimizer.only,
        exclude=optimizer.exclude,
        where=f"{WHERE} (bound)",
    )


def fresh_entries(
    clip: Clip, bound: StandingBound | None, weights: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the entries of the state before the first step."""
    own = library()
    # Squares of half precision do not fit into it.
    kinds = {n: "float64" if v.dtype == "float64" else "float32" for n, v in weights.items()}
    dtypes: dict[str, Any] = {n: keras.ops.zeros((), dtype=kind).dtype for n, kind in kinds.items()}
    state = clip.fresh(dtypes, own)
    if bound is not None:
        state |= {BOUND + key: value for key, value in bound.fresh(own).items()}
    return {key: on_host(value) for key, value in state.items()}
