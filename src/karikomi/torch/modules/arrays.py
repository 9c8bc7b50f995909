"""Modules as named NumPy arrays and back: what files, searches and other frameworks speak."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported, suggest
from karikomi.quantize import Coded
from karikomi.torch.modules import codes
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.modules.resizing import resize_


def to_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """Return name -> array for all parameters and buffers that a state dict holds; copies.

    A tensor that stands under two names (tied weights) stands under both. Raises `Unsupported` naming the
    tensor for types that NumPy does not have (bfloat16, float8): convert the module first.
    """
    return {name: _array(name, tensor) for name, tensor in _tensors(unwrapped(module)).items()}


def to_stored(module: nn.Module) -> dict[str, np.ndarray | Coded]:
    """Return what a file stores of a module: codes where it was quantized, arrays elsewhere.

    Raises `Unsupported` naming the first tensor that changed after `quantize_`.
    """
    module = unwrapped(module)
    coded = codes.recall(module)
    return {
        name: coded[name] if name in coded else _array(name, tensor)
        for name, tensor in _tensors(module).items()
    }


@torch.no_grad()
def fill_(module: nn.Module, tensors: Mapping[str, np.ndarray | Coded]) -> nn.Module:
    """Put named arrays (or codes) into a module, in place, and return it.

    Layers whose stored shape is smaller (a shrunk network) are resized first; the network's inputs
    and outputs are not. Raises `InvalidArgument` naming the first tensor that is missing or unknown, or
    has values that the module's type cannot hold, and `Unsupported` where a shape does not fit.
    """
    inner = unwrapped(module)
    _check_names(set(_tensors(inner)), set(tensors))
    coded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Coded)}
    arrays = {
        name: tensor.decode() if isinstance(tensor, Coded) else np.asarray(tensor)
        for name, tensor in tensors.items()
    }
    new = {name: _tensor(name, arrays[name], own) for name, own in _tensors(inner).items()}
    shapes = {
        n: tuple(new[n].shape) for n, own in _tensors(inner).items() if own.shape != new[n].shape
    }
    if shapes:
        _check_ends(inner, shapes)
        resize_(inner, shapes)
    for name, own in _tensors(inner).items():
        own.copy_(new[name])
    codes.remember_(inner, coded)
    return module


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise Unsupported("this extra state is no tensor", where=name, got=type(value).__name__)
    return state


def _array(name: str, tensor: torch.Tensor) -> np.ndarray:
    try:
        # np.array keeps a 0-d tensor 0-d, which ascontiguousarray would not.
        return np.array(tensor.detach().cpu().resolve_conj().numpy(), order="C")
    except TypeError as error:
        raise Unsupported(
            f"NumPy has no {str(tensor.dtype).removeprefix('torch.')}",
            where=name,
            hint="convert the module first, say with module.float()",
        ) from error


def _tensor(name: str, array: np.ndarray, own: torch.Tensor) -> torch.Tensor:
    given = torch.from_numpy(np.array(array, order="C"))
    cast = given.to(own.dtype)
    kinds = given.is_complex(), given.is_floating_point()
    if kinds != (own.is_complex(), own.is_floating_point()):
        raise InvalidArgument(
            "another kind of number", where=name, got=given.dtype, allowed=own.dtype
        )
    if given.is_floating_point() and not torch.equal(torch.isfinite(cast), torch.isfinite(given)):
        raise InvalidArgument("values too large for the module's type", where=name, got=own.dtype)
    return cast


def _check_ends(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse another number of inputs or outputs: that is another network, not a shrunk one."""
    weights = [
        (name, parameter) for name, parameter in module.named_parameters() if parameter.dim() > 1
    ]
    for (name, own), axis, what in ((weights[0], 1, "inputs"), (weights[-1], 0, "outputs")):
        stored = shapes.get(name, tuple(own.shape))
        if len(stored) != own.dim() or stored[axis] != own.shape[axis]:
            raise Unsupported(
                f"the network in the file has other {what}",
                where=name,
                got=stored,
                allowed=tuple(own.shape),
            )


def _check_names(own: set[str], given: set[str]) -> None:
    missing, unknown = sorted(own - given), sorted(given - own)
    if missing:
        raise InvalidArgument(
            "a tensor of the module is missing",
            where=missing[0],
            hint=f"{len(missing)} missing; {suggest(missing[0], given)}",
        )
    if unknown:
        raise InvalidArgument(
            "the module has no such tensor",
            where=unknown[0],
            hint=f"{len(unknown)} unknown; {suggest(unknown[0], own)}",
        )
