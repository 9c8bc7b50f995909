"""Joint norms of sharded gradients: every logical parameter counts once, whatever its mesh.

Each rank measures its local part, and the numbers are reduced here. The layout of DTensors is given by their
mesh and placements: one reduction for each set of ranks. That other ranks have other plain parameters is
given by the caller as `process_group`; their joint norm is one more number, with a name such as
``(other ranks of experts.*)``.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from karikomi.errors import InvalidArgument, UnknownName, Unsupported, suggest
from karikomi.rule import Scope
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import PEAKS, Kind, Part, Stage
from karikomi.torch.distributed import collectives
from karikomi.torch.distributed.dtensors import (
    copies_of,
    is_sharded,
    joints,
    local,
    own_units,
    ranks_of,
)
from karikomi.torch.modules.parameters import other_names
from karikomi.torch.numerics.orders import unit_norms_of

Groups: TypeAlias = "dist.ProcessGroup | Mapping[str, dist.ProcessGroup]"
"""A process group, or globs over parameter names -> process group."""

_ALIKE = 1e-6  # replicas summed in another order differ by rounding


@dataclass(frozen=True, slots=True)
class _Others:
    """The parameters of the other ranks of a group, in place of these members."""

    name: str
    group: Any
    members: frozenset[str]
    size: float


@dataclass(frozen=True, slots=True)
class _Layout:
    """The sets of ranks that the numbers of a stage are reduced over."""

    stage: Stage
    joints: list[tuple[tuple[Any, ...], np.ndarray, np.ndarray, np.ndarray]]
    others: list[tuple[_Others, np.ndarray, bool, bool]]
    peaks: np.ndarray
    comparable: np.ndarray


class Sharding:
    """The ranks of the parts of named parameters, and the reduction of their numbers.

    `elsewhere`: a name for the parameters of other ranks, per glob of `process_group`; `sizes`: their entries.
    """

    def __init__(
        self,
        found: Mapping[str, torch.Tensor],
        groups: Groups | None,
        *,
        check_ranks: bool,
        further: Mapping[str, str] | None = None,
    ) -> None:
        self._joints = joints(found)
        self._others = _others(found, groups, further or {})
        self._check_ranks = check_ranks
        self._layouts: dict[int, _Layout] = {}
        self.elsewhere = tuple(other.name for other in self._others)
        self.sizes = tuple(other.size for other in self._others)

    @classmethod
    def of(
        cls,
        found: Mapping[str, torch.Tensor],
        groups: Groups | None,
        *,
        check_ranks: bool,
        module: Any = None,
    ) -> Sharding | None:
        """Return the sharding of parameters, ``None`` where all are whole on this rank.

        `module`: for the further names of tied weights. `groups`: see `attach`; a DTensor whose mesh has other ranks of
        the group is counted by its mesh. Raises `InvalidArgument` without ranks or for an object that is not a group,
        `UnknownName` for a glob that matches nothing on any rank, `Unsupported` for a tensor on a mesh without this
        rank.
        """
        if groups is None and not check_ranks and not any(map(is_sharded, found.values())):
            return None
        if not dist.is_available() or not dist.is_initialized():
            raise InvalidArgument(
                "there are no ranks to join",
                where="process_group, check_ranks",
                hint="call torch.distributed.init_process_group first",
            )
        further = other_names(module) if isinstance(module, nn.Module) else None
        return cls(found, groups, check_ranks=check_ranks, further=further)

    def extended(self, stages: Sequence[Stage]) -> tuple[Stage, ...]:
        """Return stages that also have a number for each name of `elsewhere`.

        It is used by rules of global and element scope, other rules act on this rank alone; where a rule of one
        sort follows one of the other, a new stage begins. Raises `Unsupported` where a global rule acts on
        some of the tensors of a group only: of other ranks only the joint norm is known.
        """
        if not self._others:
            return tuple(stages)
        return tuple(self._with_others(run) for stage in stages for run in _runs(stage))

    def settle_(self, parameters: Iterable[torch.Tensor]) -> None:
        """Redistribute gradients with other placements than their parameters (pending sums)."""
        for parameter in parameters:
            gradient: Any = parameter.grad
            if gradient is None or not is_sharded(gradient):
                continue
            own: Any = parameter
            if gradient.placements != own.placements:
                own.grad = gradient.redistribute(placements=own.placements)

    def combined(
        self, stage: Stage, numbers: np.ndarray, present: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of whole tensors, and which are present, from those of their local parts.

        `numbers`, `present`: one per number of the stage, without those of `elsewhere`, which the result has
        at its end. A collective: all ranks call it for the same stages in the same order. A number that is not
        finite on one rank is not finite on any.
        """
        layout = self._layout(stage)
        numbers, present = numbers.astype(np.float64), present.copy()
        for groups, places, shares, peaks in layout.joints:
            numbers[places], present[places] = collectives.reduced(
                groups, numbers[places], present[places], shares, peaks, stage.order
            )
        more = [_elsewhere(*item, numbers, present, stage.order) for item in layout.others]
        if not more:
            return numbers, present
        extra, there = zip(*more, strict=True)
        return np.append(numbers, extra), np.append(present, there)

    def check(self, stage: Stage, outcome: Outcome) -> None:
        """Raise `Unsupported` on every rank if they decided differently, where `check_ranks` is set."""
        if not self._check_ranks:
            return
        layout = self._layout(stage)
        norms, peaks = layout.comparable & ~layout.peaks, layout.comparable & layout.peaks
        own = [float(bool(outcome.skipped))]
        for vector in map(np.asarray, (outcome.norms, outcome.after)):
            own += [collectives.norm(vector[norms], stage.order), collectives.peak(vector[peaks])]
        every = collectives.gathered(dist.group.WORLD, np.array(own))
        alike = np.isclose(every, every[0], rtol=_ALIKE, atol=0.0, equal_nan=True)
        if alike.all():
            return
        other = int(np.argmin(alike.all(axis=1)))
        raise Unsupported(
            f"the ranks decided differently: rank 0 {_format_row(every[0])}, rank {other} {_format_row(every[other])}",
            where="check_ranks",
            hint="are plain gradients reduced, and rules and states alike?",
        )

    def is_split(self, tensor: torch.Tensor) -> bool:
        """Return whether this rank has only a part of a tensor."""
        return is_sharded(tensor) and copies_of(tensor) < tensor.device_mesh.size()  # type: ignore[attr-defined]

    def unit_norms(self, tensor: torch.Tensor, axis: int, order: float) -> np.ndarray:
        """Return one norm per unit of the whole tensor, of the local entries; 0 for units of other ranks."""
        numbers = np.zeros(tensor.shape[axis])
        here = unit_norms_of(local(tensor), axis, order).cpu().double().numpy()
        numbers[own_units(tensor, axis)] = here
        return numbers

    def _with_others(self, stage: Stage) -> Stage:
        kinds, columns = [], []
        for other in self._others:
            own = {k for n, k in zip(stage.names, stage.kinds, strict=True) if n in other.members}
            kinds.append(Kind.PEAK if (own or set(stage.kinds)) <= {*PEAKS} else Kind.NORM)
            columns.append([_concerns(part, other, stage) for part in stage.parts])
        parts = []
        for place, part in enumerate(stage.parts):
            more = [column[place] for column in columns]
            members = part.members
            if members is None and not all(more):
                members = np.full(sum(stage.counts), True)
            parts.append(
                replace(part, members=None if members is None else np.append(members, more))
            )
        return Stage(
            (*stage.names, *self.elsewhere),
            (*stage.kinds, *kinds),
            (*stage.counts, *(1 for _ in self._others)),
            tuple(parts),
            order=stage.order,
        )

    def _layout(self, stage: Stage) -> _Layout:
        known = self._layouts.get(id(stage))
        if known is None:
            # The stage is kept with it, so that its id is not reused.
            known = self._layouts[id(stage)] = self._laid_out(stage)
        return known

    def _laid_out(self, stage: Stage) -> _Layout:
        peaks = np.repeat([kind in PEAKS for kind in stage.kinds], stage.counts)
        joints = []
        for joint in self._joints:
            places = np.flatnonzero(_marked(stage, joint.shares))
            shares = np.repeat([joint.shares.get(name, 0.0) for name in stage.names], stage.counts)
            joints.append((joint.groups, places, shares[places], peaks[places]))
        others, comparable = [], np.full(len(peaks), True)
        for place, other in enumerate(self._others, start=len(peaks) - len(self._others)):
            own = _marked(stage, other.members)
            counted = any(part.members is None or part.members[place] for part in stage.parts)
            others.append((other, np.flatnonzero(own), bool(peaks[place]), counted))
            if not counted:
                comparable[own] = comparable[place] = False
        return _Layout(stage, joints, others, peaks, comparable)


def _others(
    found: Mapping[str, torch.Tensor], groups: Groups | None, further: Mapping[str, str]
) -> list[_Others]:
    """Return the groups with their members; `further`: another name of a tied weight -> its first."""
    if groups is None:
        return []
    pairs = list(groups.items()) if isinstance(groups, Mapping) else [("*", groups)]
    if not pairs:
        raise InvalidArgument("there is no group", where="process_group", got="{}")
    free, others = dict(found), []
    for glob, group in pairs:
        if not isinstance(group, dist.ProcessGroup):
            raise InvalidArgument(
                "not a process group of this rank",
                where=f"process_group, {glob}",
                got=type(group).__name__,
                allowed="a torch ProcessGroup, or globs over names -> ProcessGroup",
            )
        # The globs stay as they are, so that ranks with other modules have as many.
        meant = {
            further.get(name, name)
            for name in (*found, *further)
            if name == glob or fnmatch.fnmatchcase(name, glob)
        }
        members = [name for name in free if name in meant]
        members = [name for name in members if not _counted_by_mesh(free[name], group)]
        own = np.array(
            [len(members), sum(found[name].numel() for name in members)], dtype=np.float64
        )
        tensors, entries = collectives.gathered(group, own).sum(axis=0)
        if tensors == 0:
            raise UnknownName(
                "the pattern matches no parameter that its mesh does not count",
                where="process_group",
                got=repr(glob),
                hint=suggest(glob, found),
            )
        for name in members:
            del free[name]
        label = f"(other ranks of {glob})" if isinstance(groups, Mapping) else "(other ranks)"
        others.append(_Others(label, group, frozenset(members), max(1.0, float(entries - own[1]))))
    return others


def _counted_by_mesh(tensor: torch.Tensor, group: Any) -> bool:
    if not is_sharded(tensor):
        return False
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return bool({*ranks_of(mesh)} & {*dist.get_process_group_ranks(group)} - {dist.get_rank()})


def _runs(stage: Stage) -> list[Stage]:
    """Return the stage split so that no tensor has rules over all ranks and rules of one rank in the same piece."""
    runs: list[list[Part]] = [[]]
    touched = {True: np.zeros(sum(stage.counts), bool), False: np.zeros(sum(stage.counts), bool)}
    for part in stage.parts:
        joint = _is_joint(part)
        mask = np.full(sum(stage.counts), True) if part.members is None else part.members
        if (touched[not joint] & mask).any():
            runs.append([])
            touched = {sort: np.zeros_like(seen) for sort, seen in touched.items()}
        runs[-1].append(part)
        touched[joint] = touched[joint] | mask
    return [replace(stage, parts=tuple(run)) for run in runs]


def _marked(stage: Stage, names: Container[str]) -> np.ndarray:
    """Return which numbers of a stage are of the given tensors."""
    return np.repeat([name in names for name in stage.names], stage.counts)


def _is_joint(part: Part) -> bool:
    return part.rule.scope in (Scope.GLOBAL, Scope.ELEMENT)


def _concerns(part: Part, other: _Others, stage: Stage) -> bool:
    if not _is_joint(part) or part.members is None:
        return _is_joint(part)
    own = part.members[_marked(stage, other.members)]
    if own.size and own.all():
        return True
    if part.rule.scope is Scope.GLOBAL and (own.any() or not own.size):
        raise Unsupported(
            f"{type(part.rule).__name__} would act on some of the parameters of {other.name}, of which "
            "only the joint norm is known",
            where="process_group",
            hint="give process_group= and Groups the same globs",
        )
    return False


def _elsewhere(
    other: _Others,
    places: np.ndarray,
    is_peak: bool,
    counted: bool,
    numbers: np.ndarray,
    present: np.ndarray,
    order: float = 2.0,
) -> tuple[float, bool]:
    """Return the joint number of the other ranks' parameters, and whether any is present."""
    own = numbers[places][present[places]]
    order = math.inf if is_peak else order
    every = collectives.gathered(
        other.group, np.array([collectives.norm(own, order), own.size > 0], dtype=np.float64)
    )
    theirs = np.delete(every, dist.get_rank(other.group), axis=0)
    number = collectives.norm(theirs[:, 0], order)
    if counted or not math.isfinite(number):
        return number, bool(theirs[:, 1].any())
    return 0.0, False


def _format_row(row: np.ndarray) -> str:
    skip, norm, peak, norm_after, peak_after = row.tolist()
    parts = [f"norm {norm:.6g} to {norm_after:.6g}"] if norm or not peak else []
    parts += [f"largest {peak:.6g} to {peak_after:.6g}"] if peak else []
    return "skips" if skip else ", ".join(parts)
