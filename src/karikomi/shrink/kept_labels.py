"""What stays of labelled tensors when some labels go."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from karikomi.shrink.label_planes import Labelled, kept_along

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KeptLabels:
    """What stays: a boolean per label."""

    labels: np.ndarray
    # With the tensor of labels itself, so that no other one gets its identity while the shape is remembered.
    _sizes: dict[int, tuple[Labelled, Shape]] = field(default_factory=dict, init=False)

    def indices(self, value: Labelled, axis: int) -> np.ndarray:
        """Return the indices that stay along an axis."""
        return kept_along(value, axis, self.labels)

    def sizes(self, value: Labelled) -> Shape:
        """Return the shape of what stays."""
        if id(value) not in self._sizes:
            axes = value.axes
            shape = tuple(
                len(self.indices(value, axis)) if axis in axes else size
                for axis, size in enumerate(value.shape)
            )
            self._sizes[id(value)] = value, shape
        return self._sizes[id(value)][1]

    def changes(self, value: Labelled | list[Labelled]) -> bool:
        """Return whether anything of a tensor, or of several, goes."""
        parts = value if isinstance(value, list) else [value]
        return any(self.sizes(part) != part.shape for part in parts)

    def before(self, value: Labelled, axis: int, place: int) -> int:
        """Return how many of the indices below `place` stay."""
        return int((self.indices(value, axis) < place).sum())
