"""Convert a handle's state to JSON and back, for trainers with checkpoints of callbacks in JSON.

Numbers and names stay readable; tensors (masks, second moments) are stored in one safetensors payload.
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
    """Return a state of plain data and tensors as plain JSON data, exactly."""
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
        raise BadFile(f"not a state of karikomi ({error!r})", where="checkpoint") from error


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
    # A parameter may be named "tensor" too, but its entry differs: it is not a single string.
    if set(part) == {_TENSOR} and isinstance(part[_TENSOR], str):
        return tensors[part[_TENSOR]]
    return {key: _with_tensors(value, tensors) for key, value in part.items()}
