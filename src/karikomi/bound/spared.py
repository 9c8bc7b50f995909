"""What a bound leaves alone unless it is selected: gains and running statistics of normalisation layers.

A gain begins at 1 and sets the scale of a whole channel. Clamped to the range of a weight it switches the channel off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from karikomi.errors import InvalidArgument
from karikomi.rule import Composite, Rule, Scope
from karikomi.select import NOT_SELECTED, select

SPARED = "spared"
"""The entry of a state whose bound leaves gains alone; states of earlier versions lack it, and bounded them."""
GAIN = "a gain of a normalisation layer, which only='*' selects"
STATISTIC = "a running statistic of a normalisation layer, which only='*' selects"

_GAINS = {"gain", "g", "scale", "weight"}
_STATISTICS = {"running_mean", "running_var", "moving_mean", "moving_variance"}
# A weight or spectral normalisation is no layer: its scale is that of a weight.
_LAYER = re.compile(
    r"(?<!weight)(?<!weight_)(?<!spectral)(?<!spectral_)norm(ali[sz]ation)?s?(_?\d+d?)?$"
    r"|^norm_(\w{1,4}|final)$|^(bn|ln|gn)(_?\d+|_[a-z]+)?$",
    re.IGNORECASE,
)


def is_normalisation(kind: type) -> bool:
    """Return whether a layer of this class normalises, by the names of the class and of those it is made from.

    >>> class LlamaRMSNorm: ...
    >>> class NormedLinear: ...
    >>> is_normalisation(LlamaRMSNorm), is_normalisation(NormedLinear)
    (True, False)
    """
    return any(_LAYER.search(parent.__name__) for parent in kind.__mro__)


def by_name(names: Iterable[str]) -> dict[str, str]:
    """Return name -> why a bound spares it, for trees without layers: by the last two parts of the path.

    >>> sorted(by_name(["BatchNorm_0.scale", "bn1.weight", "bn1.bias", "net/n/gamma", "norm_net.fc.weight"]))
    ['BatchNorm_0.scale', 'bn1.weight', 'net/n/gamma']
    """
    reasons = {name: _reason(name) for name in names}
    return {name: why for name, why in reasons.items() if why}


def spares(
    rule: Rule | Composite, only: str | Sequence[str] | None, state: Mapping[str, Any] | None = None
) -> bool:
    """Return whether a bound spares gains: nothing is selected, and the state is fresh or of a bound that did.

    Rules that need a unit axis, a fan-in or attention heads have no use for gains anyway; what a rule names it selects.
    """
    if only is not None or isinstance(rule, Composite) or getattr(rule, "has_names", False):
        return False
    if rule.scope is Scope.UNIT or rule.needs - {"negative_part", "distance"}:
        return False
    return not isinstance(state, Mapping) or SPARED in state


def without_mark(state: Any) -> Any:
    """Return a state without the entry `SPARED`, which is none of its rule's; anything else as it is."""
    if not isinstance(state, Mapping):
        return state
    return {key: value for key, value in state.items() if key != SPARED}


def marked(state: dict[str, Any], spare: bool) -> dict[str, Any]:
    """Return the state of a bound with the entry `SPARED` if it spares gains."""
    return {**state, SPARED: True} if spare else state


def left_alone(
    names: Iterable[str],
    gains: Mapping[str, str],
    *,
    only: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    where: str,
) -> dict[str, str]:
    """Return name -> why a bound leaves it alone: it is not selected, or one of these gains to spare.

    Raises `UnknownName` for a pattern that matches nothing, `InvalidArgument` where nothing is left to bound.

    >>> left_alone(["a", "b", "bn.weight"], {"bn.weight": GAIN}, only=None, exclude="a", where="")["a"]
    'not selected'
    """
    names = list(names)
    chosen = set(select(names, only=only, exclude=exclude, where=where)) if names else set()
    reasons = {name: NOT_SELECTED for name in names if name not in chosen}
    reasons |= {name: gains[name] for name in names if name in gains and name in chosen}
    if names and len(reasons) == len(names):
        raise InvalidArgument(
            "no tensor to bound",
            where=where,
            got="; ".join(f"{name}: {reasons[name]}" for name in names[:3]),
            hint="only='*' selects all",
        )
    return reasons


def _reason(name: str) -> str:
    # A layer may be one of a list, and a leaf may have its array under a name.
    parts = [part for part in re.split(r"[./]", name) if part != "value" and not part.isdigit()]
    leaf, layer = parts[-1:], parts[-2:-1]
    within = bool(layer) and _LAYER.search(layer[0]) is not None
    if leaf == ["gamma"] or (within and leaf[0] in _GAINS):
        return GAIN
    if leaf and (leaf[0] in _STATISTICS or (within and leaf[0] in ("mean", "var"))):
        return STATISTIC
    return ""
