"""Convert modules to named NumPy arrays and back, for files, searches and other frameworks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported, suggest
from karikomi.quantize import Coded
from karikomi.shrink.cuts import Cuts
from karikomi.torch.modules import codes, kept_units
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.modules.resizing import resize_


def to_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """Return name -> array for all parameters and buffers of the state dict; copies.

    A tensor with two names (tied weights) is returned under both. Raises `Unsupported` naming the
    tensor for types that NumPy does not have (bfloat16, float8): convert the module first.
    """
    return {name: _array(name, tensor) for name, tensor in _tensors(unwrapped(module)).items()}


def to_stored(module: nn.Module) -> dict[str, np.ndarray | Coded]:
    """Return name -> codes of the quantized tensors of a module, arrays of the others.

    Raises `Unsupported` naming the first tensor that changed after `quantize_`.
    """
    module = unwrapped(module)
    coded = codes.recall(module)
    return {
        name: coded[name] if name in coded else _array(name, tensor)
        for name, tensor in _tensors(module).items()
    }


def notes_of(module: nn.Module) -> dict[str, str]:
    """Return what a file has to say about a module beside its tensors: what a shrink left of it."""
    cuts = kept_units.recall(unwrapped(module))
    return {} if cuts is None else {kept_units.NOTE: cuts.to_text()}


@torch.no_grad()
def fill_(
    module: nn.Module,
    tensors: Mapping[str, np.ndarray | Coded],
    notes: Mapping[str, str] | None = None,
) -> nn.Module:
    """Put named arrays (or codes) into a module, in place, and return it.

    Layers whose stored shape is smaller (a shrunk network) are resized first; the network's inputs
    and outputs are not. `notes`: what `notes_of` returned of the shrunk network: the units that were kept, and the sizes in
    attributes of its layers, which shapes alone do not say. Raises `InvalidArgument` naming the first tensor that is missing or unknown, or
    has values out of range for the module's type, and `Unsupported` for a shape that does not fit.
    """
    inner = unwrapped(module)
    cuts = _cuts(notes or {})
    if cuts is not None:
        kept_units.check_form(inner, cuts)
    _check_names(set(_tensors(inner)), set(tensors))
    coded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Coded)}
    arrays = {
        name: tensor.decode() if isinstance(tensor, Coded) else np.asarray(tensor)
        for name, tensor in tensors.items()
    }
    new = {name: _tensor(name, arrays[name], old) for name, old in _tensors(inner).items()}
    _fit_(inner, {name: tuple(tensor.shape) for name, tensor in new.items()}, cuts)
    for name, tensor in _tensors(inner).items():
        tensor.copy_(new[name])
    codes.remember_(inner, coded)
    if cuts is not None:
        kept_units.remember_(inner, cuts)
    return module


def _cuts(notes: Mapping[str, str]) -> Cuts | None:
    text = notes.get(kept_units.NOTE)
    return None if text is None else Cuts.from_text(text, where=f"note {kept_units.NOTE!r}")


def _fit_(module: nn.Module, stored: Mapping[str, tuple[int, ...]], cuts: Cuts | None) -> None:
    """Make the tensors of a module as small as the stored ones."""
    present = {name: tuple(tensor.shape) for name, tensor in _tensors(module).items()}
    shapes = {name: shape for name, shape in stored.items() if shape != present[name]}
    if shapes and cuts is not None:
        kept_units.cut_(module, shapes, cuts)
    elif shapes:
        _check_ends(module, shapes)
        resize_(module, shapes)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise Unsupported(
                "this extra state is not a tensor", where=name, got=type(value).__name__
            )
    return state


def _array(name: str, tensor: torch.Tensor) -> np.ndarray:
    try:
        # np.array keeps a 0-d tensor 0-d, unlike ascontiguousarray.
        return np.array(tensor.detach().cpu().resolve_conj().numpy(), order="C")
    except TypeError as error:
        raise Unsupported(
            f"NumPy has no {str(tensor.dtype).removeprefix('torch.')}",
            where=name,
            hint="convert the module first, for example with module.float()",
        ) from error


def _tensor(name: str, array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    stored = torch.from_numpy(np.array(array, order="C"))
    cast = stored.to(like.dtype)
    kinds = stored.is_complex(), stored.is_floating_point()
    if kinds != (like.is_complex(), like.is_floating_point()):
        raise InvalidArgument(
            "another kind of number", where=name, got=stored.dtype, allowed=like.dtype
        )
    if stored.is_floating_point() and not torch.equal(torch.isfinite(cast), torch.isfinite(stored)):
        raise InvalidArgument("values too large for the module's type", where=name, got=like.dtype)
    return cast


def _check_ends(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `Unsupported` for another number of inputs or outputs: that is not a shrunk network."""
    weights = [
        (name, parameter) for name, parameter in module.named_parameters() if parameter.dim() > 1
    ]
    for (name, weight), axis, what in ((weights[0], 1, "inputs"), (weights[-1], 0, "outputs")):
        stored = shapes.get(name, tuple(weight.shape))
        if len(stored) != weight.dim() or stored[axis] != weight.shape[axis]:
            raise Unsupported(
                f"the network in the file has other {what}",
                where=name,
                got=stored,
                allowed=tuple(weight.shape),
            )


def _check_names(present: set[str], stored: set[str]) -> None:
    missing, unknown = sorted(present - stored), sorted(stored - present)
    if missing:
        raise InvalidArgument(
            "a tensor of the module is missing",
            where=missing[0],
            hint=f"{len(missing)} missing; {suggest(missing[0], stored)}",
        )
    if unknown:
        raise InvalidArgument(
            "the module has no such tensor",
            where=unknown[0],
            hint=f"{len(unknown)} unknown; {suggest(unknown[0], present)}",
        )
