"""THE table of features that meet in one training, in twos: a new feature joins all of them with one row here.

A row of `FEATURES` is what the feature changes of a `Run`, a small training that `reference_run` works out in plain
NumPy and `pair_runs` does in each framework. Two rows together are a pair. A row that cannot meet another one,
or not in some framework, has its reason in `CANNOT`; which tests of several ranks have a feature is in `RANKS`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import karikomi as kk
from contract import reference_run as by_hand

Change = Callable[["Run"], "Run"]

WEIGHTS = {
    "one.weight": np.array([[0.5, -1.0, 0.25], [1.5, 0.125, -0.75]]),
    "two.weight": np.array([[-0.375, 1.25]]),
}
MASKS = {
    "one.weight": np.array([[True, False, True], [True, True, False]]),
    "two.weight": np.array([[True, True]]),
}
_SLOPES = {
    "one.weight": np.array([[1.0, -0.5, 0.25], [0.75, -1.25, 0.5]]),
    "two.weight": np.array([[0.5, -1.5]]),
}
# Two steps in a row are spikes.
_SIZES = (1.0, 1.25, -0.75, 1.0, 0.5, 8.0, 7.0, -1.0, 1.25, 0.75)
_BAD = 4  # the micro-batch with a NaN: just before the spikes, and the first of its window


@dataclass(frozen=True)
class Limit:
    """A rule by its limit, and its reference; `floor` and `roof` are the ends of a schedule of the limit."""

    make: Callable[[Any], Any]
    limit: float
    reference: by_hand.Clip


@dataclass(frozen=True)
class Run:
    """A small training of SGD on fixed gradients.

    `rules`: one after the other. `every`: micro-batches of an update. `stop`: the micro-batches after which it
    is saved and goes on in fresh objects. `apart`: whether each tensor has an optimizer of its own.
    """

    rules: tuple[Limit, ...] = ()
    grouped: bool = False
    scheduled: bool = False
    every: int = 1
    scale: float | None = None
    bad: bool = False
    policy: str = "skip"
    momentum: float = 0.0
    stop: int | None = None
    masks: bool = False
    bound: float | None = None
    penalty: float | None = None
    apart: bool = False
    rate: float = field(default=0.25, init=False)

    def slopes(self, batch: int) -> dict[str, np.ndarray]:
        """Return the gradients of a micro-batch; their pattern moves, so that no two are parallel."""
        found = {}
        for name, slope in _SLOPES.items():
            found[name] = _SIZES[batch] * np.roll(slope, batch, axis=1)
        if self.bad and batch == _BAD:
            found["two.weight"][0, 0] = math.nan
        return found

    @property
    def batches(self) -> int:
        return len(_SIZES)

    @property
    def rule(self) -> Any:
        """The rule as karikomi is given it."""
        made = [self._made(each) for each in self.rules]
        if not made:
            return kk.clip.ByGlobalNorm(math.inf)
        rule = made[0] if len(made) == 1 else kk.clip.Chain(*made)
        return kk.clip.Groups({"one.*": rule}, default=None) if self.grouped else rule

    def _made(self, each: Limit) -> Any:
        if not self.scheduled:
            return each.make(each.limit)
        return each.make(kk.schedule.Linear(2.0 * each.limit, each.limit, steps=(0, 4)))

    def limits(self, attempted: int) -> list[tuple[by_hand.Clip, float]]:
        """Return the reference of each rule and its limit after so many attempted steps."""
        share = max(0.0, 1.0 - attempted / 4) if self.scheduled else 0.0
        return [(each.reference, each.limit * (1.0 + share)) for each in self.rules]


VALUE = Limit(kk.clip.ByValue, 1.0, by_hand.by_value)
NORM = Limit(kk.clip.ByGlobalNorm, 2.25, by_hand.by_norm)
TENSORS = Limit(kk.clip.ByNorm, 1.0, by_hand.by_tensor)
ANY = Limit(kk.clip.ByGlobalNorm, 1.5, by_hand.by_norm)  # where a feature needs some rule
LEARNED = Limit(lambda ratio: kk.clip.EMARatio(ratio, beta=0.5), 1.125, by_hand.by_mean)
MOMENTS = Limit(lambda most: kk.clip.SPAM(most, warmup=0), 1000.0, by_hand.by_second_moments)
SPIKES = Limit(
    lambda sigma: kk.clip.SkipSpikes(sigma, window=3, warmup=2, patience=1),
    1.5,
    by_hand.by_spikes,
)


def _rule(limit: Limit) -> Change:
    return lambda run: dataclasses.replace(run, rules=(*run.rules, limit))


def _setting(**changes: Any) -> Change:
    return lambda run: dataclasses.replace(run, **changes)


def _around(**changes: Any) -> Change:
    """Change how rules are put together; where there are none there is a norm."""
    return lambda run: dataclasses.replace(run, **{"rules": run.rules or (ANY,), **changes})


# In the order in which they are put together: rules first.
FEATURES: dict[str, Change] = {
    "value clip": _rule(VALUE),
    "second moments": _rule(MOMENTS),
    "patience": _rule(SPIKES),
    "learned limit": _rule(LEARNED),
    "norm clip": _rule(NORM),
    "chain": lambda run: dataclasses.replace(run, rules=(*(run.rules or (ANY,)), TENSORS)),
    "groups": _around(grouped=True),
    "schedule": _around(scheduled=True),
    "loss scale": _setting(scale=1024.0),
    "accumulation": _setting(every=2),
    "bad step": _setting(bad=True),
    "momentum": _setting(momentum=0.5),
    "resume": _setting(stop=5),
    "masks": _setting(masks=True),
    "bound": _setting(bound=0.75),
    "penalty": _setting(penalty=0.25),
    "several optimizers": _setting(apart=True),
}
# The training is the same with them as without.
UNSEEN = {"loss scale", "resume", "several optimizers"}
# Under these policies for gradients that are not finite is a pair with a bad step run.
POLICIES = ("skip", "zero", "raise")

# (feature, framework), or (feature, other feature, framework) -> why they cannot meet.
CANNOT: dict[tuple[str, ...], str] = {
    ("loss scale", "jax"): "optax has no loss scale; gradients come in their true size",
    ("loss scale", "numpy"): "there is no half precision that would need one",
    ("accumulation", "numpy"): "whoever computes the gradients adds them up",
    ("several optimizers", "jax"): "an optimizer is a function of all parameters",
    ("several optimizers", "keras"): "a model of Keras has one optimizer",
    ("several optimizers", "numpy"): "there is no optimizer",
    ("several optimizers", "torch on a device"): "a joint step of several is decided on the host",
    ("second moments", "numpy"): "they are an argument, which whoever trains keeps",
    (
        "accumulation",
        "bad step",
        "jax",
    ): "optax.MultiSteps keeps a NaN in its sum, or leaves a micro-batch out",
}
# A pair in which one of the two leaves nothing for the other one to change: (hidden, by) -> why.
HIDDEN: dict[tuple[str, str], str] = {
    ("groups", "patience"): "a step is skipped for all tensors, and both of them have the spike",
    ("schedule", "patience"): "the spike is far above the limit at both ends of the schedule",
}
PAIRS = list(itertools.combinations(FEATURES, 2))


def run_of(*features: str, policy: str = "skip") -> Run:
    """Return the run of some features."""
    run = Run(policy=policy)
    for name, change in FEATURES.items():
        if name in features:
            run = change(run)
    return run


def policies(first: str, second: str) -> tuple[str, ...]:
    """Return the policies under which a pair is run."""
    if "bad step" not in (first, second):
        return POLICIES[:1]
    # A scaler takes no step with gradients that are not finite, whatever the policy.
    return POLICIES[:1] if "loss scale" in (first, second) else POLICIES


def reason(first: str, second: str, framework: str) -> str | None:
    """Return why a pair cannot be run in a framework."""
    keys = [(first, framework), (second, framework), (first, second, framework)]
    return next((CANNOT[key] for key in keys if key in CANNOT), None)


# Feature -> the scenarios of `ranks.two_ranks` with it, or why several ranks change nothing for it.
RANKS: dict[str, tuple[str, ...] | str] = {
    "value clip": ("fsdp value", "tp value", "experts value", "nan by value"),
    "norm clip": ("fsdp global", "tp global", "experts global", "pipeline"),
    "learned limit": ("fsdp autoclip", "fsdp zclip", "experts learn"),
    "second moments": ("fsdp spam",),
    "patience": ("fsdp spikes", "tp spikes"),
    "chain": ("fsdp chain", "fsdp remeasured", "experts chain"),
    "groups": ("fsdp groups", "tp groups", "experts groups"),
    "schedule": ("fsdp scheduled", "tp scheduled"),
    "loss scale": "the scaler of torch unscales the parts of each rank and agrees on overflows by itself",
    "accumulation": "gradients are added up by backward, before a rule is asked",
    "bad step": ("nan skip", "nan zero", "nan raise", "experts nan"),
    "momentum": ("prune moments", "prune in training tp"),
    "resume": ("together fsdp", "together tp"),
    "masks": ("prune in training", "prune in training tp", "prune ddp"),
    "bound": ("bound in training", "bound in training tp"),
    "penalty": ("penalty fsdp, scales",),
    "several optimizers": ("fsdp two optimizers",),
}
