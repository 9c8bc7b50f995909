"""Deep copies of modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from karikomi.errors import Unsupported

M = TypeVar("M", bound=nn.Module)


def copied(module: M) -> M:
    """Return a deep copy; raises `Unsupported` if there is none."""
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies a kind of specification that it has deprecated itself.
            warnings.simplefilter("ignore", FutureWarning)
            return copy.deepcopy(module, _computed(module))
    except Exception as error:
        raise Unsupported(
            "the module cannot be copied",
            where="torch.shrink",
            got=error,
            hint="keep what cannot be copied out of the module",
        ) from error


def _computed(module: nn.Module) -> dict[int, torch.Tensor]:
    """Return copies of tensors that a hook has computed as attributes (masked weights), which `deepcopy` refuses."""
    return {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Put the buffers of modules back afterwards, which a forward may write to (counters, caches)."""
    held = [
        (part, name, buffer, buffer.clone())
        for module in modules
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for part, name, buffer, before in held:
            setattr(part, name, buffer)
            if not torch.equal(buffer, before):
                buffer.copy_(before)
