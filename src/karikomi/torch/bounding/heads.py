"""Bound attention heads by their largest logits: one number per head, applied to several parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.bound.qk_clip import QKClip
from karikomi.bound.standing import standing
from karikomi.errors import InvalidArgument, NonFinite, Unsupported, check_known
from karikomi.rule import State
from karikomi.rules import checkpoint, decide
from karikomi.rules.outcome import Outcome
from karikomi.torch.bounding.attention_logits import known, taken
from karikomi.torch.distributed.dtensors import is_sharded
from karikomi.torch.modules.attention import Attention, attentions

Logits = Mapping[str, Any]
WHERE = "torch.bound_"
NO_HEADS = "it makes no queries or keys"
NO_LOGITS = "no finite logits were supplied for it"


def layers_of(
    module: nn.Module, found: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Attention], dict[str, str]]:
    """Return ``(name -> attention with all projections in `found`, parameter -> why it is left alone)``, or raise."""
    every = attentions(module)
    if not every:
        raise Unsupported(
            "the module has no attention that is known here",
            where=WHERE,
            hint="declare your own layers: kk.torch.declare_attention(layer, heads=8, q=..., k=...)",
        )
    chosen = {name: item for name, item in every.items() if item.names <= found.keys()}
    if not chosen:
        raise Unsupported(
            "no attention has all its query and key projections selected", where=WHERE
        )
    touched = {name for item in chosen.values() for name in item.names}
    sharded = [name for name in found if name in touched and is_sharded(found[name])]
    if sharded:
        raise Unsupported(
            "heads of sharded weights lie on several ranks, and so do the logits that they made",
            where=f"{WHERE} (QKClip)",
            got=", ".join(sharded[:3]),
            hint="use SpectralCap on these weights, or keep the projections of queries and keys whole",
        )
    return chosen, {name: NO_HEADS for name in found if name not in touched}


def check_supplied(layers: Mapping[str, Attention]) -> None:
    """Raise `Unsupported` where no logits of these layers are recorded."""
    if not any(known(layer.layer) for layer in layers.values()):
        raise Unsupported(
            "QKClip needs the largest logit of every head, which no weight tells",
            where=WHERE,
            got=f"none for {', '.join(list(layers)[:3])}",
            hint="call kk.torch.watch_logits(model), or note_logits in forward, or pass logits=",
        )


@torch.no_grad()
def bound_heads(
    module: nn.Module,
    found: Mapping[str, torch.Tensor],
    rule: QKClip,
    state: State | None,
    logits: Logits | None,
) -> tuple[Outcome, State]:
    """Scale every head whose largest logit is above the limit; return ``(outcome, state)``."""
    layers, left_alone = layers_of(module, found)
    if logits is None:
        check_supplied(layers)
        supplied: Mapping[str, Any] = _finite(taken(layers))
    else:
        supplied = logits
        _check_names(supplied, layers)
    # In the order of the module, whatever the order they were supplied in.
    sizes = {n: _sizes(n, supplied[n], layer) for n, layer in layers.items() if n in supplied}
    for name in layers.keys() - sizes.keys():
        left_alone |= {parameter: NO_LOGITS for parameter in sorted(layers[name].names)}
    norms = np.concatenate([np.zeros(0), *sizes.values()])
    owners = [name for name, heads in sizes.items() for _ in heads]
    present = np.ones(len(norms), dtype=bool)
    verdict, after = checkpoint.decide_named(rule, owners, norms, state, present=present)
    start = 0
    for name, heads in sizes.items():
        _scale(found, layers[name], rule, verdict.factor[start : start + len(heads)])
        start += len(heads)
    left = decide.norms_after(norms, verdict, xp=np)
    held = standing(rule, left, verdict.factor, attempted=int(after["attempted"]) - 1)
    outcome = Outcome(
        names=tuple(owners),
        norms=norms,
        after=left,
        skipped=False,
        element_wise=True,
        left_alone=left_alone,
        share_at_bound=float(held.sum()) / max(len(held), 1),
    )
    return outcome, after


def _check_names(logits: Logits, layers: Mapping[str, Attention]) -> None:
    if not isinstance(logits, Mapping) or not logits:
        raise InvalidArgument(
            "logits are a mapping from attention to one number per head",
            where=f"{WHERE}(logits)",
            got=repr(logits)[:80],
        )
    for name in logits:
        check_known(name, layers, "there is no such attention", where=f"{WHERE}(logits)")


def _finite(logits: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # A forward pass that gave NaN makes a step that clipping skips: nothing is to be bounded after it.
    return {
        n: heads
        for n, heads in logits.items()
        if not torch.isnan(heads).any() and not heads.isposinf().any()
    }


def _sizes(name: str, logits: Any, attention: Attention) -> np.ndarray:
    if isinstance(logits, torch.Tensor):
        logits = logits.detach().double().cpu().numpy()
    try:
        sizes = np.asarray(logits, dtype=np.float64)
    except (TypeError, ValueError):
        sizes = np.empty((0, 0))
    if sizes.shape != (attention.heads,):
        raise InvalidArgument(
            "one largest logit per query head",
            where=f"{WHERE}(logits): {name}",
            got=f"shape {sizes.shape}",
            allowed=f"({attention.heads},)",
        )
    if not np.all(np.isfinite(sizes) | (sizes == -np.inf)):
        raise NonFinite(f"non-finite logits in {name}", where=WHERE)
    # A head whose largest logit is negative is as far from any limit as one at 0.
    return np.maximum(sizes, 0.0)


def _scale(
    found: Mapping[str, torch.Tensor], attention: Attention, rule: QKClip, gamma: np.ndarray
) -> None:
    query, key = rule.split(gamma, shared=attention.shared)
    parts = [(rows, query) for rows in attention.query]
    parts += [] if attention.shared else [(rows, key) for rows in attention.key]
    for rows, factors in parts:
        heads = rows.of(found[rows.name])
        for place in np.flatnonzero(factors != 1.0):
            heads[place].mul_(float(factors[place]))
