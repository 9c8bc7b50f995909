"""What the masks of every framework say of themselves; the arrays are the framework's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from karikomi.prune.account import Account

Mask = TypeVar("Mask")


class MaskMapping(Mapping[str, Mask]):
    """Name -> mask, true where the weight is kept; `left_alone`: name -> why it has none."""

    def __init__(
        self,
        kept: Mapping[str, Mask] | None,
        left_alone: Mapping[str, str] | None,
        account: Account | None,
    ) -> None:
        self._kept = dict(kept or {})
        self.left_alone = dict(left_alone or {})
        self.account = account or Account()

    def __getitem__(self, name: str) -> Mask:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, {self.sparsity:.2%} zero)"

    @property
    def sparsity(self) -> float:
        """The share of masked weights among all weights that have a mask, in [0, 1]."""
        counts = self.counts().values()
        total = sum(size for _, size in counts)
        return sum(removed for removed, _ in counts) / total if total else 0.0

    @property
    def emptied(self) -> tuple[str, ...]:
        """The names of the tensors that kept no weight at all."""
        return tuple(name for name, (removed, size) in self.counts().items() if removed == size > 0)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return name -> ``(removed weights, all weights)``."""
        raise NotImplementedError
