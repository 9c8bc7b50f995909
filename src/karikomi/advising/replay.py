"""Open-loop replay: what each rule would have decided on the norms that were recorded, by its own `decide`.

Open loop, since a clip that had engaged would have changed all steps after it. What replay shows is how
often a rule engages and on which steps, not where the training would have ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi import clip
from karikomi.advising.limits import by_global_norm
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals
from karikomi.record.log_codes import log2_of
from karikomi.rule import Rule, Scope, order_of
from karikomi.rules.decide import begin, committed, decide_stage
from karikomi.rules.stages import alone

MOST = 2_000
"""Rows that are replayed for rules that learn, the last ones before the event or the end."""

LEAD = 8
"""How many rows before a spike a rule may engage to count as having caught it."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a rule would have done. `rule`: its text. `limit`: a fixed limit, or ``None``.

    `engaged`: share of rows with a factor below 1 or a skip. `removed`: ``1 - sum(factor norm) / sum(norm)``.
    `variation`: standard deviation over mean of the factor: under Adam only this changes the training. `caught`,
    `spikes`: spikes at or up to 8 rows before which the rule engaged, of how many. `lead`: by how many rows before,
    the median. `false_per_1000`: engaged rows that belong to no spike, per 1,000. `rows`: how many were replayed.
    """

    rule: str
    limit: float | None
    engaged: float
    removed: float
    variation: float
    caught: int
    spikes: int
    lead: float | None
    false_per_1000: float
    rows: int


def replayed(run: Recorded, signals: Signals, limit: float | None, median: float) -> list[Replayed]:
    """Return what fixed limits and rules that learn would have done on this run.

    Rules that learn are left out where the norms are of another order than theirs.
    """
    norms = run.columns["norm"]
    rows = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    if not len(rows):
        return []
    spikes = _spikes(run, signals)
    found = []
    ratios = sorted({0.1, 0.5, 1.0, 3.0, 10.0})
    limits = sorted(
        {float(f"{ratio * median:.2g}") for ratio in ratios} | ({limit} if limit else set())
    )
    for value in limits:
        factors = _fixed(clip.ByGlobalNorm(value, norm=run.order), norms[rows])
        text = by_global_norm(value, run.order)
        found.append(_judged(text, value, rows, factors, norms, spikes))
    if run.order != order_of(clip.Recommended()):
        return found
    some = _window(rows, signals)
    for rule in (clip.Recommended(), clip.EMARatio(2.0), clip.AutoClip(50), clip.ZClip(2.5)):
        factors = _learning(rule, norms[some])
        found.append(_judged(_text(rule), None, some, factors, norms, spikes))
    factors = _learning(clip.SkipSpikes(6.0), norms[some])
    found.append(_judged("SkipSpikes(6)", None, some, factors, norms, spikes))
    tensors = _tensor_rules(run, some, norms, spikes)
    return [*found, *tensors]


def spike_kind(run: Recorded) -> str:
    """Return what counts as a spike in the replay of this run."""
    if run.has("loss"):
        return "the loss left its usual range"
    return "the norm left its usual range (no loss was recorded, so a lead is not known)"


def _spikes(run: Recorded, signals: Signals) -> np.ndarray:
    """Return the rows at which spikes begin, those within `LEAD` rows of another merged."""
    wild = signals.loss_wild | run.bad_loss if run.has("loss") else signals.norm_wild
    rows = np.flatnonzero(wild)
    return rows[np.append(True, np.diff(rows) > LEAD)] if rows.size else rows


def _window(rows: np.ndarray, signals: Signals) -> np.ndarray:
    """Return up to `MOST` rows: those that end soon after the first excursion, else the last."""
    end = len(rows)
    if signals.disturbed is not None:
        end = min(int(np.searchsorted(rows, signals.disturbed)) + MOST // 4, len(rows))
    return rows[max(end - MOST, 0) : end]


def _fixed(rule: Rule, norms: np.ndarray) -> np.ndarray:
    """Return the factors of a rule without state for all norms at once."""
    present = np.ones(len(norms), dtype=bool)
    facts = {"step": np.asarray(0.0), "skipped_in_a_row": np.asarray(0.0)}
    decision, _ = rule.decide(norms, {}, present=present, facts=facts, xp=np)
    return np.asarray(decision.factor)


def _learning(rule: Rule, norms: np.ndarray) -> np.ndarray:
    """Return the factors of a rule with state, step by step; shape (T,) or of all its numbers, (T, N)."""
    vectors = norms.reshape(len(norms), -1)
    stage = alone(rule, [str(place) for place in range(vectors.shape[1])])
    state = begin(rule, vectors[0], xp=np)
    factors = np.ones(vectors.shape)
    for t, vector in enumerate(vectors):
        decision, after = decide_stage(stage, vector, state, present=vector > 0, xp=np)
        factors[t] = 0.0 if decision.skip else decision.factor
        state = committed(state, after, skip=decision.skip, any_bad=np.asarray(False), xp=np)
    return factors if norms.ndim > 1 else factors[:, 0]


def _tensor_rules(
    run: Recorded, rows: np.ndarray, norms: np.ndarray, spikes: np.ndarray
) -> list[Replayed]:
    """Return the replay of rules per tensor, where the norms of all tensors are known."""
    if not run.measured("gradients") or bool((run.codes["gradients"][rows] == 0).all(axis=1).any()):
        return []
    logs = log2_of(run.codes["gradients"][rows]).astype(np.float64)
    vectors = np.exp2(np.nan_to_num(logs, nan=-math.inf, neginf=-math.inf))
    found = []
    for rule in (clip.AdaGC(), clip.EMARatio(2.0, per="tensor")):
        if rule.scope is Scope.TENSOR:
            factors = _learning(rule, vectors)
            total = np.sqrt(np.sum(vectors**2, axis=1))
            after = np.sqrt(np.sum((factors * vectors) ** 2, axis=1))
            joint = after / np.where(total > 0, total, 1.0)
            engaged = np.min(np.where(vectors > 0, factors, 1.0), axis=1) < 1.0
            # A tensor may be clipped without a visible change of the joint norm.
            joint = np.where(engaged, np.minimum(joint, 1.0 - 1e-12), 1.0)
            found.append(_judged(f"{_text(rule)}", None, rows, joint, norms, spikes))
    return found


def _judged(
    text: str,
    limit: float | None,
    rows: np.ndarray,
    factors: np.ndarray,
    norms: np.ndarray,
    spikes: np.ndarray,
) -> Replayed:
    engaged_rows = rows[factors < 1.0]
    own = spikes[(spikes >= rows[0]) & (spikes <= rows[-1])]
    leads = []
    for spike in own:
        near = engaged_rows[(engaged_rows >= spike - LEAD) & (engaged_rows <= spike)]
        if near.size:
            leads.append(int(spike - near[0]))
    belongs = np.zeros(len(engaged_rows), dtype=bool)
    for spike in own:
        belongs |= (engaged_rows >= spike - LEAD) & (engaged_rows <= spike + LEAD)
    sizes = norms[rows] / norms[rows].max()
    return Replayed(
        rule=text,
        limit=limit,
        engaged=len(engaged_rows) / len(rows),
        removed=float(1.0 - np.sum(factors * sizes) / np.sum(sizes)),
        variation=float(np.std(factors) / max(np.mean(factors), 1e-30)),
        caught=len(leads),
        spikes=len(own),
        lead=float(np.median(leads)) if leads else None,
        false_per_1000=1000.0 * float(np.sum(~belongs)) / len(rows),
        rows=len(rows),
    )


def _text(rule: Any) -> str:
    """Return a rule as it is written with its first argument, and others where they differ from the defaults."""
    name = type(rule).__name__
    known: Mapping[str, str] = {
        "Recommended": "Recommended()",
        "AdaGC": "AdaGC()",
        "AutoClip": "AutoClip(50)",
        "ZClip": "ZClip(2.5)",
    }
    if name == "EMARatio":
        return "EMARatio(2)" if rule.per == "global" else 'EMARatio(2, per="tensor")'
    return known.get(name, repr(rule))
