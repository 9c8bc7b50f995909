"""What masks do to a module, measured before they are applied: per layer and at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from karikomi.prune.account import Account, Row
from karikomi.selection.exact_masks import SelectionResult
from karikomi.selection.threads import each
from karikomi.torch.modules.prunable import layouts
from karikomi.torch.pruning.masks import Masks, removed
from karikomi.torch.pruning.output_errors import output_errors


def account_of(
    module: nn.Module, masks: Masks, answer: SelectionResult, data: Iterable[Any] | None
) -> Account:
    """Return one row per masked tensor; with `data` also the errors that the masks are about to make."""
    errors: Mapping[str, float] = {}
    if data is not None:
        errors = output_errors(module, masks, data)
    axes = layouts(module)

    def row(name: str) -> Row:
        mask = masks[name]
        reads_nothing, unread = (), ()
        # Of a part no one can tell what reads nothing.
        whole = name not in masks.places
        if whole and name in axes and axes[name].inputs is not None:
            canonical = axes[name].canonical(mask.cpu().numpy())
            reads_nothing = _dead(canonical.reshape(len(canonical), -1).any(axis=1))
            unread = _dead(canonical.reshape(-1, canonical.shape[-1]).any(axis=0))
        return Row(
            name=name,
            removed=removed(mask),
            size=mask.numel(),
            why=answer.why.get(name, "as before"),
            output_error=errors.get(name),
            reads_nothing=reads_nothing,
            unread=unread,
        )

    rows = each(row, list(masks), entries=sum(mask.numel() for mask in masks.values()))
    notes = ("sharded tensors: counts are of this rank's parts",) if masks.places else ()
    return Account(tuple(rows), errors.get(""), notes)


def _dead(alive: Any) -> tuple[int, ...]:
    return tuple(np.flatnonzero(~np.asarray(alive)).tolist())
