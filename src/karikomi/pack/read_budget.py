"""Upper bounds for reading: every size in a file is checked before memory is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from karikomi.errors import BadFile, check

# Below this many decoded bytes the ratio is not checked: a small tensor of zeros may have any.
RATIO_COUNTS_FROM = 2**26
MOST_RANK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Upper bounds for reading a packed file; a file that needs more is refused.

    `tensors`: how many; `rank`: axes of one (at most 64, as in NumPy); `elements`: of one tensor, counting its
    non-zero dimensions; `decoded`: bytes of all decoded tensors and their grids together; `ratio`:
    decoded bytes per byte of file, looked at above 64 MiB decoded; `header`: bytes of the
    safetensors header, and of the manifest, stored and expanded; `slow`: levels that are decoded one after the other,
    some microseconds each. All are integers >= 1. Raises
    `InvalidArgument`.

    >>> Budget(decoded=8 * 2**30).tensors
    65536
    """

    tensors: int = 2**16
    rank: int = 64
    elements: int = 2**30
    decoded: int = 2**32
    ratio: int = 4096
    header: int = 2**24
    slow: int = 2**21

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            good = type(value) is int and value >= 1
            check("Budget", (good, f"{field.name} must be an integer >= 1", repr(value), None))
        good = self.rank <= MOST_RANK
        check("Budget", (good, "rank out of range", self.rank, f"<= {MOST_RANK}"))

    def admit(self, field: str, needed: int, where: str) -> None:
        """Raise `BadFile` where `needed` is more than `field` allows."""
        allowed = getattr(self, field)
        if needed > allowed:
            raise BadFile(
                f"needs more {field} than the budget",
                where=where,
                got=needed if needed < 10**18 else "more than 10^18",
                allowed=f"<= {allowed}",
                hint=f"if you trust the file, read it with budget=Budget({field}=...)",
            )

    def admit_elements(self, shape: tuple[int, ...], where: str) -> None:
        """Raise `BadFile` for a shape of too many axes or elements."""
        self.admit("rank", len(shape), where)
        # Zeros are left out: (0, 2**62) holds nothing, yet no array of that shape can be made.
        self.admit("elements", math.prod(n for n in shape if n), where)

    def admit_decoded(self, decoded: int, stored: int, where: str) -> None:
        """Raise `BadFile` where the decoded bytes are too many, alone or beside the stored ones."""
        self.admit("decoded", decoded, where)
        if decoded > RATIO_COUNTS_FROM:
            self.admit("ratio", decoded // max(stored, 1), where)
