"""Weights that FSDP has left gathered: their parts are put back before anything writes to them.

Separate because it is a fact of one wrapper. The outermost module that is fully sharded keeps its
weights whole after a forward pass, until the next backward; they are copies, and what is written to
them is lost.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from karikomi.torch.internals import in_backward


def reshard_(module: Any) -> None:
    """Have all of a module's FSDP units hold the parts of this rank; others are left as they are.

    Nothing is done during a backward pass, which needs the gathered weights, nor to what is no module.
    """
    # Imported by whoever uses it, and slowly.
    unit = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if unit is None or not isinstance(module, nn.Module):
        return
    if in_backward():
        return
    units: list[Any] = [entry for entry in module.modules() if isinstance(entry, unit)]
    for item in units:
        item.reshard()
