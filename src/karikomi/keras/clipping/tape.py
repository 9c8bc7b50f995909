"""Clip gradients in hand-written loops: a pure function of gradients and state, eager or compiled."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from karikomi import tree
from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.functional.library import Library
from karikomi.functional.outcomes import as_bytes, described, from_bytes
from karikomi.functional.unit_axes import UnitAxes
from karikomi.keras.arrays.library import as_it_is, framework_of, is_known, library_for, readable
from karikomi.keras.arrays.variables import names_of, prepared, value_of
from karikomi.keras.clipping.named_clip import (
    Clip,
    check_clip,
    clip_for,
    culprits,
    outcome_of,
)
from karikomi.rule import Array, Composite, Rule, State
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import PEAKS
from karikomi.schedule import whole_from

WHERE = "keras.clip"
_OF = "of."  # the entry that identifies a state; its name, which is readable while tracing, ends in a checksum


def clip(
    grads: Any,
    rule: Rule | Composite,
    state: Mapping[str, Any] | None = None,
    *,
    variables: Any = None,
    nonfinite: str = "skip",
    unit_axes: UnitAxes | None = None,
) -> tuple[Any, Outcome, State]:
    """Return ``(clipped gradients, outcome, state)``; nothing is written to.

    `grads`: a list, dict or nested containers of the arrays of TensorFlow, JAX or torch, such as
    ``tape.gradient`` returns them; they come back in the same containers. ``None`` took no part and stays
    ``None``. A `tf.IndexedSlices` is measured with the rows that occur twice added up, and stays one but where
    `SPAM`, or a unit across rows, needs the whole table.
    `state`: what the last call returned, or ``None`` for a fresh one; `initial_state` makes one to begin
    with, so that a ``tf.function`` is traced once. It is a flat dict of tensors, for ``np.savez`` and JSON,
    and with every entry in a `tf.Variable` for `tf.train.Checkpoint`, which saves no plain tensors.
    `variables`: those of the gradients, which give the names (else places do), and the weights for rules
    that compare with them (`AGC`).
    `nonfinite`: a step with NaN or infinite entries: ``skip`` returns zeros for all of it, ``zero`` zeroes
    the bad tensors alone, ``zero_entries`` their bad entries alone, ``pass`` leaves them, ``raise`` raises where
    values are known and is ``skip`` in compiled code: then `check` the state. A step with zeros still moves moments;
    to leave it out, branch on ``state["skipped"]``, or use ``kk.keras.clipped``. `unit_axes`: for rules per unit,
    name or glob -> the axis whose index is one output unit, or the axes: for Keras ``{"*kernel": -1}``. An array
    without an entry is one unit.

    In compiled code the outcome cannot be read: return the state and read ``kk.keras.outcome(state)``.
    Raises `InvalidArgument` for what is no such tree or a state of other arrays, `NonFinite` as said, and
    `Unsupported` for rules on updates, and on weights without `variables`.

    >>> import keras, karikomi as kk
    >>> grads, outcome, state = clip([keras.ops.full((4,), 10.0)], kk.clip.ByGlobalNorm(1.0))
    >>> keras.ops.convert_to_numpy(grads[0]).tolist(), outcome.pre
    ([0.5, 0.5, 0.5, 0.5], 20.0)
    """
    # AutoGraph, which rewrites whatever a tf.function calls, has nothing to find here.
    return as_it_is(_clipped)(grads, rule, state, variables, nonfinite, unit_axes)


def initial_state(
    rule: Rule | Composite, variables: Any, *, unit_axes: UnitAxes | None = None
) -> State:
    """Return the state of `clip` before the first step, for the gradients of these variables.

    >>> import keras, karikomi as kk
    >>> state = initial_state(kk.clip.ZClip(), [keras.Variable([1.0, 2.0])])
    >>> int(state["attempted"])
    0
    """
    check_clip(rule, "skip", weights=True, where=WHERE)
    variables = tree.collected(variables)
    _, known = _named(tree.flatten(variables, where=WHERE), variables)
    weights = {name: value_of(variable) for name, variable in known.items()}
    return _fresh(
        _clip(rule, weights, weights, "skip", unit_axes), weights, library_for(_first(weights, {}))
    )


def outcome(state: Mapping[str, Any]) -> Outcome:
    """Return the outcome of the step of `clip` that returned this state; this waits for the device.

    >>> import keras, karikomi as kk
    >>> _, _, state = clip([keras.ops.ones((4,))], kk.clip.ByNorm(1.0))
    >>> print(outcome(state))
    pre 2 -> post 1 x0.5 clipped; top: 0 100%
    """
    return outcome_of(_description(state), dict(state))


def check(state: Mapping[str, Any], *, stop_after: int = 10) -> None:
    """Raise `NonFinite`, naming the arrays, once `stop_after` steps in a row had non-finite gradients.

    Compiled code cannot raise: call this beside the loss that you log. It waits for the device.

    >>> import keras, karikomi as kk
    >>> _, _, state = clip([keras.ops.full((4,), float("nan"))], kk.clip.ByNorm(1.0))
    >>> check(state, stop_after=1)
    Traceback (most recent call last):
    karikomi.errors.NonFinite: keras.check: 1 steps in a row with non-finite entries, the last in 0
    """
    stop_after = whole_from(1, stop_after, "stop_after must be >= 1", where="keras.check")
    in_a_row = int(np.asarray(readable(state["bad_in_a_row"])))
    if in_a_row >= stop_after:
        named = culprits(_description(state), dict(state))
        _raise(
            named, f"{in_a_row} steps in a row with non-finite entries, the last in", "keras.check"
        )


def _clipped(
    grads: Any,
    rule: Rule | Composite,
    state: Mapping[str, Any] | None,
    variables: Any,
    nonfinite: str,
    unit_axes: UnitAxes | None,
) -> tuple[Any, Outcome, State]:
    check_clip(rule, nonfinite, weights=variables is not None, where=WHERE)
    grads = tree.collected(grads)
    leaves = tree.flatten(grads, where=WHERE)
    names, known = _named(leaves, tree.collected(variables))
    library = library_for(_first(leaves, known))
    found = dict(sorted(_found(names, leaves, known).items()))
    _check_entries(found, library)
    own = _clip(rule, known or found, found, nonfinite, unit_axes)
    weights = {}
    if own.needs & {"weights", "second_moment"}:
        # Read only where it is needed: this is an operation for each of them.
        weights = {name: value_of(variable) for name, variable in known.items()}
    before = _settled(state, _fresh(own, weights or found, library))
    passed, after = own.step(found, before, weights, zero_skipped=True, library=library)
    after |= {key: value for key, value in before.items() if key.startswith(_OF)}
    if nonfinite == "raise" and is_known(passed.bad) and bool(passed.bad):
        _raise(culprits(described(own.plan), after), "non-finite entries in", WHERE)
    done = {path: _plain(passed.arrays[name]) for path, name in names.items()}
    return tree.unflatten(grads, done, where=WHERE), own.outcome(after), after


def _named(leaves: Mapping[str, Any], variables: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Return ``(path of a leaf -> its name, name -> variable in the order of names)``."""
    if variables is None:
        return {path: path for path in leaves}, {}
    entries = tree.flatten(variables, where=f"{WHERE} (variables)")
    if entries.keys() != leaves.keys():
        raise InvalidArgument(
            "there must be one variable for each gradient, in the same containers",
            where=WHERE,
            got=f"{len(leaves)} gradients, {len(entries)} variables",
        )
    names = dict(zip(entries, names_of(list(entries.values()), entries), strict=True))
    return names, {names[path]: entries[path] for path in sorted(entries, key=names.__getitem__)}


def _first(leaves: Mapping[str, Any], known: Mapping[str, Any]) -> Array:
    """Return the first gradient, or the value of a variable if there is none."""
    for name, leaf in (*leaves.items(), *((name, value_of(item)) for name, item in known.items())):
        if leaf is not None:
            if framework_of(leaf) is None:
                raise InvalidArgument(
                    "not an array of TensorFlow, JAX or torch",
                    where=f"{WHERE}: {name}",
                    got=type(leaf).__name__,
                    hint="kk.numpy.clip is for NumPy's" if isinstance(leaf, np.ndarray) else None,
                )
            return leaf
    raise InvalidArgument("there is no gradient to clip", where=WHERE)


def _found(
    names: Mapping[str, str], leaves: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Array | None]:
    framework = framework_of(_first(leaves, known))
    found = {}
    for path, leaf in leaves.items():
        if leaf is not None and framework_of(leaf) != framework:
            raise InvalidArgument(
                f"not an array of {framework}, as others here",
                where=f"{WHERE}: {names[path]}",
                got=type(leaf).__name__,
            )
        shape = getattr(known.get(names[path]), "shape", None)
        if leaf is not None and shape is not None and not _fits(leaf, tuple(shape)):
            raise InvalidArgument(
                "the gradient has not the shape of its variable",
                where=f"{WHERE}: {names[path]}",
                got=leaf.shape,
                allowed=tuple(shape),
            )
        found[names[path]] = prepared(leaf, shape, names[path])
    return found


def _fits(array: Any, wanted: tuple[int, ...]) -> bool:
    """Return whether the shape of an array, as far as it is known, is this one."""
    shape = array.shape
    if getattr(shape, "rank", 0) is None:
        return True
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(own in (None, other) for own, other in pairs)


def _plain(array: Any) -> Any:
    return array.to_tensorflow() if hasattr(array, "to_tensorflow") else array


def _check_entries(found: Mapping[str, Array | None], library: Library) -> None:
    for name, array in found.items():
        if array is not None and not any(k in str(array.dtype) for k in ("float", "complex")):
            raise InvalidArgument("not a floating array", where=f"{WHERE}: {name}", got=array.dtype)


def _clip(
    rule: Rule | Composite,
    shaped: Mapping[str, Any],
    found: Mapping[str, Array | None],
    nonfinite: str,
    unit_axes: UnitAxes | None,
) -> Clip:
    shapes = {name: () if array is None else array.shape for name, array in shaped.items()}
    own = clip_for(rule, shapes, nonfinite=nonfinite, unit_axes=unit_axes, where=WHERE)
    for stage in own.plan:
        for name, kind in zip(stage.names, stage.kinds, strict=True):
            array = found[name]
            if kind in PEAKS and array is not None and "complex" in str(array.dtype):
                raise Unsupported(
                    "complex entries have no order to clamp by",
                    where=f"{WHERE}: {name}",
                    hint="use a rule by norm",
                )
    return own


def _fresh(own: Clip, found: Mapping[str, Array | None], library: Library) -> State:
    dtypes = {n: library.wide if a is None else _for_squares(a, library) for n, a in found.items()}
    labels = as_bytes(described(own.plan))
    key = f"{_OF}{zlib.crc32(labels.tobytes()):08x}"
    return own.fresh(dtypes, library) | {key: library.xp.asarray(labels.copy())}


def _for_squares(array: Array, library: Library) -> Any:
    real = library.xp.abs(array) if "complex" in str(array.dtype) else array
    return real.dtype if library.itemsize(real.dtype) >= 4 else library.wide


def _settled(state: Mapping[str, Any] | None, fresh: State) -> State:
    """Return a given state in the dtypes of a fresh one; it may be of plain numbers, from a file."""
    if state is None:
        return fresh
    if not isinstance(state, Mapping) or state.keys() != fresh.keys():
        raise InvalidArgument(
            "this state is of other arrays or of another rule",
            where=WHERE,
            got=_format_difference(state, fresh)
            if isinstance(state, Mapping)
            else type(state).__name__,
            hint="make it with kk.keras.initial_state(rule, variables)",
        )
    return {key: _as(state[key], like) for key, like in fresh.items()}


def _format_difference(state: Mapping[str, Any], fresh: State) -> str:
    odd = sorted(map(str, state.keys() - fresh.keys())), sorted(fresh.keys() - state.keys())
    return f"{', '.join(odd[0][:3]) or 'nothing'} instead of {', '.join(odd[1][:3]) or 'nothing'}"


def _as(value: Any, like: Array) -> Array:
    if framework_of(value) == framework_of(like) and value.dtype == like.dtype:
        return value.read_value() if hasattr(value, "read_value") else value
    library = library_for(like)
    array = library.xp.asarray(np.asarray(value).tolist(), dtype=like.dtype)
    if tuple(array.shape) != tuple(like.shape):
        raise InvalidArgument(
            "an entry of the state does not fit",
            where=WHERE,
            got=f"shape {tuple(array.shape)}",
            allowed=f"shape {tuple(like.shape)}",
        )
    return array


def _description(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    for key, value in state.items():
        if key.startswith(_OF):
            return from_bytes(readable(value) if framework_of(value) else value)
    raise InvalidArgument(
        "not a state of kk.keras.clip", where="keras.outcome", got=sorted(state)[:5]
    )


def _raise(named: list[str], what: str, where: str) -> None:
    raise NonFinite(f"{what} {', '.join(named[:5])}", where=where)
