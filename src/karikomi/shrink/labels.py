"""Labels of units, and which of them can only be removed together.

Every index of every axis of every weight gets a label, a positive integer. Wherever an operation makes two
labels meet, they are joined; what is joined is removed together or not at all. 0 is no label: an
entry with it always stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive labels of one axis of one tensor: ``first`` to ``first + size - 1``."""

    owner: str
    axis: int
    first: int
    size: int

    @property
    def labels(self) -> np.ndarray:
        """The labels in the order of the axis."""
        return np.arange(self.first, self.first + self.size)


class Labels:
    """A union-find over labels, with the reasons why some of them are fixed and why others were joined.

    >>> import numpy as np
    >>> labels = Labels()
    >>> rows, columns = labels.new("a.weight", 0, 3), labels.new("b.weight", 1, 3)
    >>> labels.join(rows, columns, "a, then b")
    >>> labels.fix(rows[2:], "output")
    >>> labels.roots(columns).tolist(), labels.classes().reasons
    ([1, 2, 3], {3: 'output'})
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._parent = np.zeros(1, np.int64)
        self._reason = np.zeros(1, np.int32)
        self._owned = np.zeros(1, bool)
        self._reasons = [""]
        self._joined: list[tuple[np.ndarray, int]] = []
        self._sites: dict[str, int] = {}

    @property
    def joins(self) -> int:
        """How often labels were joined."""
        return len(self._joined)

    @property
    def count(self) -> int:
        """The number of labels, with 0."""
        return len(self._parent)

    def new(self, owner: str, axis: int, size: int) -> np.ndarray:
        """Return fresh labels of an axis."""
        block = Block(owner, axis, self.count, size)
        self.blocks.append(block)
        self._parent = np.concatenate([self._parent, block.labels])
        self._reason = np.concatenate([self._reason, np.zeros(size, np.int32)])
        self._owned = np.concatenate([self._owned, np.full(size, bool(owner))])
        return block.labels

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """Return one label for each class, the smallest of it, in the shape of `labels`."""
        found = np.asarray(self._parent[labels])
        while True:
            above = np.asarray(self._parent[found])
            if np.array_equal(above, found):
                break
            found = np.asarray(self._parent[above])
        self._parent[labels] = found
        return found

    def owned(self, labels: np.ndarray) -> np.ndarray:
        """Return for each label whether its class has an index of a tensor, and not of padding or repetition only."""
        return self._owned[self.roots(labels)]

    def join(self, ones: np.ndarray, others: np.ndarray, site: str) -> None:
        """Join labels pairwise; one that meets 0 is fixed. `site`: where, for the account."""
        ones, others = (side.ravel() for side in np.broadcast_arrays(ones, others))
        bare = (ones == 0) != (others == 0)
        if bare.any():
            self.fix(np.maximum(ones, others)[bare], site)
        both = (ones != 0) & (others != 0)
        ones, others = ones[both], others[both]
        while True:
            ones, others = self.roots(ones), self.roots(others)
            apart = ones != others
            if not apart.any():
                return
            ones, others = ones[apart], others[apart]
            low, high = np.minimum(ones, others), np.maximum(ones, others)
            np.minimum.at(self._parent, high, low)
            np.logical_or.at(self._owned, low, self._owned[high])
            number = self._sites.setdefault(site, len(self._sites))
            self._joined.append((np.unique(low), number))

    def fix(self, labels: np.ndarray, reason: str) -> None:
        """Let labels, with all that are or will be joined with them, stay for `reason`."""
        chosen = np.unique(labels)
        chosen = chosen[(chosen != 0) & (self._reason[chosen] == 0)]
        if not len(chosen):
            return
        if self._reasons[-1] != reason:
            self._reasons.append(reason)
        self._reason[chosen] = len(self._reasons) - 1

    def classes(self) -> Classes:
        """Return which labels go together, as it stands."""
        every = np.arange(self.count)
        roots = self.roots(every)
        held = self._reason != 0
        first: dict[int, str] = {}
        for root, number in zip(roots[held].tolist(), self._reason[held].tolist(), strict=True):
            first.setdefault(root, self._reasons[number])
        sites: dict[int, list[str]] = {}
        names = list(self._sites)
        for low, number in self._joined:
            for root in np.unique(roots[low]).tolist():
                known = sites.setdefault(root, [])
                if names[number] not in known:
                    known.append(names[number])
        return Classes(roots, tuple(self.blocks), first, sites)


@dataclass(frozen=True, slots=True)
class Classes:
    """Which labels go together.

    `roots`: label -> its class. `blocks`: the axes that have labels. `reasons`: class -> why it
    stays; a class without a reason can be removed. `sites`: class -> the operations that joined it.
    """

    roots: np.ndarray
    blocks: tuple[Block, ...]
    reasons: dict[int, str]
    sites: dict[int, list[str]]

    def free(self) -> np.ndarray:
        """Return a boolean per label: whether its class can be removed."""
        fixed = np.zeros(len(self.roots), bool)
        fixed[list(self.reasons)] = True
        fixed[0] = True
        return ~fixed[self.roots]
