"""Prune torch modules in place, without wrapping a layer: measure, select, mask, and say what it did.

The selection itself is shared by all frameworks (`karikomi.selection.exact_masks`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune import (
    OBC,
    Layers,
    NofM,
    Pattern,
    Score,
    SparseGPT,
    Target,
    Units,
    as_pattern,
    as_score,
)
from karikomi.prune.account import Account
from karikomi.select import select
from karikomi.selection.arguments import allocation_of, asked, by_hand
from karikomi.selection.block_scores import check_blockwise
from karikomi.selection.exact_masks import (
    SelectionRequest,
    SelectionResult,
    check_combination,
    find_masks,
)
from karikomi.torch.distributed.fsdp import reshard_
from karikomi.torch.facts.measure import check_data, following, measure
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.modules.prunable import BY_DEFAULT, prunable
from karikomi.torch.pruning.account import account_of
from karikomi.torch.pruning.mask_agreement import check_replicas
from karikomi.torch.pruning.mask_shards import place_of
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.pruning.output_errors import first_of, outputs_of, relative_error
from karikomi.torch.pruning.weight_sources import (
    Facts,
    check_facts,
    counted,
    coupled_in,
    members_of,
    outlying,
    sources_of,
    totals_of,
    with_axes,
)
from karikomi.torch.reconstruction.refit import reconstruct_
from karikomi.torch.tracing.isolation import isolated
from karikomi.torch.tracing.restoring import restored_unless_kept

WHERE = "torch.prune_"


def prune_(
    module: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    width: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    score: str | Score = "magnitude",
    allocation: str | None = None,
    pattern: str | Pattern = "unstructured",
    data: Iterable[Any] | None = None,
    loss: Any = None,
    facts: Facts | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    protect: Collection[str] | None = None,
    masks: Masks | None = None,
) -> Masks:
    """Set the least important weights of a module to zero, in place, and return the masks.

    The weights of Linear, Conv and ConvTranspose layers are scored in float32; of each pool of the
    allocation exactly the asked number goes, ties by parameter order, then index order. Biases,
    normalisation, embeddings (and a weight tied to one) and recurrent cells are left alone:
    ``masks.left_alone`` says why. Tensors that lost every weight stand in ``masks.emptied``;
    ``masks.account`` says per tensor what went, why, and, with `data`, what that did to the output.

    One target, unless the pattern says how much goes: `sparsity`, the share of all selected weights that
    is zero afterwards, in [0, 1), or globs over parameter names -> such a share, each layer by hand;
    `width`, the share of units (heads, layers, blocks) that stays, in
    (0, 1]; or a budget for what stays of the whole module, as a share or a whole number: `parameters`,
    `macs` (multiply-accumulates of one example), `bytes` (kept values and one bit per masked weight).
    `score`, `allocation`, `pattern`: registered names (``karikomi list``) or objects of `karikomi.prune`;
    without an `allocation` it is ``uniform`` for units, blocks and scores that compare within rows
    (``wanda``), else ``global``. `data`: batches
    ``(inputs, targets)`` or inputs, for scores that need them; read once per measuring, in memory that
    does not grow. `loss`: ``loss(outputs, targets)``, for scores by gradients. `facts`: measured facts,
    fact -> parameter -> array (`karikomi.prune.FACTS`, ``macs``, ``outliers``, ``curve``), instead of
    measuring them. `only`, `exclude`: globs over parameter names. `protect`: what is left alone, of
    ``first``, ``last``, ``norms``, ``embeddings``, ``recurrent`` cells and ``attention`` (fused projections);
    by default all but first and last, and for units and layers also the last layer, whose units are the
    outputs. `masks`: earlier masks; what they removed
    stays removed and counts.

    Of sharded weights (DTensor) single ones go, by scores that need no data and by sparsity, over all ranks
    together: the same as of the whole weights. All ranks call; each has the masks of its parts
    (`Masks.joined` makes them whole).

    Units take their bias with them, and, with `data`, the scale and shift of the normalisation that
    follows them, so that their output is zero. A score that compares within rows (``wanda``) or
    reconstructs (``obc``, ``sparsegpt``) takes from each tensor of a joint pool as many as magnitude would.

    Raises `InvalidArgument` for a target that is missing or can be read in two ways, `UnknownName` for a
    name or a glob, `Unsupported` when nothing can be pruned or a combination means nothing, `NonFinite`
    naming a tensor with NaN or infinite weights or scores.

    >>> import torch, karikomi as kk
    >>> layer = torch.nn.Linear(4, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
    >>> masks = kk.torch.prune_(layer, sparsity=0.5)
    >>> layer.weight.tolist(), masks.counts(), masks.left_alone
    ([[3.0, 0.0, 0.0, -4.0]], {'weight': (2, 4)}, {'bias': 'a bias'})

    Source: Han et al. 2015 (magnitude); Frankle and Carbin 2019 (global). Deviation from
    ``torch.nn.utils.prune``: exact counts under ties, no parametrization, a few MiB of memory.
    """
    if not isinstance(module, nn.Module):
        raise InvalidArgument(
            "what is pruned is a module, as its layers say what the axes of a weight are",
            where=WHERE,
            got=type(module).__name__,
            hint="kk.numpy.prune takes trees of arrays",
        )
    reshard_(module)
    chosen, asked_score = as_pattern(pattern), as_score(score)
    check_facts(module, facts or {}, asked_score)
    check_combination(asked_score, chosen)
    if data is not None:
        check_data(data, WHERE)
    if isinstance(data, Iterator):
        raise InvalidArgument(
            "data is read more than once, and an iterator gives it once",
            where=f"{WHERE}: data",
            got=type(data).__name__,
            allowed="a list or a DataLoader of batches",
        )
    value = 0.0 if isinstance(sparsity, Mapping) else sparsity
    target = asked(
        *(chosen, WHERE), sparsity=value, width=width, parameters=parameters, macs=macs, bytes=bytes
    )
    if protect is None:
        last = ("last",) if isinstance(chosen, Units | Layers) else ()
        protect = (*BY_DEFAULT, *last)
    weights, left_alone = _selected(module, only, exclude, protect)
    hand = by_hand(sparsity, list(weights), allocation, where=WHERE)
    if hand:
        left_alone |= {n: "no sparsity is given for it" for n in weights if n not in hand}
        weights = {name: weight for name, weight in weights.items() if name in hand}
    _check_sharded(weights, asked_score, data)
    pruning = _Pruning(
        module=module,
        weights=weights,
        score=asked_score,
        pattern=chosen,
        allocation=allocation_of(allocation, chosen, asked_score),
        target=target,
        data=data,
        loss=loss,
        facts=facts or {},
        by_hand=hand,
        spared=_spared(module, exclude),
    )
    found = pruning.run_(masks)
    left_alone = {**left_alone, **found.left_alone}
    return Masks(
        found,
        left_alone={name: why for name, why in left_alone.items() if name not in found},
        account=found.account,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pruning:
    """One call of `prune_`, checked."""

    module: nn.Module
    weights: Mapping[str, torch.Tensor]
    score: Score
    pattern: Pattern
    allocation: str
    target: Target | None
    data: Iterable[Any] | None
    loss: Any
    facts: Facts
    by_hand: Mapping[str, float]
    spared: Collection[str]

    def run_(self, masks: Masks | None) -> Masks:
        """Prune in as many rounds as the score asks for; after an error the weights are as before."""
        found, rounds = Masks(masks), self.score.rounds
        moves = rounds > 1 or self.score.updates
        weights = _initialized(self.module) if moves else {}
        with isolated(0, 0), restored_unless_kept(lambda: weights) as snapshot:
            for number in range(1, rounds + 1):
                target = None if self.target is None else self.target.after(number, rounds)
                question, left_alone = self._question(target, found)
                answer = find_masks(question)
                if number == rounds > 1:
                    # The account compares with the weights before the first round.
                    snapshot.restore_()
                found = self._applied(answer, found, left_alone, last=number == rounds)
            snapshot.keep()
        return found

    def _question(
        self, target: Target | None, earlier: Masks
    ) -> tuple[SelectionRequest, dict[str, str]]:
        norms = {}
        if isinstance(self.pattern, Units) and self.data is not None:
            norms = following(self.module, self.data)
        coupled, left_alone = [], {}
        members = dict(self.weights)
        if self.pattern.coupled:
            coupled, left_alone = coupled_in(
                self.module, self.pattern, self.weights, norms, self.spared
            )
            members = members_of(self.module, coupled)
        else:
            members, left_alone = with_axes(self.module, members, self.pattern, self.score)
        facts = self._measured(members)
        question = SelectionRequest(
            sources=sources_of(self.module, members, facts),
            score=self.score,
            pattern=self.pattern,
            allocation=self.allocation,
            target=target,
            coupled=coupled,
            earlier=_on_host(earlier, members),
            totals=totals_of(self.module, facts),
            outliers=facts.get("outliers", {}),
            curves=facts.get("curve", {}),
            by_hand=self.by_hand,
        )
        return question, left_alone

    def _measured(self, members: Mapping[str, torch.Tensor]) -> dict[str, Mapping[str, Any]]:
        needs = set(self.score.needs) - {"noise"}
        outliers = self.allocation == "owl" and "outliers" not in self.facts
        if outliers:
            needs.add("input_norm")
        needs -= self.facts.keys()
        found: dict[str, Mapping[str, Any]] = dict(self.facts)
        if self.target is not None and self.target.unit == "macs" and "macs" not in found:
            # Of the whole module, as the budget is.
            every = {**counted(self.module), **{n: o for n, o in members.items() if o.dim() > 1}}
            found |= measure(self.module, {"macs"}, every, data=self.data, where=WHERE)
        if needs:
            scored = {
                n: member for n, member in members.items() if n in self.weights or member.dim() > 1
            }
            found |= measure(
                *(self.module, frozenset(needs), scored),
                data=self.data,
                loss=self.loss,
                where=WHERE,
            )
        if outliers:
            norms = found["input_norm"]
            found["outliers"] = {
                n: outlying(self.weights[n], norms[n]) for n in members if n in self.weights
            }
        return found

    def _applied(
        self, answer: SelectionResult, earlier: Masks, left_alone: Mapping[str, str], *, last: bool
    ) -> Masks:
        account = None
        if self.score.updates:
            answer, account = self._reconstructed(answer, earlier)
        parameters = dict(unwrapped(self.module).named_parameters())
        kept, places = dict(earlier.items()), dict(earlier.places)
        for name, mask in answer.masks.items():
            kept[name] = torch.from_numpy(mask).to(parameters[name].device)
            if (place := place_of(parameters[name])) is not None:
                places[name] = place
        left_alone = {**left_alone, **answer.left_alone}
        masks = Masks(kept, left_alone=left_alone, places=places)
        if account is None:
            account = account_of(self.module, masks, answer, self.data if last else None)
        check_replicas(self.module, masks)
        with torch.no_grad():
            masks.apply_(self.module)
        return Masks(masks, left_alone=left_alone, account=account)

    def _reconstructed(
        self, answer: SelectionResult, earlier: Masks
    ) -> tuple[SelectionResult, Account]:
        """Return the masks that the reconstruction chose, and what it did, the weights being re-fitted."""
        assert isinstance(self.score, OBC | SparseGPT)  # noqa: S101  (no other score updates)
        batches = [] if self.data is None else first_of(self.module, self.data)
        before = outputs_of(self.module, batches)
        found = reconstruct_(
            *(self.module, answer.removes, self.data, self.score),
            pattern=self.pattern if isinstance(self.pattern, NofM) else None,
            earlier=earlier,
        )
        answer = replace(
            answer, masks=found.masks, why=dict.fromkeys(answer.why, "least harm once re-fitted")
        )
        masks = Masks({name: torch.from_numpy(mask) for name, mask in found.masks.items()})
        account = found.account(account_of(self.module, masks, answer, None))
        after = outputs_of(self.module, batches)
        return answer, replace(account, output_error=relative_error(before, after))


def _initialized(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in module.named_parameters() if not is_lazy(weight)}


def _spared(module: nn.Module, exclude: str | Sequence[str] | None) -> set[str]:
    """Return the parameters that are excluded by name."""
    names = list(dict(unwrapped(module).named_parameters()))
    return set(names) - set(select(names, only=None, exclude=exclude, where=WHERE))


def _selected(
    module: nn.Module,
    only: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    protect: Collection[str],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weights, left_alone = prunable(module, protect)
    chosen = set(select([*weights, *left_alone], only=only, exclude=exclude, where=WHERE))
    if not chosen & set(weights):
        raise Unsupported(
            "nothing of this can be pruned",
            where=WHERE,
            got="; ".join(f"{k}: {why}" for k, why in list(left_alone.items())[:3]),
            allowed="weights of Linear and Conv layers",
        )
    left_alone |= {name: "not selected" for name in weights if name not in chosen}
    return {name: weight for name, weight in weights.items() if name in chosen}, left_alone


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


def _on_host(masks: Masks, weights: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return earlier masks as arrays, or refuse one that does not fit."""
    found = {}
    for name, weight in weights.items():
        if name not in masks:
            continue
        found[name] = np.ascontiguousarray(masks.here(name, weight).cpu().numpy())
    return found
