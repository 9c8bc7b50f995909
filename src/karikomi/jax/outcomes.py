"""Read the outcome of a clip from the state of an optimizer, at any depth."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from karikomi.errors import InvalidArgument, NonFinite
from karikomi.functional.outcomes import from_bytes, last_outcome, owners
from karikomi.jax.clipping import ClipState
from karikomi.jax.sparse_training.masked_optimizer import pruned_states
from karikomi.rules.outcome import Outcome
from karikomi.schedule import whole_from


def outcome(state: Any) -> Outcome:
    """Return the outcome of the last step of the clip in an optimizer's state; this waits for the device.

    `state`: of `kk.jax.clip`, `kk.jax.clipped`, or of an optimizer that contains one of them. Raises
    `InvalidArgument` for a state with no clip or several, and for one of several networks (``vmap``).

    >>> import jax.numpy as jnp, karikomi as kk
    >>> tx = kk.jax.clip(kk.clip.ByNorm(1.0))
    >>> _, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init({"w": jnp.zeros(2)}))
    >>> print(outcome(state))
    pre 5 -> post 1 x0.2 clipped; top: w 100%
    """
    found = _clips(state)
    if len(found) != 1:
        raise InvalidArgument(
            "the state must contain exactly one clip",
            where="jax.outcome",
            got=f"{len(found)} clips",
            hint="pass the part of the state with one clip" if found else None,
        )
    return _outcome(found[0])


def check(state: Any, *, stop_after: int = 10) -> None:
    """Raise `NonFinite`, naming the arrays, once `stop_after` steps in a row had non-finite gradients.

    Also once masks of `pruned` are due for so many steps in a row, because weights, gradients or scores are not finite.
    Compiled code cannot raise: call this beside the loss that you log. It waits for the device.

    >>> import jax.numpy as jnp, karikomi as kk
    >>> tx = kk.jax.clip(kk.clip.ByNorm(1.0))
    >>> _, state = tx.update({"w": jnp.array([jnp.inf])}, tx.init({"w": jnp.zeros(1)}))
    >>> check(state, stop_after=1)
    Traceback (most recent call last):
    karikomi.errors.NonFinite: jax.check: 1 steps in a row with non-finite entries, the last in w
    """
    stop_after = whole_from(1, stop_after, "stop_after must be >= 1", where="jax.check")
    found, masked = _clips(state), pruned_states(state)
    if not found and not masked:
        raise InvalidArgument("there is no clip and no mask in this state", where="jax.check")
    for own in masked:
        late = int(np.max(np.asarray(own.steps) - np.maximum(np.asarray(own.seen), 0)))
        if late >= stop_after:
            raise NonFinite(
                f"masks are due for {late} steps, and weights, gradients or scores are not finite in float32",
                where="jax.check",
            )
    for clip in found:
        in_a_row = int(np.max(np.asarray(clip.rule["bad_in_a_row"])))
        if in_a_row >= stop_after:
            culprits = ", ".join(_culprits(clip)[:5])
            raise NonFinite(
                f"{in_a_row} steps in a row with non-finite entries, the last in {culprits}",
                where="jax.check",
            )


def _clips(state: Any) -> list[ClipState]:
    leaves = jax.tree.leaves(state, is_leaf=lambda value: isinstance(value, ClipState))
    return [leaf for leaf in leaves if isinstance(leaf, ClipState)]


def _culprits(clip: ClipState) -> list[str]:
    pairs = zip(from_bytes(_first(clip.labels, 1)), clip.numbers, strict=True)
    bad = [
        name
        for stage, numbers in pairs
        for name, norms in zip(owners(stage), np.moveaxis(np.asarray(numbers), -1, 0), strict=True)
        if not np.isfinite(norms[..., 0]).all()
    ]
    return list(dict.fromkeys(bad))


def _first(array: Any, rank: int) -> np.ndarray:
    """Return the array of the first network, where there may be several."""
    array = np.asarray(array)
    return array.reshape(-1, *array.shape[array.ndim - rank :])[0]


def _outcome(clip: ClipState) -> Outcome:
    skipped = np.asarray(clip.skipped)
    if skipped.ndim:
        raise InvalidArgument(
            "this state is of several networks",
            where="jax.outcome",
            got=f"a batch of shape {skipped.shape}",
            hint="take one: jax.tree.map(lambda x: x[0], state)",
        )
    numbers = [np.asarray(pair, np.float64) for pair in clip.numbers]
    return last_outcome(from_bytes(clip.labels), numbers, bool(skipped))
