"""What training steps show of weights: running facts, for scores that schedules ask while a network trains.

Separate from measuring on data, which needs passes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune.schedules.pruning_schedule import PruningSchedule
from karikomi.schedule import whole

# What a training step shows of a weight: its gradient, the weight, the learning rate.
_SHOWN = {
    "gradient": lambda gradient, weight, rate: gradient,
    "squared_gradient": lambda gradient, weight, rate: gradient * gradient,
    "moved": lambda gradient, weight, rate: -rate * weight * gradient,
}
_SUMS = frozenset({"moved"})
"""Facts that are sums over all steps; the others are means since the last masks."""
_OF_ALLOCATIONS = {"owl": {"outliers"}, "sensitivity": {"curve"}}


class RunningStats:
    """What the gradients of training steps show of weights: running facts for scores.

    A step's part is noted before its gradients are masked, and taken in once the step was taken.
    """

    def __init__(self, facts: frozenset[str]) -> None:
        self.facts = facts
        self._steps = 0
        self._sums: dict[str, dict[str, torch.Tensor]] = {fact: {} for fact in sorted(facts)}
        self._now: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def waiting(self) -> bool:
        """Whether a step's part is noted and not taken in."""
        return bool(self._now)

    def note(
        self,
        weights: Mapping[str, torch.Tensor],
        rates: Mapping[str, float],
        scale: torch.Tensor | None,
    ) -> None:
        """Note what this step shows; a weight without a gradient shows zeros."""
        self._now = {fact: {} for fact in self._sums}
        for name, weight in weights.items():
            if weight.grad is None:
                continue
            # A copy: the gradient itself is masked and clipped before the step is known to be taken.
            gradient = weight.grad.detach().to(torch.float32, copy=True)
            gradient = gradient if scale is None else gradient / scale
            for fact, now in self._now.items():
                now[name] = _SHOWN[fact](gradient, weight.detach().float(), rates[name])

    def take_in(self) -> None:
        """Add the step's part to the sums."""
        for fact, now in self._now.items():
            sums = self._sums[fact]
            for name, current in now.items():
                sums[name] = sums[name] + current if name in sums else current
        self._steps += bool(self._now)
        self._now = {}

    def finite(self) -> bool:
        """Return whether the step's part is finite."""
        return all(finite(now) for now in self._now.values())

    def drop(self) -> None:
        """Forget the step's part."""
        self._now = {}

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
        """Return everything, for a checkpoint."""
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
                "the state has not the facts that the score needs",
                where="prune: shown",
                got=sorted(sums) if isinstance(sums, Mapping) else type(sums).__name__,
                allowed=sorted(self._sums),
            )
        return steps, {fact: _fitting(total, found) for fact, total in sums.items()}

    def load(self, read: tuple[int, Any]) -> None:
        """Continue with what `read` returned."""
        self._steps, self._sums = read
        self._now = {}


def shown_in_training(schedule: PruningSchedule) -> frozenset[str]:
    """Return the facts that training has to show, or refuse the score or the allocation."""
    score = schedule.scored_by()
    asked = {
        type(score).__name__: score.needs | {"inputs"} if score.updates else score.needs,
        f"allocation {schedule.allocation!r}": _OF_ALLOCATIONS.get(
            schedule.allocation or "", set()
        ),
    }
    for asker, needs in asked.items():
        missing = needs - _SHOWN.keys() - {"noise"}
        if missing:
            raise Unsupported(
                f"{asker} needs {', '.join(sorted(missing))}, which training steps do not show",
                where="torch.attach(prune)",
                allowed=f"what needs no more than {', '.join(_SHOWN)}",
                hint="masks = kk.torch.prune_(model, ..., data=batches), then attach(prune=masks)",
            )
    return frozenset(score.needs & _SHOWN.keys())


def finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether all is finite: what masks hide of a gradient, no one has looked at before."""
    flags = [tensor.isfinite().all() for tensor in tensors.values()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def _fitting(given: Any, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not isinstance(given, Mapping):
        raise InvalidArgument("this is no state of a schedule", where="prune: shown")
    for name, tensor in given.items():
        if name not in found or getattr(tensor, "shape", None) != found[name].shape:
            raise InvalidArgument("what was measured in training does not fit", where=str(name))
    return {name: tensor.to(found[name].device, copy=True) for name, tensor in given.items()}
