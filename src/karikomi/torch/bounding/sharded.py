"""Bounds on sharded weights: rules use norms of whole weights and change the local shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from karikomi.errors import KarikomiError, NonFinite, Unsupported
from karikomi.rule import Rule, Scope, order_of
from karikomi.torch.bounding.projections import NearestPoints
from karikomi.torch.bounding.unsharded import measured
from karikomi.torch.distributed import collectives
from karikomi.torch.distributed.dtensors import Joint, is_sharded, joints, local, own_units
from karikomi.torch.numerics.orders import Axis

WHERE = "torch.bound_"
MEND = "load the last good checkpoint: no bound can mend them"
"""The hint of errors about weights that are not finite."""


class ShardedWeights:
    """The shards of the weights that a rule bounds, and the reductions of their numbers.

    `here`: name -> the part on this rank, to be written to. All ranks call all methods in the same order.
    """

    def __init__(
        self, found: Mapping[str, torch.Tensor], rule: Rule, axes: Mapping[str, Axis | None]
    ) -> None:
        self.here = {name: local(found[name].detach()) for name in axes}
        self._found, self._rule, self._axes = found, rule, axes
        self._joints = joints({name: found[name] for name in axes}, copied=True)
        self._split = {name for joint in self._joints for name in joint.shares}
        self._units: dict[str, slice] = {}
        self._error: Unsupported | None = None
        if rule.scope is Scope.UNIT:
            self._place_units()

    @classmethod
    def of(
        cls, found: Mapping[str, torch.Tensor], rule: Rule, axes: Mapping[str, Axis | None]
    ) -> ShardedWeights | None:
        """Return the sharding of weights with unit `axes`, None if none is; raises `Unsupported` for pending sums."""
        sharded: dict[str, Any] = {name: found[name] for name in axes if is_sharded(found[name])}
        if not sharded:
            return None
        _check_whole(rule, {name: axes[name] for name in sharded})
        for name, tensor in sharded.items():
            if any(placement.is_partial() for placement in tensor.placements):
                raise Unsupported(
                    "sums that are still to be made have no weights to bound",
                    where=f"{WHERE}: {name}",
                    got=tensor.placements,
                    hint="redistribute the parameter first",
                )
        return cls(found, rule, axes)

    def measured(
        self, vectors: dict[str, torch.Tensor], nearest: NearestPoints
    ) -> dict[str, np.ndarray]:
        """Return name -> the numbers of whole weights, as `weights.measured` does of plain ones.

        `SpectralCap` sees one weight after the other whole. Raises, on all ranks, `NonFinite` for what is
        not finite on one of them, and `Unsupported` where the units of one do not lie side by side.
        """
        if "spectral_norm" in self._rule.needs:
            numbers = self._spectral(vectors, nearest)
        else:
            numbers = measured(self._rule, self.here, self._axes, vectors, nearest)
        bad = not all(np.isfinite(own).all() for own in numbers.values())
        numbers = {name: self._placed(name, own) for name, own in numbers.items()}
        troubles = [float(bad), float(self._error is not None)]
        again = []
        for place, joint in enumerate(self._joints):
            # The state after one set of ranks is the input of the next; the largest set is last.
            *troubles, open_ended = self._join(joint, numbers, [*troubles, self._is_open(place)])
            again += [joint] if open_ended else []
        for joint in reversed(again):
            troubles = collectives.largest(joint.groups, np.array(troubles)).tolist()
        self._raise(numbers, *troubles)
        return numbers

    def own(self, name: str, part: slice) -> slice:
        """Return which of the numbers of one weight, `part` of those of all, are of units on this rank."""
        units = self._units.get(name)
        return part if units is None else slice(part.start + units.start, part.start + units.stop)

    def totals(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return how many entries of whole weights are counted, from how many of the parts.

        `counts`: of weights that the numbers of the whole single out, so that they are the same on all ranks.
        """
        totals: dict[str, float] = dict(counts)
        for joint in self._joints:
            names = [name for name in joint.shares if name in counts]
            if names:
                own = np.array([counts[name] for name in names], dtype=np.float64)
                every = collectives.summed(joint.groups, own) * [
                    joint.shares[name] for name in names
                ]
                totals.update(zip(names, every.tolist(), strict=True))
        return totals

    def _place_units(self) -> None:
        for name in self._axes:
            if name not in self._split:
                continue
            try:
                self._units[name] = own_units(self._found[name], _axis(self._axes[name]))
            except Unsupported as error:
                # Raised later, when the other ranks, whose units may be in order, have heard of it.
                self._error = self._error or error
                self._units[name] = slice(0, 0)

    def _placed(self, name: str, own: np.ndarray) -> np.ndarray:
        units = self._units.get(name)
        if units is None:
            return own
        numbers = np.zeros(self._found[name].shape[_axis(self._axes[name])])
        numbers[units] = own[: units.stop - units.start]
        return numbers

    def _spectral(
        self, vectors: dict[str, torch.Tensor], nearest: NearestPoints
    ) -> dict[str, np.ndarray]:
        numbers: dict[str, np.ndarray] = {}
        for name, axis in self._axes.items():
            tensor: Any = self._found[name].detach()
            whole = tensor.full_tensor() if is_sharded(tensor) else tensor
            numbers |= measured(self._rule, {name: whole}, {name: axis}, vectors, nearest)
        return numbers

    def _is_open(self, place: int) -> bool:
        """Return whether a later set of ranks lacks a rank of the set at `place`."""
        own = {*self._joints[place].over}
        return any(not own <= {*later.over} for later in self._joints[place + 1 :])

    def _join(
        self, joint: Joint, numbers: dict[str, np.ndarray], troubles: Sequence[float]
    ) -> list[float]:
        """Put the numbers of whole weights in place of those of parts; return the troubles of all ranks."""
        names = list(joint.shares)
        own = np.concatenate([np.zeros(0), *(numbers[name] for name in names)])
        counts = [len(numbers[name]) for name in names]
        if self._rule.scope is Scope.ELEMENT or "spectral_norm" in self._rule.needs:
            whole = collectives.largest(joint.groups, np.append(own, troubles))
            whole, heard = whole[: len(own)], whole[len(own) :]
        else:
            shares = np.repeat(list(joint.shares.values()), counts)
            no_peaks = np.zeros(len(own), bool)
            whole, heard = collectives.reduced(
                joint.groups, own, np.array(troubles), shares, no_peaks, order_of(self._rule)
            )
        numbers.update(zip(names, np.split(whole, np.cumsum(counts))[:-1], strict=True))
        return heard.astype(np.float64).tolist()

    def _raise(self, numbers: Mapping[str, np.ndarray], bad: float, apart: float) -> None:
        error: KarikomiError | None = self._error
        if apart and error is None:
            error = Unsupported(
                "the units of another rank do not lie side by side",
                where=WHERE,
                hint="use a rule by tensor",
            )
        if error is not None:
            raise error
        if bad and all(np.isfinite(own).all() for own in numbers.values()):
            raise NonFinite("non-finite weights on another rank", where=WHERE, hint=MEND)


def _check_whole(rule: Rule, axes: Mapping[str, Axis | None]) -> None:
    """Raise `Unsupported` for what needs more of a sharded weight than its numbers."""
    several = [name for name, axis in axes.items() if isinstance(axis, tuple)]
    if several:
        raise Unsupported(
            "the units of a sharded weight have one axis",
            where=f"{WHERE}(unit_axes): {several[0]}",
            got=axes[several[0]],
        )
    if "distance" in rule.needs and not getattr(rule, "by_entry", False):
        raise Unsupported(
            f"{type(rule).__name__} needs all entries of a weight, and a sharded one lies on several ranks",
            where=WHERE,
            got=", ".join(list(axes)[:3]),
            hint="MaxNorm, Clamp and a Box between two numbers bound sharded weights",
        )


def _axis(axis: Axis | None) -> int:
    return axis if isinstance(axis, int) else 0
