"""Shared parts of the trainers' callbacks: the options of `attach`, and a subclass of the trainer's class.

A trainer takes callbacks of its own class only, and karikomi imports no trainer; so the class of a callback is
created with the first callback, and again by a copy or pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from karikomi.errors import InvalidArgument, Unsupported, suggest
from karikomi.plugins.scalars import scalars

if TYPE_CHECKING:
    import torch

    from karikomi.prune import PruningSchedule
    from karikomi.prune.penalties.penalty import Penalty
    from karikomi.record import Recorder
    from karikomi.rule import Composite, Rule
    from karikomi.torch import Handle, Masks


class Options(TypedDict, total=False):
    """Options of `kk.torch.attach`, with the defaults of that function."""

    clip: Rule | Composite | None
    update: Rule | Composite | None
    bound: Rule | None
    only: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    prune: PruningSchedule | Masks | None
    penalty: Penalty | None
    nonfinite: str
    stop_after: int
    record: Recorder | None


class Attaching:
    """Options, stored until the trainer has an optimizer.

    Copies and unpickled objects have the options, but no handle, which belongs to an optimizer.

    Raises `InvalidArgument` for an option that is not in `Options`.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        for name in options.keys() - Options.__annotations__.keys():
            raise InvalidArgument(
                f"there is no option {name!r}",
                where=type(self).__name__,
                hint=suggest(name, Options.__annotations__),
            )
        self._options = options

    def __reduce__(self) -> tuple[Any, ...]:
        """Reduce to the importable class instead of the one created from it."""
        importable = vars(type(self)).get("_joined_from", type(self))
        return _made_again, (importable,), self._apart()

    def _apart(self) -> dict[str, Any]:
        """Return the attributes of a copy, without those of a training."""
        return dict(self.__dict__)

    @property
    def _clips(self) -> bool:
        """Whether the trainer's own clipping would be a second one."""
        return any(self._options.get(name) is not None for name in ("clip", "update"))

    def _warn_of_no_state(self) -> None:
        warnings.warn(
            "karikomi: the checkpoint has no state of this callback, so its statistics and steps start "
            "afresh",
            stacklevel=3,
        )

    def _attach(
        self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], model: Any
    ) -> Handle:
        from karikomi import torch

        refuse_flattened(model, where=type(self).__name__)
        return torch.attach(optimizer, model, **self._options)


def joined(cls: type, hosts: Sequence[type]) -> type:
    """Return a subclass of `cls` and of the trainer's classes, under the same name."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, *hosts), {**names, "_joined_from": cls})


def _made_again(cls: Any) -> Any:
    return cls.__new__(cls)


def curves(handle: Handle) -> dict[str, float]:
    """Return ``karikomi/norm``, ``karikomi/factor`` and so on, of the last step."""
    if handle.last is None:
        return {}
    row: Mapping[str, Any] = {"event": "step", **handle.last.as_row()}
    return scalars(row if handle.masks is None else {**row, "sparsity": handle.sparsity})


def refuse_flattened(model: Any, *, where: str) -> None:
    """Raise `Unsupported` for a module flattened by FSDP1: the norms would be those of a shard."""
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel

    parts = model.modules() if isinstance(model, nn.Module) else ()
    if any(isinstance(part, FullyShardedDataParallel) for part in parts):
        raise flattened(where)


def flattened(where: str) -> Unsupported:
    """Return the error for FSDP1."""
    return Unsupported(
        "FSDP1 flattens and splits the parameters, so that a norm would be that of one rank's shard",
        where=where,
        hint="use FSDP2 (fully_shard), whose parameters are DTensors",
    )
