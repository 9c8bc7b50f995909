"""Prune layers and re-fit the remaining weights to the outputs of the dense network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune.account import Account
from karikomi.prune.pattern import NofM
from karikomi.prune.scores.reconstruction import OBC, SparseGPT
from karikomi.reconstruction.least_squares import Reconstructed
from karikomi.reconstruction.obc import obc, operations
from karikomi.reconstruction.sparsegpt import sparsegpt
from karikomi.torch.modules.parameters import check_names, check_values, unwrapped
from karikomi.torch.reconstruction.calibration import Regressions, matrix_weight, weight_matrix
from karikomi.torch.tracing.eval_mode import steady
from karikomi.torch.tracing.restoring import restored_unless_kept

WHERE = "reconstruct_"
PER_SECOND = 5e8
"""Operations of `obc` that a processor does in a second, for an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitted:
    """One tensor: the relative errors of its layer's output against the dense network's.

    `masked`: with the mask alone, `refitted`: with the weights of the reconstruction, both for inputs from
    the pruned layers before it. `updated`: whether the reconstruction had the lower error and was
    kept. `damping`: as used, more than requested if the Gram matrix had no Cholesky factor.
    """

    name: str
    masked: float
    refitted: float
    updated: bool
    damping: float

    @property
    def error(self) -> float:
        """The error of the weights that were kept."""
        return self.refitted if self.updated else self.masked


@dataclass(frozen=True, slots=True)
class LayerRefit:
    """`masks`: parameter name -> boolean array, true where kept. `rows`: in the order of the forward pass."""

    masks: dict[str, np.ndarray]
    rows: tuple[Refitted, ...]
    damping: float

    def account(self, account: Account) -> Account:
        """Return an account with the output errors of the reconstruction, and notes on deviations."""
        errors = {row.name: row.error for row in self.rows}
        rows = tuple(
            replace(row, output_error=errors.get(row.name, row.output_error))
            for row in account.rows
        )
        # The error of the whole network was measured after the re-fit, against itself.
        notes = (*account.notes, *self._notes())
        return replace(account, rows=rows, output_error=None, notes=notes)

    def _notes(self) -> Iterator[str]:
        for row in self.rows:
            if not row.updated:
                yield f"{row.name}: masked only, a re-fit was no better"
            if row.damping > self.damping:
                yield f"{row.name}: damping {row.damping:g}, as {self.damping:g} gave no Cholesky factor"


@torch.no_grad()
def reconstruct_(
    module: nn.Module,
    removes: Mapping[str, int],
    data: Iterable[Any] | None,
    method: OBC | SparseGPT | None = None,
    *,
    pattern: NofM | None = None,
    earlier: Mapping[str, torch.Tensor] | None = None,
    progress: bool = True,
) -> LayerRefit:
    """Remove weights of a module and re-fit the others, layer by layer, in place.

    ``min ||W X - W' X'||^2 + damping mean(diag(X' X'^T)) ||W - W'||^2`` with X the inputs in the dense
    network and X' the outputs of the layers before it, already pruned; so that each layer compensates
    the earlier ones. In eval mode; memory does not grow with the data. A re-fit that is not
    better than the mask alone on `data` is not kept, and noted.

    `removes`: parameter name -> how many of its weights are zero afterwards. `data`: batches
    ``(inputs, targets)`` or inputs alone, read once for each tensor. `method`: `OBC` (default) or
    `SparseGPT`. `pattern`: of `of` consecutive inputs `keep` are kept, instead of the counts. `earlier`:
    masks; the weights that they removed are removed first, and count. Raises `InvalidArgument` for missing
    data, `UnknownName`, `Unsupported` for a weight that no linear map or convolution reads, `NonFinite`;
    after an error the weights are as before.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> refit = reconstruct_(layer, {"weight": 1}, [torch.tensor([[1.0, 1.0], [2.0, 2.0]])], progress=False)
    >>> layer.weight.round(decimals=1).tolist(), refit.rows[0].updated
    ([[4.0, 0.0]], True)

    Source: Frantar and Alistarh 2022 and 2023 (see `OBC`, `SparseGPT`). Deviation: the targets are the
    dense network's outputs, as in the asymmetric reconstruction of He, Zhang and Sun 2017, "Channel
    Pruning for Accelerating Very Deep Neural Networks"; the damping pulls to the dense weights.
    """
    if data is None or isinstance(data, Iterator):
        raise InvalidArgument(
            "reconstruction reads the data once for each tensor",
            where=f"{WHERE}: data",
            got=type(data).__name__,
            allowed="a list or a DataLoader of batches",
        )
    module, method = unwrapped(module), method or OBC()
    parameters = _chosen(module, removes)
    check_values(parameters, where=WHERE)
    if isinstance(method, OBC):
        _check_cost(parameters, removes, method, pattern)
    masks = {name: np.ones(tuple(weight.shape), bool) for name, weight in parameters.items()}
    masks |= {name: mask.cpu().numpy() for name, mask in (earlier or {}).items() if name in masks}
    rows = []
    with steady(module), restored_unless_kept(lambda: parameters) as snapshot:
        regressions = Regressions(module, parameters, snapshot.copies, data, where=WHERE)
        bar = tqdm(
            regressions.order, "reconstruct", leave=False, disable=None if progress else True
        )
        for number, name in enumerate(bar):

            def advance(share: float, number: int = number) -> None:
                bar.n = number + round(share, 3)
                bar.refresh()

            if removes[name] > masks[name].size - int(masks[name].sum()) or pattern:
                amount = pattern or removes[name]
                result, row = _refit(regressions, name, amount, method, masks[name], advance)
                shape, window = tuple(parameters[name].shape), regressions.windows[name]
                both = (torch.from_numpy(found) for found in (result.weights, result.kept))
                weights, kept = (matrix_weight(found, shape, window) for found in both)
                parameters[name].copy_(weights)
                masks[name] = kept.numpy()
                rows.append(row)
        snapshot.keep()
    return LayerRefit(masks, tuple(rows), method.damping)


def _refit(
    regressions: Regressions,
    name: str,
    amount: int | NofM,
    method: OBC | SparseGPT,
    mask: np.ndarray,
    advance: Callable[[float], None],
) -> tuple[Reconstructed, Refitted]:
    problem = regressions.problem(name)
    window = regressions.windows[name]
    weights = weight_matrix(regressions.dense[name].double().cpu(), window).numpy()
    by_columns = isinstance(method, SparseGPT)
    solver = (
        partial(sparsegpt, block=method.block) if by_columns else partial(obc, progress=advance)
    )
    where, gone = f"{WHERE}: {name}", ~weight_matrix(torch.from_numpy(mask), window).numpy()
    result = solver(weights, problem, amount, damping=method.damping, gone=gone, where=where)
    masked = np.where(result.kept, weights, 0.0)
    errors = problem.error(masked), problem.error(result.weights)
    updated = errors[1] < errors[0]
    row = Refitted(
        name=name, masked=errors[0], refitted=errors[1], updated=updated, damping=result.damping
    )
    return (result if updated else replace(result, weights=masked)), row


def _chosen(module: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    known = dict(module.named_parameters())
    check_names(names, known, where=WHERE)
    for name in names:
        if known[name].dim() < 2:
            raise Unsupported("this is not a matrix of weights", where=f"{WHERE}: {name}")
    return {name: known[name] for name in names}


def _check_cost(
    parameters: Mapping[str, torch.Tensor],
    removes: Mapping[str, int],
    method: OBC,
    pattern: NofM | None,
) -> None:
    """Raise `Unsupported` for the first tensor that needs more operations than the method may take."""
    for name, weight in parameters.items():
        rows = weight.shape[0]
        remove = round(weight.numel() * pattern.sparsity) if pattern else removes[name]
        needed = operations((rows, weight.numel() // max(rows, 1)), remove)
        if needed > method.most_operations:
            raise Unsupported(
                f"obc needs about {needed:.0e} operations for this tensor, some "
                f"{needed / PER_SECOND / 60:,.0f} minutes",
                where=f"{WHERE}: {name}",
                allowed=f"<= {method.most_operations:.0e}",
                hint='score="sparsegpt", or score=kk.prune.OBC(most_operations=...)',
            )
