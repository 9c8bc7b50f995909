"""The masks of a pruned module: which weights are kept, stored outside of the module itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import BadFile, InvalidArgument, KarikomiError
from karikomi.prune import pack_mask, unpack_mask
from karikomi.prune.account import Account
from karikomi.prune.mask_mapping import MaskMapping
from karikomi.selection.threads import each
from karikomi.torch.distributed.dtensors import local
from karikomi.torch.distributed.fsdp import reshard_
from karikomi.torch.internals import opaque
from karikomi.torch.modules.kept_units import Move
from karikomi.torch.modules.parameters import check_names, check_values, through_adapters, unwrapped
from karikomi.torch.pruning import mask_shards
from karikomi.torch.pruning.mask_shards import ShardPlace

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (torch.Tensor, nn.Parameter)


class Masks(MaskMapping[torch.Tensor]):
    """Parameter name -> boolean tensor of the parameter's shape, true where the weight is kept.

    `left_alone`: parameter name -> why it has no mask. `account`: what was removed, why, and the change of
    the outputs (print it), of the call that made them. `places`: the mask of a sharded weight (DTensor) is
    that of this rank's part, and so are all counts; this is where the part begins. A whole mask is cut to
    the part when it is first applied. Raises `InvalidArgument` for a mask that is not boolean.

    >>> masks = Masks({"weight": torch.tensor([[True, False]])})
    >>> masks.sparsity, masks.counts()
    (0.5, {'weight': (1, 2)})
    """

    def __init__(
        self,
        kept: Mapping[str, torch.Tensor] | None = None,
        *,
        left_alone: Mapping[str, str] | None = None,
        account: Account | None = None,
        places: Mapping[str, ShardPlace] | None = None,
    ) -> None:
        if not isinstance(kept, Mapping | None):
            raise InvalidArgument(
                "masks are a mapping by the names of parameters",
                where="Masks",
                got=type(kept).__name__,
            )
        super().__init__(kept, left_alone, account)
        inherited = kept.places if isinstance(kept, Masks) else {}
        self.places = dict(inherited if places is None else places)
        for name, mask in self._kept.items():
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                got = getattr(mask, "dtype", None)
                raise InvalidArgument(
                    "a mask is a boolean tensor", where=name, got=f"{type(mask).__name__} of {got}"
                )

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return parameter name -> ``(removed weights, all weights)``."""
        return {name: (removed(mask), mask.numel()) for name, mask in self._kept.items()}

    def not_zero(self, module: nn.Module) -> dict[str, int]:
        """Return parameter name -> how many masked weights of a module are not zero, where there are any."""
        pairs = zip(self._kept, self._pairs(module), strict=True)
        counts = {
            name: int(((local(parameter) != 0) & ~mask).count_nonzero())
            for name, (parameter, mask) in pairs
            if not parameter.is_meta
        }
        return {name: count for name, count in counts.items() if count}

    @opaque
    def apply_(self, module: nn.Module) -> None:
        """Set the masked weights of a module, or of an averaged copy of it, to exactly ``+0.0``.

        LoRA adapters of PEFT may have been added to the module, or merged into it, since the masks were made.
        """
        pairs = self._pairs(module)
        tensors = [parameter for parameter, _ in pairs]
        check_values(dict(zip(self._kept, tensors, strict=True)), where="Masks.apply_")
        entries = sum(mask.numel() for _, mask in pairs if mask.is_cpu)
        each(lambda pair: _clear_(*pair), pairs, entries=entries)

    @opaque
    def mask_gradients_(self, module: nn.Module) -> None:
        """Set the gradients of masked weights to zero, where there are gradients."""
        for parameter, mask in self._pairs(module):
            if parameter.grad is not None:
                _clear_(parameter.grad, mask)

    def to(self, device: torch.device | str) -> Masks:
        """Return these masks on another device."""
        moved = {name: mask.to(device) for name, mask in self._kept.items()}
        return Masks(moved, left_alone=self.left_alone, account=self.account, places=self.places)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return name -> ``{"bits": uint8 tensor, "shape": list}``: plain data, a bit per weight.

        `torch.load` reads it with ``weights_only=True``. `left_alone` and `account` are not included. Of a
        sharded weight it is the part of this rank, with ``"of"``, the shape of the whole, and ``"from"``,
        where the part begins: each rank saves its part, or `joined` makes whole masks.
        """
        return {name: self._packed(name, mask) for name, mask in self._kept.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Any]]) -> Masks:
        """Return the masks that `state_dict` described; raises `BadFile` naming the tensor."""
        kept = {name: _unpacked(name, value) for name, value in state.items()}
        return cls(
            kept, places={n: _place(n, value) for n, value in state.items() if "of" in value}
        )

    @classmethod
    def joined(cls, masks: Iterable[Masks]) -> Masks:
        """Return the whole masks that the masks of all ranks are parts of, without communication.

        Exchange their states by ``torch.distributed.all_gather_object``, or as files. Raises
        `InvalidArgument` naming a tensor, if a part is missing or two differ.
        """
        parts: dict[str, list[tuple[torch.Tensor, ShardPlace | None]]] = {}
        for of_rank in masks:
            for name, mask in of_rank.items():
                parts.setdefault(name, []).append((mask, of_rank.places.get(name)))
        return cls({name: mask_shards.joined(name, several) for name, several in parts.items()})

    def following(self, move: Move) -> Callable[[], None]:
        """Return a function that makes these the masks of a smaller copy of their module; `shrink` calls it."""
        check_names(self._kept, move.old, where="torch.shrink: follow: Masks")
        cut = {
            name: move.cut(name, mask, what="the mask")
            for name, mask in self._kept.items()
            if name in move.new
        }

        def commit() -> None:
            self._kept = cut

        return commit

    def here(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """Return the mask of the part of a parameter on this rank; raises `InvalidArgument`."""
        return mask_shards.here(name, self._kept[name], self.places.get(name), parameter)

    def _packed(self, name: str, mask: torch.Tensor) -> dict[str, Any]:
        bits = torch.from_numpy(pack_mask(mask.cpu().numpy()))
        place = self.places.get(name)
        shard = {} if place is None else {"of": list(place.whole), "from": list(place.offsets)}
        return {"bits": bits, "shape": list(mask.shape), **shard}

    def _pairs(self, module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # All are checked before the first is written to.
        pairs = []
        reshard_(module)
        known = dict(unwrapped(module).named_parameters(remove_duplicate=False))
        parameters = through_adapters(self._kept, known)
        check_names(self._kept, parameters, where="Masks")
        for name in self._kept:
            mask = self.here(name, parameters[name])
            if mask is not self._kept[name]:
                self.places[name] = mask_shards.place_of(parameters[name])  # type: ignore[assignment]
            # Once, and not each step: masks come from a file on the CPU.
            if not parameters[name].is_meta:
                self._kept[name] = mask.to(parameters[name].device)
            pairs.append((parameters[name], self._kept[name]))
        return pairs


def removed(mask: torch.Tensor) -> int:
    """Return how many weights a mask removes."""
    if mask.device.type == "cpu":
        # Ten times as fast as torch's.
        return mask.numel() - int(np.count_nonzero(mask.numpy()))
    return mask.numel() - int(mask.count_nonzero())


@torch.no_grad()
def _clear_(tensor: torch.Tensor, kept: torch.Tensor) -> None:
    """Set the entries of a tensor, or of this rank's part of it, to +0.0 where they are not kept."""
    tensor = local(tensor)
    if tensor.device.type == "cpu" and tensor.is_floating_point() and type(tensor) in _PLAIN:
        # The bits times 0 or 1, in one thread: masked_fill_ needs an inverted mask, and waits for threads.
        bits = tensor.detach().view(_BITS[tensor.element_size()]).numpy()
        np.multiply(bits, kept.numpy(), out=bits)
        return
    tensor.masked_fill_(~kept, 0.0)


def _unpacked(name: str, value: Mapping[str, Any]) -> torch.Tensor:
    try:
        shape = [int(size) for size in value["shape"]]
        return torch.from_numpy(unpack_mask(value["bits"].cpu().numpy(), shape))
    except (KarikomiError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadFile("this is not a packed mask", where=name, got=error) from error


def _place(name: str, value: Mapping[str, Any]) -> ShardPlace:
    try:
        place = ShardPlace(tuple(map(int, value["of"])), tuple(map(int, value["from"])))
        ends = [at + int(n) for at, n in zip(place.offsets, value["shape"], strict=True)]
        fits = all(0 <= at for at in place.offsets)
        fits = fits and all(end <= n for end, n in zip(ends, place.whole, strict=True))
    except (LookupError, TypeError, ValueError) as error:
        raise BadFile("this is not a part of a mask", where=name, got=error) from error
    if not fits:
        raise BadFile("this part is not inside of its mask", where=name, got=place)
    return place
