"""A handle's state as JSON and back, for trainers whose checkpoints keep the state of callbacks as JSON.

Numbers and names stay readable; tensors (masks, second moments) go into one safetensors payload.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from karikomi.errors import BadFile

if TYPE_CHECKING:
    import torch

_TENSOR = "tensor"


def to_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state of plain data and tensors as what JSON can say, exactly."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    plain = _without_tensors(state, tensors)
    payload = base64.b64encode(save(tensors)).decode("ascii") if tensors else ""
    return {"plain": plain, "tensors": payload}


def from_json(stored: Any) -> dict[str, Any]:
    """Return the state that `to_json` wrote; raises `BadFile` for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        payload = base64.b64decode(stored["tensors"], validate=True)
        return _with_tensors(stored["plain"], load(payload) if payload else {})
    except (TypeError, KeyError, ValueError, binascii.Error, SafetensorError) as error:
        raise BadFile(f"this is no state of karikomi ({error!r})", where="checkpoint") from error


def _without_tensors(part: Any, tensors: dict[str, torch.Tensor]) -> Any:
    import torch

    if isinstance(part, torch.Tensor):
        name = str(len(tensors))
        # A copy: safetensors takes no tensors that share memory.
        tensors[name] = part.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(part, Mapping):
        return {key: _without_tensors(value, tensors) for key, value in part.items()}
    return part


def _with_tensors(part: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(part, Mapping):
        return part
    # A parameter may be called "tensor" as well, but then something else stands beside it or in it.
    if set(part) == {_TENSOR} and isinstance(part[_TENSOR], str):
        return tensors[part[_TENSOR]]
    return {key: _with_tensors(value, tensors) for key, value in part.items()}
