"""Masks by name, common to all frameworks, whose arrays they are, and the check of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from karikomi.errors import InvalidArgument, check_known
from karikomi.prune.account import Account

Mask = TypeVar("Mask")


def check_masks(
    masks: Mapping[str, Any] | None,
    shapes: Mapping[str, tuple[int, ...] | None],
    *,
    where: str,
    leaf: str = "tensor",
) -> None:
    """Raise for masks that are not boolean, and those without a tensor of their name and shape.

    `shapes`: name -> shape, None where any fits. `leaf`: what errors call a tensor.
    """
    for name, mask in (masks or {}).items():
        check_known(name, shapes, f"a mask without its {leaf}", where=where)
        shape, dtype = (
            tuple(getattr(mask, "shape", ())),
            getattr(mask, "dtype", type(mask).__name__),
        )
        expected = shape if shapes[name] is None else tuple(shapes[name] or ())
        if shape != expected or "bool" not in str(dtype):
            raise InvalidArgument(
                f"the mask does not fit its {leaf}",
                where=f"{where}: {name}",
                got=f"{dtype} {shape}",
                allowed=f"bool {expected}",
            )


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
