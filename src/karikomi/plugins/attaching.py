"""What the trainers' callbacks share: the options of `attach`, and a class made of the trainer's own.

A trainer takes callbacks of its own class only, and karikomi imports no trainer; so the class of a callback is
made when the first one is, and a copy or pickle makes it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from karikomi.errors import InvalidArgument, Unsupported, suggest
from karikomi.plugins.scalars import scalars

if TYPE_CHECKING:
    import torch

    from karikomi.prune import PruningSchedule
    from karikomi.record import Recorder
    from karikomi.rule import Composite, Rule
    from karikomi.torch import Handle, Masks


class Options(TypedDict, total=False):
    """What `kk.torch.attach` is given; what is left out has the default that it has there."""

    clip: Rule | Composite | None
    update: Rule | Composite | None
    bound: Rule | None
    prune: PruningSchedule | Masks | None
    nonfinite: str
    stop_after: int
    record: Recorder | None


class Attaching:
    """Options that wait for the trainer to have an optimizer.

    A copy, and what comes out of a pickle, has the options, and no handle: that stays with its optimizer.

    Raises `InvalidArgument` for an option that `kk.torch.attach` does not have here.
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
        """Name the class that can be imported, in the place of the one that was made of it."""
        importable = vars(type(self)).get("_joined_from", type(self))
        return _made_again, (importable,), self._apart()

    def _apart(self) -> dict[str, Any]:
        """Return the attributes of a copy, without what is of a training."""
        return dict(self.__dict__)

    @property
    def _clips(self) -> bool:
        """Whether the trainer's own clipping would be a second one."""
        return any(self._options.get(name) is not None for name in ("clip", "update"))

    def _attach(
        self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], model: Any
    ) -> Handle:
        from karikomi import torch

        refuse_flattened(model, where=type(self).__name__)
        return torch.attach(optimizer, model, **self._options)


def joined(own: type, hosts: Sequence[type]) -> type:
    """Return `own` as a class of the trainer's too, under the same name."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own, *hosts), {**names, "_joined_from": own})


def _made_again(own: Any) -> Any:
    return own.__new__(own)


def curves(handle: Handle) -> dict[str, float]:
    """Return ``karikomi/norm``, ``karikomi/factor`` and so on, of the last step."""
    if handle.last is None:
        return {}
    row: Mapping[str, Any] = {"event": "step", **handle.last.as_row()}
    return scalars(row if handle.masks is None else {**row, "sparsity": handle.sparsity})


def refuse_flattened(model: Any, *, where: str) -> None:
    """Refuse a module whose parameters FSDP1 has flattened into one: the norms would be of a shard."""
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel

    parts = model.modules() if isinstance(model, nn.Module) else ()
    if any(isinstance(part, FullyShardedDataParallel) for part in parts):
        raise flattened(where)


def flattened(where: str) -> Unsupported:
    """Return the error for FSDP1."""
    return Unsupported(
        "FSDP1 flattens and cuts the parameters, so that a norm would be that of one rank's piece",
        where=where,
        hint="use FSDP2 (fully_shard), whose parameters are DTensors",
    )
