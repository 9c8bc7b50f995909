"""The parameters that some optimizers hold, by their names in a model, and what changes among them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.torch.distributed.fsdp import reshard_
from karikomi.torch.internals import registered
from karikomi.torch.modules.parameters import named


class Change(NamedTuple):
    """Names of parameters that are held since, no more, or as another tensor; and all that are held now."""

    joined: frozenset[str]
    left: frozenset[str]
    replaced: frozenset[str]
    found: dict[str, torch.Tensor]


class HeldParameters:
    """The parameters of some optimizers that a model has too, under its names.

    Raises `Unsupported` for parameters that the model does not have, and for one that two optimizers hold.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> None:
        self._optimizers, self._model = optimizers, model
        self._said: set[str] = set()
        self._keep(_optimized(optimizers, model))

    def change(self) -> Change | None:
        """Return what is different since `accept`, ``None`` for nothing; raises as the class does."""
        if self._identities == _identities(self._optimizers) and self._are_in_model():
            return None
        if not isinstance(self._model, nn.Module):
            raise Unsupported(
                "the optimizer has got other parameters since attach",
                where="torch.attach",
                hint="attach with the module instead of its parameters",
            )
        found, before = _optimized(self._optimizers, self._model), self.found
        if found.keys() == before.keys() and all(found[name] is before[name] for name in found):
            self._keep(found)  # in another order, or gathered by FSDP for a moment
            return None
        common = found.keys() & before.keys()
        return Change(
            joined=frozenset(found.keys() - before.keys()),
            left=frozenset(before.keys() - found.keys()),
            replaced=frozenset(name for name in common if found[name] is not before[name]),
            found=found,
        )

    def accept(self, change: Change) -> None:
        """Keep what is held now, and warn the first time of each kind of change."""
        self._keep(change.found)
        for kind, names, effect in (
            (
                "new",
                change.joined,
                "from now on it treats them like the others, with fresh statistics",
            ),
            ("no more", change.left, "their statistics are dropped"),
            (
                "replaced",
                change.replaced,
                "their masks and statistics are dropped, and start afresh",
            ),
        ):
            if names and kind not in self._said:
                self._said.add(kind)
                first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                warnings.warn(
                    f"karikomi: of the parameters that attach acts on, {len(names)} are {kind} "
                    f"in the optimizer or the model ({first}): {effect}",
                    stacklevel=5,
                )

    def _keep(self, found: Mapping[str, torch.Tensor]) -> None:
        self.found = dict(found)
        self._identities = _identities(self._optimizers)
        self._registered = registered(self._model) if isinstance(self._model, nn.Module) else []

    def _are_in_model(self) -> bool:
        return all(entries.get(name) is item for entries, name, item in self._registered)


def _identities(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[int]]:
    return [
        [item for group in optimizer.param_groups for item in map(id, group["params"])]
        for optimizer in optimizers
    ]


def _optimized(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module
) -> dict[str, torch.Tensor]:
    reshard_(model)
    per_optimizer = _identities(optimizers)
    for optimizer, own in zip(optimizers, per_optimizer, strict=True):
        if len(set(own)) < len(own):
            raise Unsupported(
                f"the optimizer holds {len(own) - len(set(own))} parameter(s) twice, and would step twice with each",
                where="torch.attach",
                got=type(optimizer).__name__,
                hint="pass model.parameters(), which has every parameter once",
            )
    chosen = {item for own in per_optimizer for item in own}
    if len(chosen) < sum(map(len, per_optimizer)):
        raise Unsupported("two optimizers hold the same parameter", where="torch.attach")
    parameters = named(model, where="torch.attach").items()
    found = {name: parameter for name, parameter in parameters if id(parameter) in chosen}
    foreign = len(chosen) - len(found)
    if foreign:
        raise Unsupported(
            f"the optimizer holds {foreign} parameter(s) that the model does not",
            where="torch.attach",
            hint="attach the module that owns all of them; of a layer that was replaced, put the new "
            "parameters into optimizer.param_groups in place of the old ones",
        )
    return found
