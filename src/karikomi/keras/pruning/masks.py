"""The masks of a pruned model: which weights are kept, stored outside of the model itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors

from karikomi.errors import BadFile, InvalidArgument, KarikomiError, UnknownName, suggest
from karikomi.files import as_path, tensor_file, write_bytes
from karikomi.keras.arrays.variables import masked, names_of, value_of
from karikomi.keras.pruning.variable_matching import VariablePlace, matched
from karikomi.prune import pack_mask, unpack_mask
from karikomi.prune.account import Account
from karikomi.prune.mask_mapping import MaskMapping

_SHAPES, _PLACES = "karikomi.masks", "karikomi.masks.places"


class Masks(MaskMapping[np.ndarray]):
    """Path of a variable -> boolean array of its shape, true where the weight is kept.

    `left_alone`: path -> why it has no mask. `account`: what was removed, why, and the change of the
    outputs (print it), of the call that made them. `places`: places of the variables in their model, by
    which they are matched in one that was loaded. Raises `InvalidArgument` for a mask that is not boolean.

    >>> masks = Masks({"net/head/kernel": np.array([[True, False]])})
    >>> masks.sparsity, masks.counts()
    (0.5, {'net/head/kernel': (1, 2)})
    """

    def __init__(
        self,
        kept: Mapping[str, np.ndarray] | None = None,
        *,
        left_alone: Mapping[str, str] | None = None,
        account: Account | None = None,
        places: Mapping[str, VariablePlace] | None = None,
    ) -> None:
        super().__init__(kept, left_alone, account)
        self._places = {name: item for name, item in (places or {}).items() if name in self._kept}
        for name, mask in self._kept.items():
            if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
                got = getattr(mask, "dtype", type(mask).__name__)
                raise InvalidArgument("a mask is a boolean array", where=name, got=got)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return path -> ``(removed weights, all weights)``."""
        return {
            name: (mask.size - int(np.count_nonzero(mask)), mask.size)
            for name, mask in self._kept.items()
        }

    def apply_(self, model: Any) -> None:
        """Set the masked weights of a model to exactly ``+0.0``, also inside of a ``tf.function``."""
        for variable, mask in self.pairs(model.weights):
            variable.assign(masked(mask, value_of(variable)))

    def mask_gradients(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Return gradients with zeros where their variables are masked; ``None`` stays.

        `variables`: of which these are the gradients, in the same order, such as
        ``model.trainable_variables``; masks of others are ignored. Sparse gradients stay as they are.
        Weights can be masked likewise, where variables are not written to: with JAX. Raises as `pairs`.
        """
        by_identity = {id(v): self[name] for name, v in self._matched(variables).items()}
        return [
            grad
            if grad is None or hasattr(grad, "dense_shape") or id(variable) not in by_identity
            else masked(by_identity[id(variable)], grad)
            for grad, variable in zip(gradients, variables, strict=True)
        ]

    def pairs(self, variables: Sequence[Any]) -> list[tuple[Any, np.ndarray]]:
        """Return each masked variable with its mask; raises for one that is missing or does not fit.

        A model that was built again or loaded has other first parts of paths, or several variables of one
        path: then the one with the same rest of the path, or the same place, is matched. `InvalidArgument`
        where that is ambiguous.
        """
        pairs = []
        for name, variable in self._matched(variables).items():
            mask = self[name]
            if variable is None:
                raise UnknownName(
                    "the model has no such variable",
                    where="Masks",
                    got=repr(name),
                    hint=suggest(name, names_of(variables)),
                )
            if tuple(variable.shape) != mask.shape:
                raise InvalidArgument(
                    "the mask does not fit its variable",
                    where=name,
                    got=mask.shape,
                    allowed=tuple(variable.shape),
                )
            pairs.append((variable, mask))
        return pairs

    def renamed(self, variables: Mapping[str, Any]) -> Masks:
        """Return the masks by the names of the variables that they match; others keep their names."""
        names = {id(variable): name for name, variable in variables.items()}
        found = self._matched(list(variables.values()))
        now = {name: names.get(id(variable), name) for name, variable in found.items()}
        return Masks(
            {now[name]: mask for name, mask in self._kept.items()},
            left_alone=self.left_alone,
            account=self.account,
            places={now[name]: place for name, place in self._places.items()},
        )

    def _matched(self, variables: Sequence[Any]) -> dict[str, Any]:
        shapes = {name: mask.shape for name, mask in self._kept.items()}
        return matched(shapes, self._places, variables)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return path -> ``{"bits": uint8 array, "shape": list, "place": list}``, a bit per weight.

        Plain data; ``place`` is missing where it is not known.
        """
        state: dict[str, dict[str, Any]] = {
            name: {"bits": pack_mask(mask), "shape": list(mask.shape)}
            for name, mask in self._kept.items()
        }
        for name, place in self._places.items():
            state[name]["place"] = [place.at, place.among, place.bearing]
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Any]]) -> Masks:
        """Return the masks that `state_dict` described; raises `BadFile` naming the variable."""
        places = {
            name: _place(name, value["place"]) for name, value in state.items() if "place" in value
        }
        return cls({name: _unpacked(name, value) for name, value in state.items()}, places=places)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as a safetensors file, a bit per weight, atomically."""
        state = self.state_dict()
        facts = {
            _SHAPES: {name: value["shape"] for name, value in state.items()},
            _PLACES: {name: value["place"] for name, value in state.items() if "place" in value},
        }
        bits = {name: value["bits"] for name, value in state.items()}
        metadata = {key: json.dumps(fact) for key, fact in facts.items()}
        write_bytes(path, tensor_file(bits, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Return the masks that `save` wrote; raises `BadFile` for other files."""
        try:
            with safetensors.safe_open(as_path(path), framework="numpy") as file:  # type: ignore[no-untyped-call]
                metadata = file.metadata() or {}
                places = json.loads(metadata.get(_PLACES, "{}"))
                state: dict[str, dict[str, Any]] = {
                    name: {"bits": file.get_tensor(name), "shape": shape}
                    for name, shape in json.loads(metadata[_SHAPES]).items()
                }
                for name, place in places.items():
                    state[name]["place"] = place
        except (
            *(OSError, LookupError, ValueError, AttributeError, TypeError),
            safetensors.SafetensorError,
        ) as error:
            raise BadFile("this is not a file of masks", where=str(path), got=error) from error
        return cls.from_state_dict(state)


def _unpacked(name: str, value: Mapping[str, Any]) -> np.ndarray:
    try:
        return unpack_mask(np.asarray(value["bits"]), [int(size) for size in value["shape"]])
    except (KarikomiError, LookupError, TypeError, ValueError) as error:
        raise BadFile("this is not a packed mask", where=name, got=error) from error


def _place(name: str, numbers: Any) -> VariablePlace:
    try:
        place = VariablePlace(*map(int, numbers))
        if not (0 <= place.at < place.among and place.bearing > 0):
            raise ValueError("out of range")
    except (TypeError, ValueError) as error:
        raise BadFile("this is not a place of a variable", where=name, got=numbers) from error
    return place
