"""The account of masks of a module, with the errors of outputs, measured before they are applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from karikomi.prune.account import Account, Row, row_of
from karikomi.selection.exact_masks import SelectionResult
from karikomi.selection.threads import each
from karikomi.torch.distributed.dtensors import local
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
        # Whether a unit reads nothing is not known from a part of a weight.
        layout = None if name in masks.places else axes.get(name)
        return row_of(
            name,
            masks[name].cpu().numpy(),
            layout,
            removed=removed(masks[name]),
            why=answer.why.get(name),
            output_error=errors.get(name),
        )

    rows = each(row, list(masks), entries=sum(mask.numel() for mask in masks.values()))
    notes = ("sharded tensors: counts are of this rank's parts",) if masks.places else ()
    total = sum(local(p).numel() for p in module.parameters() if not is_lazy(p))
    return Account(tuple(rows), errors.get(""), notes, total)
