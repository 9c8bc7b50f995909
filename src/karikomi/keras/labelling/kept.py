"""What stays of the tensors and variables of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.errors import Unsupported
from karikomi.keras.labelling.label_run import Propagated
from karikomi.shrink.kept_labels import KeptLabels
from karikomi.shrink.label_planes import Labelled, is_product, keeps

WHERE = "keras.shrink"


@dataclass(frozen=True, slots=True)
class KeptWeights(KeptLabels):
    """What stays of each tensor of a model: a boolean per label, and the labels of its variables."""

    found: Propagated

    def of(self, variable: Any) -> tuple[int, ...]:
        """Return the shape of what stays of a variable."""
        return self.sizes(self.value_of(variable))

    def value_of(self, variable: Any) -> Labelled:
        """Return the labels of a variable, none for one that was never met."""
        shape = tuple(map(int, variable.shape))
        return self.found.variables.get(id(variable), Labelled(shape))

    def cut(self, variable: Any, numbers: np.ndarray) -> np.ndarray:
        """Return what stays of the numbers of a variable."""
        value = self.value_of(variable)
        for axis in sorted(value.axes):
            numbers = numbers.take(self.indices(value, axis), axis)
        return numbers

    def zeroed(self, variable: Any, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers of a variable with zeros for those that go."""
        for plane in self.value_of(variable).planes:
            numbers = np.where(keeps(plane, self.labels), numbers, np.zeros((), numbers.dtype))
        return numbers

    def check_products(self) -> None:
        """Raise `Unsupported` naming a layer whose kept entries are not the same along each axis."""
        for call, found in self.found.calls:
            for value in found if isinstance(found, list) else [found]:
                if not is_product(value, self.labels):
                    raise Unsupported(
                        "the units that stay are not the same along each axis",
                        where=WHERE,
                        got=call.site,
                    )
