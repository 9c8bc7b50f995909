"""Digests of networks, so that no checkpoint is continued with another network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from karikomi.torch.modules.parameters import unwrapped


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module by name, tied ones once."""
    plain = unwrapped(module)
    return {**dict(plain.named_parameters()), **dict(plain.named_buffers())}


def fingerprint(tensors: nn.Module | Mapping[str, torch.Tensor]) -> str:
    """Return a digest of a module's parameters and buffers, or of named tensors: names, types, shapes, bits.

    >>> import copy
    >>> one = nn.Linear(2, 2)
    >>> fingerprint(one) == fingerprint(copy.deepcopy(one)), len(fingerprint(one))
    (True, 32)
    """
    named = tensors_of(tensors) if isinstance(tensors, nn.Module) else tensors
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
