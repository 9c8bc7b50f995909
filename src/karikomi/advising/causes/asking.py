"""The rules for causes in the order in which they are asked, and the names of the causes."""

from __future__ import annotations

from collections.abc import Callable

from karikomi.advising.causes.always_clipped import always_clipped
from karikomi.advising.causes.changed_weights import changed_weights
from karikomi.advising.causes.finding import Finding
from karikomi.advising.causes.learning_rate import rate_jumped, rate_too_high
from karikomi.advising.causes.moment_lag import moment_lag
from karikomi.advising.causes.overflow import loss_scale, nonfinite
from karikomi.advising.causes.single_tensor import single_tensor
from karikomi.advising.causes.slow_growth import slow_growth
from karikomi.advising.causes.small_gradients import near_epsilon, vanishing
from karikomi.advising.causes.spoilt_data import bad_batch, data_shift
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals

RULES: tuple[Callable[[Recorded, Signals], Finding | None], ...] = (
    loss_scale,
    changed_weights,
    nonfinite,
    rate_jumped,
    moment_lag,
    bad_batch,
    data_shift,
    single_tensor,
    slow_growth,
    rate_too_high,
    vanishing,
    near_epsilon,
    always_clipped,
)
"""The rules: what is certain from a few numbers first, what is inferred from many last."""

CAUSES = {
    "loss_scale": "the loss scale of float16 collapsed",
    "changed_weights": "weights were written by something other than a step",
    "nonfinite_batch": "a batch or forward pass that is not finite",
    "backward_overflow": "an overflow of the backward pass",
    "learning_rate": "the learning rate",
    "moment_lag": "lag of Adam's second moment",
    "bad_batch": "a bad batch",
    "data_shift": "data that changed",
    "single_tensor": "one tensor that explodes before the others",
    "slow_growth": "growth of attention or output logits",
    "vanishing": "vanishing gradients",
    "near_epsilon": "gradients near Adam's epsilon",
    "always_clipped": "a limit that is always met",
    "unknown": "unknown",
    "none": "nothing happened",
}

NO_FAULT = ("none", "always_clipped")
"""Causes that name no fault."""


def findings(run: Recorded, signals: Signals) -> list[Finding]:
    """Return the findings of all rules that apply, in the order of the rules.

    A run with an excursion that no rule explains has the cause ``unknown``, one without any none.
    """
    found = [finding for rule in RULES if (finding := rule(run, signals)) is not None]
    row = signals.disturbed
    if row is not None and not any(item.cause not in NO_FAULT for item in found):
        missing = ", ".join(run.missing) or "nothing that the rules need"
        found.insert(0, _unknown(run, signals, row, missing))
    return found


def _unknown(run: Recorded, signals: Signals, row: int, missing: str) -> Finding:
    numbers = {
        "norm_score": float(signals.norm_z[row]),
        "loss_score": float(signals.loss_z[row]),
    }
    return Finding(
        "unknown",
        row,
        f"Norm or loss left its usual range in step {run.steps[row]:,}, and no rule explains it. Not recorded: "
        f"{missing}.",
        "Record the run with kk.record.Recorder and attach(record=), which keep what the rules need.",
        numbers=numbers,
    )
