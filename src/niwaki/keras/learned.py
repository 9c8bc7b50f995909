"""What a clipped optimizer knows once it has seen the variables: rules for them, and variables of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from niwaki.keras.clipping import Clip
from niwaki.keras.gradients import value_of
from niwaki.keras.library import library
from niwaki.keras.saved_state import BOUND
from niwaki.keras.standing_bound import StandingBound
from niwaki.rule import Array, State


@dataclass(frozen=True)
class Learned:
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
        return number(self.entries[f"{prefix}attempted"])


def number(variable: Any) -> int:
    """Return the whole number that a variable holds."""
    return int(np.asarray(keras.ops.convert_to_numpy(variable)))


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
    return {key: np.asarray(keras.ops.convert_to_numpy(value)) for key, value in state.items()}
