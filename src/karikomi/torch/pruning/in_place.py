"""Prune torch modules in place, without wrapping a layer: measure, select, mask, report."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune import OBC, Allocation, Fixed, NofM, Pattern, Score, SparseGPT, Units
from karikomi.prune.account import Account
from karikomi.prune.facts import Facts, check_facts
from karikomi.select import outright, select
from karikomi.selection.block_scores import check_blockwise
from karikomi.selection.exact_masks import SelectionRequest, SelectionResult, find_masks
from karikomi.selection.request import PruneRequest, request_of, totals_of
from karikomi.torch.distributed.fsdp import reshard_
from karikomi.torch.distributed.replicas import gathered, replica_count
from karikomi.torch.facts.measure import check_data, check_rereadable, following, measure
from karikomi.torch.modules.parameters import by_any_name, every_name, keys_by_any_name, unwrapped
from karikomi.torch.modules.prunable import layouts, projections, prunable
from karikomi.torch.pruning.account import account_of
from karikomi.torch.pruning.mask_shards import place_of
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.pruning.output_errors import first_of, outputs_of, relative_error
from karikomi.torch.pruning.weight_sources import (
    coupled_in,
    members_of,
    sizes_of,
    sources_of,
)
from karikomi.torch.reconstruction.refit import reconstruct_
from karikomi.torch.tracing.isolation import isolated
from karikomi.torch.tracing.restoring import restored_unless_kept

WHERE = "torch.prune_"


def prune_(
    module: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    count: int | Mapping[str, int] | None = None,
    width: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    score: str | Score = "magnitude",
    allocation: Allocation | None = None,
    pattern: str | Pattern = "unstructured",
    rounding: str = "up",
    importance: Mapping[str, Any] | None = None,
    data: Iterable[Any] | None = None,
    loss: Any = None,
    facts: Facts | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    protect: Collection[str] | None = None,
    masks: Masks | None = None,
) -> Masks:
    """Set the least important weights of a module to zero, in place, and return the masks.

    The weights of Linear, Conv, ConvTranspose, recurrent and attention layers are scored in float32; of each pool of
    the allocation exactly the asked number goes, ties by parameter order, then index order. Biases, normalisation,
    embeddings (and a weight tied to one), parameters of other layers, and what a layer computes its weight from
    (``spectral_norm``, ``weight_norm``) are left alone: ``masks.left_alone`` has the reasons.
    Tensors that lost every weight are in ``masks.emptied``;
    ``masks.account`` has the share of all weights that is zero, per tensor what was removed and why, and, with `data`,
    the effect on the output.

    One target, unless the pattern determines how much is removed: `sparsity`, the share of all selected weights that
    is zero afterwards, in [0, 1), or globs over parameter names -> such a share, each layer by hand; of units, heads,
    layers or blocks as many go as make it at least that share, or with ``rounding="nearest"`` nearest to it;
    `count`, how many weights (units, heads, layers, blocks) are zero afterwards, or globs -> such numbers;
    `width`, the share of units (heads, layers, blocks) that stays, in (0, 1]; or a budget for what stays of the whole
    module, as a share or a whole number: `parameters`,
    `macs` (multiply-accumulates of one example), `bytes` (kept values and one bit per masked weight).
    `score`, `allocation`, `pattern`: registered names (``karikomi list``) or objects of `karikomi.prune`;
    without an `allocation` it is ``uniform`` for units, blocks and scores that compare within rows
    (``wanda``), else ``global``. `data`: batches
    ``(inputs, targets)`` or inputs, also mappings with ``labels``, for scores that need them; read once per
    measuring, in memory that does not grow. `loss`: ``loss(outputs, targets)``, for scores by gradients.
    `facts`: measured facts, fact -> parameter -> array (`karikomi.prune.FACTS`), instead of measuring
    them. `importance`: parameter -> array of its shape, a score of your own instead of `score`; what has none is left
    alone. `only`, `exclude`: globs over parameter names; one that spells a bias or another parameter out ("*.bias",
    "norm.weight") selects it too (`karikomi.select.outright`). `protect`: what is left alone, of
    ``first``, ``last``, ``norms``, ``embeddings``, ``recurrent`` cells and ``attention`` (fused projections);
    by default norms and embeddings, for scores that reconstruct the fused ones too, and for units and layers also
    the last layer, whose units are the outputs. `masks`: earlier masks; what they removed
    stays removed and counts.

    Of sharded weights (DTensor) single ones go, by scores that need no data and by sparsity, over all ranks
    together: the same as of the whole weights. All ranks call; each has the masks of its parts
    (`Masks.joined` makes them whole).

    Units take their bias with them, and, with `data`, the scale and shift of the normalisation that
    follows them, so that their output is zero. A score that compares within rows (``wanda``) or
    reconstructs (``obc``, ``sparsegpt``) takes from each tensor of a joint pool as many as magnitude would.

    Raises `InvalidArgument` for a target that is missing or can be read in two ways, `UnknownName` for a
    name or a glob, `Unsupported` when nothing can be pruned or a combination means nothing, `NonFinite`
    naming a tensor with NaN or infinite weights or scores. Warns of tensors that lose every weight because
    all were zero before (new LoRA adapters).

    >>> import torch, karikomi as kk
    >>> layer = torch.nn.Linear(4, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
    >>> masks = kk.torch.prune_(layer, sparsity=0.5)
    >>> layer.weight.tolist(), masks.counts(), masks.left_alone
    ([[3.0, 0.0, 0.0, -4.0]], {'weight': (2, 4)}, {'bias': 'a bias'})

    Source: Han et al. 2015 (magnitude); Frankle and Carbin 2019 (global). Deviation from
    ``torch.nn.utils.prune``: exact counts under ties, no parametrization, a few MiB of memory.
    """
    request = request_of(
        WHERE,
        sparsity=sparsity,
        count=count,
        width=width,
        parameters=parameters,
        macs=macs,
        bytes=bytes,
        score=score,
        allocation=allocation,
        pattern=pattern,
        rounding=rounding,
        importance=importance,
        facts=facts,
        only=only,
        exclude=exclude,
        protect=protect,
    )
    pruning, left_alone = prepared(module, request, data, loss)
    pruned = pruning.run_(masks)
    left_alone = {**left_alone, **pruned.left_alone}
    return Masks(
        pruned,
        left_alone={name: why for name, why in left_alone.items() if name not in pruned},
        account=pruned.account,
    )


def prepared(
    module: nn.Module, request: PruneRequest, data: Iterable[Any] | None, loss: Any
) -> tuple[PruneCall, dict[str, str]]:
    """Return ``(a call of `prune_`, checked, parameter -> why it is left alone)``; the module is not changed."""
    where = request.where
    if not isinstance(module, nn.Module):
        raise InvalidArgument(
            "not a module, whose layers determine the axes of their weights",
            where=where,
            got=type(module).__name__,
            hint="karikomi.numpy takes trees of arrays",
        )
    reshard_(module)
    plain = unwrapped(module)
    names = dict(plain.named_parameters(remove_duplicate=False))
    check_facts(request.facts, request.score.needs, names, where=where)
    if data is not None:
        check_data(data, where)
        check_rereadable(data, where)
    weights, left_alone = prunable(plain, request.protect, outright(names, request.only))
    if request.sees_inputs:
        for name in projections(plain):
            left_alone[name] = "what it multiplies stays inside of the kernel"
            weights.pop(name, None)
    named = _by_any_name(plain, request)
    chosen, left_alone, shares = named.chosen(
        weights, left_alone, allowed="weights of Linear, Conv and recurrent layers"
    )
    weights = {name: weights[name] for name in chosen}
    _check_sharded(weights, request.score, data)
    pruning = PruneCall(
        module=plain,
        request=named,
        weights=weights,
        shares=shares,
        data=data,
        loss=loss,
        spared=_spared(plain, names, request),
        check=lambda masks: _check_replicas(module, masks),
    )
    return pruning, left_alone


def _spared(module: nn.Module, names: Mapping[str, Any], request: PruneRequest) -> set[str]:
    """Return the names, further ones of tied weights too, of what `exclude` matches."""
    if request.exclude is None:
        return set()
    where = request.where
    exclude = every_name(module, request.exclude, where=where)
    kept = select(list(names), exclude=exclude, where=where)
    return set(names) - set(kept)


def _by_any_name(module: nn.Module, request: PruneRequest) -> PruneRequest:
    """Return the request with patterns and arrays that find tied weights by any of their names."""
    facts, allocation = request.facts, request.allocation
    if isinstance(allocation, Fixed):
        allocation = replace(allocation, shares=keys_by_any_name(module, dict(allocation.shares)))
    return replace(
        request,
        allocation=allocation,
        only=by_any_name(module, request.only),
        exclude=by_any_name(module, request.exclude),
        shares=keys_by_any_name(module, request.shares),
        counts=keys_by_any_name(module, request.counts),
        facts={fact: keys_by_any_name(module, facts[fact]) for fact in facts} if facts else facts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneCall:
    """One call of `prune_`, checked; `check` compares the masks of replicas before they are applied."""

    module: nn.Module
    request: PruneRequest
    weights: Mapping[str, torch.Tensor]
    shares: Mapping[str, float]
    data: Iterable[Any] | None
    loss: Any
    spared: Collection[str]
    check: Callable[[Masks], None]

    def run_(self, masks: Masks | None) -> Masks:
        """Prune in as many rounds as the score has; after an error the weights are as before."""
        found, rounds = Masks(masks), self.request.score.rounds
        moves = rounds > 1 or self.request.score.updates
        weights = {
            name: weight
            for name, weight in self.module.named_parameters()
            if moves and not is_lazy(weight)
        }
        with isolated(0, 0), restored_unless_kept(lambda: weights) as snapshot:
            for number, request in enumerate(self.request.rounds(), start=1):
                selection, left_alone = self.selection(request, found)
                answer = find_masks(selection)
                if number == rounds > 1:
                    # The account compares with the weights before the first round.
                    snapshot.restore_()
                found = self._applied(answer, found, left_alone, last=number == rounds)
            snapshot.keep()
        return found

    def selection(
        self, request: PruneRequest, earlier: Masks
    ) -> tuple[SelectionRequest, dict[str, str]]:
        """Return ``(what is selected from, parameter -> why nothing of it)``; facts are measured here."""
        members, coupled = dict(self.weights), []
        if request.pattern.coupled:
            norms = {}
            if isinstance(request.pattern, Units) and self.data is not None:
                norms = following(self.module, self.data)
            coupled, left_alone = coupled_in(self.module, request, self.weights, norms, self.spared)
            members = members_of(self.module, coupled)
        else:
            axes = layouts(self.module)
            left_alone = request.without_axes({name: axes.get(name) for name in members})
            members = {n: weight for n, weight in members.items() if n not in left_alone}
        facts = request.gathered(lambda needs: self._measured(needs, members))
        selection = request.selection(
            sources_of(self.module, members, facts),
            facts,
            shares=self.shares,
            coupled=coupled,
            earlier={
                name: np.ascontiguousarray(earlier.here(name, weight).cpu().numpy())
                for name, weight in members.items()
                if name in earlier
            },
            totals=totals_of(sizes_of(self.module), facts),
        )
        return selection, left_alone

    def _measured(self, needs: frozenset[str], members: Mapping[str, torch.Tensor]) -> Facts:
        matrices = {name: item for name, item in members.items() if item.dim() > 1}
        scored = {n: item for n, item in members.items() if n in self.weights or n in matrices}
        measured: dict[str, Mapping[str, Any]] = {}
        if "macs" in needs:
            # Of the whole module, as the budget is: of layers and attention.
            whole = {**prunable(self.module, ("norms",))[0], **matrices}
            whole = {
                name: item for name, item in whole.items() if name not in projections(self.module)
            }
            measured |= measure(
                self.module, {"macs"}, whole, data=self.data, where=self.request.where
            )
        if needs := needs - {"macs"}:
            measured |= measure(
                self.module, needs, scored, data=self.data, loss=self.loss, where=self.request.where
            )
        return measured

    def _applied(
        self, answer: SelectionResult, earlier: Masks, left_alone: Mapping[str, str], *, last: bool
    ) -> Masks:
        account = None
        if self.request.score.updates:
            answer, account = self._reconstructed(answer, earlier)
        parameters = dict(self.module.named_parameters())
        kept, places = dict(earlier.items()), dict(earlier.places)
        for name, mask in answer.masks.items():
            kept[name] = torch.from_numpy(mask).to(parameters[name].device)
            if (place := place_of(parameters[name])) is not None:
                places[name] = place
        left_alone = {**left_alone, **answer.left_alone}
        masks = Masks(kept, left_alone=left_alone, places=places)
        if account is None:
            account = account_of(self.module, masks, answer, self.data if last else None)
            notes = self.request.notes(answer.masks)
            account = replace(account, notes=(*account.notes, *notes))
        self.check(masks)
        self._warn_of_untrained(account, earlier)
        with torch.no_grad():
            masks.apply_(self.module)
        return Masks(masks, left_alone=left_alone, account=account)

    def _warn_of_untrained(self, account: Account, earlier: Masks) -> None:
        """Warn of tensors that lose every weight because all were zero before."""
        lost = [row.name for row in account.rows if row.removed == row.size]
        zero = [
            name
            for name in lost
            if name in self.weights
            and not (name in earlier and not earlier[name].any())
            and not self.weights[name].any()
        ]
        if zero:
            first = ", ".join(zero[:3]) + (", ..." if len(zero) > 3 else "")
            warnings.warn(
                f"karikomi: all weights of {len(zero)} tensor(s) were zero, as in a new LoRA adapter, and all of "
                f"them are masked now, so that they cannot be trained ({first}). Train them before they are "
                f"pruned, or leave them out, such as by exclude={zero[0]!r}",
                stacklevel=4,
            )

    def _reconstructed(
        self, answer: SelectionResult, earlier: Masks
    ) -> tuple[SelectionResult, Account]:
        """Return the masks of the reconstruction and its account; the weights are re-fitted."""
        score, pattern = self.request.score, self.request.pattern
        assert isinstance(score, OBC | SparseGPT)  # noqa: S101  (no other score updates)
        batches = [] if self.data is None else first_of(self.module, self.data)
        before = outputs_of(self.module, batches)
        found = reconstruct_(
            self.module,
            answer.removes,
            self.data,
            score,
            pattern=pattern if isinstance(pattern, NofM) else None,
            earlier=earlier,
        )
        answer = replace(
            answer, masks=found.masks, why=dict.fromkeys(answer.why, "least harm once re-fitted")
        )
        masks = Masks({name: torch.from_numpy(mask) for name, mask in found.masks.items()})
        account = found.account(account_of(self.module, masks, answer, None))
        after = outputs_of(self.module, batches)
        return answer, replace(account, output_error=relative_error(before, after))


def _check_replicas(module: nn.Module, masks: Masks) -> None:
    """Raise `Unsupported`, on every rank, if the ranks of a data-parallel module found different masks."""
    if replica_count(module) == 1:
        return
    checksum = 0
    for name, mask in masks.items():
        checksum = zlib.crc32(mask.cpu().numpy().tobytes(), zlib.crc32(name.encode(), checksum))
    if len(set(gathered(module, checksum))) > 1:
        raise Unsupported(
            "the ranks found different masks, and their replicas would drift apart",
            where=WHERE,
            hint="give every rank the same data=, or prune before wrapping and load the masks on each",
        )


def _check_sharded(weights: Mapping[str, torch.Tensor], score: Score, data: Any) -> None:
    split = [name for name, weight in weights.items() if place_of(weight) is not None]
    if not split:
        return
    check_blockwise(score, where=split[0])
    if data is not None:
        raise Unsupported(
            "of sharded weights nothing is measured",
            where=f"{WHERE}: data",
            got=split[0],
            hint='score="magnitude" needs no data',
        )
