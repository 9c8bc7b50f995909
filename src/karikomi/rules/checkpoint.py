"""The state of rules as plain data, for JSON and checkpoints, and back; matched by tensor names in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.rule import Rule, Scope, State
from karikomi.rules.decide import PREFIX, StageDecision, begin_stages, committed, decide_stage
from karikomi.rules.stages import Stage, alone

_NAMES = "names"


def decide_named(
    rule: Rule,
    names: Sequence[str],
    norms: np.ndarray,
    state: Mapping[str, Any] | None,
    *,
    present: np.ndarray,
    nonfinite: str = "skip",
    facts: Mapping[str, np.ndarray] | None = None,
) -> tuple[StageDecision, dict[str, Any]]:
    """Return the decision and the state after it as plain data, for named NumPy numbers.

    `names`: one per number; the name of a tensor is repeated for each of its units. `state`: returned by an
    earlier call for the same rule, for any names, or ``None`` for a fresh one.
    """
    stage = alone(rule, names)
    arrays = from_plain([stage], state)
    decision, learned = decide_stage(
        stage, norms, arrays, present=present, xp=np, nonfinite=nonfinite, facts=facts
    )
    any_bad = np.any(decision.bad)
    arrays = committed(arrays, learned, skip=decision.skip, any_bad=any_bad, xp=np)
    return decision, to_plain([stage], arrays)


def to_plain(stages: Sequence[Stage], state: State) -> dict[str, Any]:
    """Return a state as plain numbers and lists, for JSON and for ``torch.load(weights_only=True)``.

    A stage whose rules keep an entry per measured number also has an entry ``names``.
    """
    plain = {key: value.tolist() for key, value in state.items()}
    for place, stage in enumerate(stages):
        if _named_axes(stage):
            plain[_names_key(place)] = list(stage.owners)
    return plain


def from_plain(stages: Sequence[Stage], plain: Mapping[str, Any] | None) -> State:
    """Return the NumPy state for these stages from the plain data of `to_plain`.

    Statistics are matched by name: a new name starts with fresh ones, those of missing names are
    dropped. Raises `InvalidArgument` for data that is not a state of these rules.
    """
    vectors = [np.zeros(sum(stage.counts)) for stage in stages]
    fresh = begin_stages(stages, vectors, xp=np)
    if plain is None:
        return fresh
    axes = [_named_axes(stage) for stage in stages]
    expected = {*fresh, *(_names_key(place) for place, own in enumerate(axes) if own)}
    if not isinstance(plain, Mapping) or set(plain) != expected:
        raise InvalidArgument(
            "this state belongs to another rule",
            where=", ".join(type(p.rule).__name__ for stage in stages for p in stage.parts),
            got=sorted(map(str, plain)) if isinstance(plain, Mapping) else type(plain).__name__,
            allowed=sorted(expected),
        )
    named = {key: (axis, place) for place, own in enumerate(axes) for key, axis in own.items()}
    before = [_checked_names(plain[_names_key(i)]) if own else [] for i, own in enumerate(axes)]
    state = {}
    for key, like in fresh.items():
        shape = list(like.shape)
        if key in named:
            axis, place = named[key]
            shape[axis] = len(before[place])
        state[key] = _array(key, plain[key], like.dtype, tuple(shape))
    for stage, own, names in zip(stages, axes, before, strict=True):
        _realign(state, fresh, own, names, list(stage.owners))
    return state


def forgotten(plain: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a plain state without what was learned of these names; a tensor per name is dropped too."""
    kept = {}
    for key, value in plain.items():
        if key == _NAMES or key.startswith(f"{_NAMES}."):
            # No tensor has this name, and `from_plain` drops the numbers of names that are missing.
            value = [f"({name})" if name in names else name for name in value]
        elif isinstance(value, Mapping):
            value = {name: item for name, item in value.items() if name not in names}
        kept[key] = value
    return kept


def _names_key(place: int) -> str:
    return _NAMES if place == 0 else f"{_NAMES}.{place}"


def _named_axes(stage: Stage) -> dict[str, int]:
    """Return entry of the state -> the axis along which it has one number per name."""
    count, axes = sum(stage.counts), {}
    for part in stage.parts:
        if part.rule.scope is Scope.GLOBAL:
            continue
        item, more = (part.rule.init(np.zeros(n), xp=np) for n in (count, count + 1))
        for key, value in item.items():
            differing = [i for i, n in enumerate(more[key].shape) if n != value.shape[i]]
            if differing:
                axes[f"{PREFIX}{part.key}{key}"] = differing[0]
    return axes


def _checked_names(names: object) -> list[str]:
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InvalidArgument("the names of a state are a list of str", got=repr(names)[:80])
    return list(names)


def _array(key: str, value: object, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(value)
        # An empty list has no kind of its own.
        fits = np.can_cast(array.dtype, dtype, "same_kind") or array.size == 0
    except (TypeError, ValueError, OverflowError):
        array, fits = np.empty(0), False
    if not fits or array.shape != shape:
        raise InvalidArgument(
            "this entry of the state does not fit",
            where=key,
            got=repr(value)[:80],
            allowed=f"{dtype} of shape {shape}",
        )
    return array.astype(dtype)


def _realign(
    state: State, fresh: State, axes: Mapping[str, int], before: list[str], names: list[str]
) -> None:
    if before == names or not axes:
        return
    places = {key: place for place, key in enumerate(_numbered(before))}
    known = [(now, places[key]) for now, key in enumerate(_numbered(names)) if key in places]
    if before and names and not known:
        raise InvalidArgument(
            "the state has the names of other tensors",
            where="state",
            got=", ".join(before[:3]),
            allowed=", ".join(names[:3]),
            hint="was the model wrapped or renamed since?",
        )
    to, source = [now for now, _ in known], [then for _, then in known]
    for key, axis in axes.items():
        moved = np.moveaxis(fresh[key].copy(), axis, 0)
        moved[to] = np.moveaxis(state[key], axis, 0)[source]
        state[key] = np.moveaxis(moved, 0, axis)


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    # Units share the name of their tensor and are distinguished by their order.
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        numbered.append((name, seen[name]))
        seen[name] += 1
    return numbered
