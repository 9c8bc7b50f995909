"""Resharding of weights that FSDP left gathered, before they are written to.

The outermost fully sharded module keeps its weights gathered after a forward pass, until the next
backward; they are copies, and writes to them are lost.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from karikomi.torch.internals import in_backward


def reshard_(module: Any) -> None:
    """Reshard all FSDP units of a module, except during a backward pass, which needs the gathered weights."""
    # Slow to import, and already imported where it is used.
    unit = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if unit is None or not isinstance(module, nn.Module) or in_backward():
        return
    units: list[Any] = [entry for entry in module.modules() if isinstance(entry, unit)]
    for item in units:
        item.reshard()
