"""Clip the gradients of single examples, as `jax.vmap` returns them, and reduce them over the batch."""

from __future__ import annotations

from typing import Any

import jax

from karikomi.functional.per_example import (
    check_examples,
    check_examples_rule,
    clip_each_example,
)
from karikomi.jax.clipping import strong
from karikomi.jax.library import library
from karikomi.jax.pytrees import named, replaced, shapes
from karikomi.rule import Rule

WHERE = "jax.clip_examples"


def clip_examples(
    grads: Any, rule: Rule, state: dict[str, jax.Array] | None = None, *, reduce: str = "mean"
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """Return ``(gradients reduced over the examples, norms before, state)``; works under ``jit`` and ``scan``.

    `grads`: a pytree whose arrays have the examples along their first axis, such as ``jax.vmap(jax.grad(loss),
    (None, 0))`` returns it. `rule`: `ByGlobalNorm` clips each example by the norm over all its arrays
    (``optax.per_example_global_norm_clip``), `ByNorm` each array of each example, `AdaptiveQuantile` with a limit
    that follows a quantile of their norms. `reduce`: ``"mean"``, ``"sum"`` or ``"none"``. An example with an entry
    that is not finite becomes zeros, and counts. The norms have shape (examples,), for a rule per tensor (arrays,
    examples).

    Noise and the account of privacy are no part of this. `clip` itself may be mapped as well, with a state per
    example: ``jax.vmap(tx.update)``. Raises `Unsupported` for other rules, `InvalidArgument` for arrays without a
    common first axis.

    >>> import jax, jax.numpy as jnp, karikomi as kk
    >>> each = jax.vmap(jax.grad(lambda w, x: w["a"] @ x), (None, 0))
    >>> grads = each({"a": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [0.0, 1.0]]))
    >>> mean, norms, state = clip_examples(grads, kk.clip.ByGlobalNorm(1.0))
    >>> [round(float(entry), 3) for entry in mean["a"]], norms.tolist()
    ([0.3, 0.9], [5.0, 1.0])
    """
    check_examples_rule(rule, reduce, where=WHERE)
    found = {n: array for n, array in named(grads, where=WHERE).items() if array is not None}
    check_examples(shapes(found), where=WHERE)
    done = clip_each_example(rule, found, state, reduce=reduce, library=library())
    return replaced(grads, done.arrays), done.norms, strong(done.state)
