"""Running facts of weights from training steps, for scores that schedules compute while a network trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune.allocations.allocation import name_of
from karikomi.prune.schedules.pruning_schedule import PruningSchedule
from karikomi.schedule import whole

# Fact -> its term of one training step, from the gradient, the weight and the learning rate.
_TERMS = {
    "gradient": lambda gradient, weight, rate: gradient,
    "squared_gradient": lambda gradient, weight, rate: gradient * gradient,
    "moved": lambda gradient, weight, rate: -rate * weight * gradient,
}
_SUMS = frozenset({"moved"})
"""Facts that are sums over all steps; the others are means since the last masks."""
_OF_ALLOCATIONS = {"owl": {"outliers"}, "sensitivity": {"curve"}}


class RunningStats:
    """Sums and means of facts over training steps.

    The terms of a step are stored before its gradients are masked, and added once the step was taken.
    """

    def __init__(self, facts: frozenset[str]) -> None:
        self.facts = facts
        self._steps = 0
        self._sums: dict[str, dict[str, torch.Tensor]] = {fact: {} for fact in sorted(facts)}
        self._now: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def waiting(self) -> bool:
        """Whether the terms of a step are stored and not yet added."""
        return bool(self._now)

    def note(
        self,
        weights: Mapping[str, torch.Tensor],
        rates: Mapping[str, float],
        scale: torch.Tensor | None,
    ) -> None:
        """Store the terms of this step, zeros for a weight without a gradient."""
        self._now = {fact: {} for fact in self._sums}
        for name, weight in weights.items():
            if weight.grad is None:
                continue
            # A copy: the gradient itself is masked and clipped before the step is known to be taken.
            gradient = weight.grad.detach().to(torch.float32, copy=True)
            gradient = gradient if scale is None else gradient / scale
            for fact, now in self._now.items():
                now[name] = _TERMS[fact](gradient, weight.detach().float(), rates[name])

    def take_in(self) -> None:
        """Add the stored terms to the sums."""
        for fact, now in self._now.items():
            sums = self._sums[fact]
            for name, current in now.items():
                sums[name] = sums[name] + current if name in sums else current
        self._steps += bool(self._now)
        self._now = {}

    def finite(self) -> bool:
        """Return whether the stored terms are finite."""
        return all(finite(now) for now in self._now.values())

    def drop(self) -> None:
        """Drop the stored terms."""
        self._now = {}

    def forget(self, names: Collection[str]) -> None:
        """Drop what is stored of these weights."""
        for sums in (self._sums, self._now):
            for fact, total in sums.items():
                sums[fact] = {name: item for name, item in total.items() if name not in names}

    def restart(self) -> None:
        """Begin new means."""
        self._steps = 0
        self._sums = {fact: total if fact in _SUMS else {} for fact, total in self._sums.items()}

    def found(self, weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Return fact -> name -> tensor, for all of these weights."""
        return {
            fact: {
                name: sums[name] / (1 if fact in _SUMS else self._steps)
                if name in sums
                else torch.zeros_like(weight, dtype=torch.float32)
                for name, weight in weights.items()
            }
            for fact, sums in self._sums.items()
        }

    def plain(self) -> dict[str, Any] | None:
        """Return the state, for a checkpoint."""
        sums = {fact: dict(total) for fact, total in self._sums.items()}
        return {"steps": self._steps, "sums": sums} if self.facts else None

    def read(self, plain: Any, found: Mapping[str, torch.Tensor]) -> tuple[int, Any]:
        """Return what `plain` returned, checked; raises `InvalidArgument` for what does not fit."""
        if plain is None and not self.facts:
            return 0, {}
        sums = plain.get("sums") if isinstance(plain, Mapping) else None
        steps = whole(plain.get("steps")) if isinstance(plain, Mapping) else None
        if steps is None or not isinstance(sums, Mapping) or sums.keys() != self._sums.keys():
            raise InvalidArgument(
                "the state does not have the facts that the score needs",
                where="prune: shown",
                got=sorted(sums) if isinstance(sums, Mapping) else type(sums).__name__,
                allowed=sorted(self._sums),
            )
        return steps, {fact: _checked(total, found) for fact, total in sums.items()}

    def load(self, read: tuple[int, Any]) -> None:
        """Continue with what `read` returned."""
        self._steps, self._sums = read
        self._now = {}


def shown_in_training(schedule: PruningSchedule) -> frozenset[str]:
    """Return the facts that training steps have to give, or raise `Unsupported` for score or allocation."""
    score, allocation = schedule.scored_by(), schedule.allocation or ""
    needs_by_name = {
        type(score).__name__: score.needs | {"inputs"} if score.updates else score.needs,
        f"allocation {allocation!r}": _OF_ALLOCATIONS.get(name_of(allocation), set()),
    }
    for name, needs in needs_by_name.items():
        missing = needs - _TERMS.keys() - {"noise"}
        if missing:
            raise Unsupported(
                f"{name} needs {', '.join(sorted(missing))}, which training steps do not show",
                where="torch.attach(prune)",
                allowed=f"what needs no more than {', '.join(_TERMS)}",
                hint="masks = kk.torch.prune_(model, ..., data=batches), then attach(prune=masks)",
            )
    return frozenset(score.needs & _TERMS.keys())


def finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether all entries are finite, also those that masks hide from the clip."""
    flags = [tensor.isfinite().all() for tensor in tensors.values()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def _checked(sums: Any, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not isinstance(sums, Mapping):
        raise InvalidArgument("this is not a state of a schedule", where="prune: shown")
    for name, tensor in sums.items():
        if name not in found or getattr(tensor, "shape", None) != found[name].shape:
            raise InvalidArgument("what was measured in training does not fit", where=str(name))
    return {name: tensor.to(found[name].device, copy=True) for name, tensor in sums.items()}
