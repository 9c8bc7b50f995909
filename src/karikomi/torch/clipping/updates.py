"""Rules on updates: the change that a step made to the weights is measured and partly undone.

The update of a parameter is its change divided by the learning rate, decoupled weight decay included;
the moments of the optimizer stay as the step left them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.functional.unit_axes import UnitAxes
from karikomi.rule import Composite, Rule
from karikomi.rules.decide import leaves
from karikomi.rules.outcome import Outcome
from karikomi.torch.clipping.host_step import Clipping
from karikomi.torch.clipping.host_tensors import HostTensors
from karikomi.torch.clipping.joint_norms import Sharding
from karikomi.torch.clipping.second_moments import Moments
from karikomi.torch.distributed.dtensors import local


class Updates:
    """A rule for the updates of some optimizers; costs a copy of the weights."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        found: Mapping[str, torch.Tensor],
        rule: Rule | Composite,
        sharding: Sharding | None,
        unit_axes: UnitAxes | None = None,
        *,
        where: str,
    ) -> None:
        _check_moments(optimizers, rule, where=where)
        self._found, self._optimizers = dict(found), optimizers
        self._before = {name: p.detach().clone() for name, p in found.items()}
        self._clipping = Clipping(
            self._before,
            rule,
            module=model,
            nonfinite="skip",
            moments=Moments(),
            sharding=sharding,
            unit_axes=unit_axes,
            where=where,
        )

    def remember(self) -> None:
        """Keep the weights as they are before the step."""
        for name, parameter in self._found.items():
            self._before[name].copy_(parameter)

    def pass_over(self) -> None:
        """Count a step that was not taken; no statistic changes."""
        self._clipping.count_attempt()

    def clip(self) -> Outcome:
        """Clip the updates of the step that was just taken."""
        rates = self._rates()
        updates = [
            None if p.grad is None else (p.detach() - self._before[name]).div_(rates[name])
            for name, p in self._found.items()
        ]
        tensors = _UpdateTensors(self._clipping, updates, self._found, self._optimizers)
        outcome = self._clipping.run_on_host(tensors).outcomes[-1]
        changed = set(self._found) if outcome.skipped else _changed(outcome)
        for (name, parameter), update in zip(self._found.items(), tensors.tensors, strict=True):
            if name in changed:
                before = self._before[name]
                undone = update is None or outcome.skipped
                parameter.copy_(before if undone else before + update * rates[name])  # pyright: ignore[reportOptionalOperand]
        return outcome

    def plain(self) -> dict[str, Any]:
        """Return the state of the rule as plain data."""
        return self._clipping.plain()

    def load(self, plain: Mapping[str, Any] | None) -> None:
        """Restore the state that `plain` returned."""
        self._clipping.load(plain)

    def _rates(self) -> dict[str, float]:
        rates = {
            id(parameter): float(group["lr"]) or 1.0
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        return {name: rates[id(parameter)] for name, parameter in self._found.items()}


class _UpdateTensors(HostTensors):
    """Updates, and the gradients and second moments of the optimizers that made them."""

    def __init__(
        self,
        clipping: Clipping,
        updates: Sequence[torch.Tensor | None],
        found: Mapping[str, torch.Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        super().__init__(clipping, updates)
        self._parameters, self._optimizers = list(found.values()), optimizers

    def gradient(self, place: int) -> torch.Tensor | None:
        """Return the gradient that the update was made of."""
        return self._parameters[place].grad

    def second_moments(self, place: int) -> torch.Tensor | None:
        """Return the second moments after the step, bias-corrected."""
        parameter = self._parameters[place]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if any(parameter is item for item in group["params"]):
                    kept = optimizer.state[parameter]
                    decay = float(group["betas"][1]) ** float(kept["step"])
                    return local(kept["exp_avg_sq"]) / (1.0 - decay)
        return None


def _check_moments(
    optimizers: Sequence[torch.optim.Optimizer], rule: Rule | Composite, *, where: str
) -> None:
    if not any("second_moment" in leaf.needs for leaf in leaves(rule)):
        return
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise Unsupported(
                f"{type(rule).__name__} needs the second moments that Adam and AdamW keep",
                where=where,
                got=type(optimizer).__name__,
                hint="BlockRMS needs none",
            )


def _changed(outcome: Outcome) -> set[str]:
    stages = (*outcome.earlier, outcome)
    return {
        name
        for stage in stages
        for name, before, after in zip(stage.names, stage.norms, stage.after, strict=True)
        if before != after
    }
