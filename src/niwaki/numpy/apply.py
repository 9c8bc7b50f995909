"""Clip and bound dicts or lists of NumPy arrays: pure functions that return new arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

import numpy as np

from niwaki import conduct
from niwaki.errors import InvalidArgument, NonFinite, Refused, UnknownName, suggest
from niwaki.numpy.measure import check_arrays, norm, peak, unit_norms
from niwaki.outcome import Outcome
from niwaki.rule import Quantity, Rule, Scope, State

Arrays = TypeVar("Arrays", Mapping[str, np.ndarray], Sequence[np.ndarray])


def clip(
    grads: Arrays, rule: Rule, state: State | None = None, *, nonfinite: str = "skip"
) -> tuple[Arrays, Outcome, State]:
    """Return ``(clipped gradients, outcome, state)``; the input is left alone.

    `grads`: a dict or list of floating arrays; ``None`` entries took no part and stay ``None``.
    `state`: what the last call returned, plain data that JSON takes, or ``None`` for a fresh one; what
    it learned of a tensor goes with the tensor's name. `nonfinite`: ``skip`` returns
    zeros for the whole step, ``zero`` zeroes only the bad tensors, ``pass`` leaves them, ``raise``
    raises `NonFinite` naming them. A plain update with zeros is no update; moments still move.

    Raises `InvalidArgument` for arrays that are not floating, and `Refused` for a rule that
    does not act on gradients.

    >>> import numpy as np, niwaki as nw
    >>> grads, outcome, state = clip({"w": np.full(4, 10.0)}, nw.clip.ByGlobalNorm(1.0))
    >>> grads["w"].tolist(), outcome.pre, outcome.action
    ([0.5, 0.5, 0.5, 0.5], 20.0, 'clipped')
    """
    conduct.check_rule(rule, Quantity.GRADIENT, where="numpy.clip")
    conduct.check_policy(nonfinite, where="numpy.clip")
    named = _named(grads, where="numpy.clip")
    _check(rule, {name: g for name, g in named.items() if g is not None}, where="numpy.clip")
    by_element = rule.scope is Scope.ELEMENT
    size = peak if by_element else norm
    norms = np.array([0.0 if g is None else size(g) for g in named.values()], dtype=np.float64)
    present = np.array([g is not None for g in named.values()])
    verdict, state = conduct.judge_named(
        rule, list(named), norms, state, present=present, nonfinite=nonfinite
    )
    verdict = _representable(verdict, list(named.values()))
    _raise_if_asked(nonfinite, verdict.bad, list(named), where="numpy.clip")
    skip = bool(verdict.skip)
    clipped = [
        g if g is None else _applied(g, i, norms, verdict, skip=skip)
        for i, g in enumerate(named.values())
    ]
    outcome = Outcome(
        names=tuple(named),
        norms=norms,
        after=conduct.norms_after(norms, verdict, xp=np),
        skipped=skip,
        element_wise=by_element,
        nonfinite_policy=nonfinite,
    )
    return _like(grads, clipped), outcome, state


def bound(
    weights: Arrays,
    rule: Rule,
    state: State | None = None,
    *,
    unit_axes: Mapping[str, int] | None = None,
) -> tuple[Arrays, Outcome, State]:
    """Return ``(bounded weights, outcome, state)``; the input is left alone.

    `unit_axes`: for rules per unit, name -> the axis whose index is one output unit (0 for a matrix
    of shape (out, in)). Tensors without an entry are left alone, and the outcome says so.

    Raises `NonFinite` naming the tensor when a weight is not finite: no bound can mend it.
    Raises `InvalidArgument` for what is no floating array and for unit axes that do not fit.

    >>> import numpy as np, niwaki as nw
    >>> weights, outcome, state = bound({"w": np.array([[3.0, 4.0], [0.0, 1.0]])},
    ...                                 nw.bound.Clamp(2.0))
    >>> weights["w"].tolist()
    [[2.0, 2.0], [0.0, 1.0]]
    """
    conduct.check_rule(rule, Quantity.WEIGHT, where="numpy.bound")
    named = _named(weights, where="numpy.bound")
    _check(rule, named, where="numpy.bound")
    axes = _axes(rule, named, unit_axes or {})
    measured = {name: _measured(rule, named[name], axis) for name, axis in axes.items()}
    if not measured:
        raise InvalidArgument(
            "no tensor to bound", where="numpy.bound", hint="name unit axes: unit_axes={'w': 0}"
        )
    norms = np.concatenate(list(measured.values()))
    owners = [name for name, numbers in measured.items() for _ in numbers]
    _raise_if_asked("raise", ~np.isfinite(norms), owners, where="numpy.bound")
    verdict, state = conduct.judge_named(rule, owners, norms, state, present=np.isfinite(norms))
    verdict = _representable(verdict, [named[name] for name in owners])
    bounded, at_bound, start = dict(named), np.zeros(2), 0
    for name, numbers in measured.items():
        part = slice(start, start + len(numbers))
        start += len(numbers)
        bounded[name] = _bounded(named[name], axes[name], numbers, verdict, part)
        at_bound += _count_at_bound(bounded[name], rule, numbers, verdict, part)
    outcome = Outcome(
        names=tuple(owners),
        norms=norms,
        after=conduct.norms_after(norms, verdict, xp=np),
        skipped=False,
        element_wise=rule.scope is Scope.ELEMENT,
        left_alone={name: "no unit axis was named" for name in named if name not in axes},
        share_at_bound=float(at_bound[0] / max(at_bound[1], 1.0)),
    )
    return _like(weights, list(bounded.values())), outcome, state


def _check(rule: Rule, arrays: Mapping[str, np.ndarray], *, where: str) -> None:
    check_arrays(arrays, where=where)
    for name, array in arrays.items():
        if rule.scope is Scope.ELEMENT and np.iscomplexobj(array):
            raise Refused(
                "complex entries have no order to clamp by",
                where=f"{where}: {name}",
                hint="use a rule by norm",
            )


def _named(arrays: Arrays, *, where: str) -> dict[str, np.ndarray]:
    if isinstance(arrays, np.ndarray) or not isinstance(arrays, Iterable):
        raise InvalidArgument(
            "not a dict or list of arrays", where=where, got=type(arrays).__name__
        )
    pairs = arrays.items() if isinstance(arrays, Mapping) else enumerate(arrays)
    # NumPy turns arrays without axes into scalars at every opportunity.
    named = {str(key): np.asarray(a) if isinstance(a, np.generic) else a for key, a in pairs}
    if not named:
        raise InvalidArgument(
            "there is no array to act on", where=where, hint="an exhausted generator?"
        )
    return named


def _representable(
    verdict: conduct.Verdict, arrays: Sequence[np.ndarray | None]
) -> conduct.Verdict:
    # As the arrays round it: 0.1 is a little more in float32, and what stands there is not above it.
    if verdict.limit is None:
        return verdict
    with np.errstate(over="ignore"):
        limits = [
            limit if array is None else float(limit.astype(array.dtype))
            for limit, array in zip(verdict.limit, arrays, strict=True)
        ]
    return verdict._replace(limit=np.array(limits, dtype=np.float64))


def _like(example: Arrays, values: list[np.ndarray]) -> Arrays:
    if isinstance(example, Mapping):
        return cast(Arrays, dict(zip(example, values, strict=True)))
    return cast(Arrays, tuple(values) if isinstance(example, tuple) else values)


def _raise_if_asked(nonfinite: str, bad: np.ndarray, names: list[str], *, where: str) -> None:
    if nonfinite == "raise" and bad.any():
        culprits = sorted({name for name, flag in zip(names, bad, strict=True) if flag})
        raise NonFinite(f"non-finite entries in {', '.join(culprits[:5])}", where=where)


def _applied(
    array: np.ndarray, index: int, norms: np.ndarray, verdict: conduct.Verdict, *, skip: bool
) -> np.ndarray:
    if skip or verdict.factor[index] == 0.0:
        return np.zeros_like(array)
    if verdict.bad[index]:
        return array
    if verdict.limit is not None:
        return _clamped(array, float(norms[index]), float(verdict.limit[index]))
    return _scaled(array, float(verdict.factor[index]))


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    if factor == 1.0:
        return array
    # In float64, because a factor for huge gradients may be too small for their own dtype.
    wide = np.result_type(array.dtype, np.float64)
    return np.asarray(array.astype(wide) * factor).astype(array.dtype)


def _clamped(array: np.ndarray, largest: float, limit: float) -> np.ndarray:
    return np.asarray(np.clip(array, -limit, limit)) if largest > limit else array


def _axes(
    rule: Rule, named: Mapping[str, np.ndarray], unit_axes: Mapping[str, int]
) -> dict[str, int | None]:
    if rule.scope is not Scope.UNIT:
        return dict.fromkeys(named, None)
    unknown = set(unit_axes) - set(named)
    if unknown:
        raise UnknownName(
            "unit_axes names no such tensor",
            where="numpy.bound",
            got=repr(min(unknown)),
            hint=suggest(min(unknown), named),
        )
    for name, axis in unit_axes.items():
        if not -named[name].ndim <= axis < named[name].ndim:
            raise InvalidArgument(
                "the tensor has no such axis",
                where=f"numpy.bound: {name}",
                got=axis,
                allowed=f"an axis of shape {named[name].shape}",
            )
    return {name: unit_axes[name] for name in named if name in unit_axes}


def _measured(rule: Rule, array: np.ndarray, axis: int | None) -> np.ndarray:
    if axis is not None:
        return unit_norms(array, axis)
    return np.array([peak(array) if rule.scope is Scope.ELEMENT else norm(array)])


def _bounded(
    array: np.ndarray,
    axis: int | None,
    numbers: np.ndarray,
    verdict: conduct.Verdict,
    part: slice,
) -> np.ndarray:
    if verdict.limit is not None:
        return _clamped(array, float(numbers[0]), float(verdict.limit[part][0]))
    factors = verdict.factor[part]
    if axis is None:
        return _scaled(array, float(factors[0]))
    if np.all(factors == 1.0):
        return array
    shape = [1] * array.ndim
    shape[axis] = -1
    wide = np.result_type(array.dtype, np.float64)
    return (array.astype(wide) * factors.reshape(shape)).astype(array.dtype)


def _count_at_bound(
    array: np.ndarray, rule: Rule, numbers: np.ndarray, verdict: conduct.Verdict, part: slice
) -> np.ndarray:
    if verdict.limit is not None:
        limit = float(verdict.limit[part][0])
        return np.array([np.count_nonzero(np.abs(array) >= limit), array.size])
    return np.array([np.count_nonzero(verdict.factor[part] < 1.0), len(numbers)])
