"""Convert modules to named NumPy arrays and back, for files, searches and other frameworks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported, suggest
from karikomi.pack.stored import DTYPES, EXTENDED, array_dtype, kind_of
from karikomi.quantize import Coded
from karikomi.shrink.cuts import Cuts
from karikomi.torch.modules import codes, kept_units
from karikomi.torch.modules.parameters import check_values, unwrapped
from karikomi.torch.modules.resizing import resize_

PAIRS = "float4_e2m1fn_x2"
"""The type of torch that has two numbers of float4 in a byte, the first in the lower half."""


def to_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """Return name -> array for all parameters and buffers of the state dict; copies.

    A tensor with two names (tied weights) is returned under both. bfloat16, float8 and float4 come as ml_dtypes
    has them, which NumPy has not. Raises `Unsupported` naming the tensor for types that neither has, and
    for tensors on the meta device.
    """
    return {name: as_array(tensor, name) for name, tensor in _tensors(unwrapped(module)).items()}


def to_stored(module: nn.Module) -> dict[str, np.ndarray | Coded]:
    """Return name -> codes of the quantized tensors of a module, arrays of the others.

    Raises `Unsupported` naming the first tensor that changed after `quantize_`.
    """
    module = unwrapped(module)
    coded = codes.recall(module)
    return {
        name: coded[name] if name in coded else as_array(tensor, name)
        for name, tensor in _tensors(module).items()
    }


def notes_of(module: nn.Module) -> dict[str, str]:
    """Return what a file has to say about a module beside its tensors: what a shrink left of it."""
    cuts = kept_units.recall(unwrapped(module))
    return {} if cuts is None else {kept_units.NOTE: cuts.to_text()}


def as_array(tensor: torch.Tensor, name: str) -> np.ndarray:
    """Return a copy of a tensor as an array; `name` is for the error where that cannot be."""
    check_values({name: tensor}, where="torch.to_arrays")
    kind = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach().cpu().resolve_conj()
    try:
        if kind == PAIRS:
            pairs = tensor.contiguous().view(torch.uint8).numpy()
            both = np.stack([pairs & 15, pairs >> 4], axis=-1)
            return both.reshape(*pairs.shape[:-1], -1).view(array_dtype("float4_e2m1fn"))
        if kind in EXTENDED:
            carrier = torch.int16 if tensor.element_size() == 2 else torch.uint8
            return np.array(tensor.contiguous().view(carrier).numpy()).view(array_dtype(kind))
        # np.array keeps a 0-d tensor 0-d, unlike ascontiguousarray.
        return np.array(tensor.numpy(), order="C")
    except TypeError as error:
        raise Unsupported(
            f"NumPy has no {kind}",
            where=name,
            hint="convert the module first, for example with module.float()",
        ) from error


@torch.no_grad()
def fill_(
    module: nn.Module,
    tensors: Mapping[str, np.ndarray | Coded],
    notes: Mapping[str, str] | None = None,
) -> nn.Module:
    """Put named arrays (or codes) into a module, in place, and return it.

    Layers whose stored shape is smaller (a shrunk network) are resized first; the network's inputs
    and outputs are not. `notes`: what `notes_of` returned of the shrunk network: the units that were kept, and the
    sizes in attributes of its layers, which shapes alone do not say. Tensors on the meta device are replaced by
    ones on the CPU, tied ones by one. Raises `InvalidArgument` naming the first tensor that is missing or unknown,
    or has values out of range for the module's type, and `Unsupported` for a shape that does not fit.
    """
    inner = unwrapped(module)
    cuts = _cuts(notes or {})
    if cuts is not None:
        kept_units.check_form(inner, cuts)
    coded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Coded)}
    arrays = {
        name: tensor.decode() if isinstance(tensor, Coded) else np.asarray(tensor)
        for name, tensor in tensors.items()
    }
    with kept_units.removed_(inner, cuts, {name: array.shape for name, array in arrays.items()}):
        _put_(inner, arrays, cuts)
    codes.remember_(inner, coded)
    if cuts is not None:
        kept_units.remember_(inner, cuts)
    return module


def _put_(inner: nn.Module, arrays: Mapping[str, np.ndarray], cuts: Cuts | None) -> None:
    """Put arrays into a module that has the layers of the shrunk one."""
    _check_names(set(_tensors(inner)), set(arrays))
    new = {name: _tensor(name, arrays[name], old) for name, old in _tensors(inner).items()}
    _check_loadable(inner)
    _fit_(inner, {name: tuple(tensor.shape) for name, tensor in new.items()}, cuts)
    _give_memory_(inner)
    for name, tensor in _tensors(inner).items():
        tensor.copy_(new[name])


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


def _check_loadable(module: nn.Module) -> None:
    """Raise `Unsupported` for a tensor on the meta device that no file has: it would stay without values."""
    state = module.state_dict()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta and name not in state:
            raise Unsupported(
                "a buffer on the meta device that is not in the state dict gets no values from a file",
                where=name,
                hint="make it on the CPU: build the module outside of torch.device('meta'), "
                "or set the buffer before loading",
            )


def _give_memory_(module: nn.Module) -> None:
    """Replace tensors on the meta device by uninitialised ones on the CPU."""
    made: dict[int, torch.Tensor] = {}
    for layer in module.modules():
        own = itertools.chain(
            layer.named_parameters(recurse=False), layer.named_buffers(recurse=False)
        )
        for leaf, old in list(own):
            if not old.is_meta:
                continue
            if id(old) not in made:
                empty = torch.empty_like(old, device="cpu")
                if isinstance(old, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=old.requires_grad)
                made[id(old)] = empty
            setattr(layer, leaf, made[id(old)])


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise Unsupported(
                "this extra state is not a tensor", where=name, got=type(value).__name__
            )
    return state


def _tensor(name: str, array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    stored = _stored(array)
    if stored.dtype == like.dtype:
        return stored
    kinds = stored.is_complex(), stored.is_floating_point()
    packed = PAIRS in (str(stored.dtype)[6:], str(like.dtype)[6:])
    if packed or kinds != (like.is_complex(), like.is_floating_point()):
        raise InvalidArgument(
            "another kind of number", where=name, got=stored.dtype, allowed=like.dtype
        )
    cast = stored.to(like.dtype)
    if stored.is_floating_point() and not torch.equal(_finite(cast), _finite(stored)):
        raise InvalidArgument("values too large for the module's type", where=name, got=like.dtype)
    return cast


def _stored(array: np.ndarray) -> torch.Tensor:
    """Return an array as a tensor of its own type; two numbers of float4 share a byte in torch."""
    kind, array = kind_of(array.dtype), np.array(array, order="C")
    if kind in ("int4", "uint4"):
        return torch.from_numpy(array.astype(np.int8))
    if kind == "float4_e2m1fn" and array.ndim and array.shape[-1] % 2 == 0:
        bits = array.view(np.uint8)
        return torch.from_numpy(bits[..., 0::2] & 15 | bits[..., 1::2] << 4).view(
            getattr(torch, PAIRS)
        )
    if kind in EXTENDED:
        return torch.from_numpy(array.view(DTYPES[kind].carrier)).view(getattr(torch, kind))
    return torch.from_numpy(array)


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)


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
    if missing or unknown:
        near = suggest(missing[0], unknown) if missing and unknown else None
        raise InvalidArgument(
            "the file and the module are different networks",
            where=(missing or unknown)[0],
            got=f"only in the file: {_first(unknown)}",
            allowed=f"only in the module: {_first(missing)}",
            hint=f"{len(present & stored)} names are in both" + (f"; {near}" if near else ""),
        )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"
