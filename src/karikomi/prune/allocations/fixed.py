"""Shares of some tensors by hand inside of an allocation of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.errors import InvalidArgument
from karikomi.prune.allocations.allocation import (
    Allocation,
    Allocator,
    Pool,
    Tensor,
    as_allocation,
    check_sparsity,
    least_left,
    name_of,
)
from karikomi.registry import register
from karikomi.schedule import is_number
from karikomi.select import spread


@register(
    "allocator",
    formula="the given shares of some tensors, an allocation of the others",
    source="Evci et al. 2020, Rigging the Lottery (custom_sparsity_map)",
)
@dataclass(frozen=True, slots=True)
class Fixed(Allocator):
    """The shares of some tensors by hand, the others by an allocation at the sparsity that is asked for.

    `shares`: names or globs -> the share of their items that goes, in [0, 1); a name takes precedence over a glob, an
    earlier glob over a later one. `others`: the allocation of the rest, a registered name or an object. The sparsity
    holds among the others alone, so that the whole has another one, which the account says; with ``of_all=True`` the
    others make up for it: ``round(sparsity * items)`` go in all. In a schedule the shares hold from its first masks on.
    Raises `InvalidArgument`, also where the others cannot make up for it, and `UnknownName` for a glob.

    >>> sizes = {name: Tensor(items=100, shape=(10, 10)) for name in ("stem", "body", "head")}
    >>> [pool.remove for pool in Fixed({"head": 0.5})(sizes, 0.9)]
    [90, 90, 50]
    >>> [pool.remove for pool in Fixed({"head": 0.5}, others="uniform", of_all=True)(sizes, 0.8)]
    [95, 95, 50]

    Source: the ``custom_sparsity_map`` of the code of Evci et al. 2020, "Rigging the Lottery", and of JaxPruner.
    """

    shares: Mapping[str, float] | Iterable[tuple[str, float]]
    others: Allocation = "uniform"
    _: KW_ONLY
    of_all: bool = False

    def __post_init__(self) -> None:
        pairs = tuple(dict(self.shares).items())
        if not pairs:
            raise InvalidArgument(
                "no share is given", where="Fixed.shares", allowed="{glob: share}"
            )
        for glob, share in pairs:
            check_sparsity(share, where=f"Fixed.shares: {glob}")
        # Plain values, so that a schedule can be compared and written down.
        plain = tuple((str(glob), float(share)) for glob, share in pairs if is_number(share))
        object.__setattr__(self, "shares", plain)
        as_allocation(self.others)

    @property
    def name(self) -> str:
        """The name of the allocation of the others."""
        return name_of(self.others)

    def __call__(self, tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
        """Return the pools, in the order of the tensors as far as each is one of its own."""
        check_sparsity(sparsity)
        fixed = {
            name: max(round(share * tensors[name].items), tensors[name].gone)
            for name, share in self._chosen(tensors).items()
        }
        rest = {name: tensor for name, tensor in tensors.items() if name not in fixed}
        if self.of_all:
            sparsity = _left(tensors, rest, sum(fixed.values()), sparsity)
        pools = as_allocation(self.others)(rest, sparsity) if rest else []
        pools += [Pool((name,), count) for name, count in fixed.items()]
        places = {name: place for place, name in enumerate(tensors)}
        return sorted(pools, key=lambda pool: places[pool.names[0]])

    def fewest(self, tensors: Mapping[str, Tensor]) -> int:
        """Return how many items go by hand, which the whole share cannot be below."""
        shares = self._chosen(tensors) if self.of_all else {}
        return sum(max(round(s * tensors[n].items), tensors[n].gone) for n, s in shares.items())

    def least(self, tensors: Mapping[str, Tensor]) -> int:
        """Return how many items stay at the largest share that the others can lose."""
        fixed = self._chosen(tensors)
        rest = {name: tensor for name, tensor in tensors.items() if name not in fixed}
        items, others = (sum(item.items for item in some.values()) for some in (tensors, rest))
        stay = max(least_left(self.others, rest), 1)
        if self.of_all:
            return stay + sum(item.items for item in tensors.values()) - others
        return -(-items * stay // max(others, 1))

    def _chosen(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return spread("shares", dict(self.shares), tensors, where="Fixed")


def _left(
    tensors: Mapping[str, Tensor], rest: Mapping[str, Tensor], gone: int, sparsity: float
) -> float:
    """Return the share of the rest that has to go beside `gone`."""
    target = round(sparsity * sum(tensor.items for tensor in tensors.values()))
    items = sum(tensor.items for tensor in rest.values())
    if not gone <= target < gone + max(items, 1):
        raise InvalidArgument(
            "the other tensors cannot make up for the shares by hand",
            where="Fixed",
            got=f"{gone} by hand, {target} in all",
            allowed=f"{gone} to {gone + max(items - 1, 0)} in all",
        )
    return (target - gone) / max(items, 1)
