"""Deep copies of modules."""

from __future__ import annotations

import copy
import warnings
from typing import TypeVar

from torch import nn

from karikomi.errors import Unsupported

M = TypeVar("M", bound=nn.Module)


def copied(module: M) -> M:
    """Return a deep copy; raises `Unsupported` if there is none."""
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies a kind of specification that it has deprecated itself.
            warnings.simplefilter("ignore", FutureWarning)
            return copy.deepcopy(module)
    except Exception as error:
        raise Unsupported(
            "the module cannot be copied",
            where="torch.shrink",
            got=error,
            hint="make weights that a hook computes permanent first",
        ) from error
