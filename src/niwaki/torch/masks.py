"""The masks of a pruned module: which weights are kept, held outside of the module itself.

The module keeps its class, its parameter names and its state dict; a mask is applied after each
step of an optimizer, which would let masked weights grow again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from niwaki.errors import BadFile, InvalidArgument, NiwakiError, UnknownName, suggest
from niwaki.prune import pack_mask, unpack_mask
from niwaki.prune.account import Account
from niwaki.torch.tensors import unwrapped

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (torch.Tensor, nn.Parameter)


class Masks(Mapping[str, torch.Tensor]):
    """Parameter name -> boolean tensor of the parameter's shape, true where the weight is kept.

    `left_alone`: parameter name -> why it has no mask. `account`: what was removed, why, and what that
    did to the outputs (print it), of the call that made them. Raises `InvalidArgument` for a mask that is
    not boolean.

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
    ) -> None:
        self._kept = dict(kept or {})
        self.left_alone = dict(left_alone or {})
        self.account = account or Account()
        for name, mask in self._kept.items():
            if mask.dtype != torch.bool:
                raise InvalidArgument("a mask is boolean", where=name, got=mask.dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, {self.sparsity:.2%} zero)"

    @property
    def sparsity(self) -> float:
        """The share of masked weights among all weights that have a mask, in [0, 1]."""
        counts = self.counts().values()
        total = sum(size for _, size in counts)
        return sum(removed for removed, _ in counts) / total if total else 0.0

    @property
    def emptied(self) -> tuple[str, ...]:
        """The names of the tensors that kept no weight at all."""
        return tuple(name for name, (removed, size) in self.counts().items() if removed == size > 0)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return parameter name -> ``(removed weights, all weights)``."""
        return {name: (removed(mask), mask.numel()) for name, mask in self._kept.items()}

    @torch.no_grad()
    def apply_(self, module: nn.Module) -> None:
        """Set the masked weights of a module to exactly ``+0.0``."""
        for parameter, mask in self._pairs(module):
            _clear_(parameter, mask)

    @torch.no_grad()
    def mask_gradients_(self, module: nn.Module) -> None:
        """Set the gradients of masked weights to zero, where there are gradients."""
        for parameter, mask in self._pairs(module):
            if parameter.grad is not None:
                _clear_(parameter.grad, mask)

    def to(self, device: torch.device | str) -> Masks:
        """Return these masks on another device."""
        moved = {name: mask.to(device) for name, mask in self._kept.items()}
        return Masks(moved, left_alone=self.left_alone, account=self.account)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return name -> ``{"bits": uint8 tensor, "shape": list}``: plain data, a bit per weight.

        What `torch.load` reads with ``weights_only=True``. `left_alone` and `account` are no part of it.
        """
        return {
            name: {
                "bits": torch.from_numpy(pack_mask(mask.cpu().numpy())),
                "shape": list(mask.shape),
            }
            for name, mask in self._kept.items()
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Any]]) -> Masks:
        """Return the masks that `state_dict` described; raises `BadFile` naming the tensor."""
        return cls({name: _unpacked(name, one) for name, one in state.items()})

    def _pairs(self, module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # All are looked at before the first is written to.
        pairs = []
        parameters = dict(unwrapped(module).named_parameters(remove_duplicate=False))
        for name, mask in self._kept.items():
            if name not in parameters:
                raise UnknownName(
                    "the module has no such parameter",
                    where="Masks",
                    got=repr(name),
                    hint=suggest(name, parameters),
                )
            if parameters[name].shape != mask.shape:
                raise InvalidArgument(
                    "the mask does not fit its parameter",
                    where=name,
                    got=tuple(mask.shape),
                    allowed=tuple(parameters[name].shape),
                )
            # Once, and not each step: masks come from a file on the CPU.
            self._kept[name] = mask.to(parameters[name].device)
            pairs.append((parameters[name], self._kept[name]))
        return pairs


def removed(mask: torch.Tensor) -> int:
    """Return how many weights a mask removes."""
    if mask.device.type == "cpu":
        # Ten times as fast as torch's.
        return mask.numel() - int(np.count_nonzero(mask.numpy()))
    return mask.numel() - int(mask.count_nonzero())


def _clear_(tensor: torch.Tensor, kept: torch.Tensor) -> None:
    """Set the entries of a tensor to +0.0 where they are not kept."""
    if tensor.device.type == "cpu" and tensor.is_floating_point() and type(tensor) in _PLAIN:
        # The bits times 0 or 1, in one thread: masked_fill_ needs an inverted mask, and waits for threads.
        bits = tensor.detach().view(_BITS[tensor.element_size()]).numpy()
        np.multiply(bits, kept.numpy(), out=bits)
        return
    tensor.masked_fill_(~kept, 0.0)


def _unpacked(name: str, one: Mapping[str, Any]) -> torch.Tensor:
    try:
        shape = [int(size) for size in one["shape"]]
        return torch.from_numpy(unpack_mask(one["bits"].cpu().numpy(), shape))
    except (NiwakiError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadFile("this is no packed mask", where=name, got=error) from error
