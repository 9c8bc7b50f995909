"""Clip the gradients of single examples and reduce them over the batch, one example after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from karikomi import tree
from karikomi.functional.per_example import check_examples, check_examples_rule
from karikomi.numpy.arrays import Arrays, like, named
from karikomi.numpy.norms import check_arrays, norm
from karikomi.numpy.scaling import scaled
from karikomi.rule import Rule, Scope, order_of
from karikomi.rules.decide import PREFIX

WHERE = "numpy.clip_examples"


def clip_examples(
    grads: Arrays,
    rule: Rule,
    state: Mapping[str, Any] | None = None,
    *,
    reduce: str = "mean",
) -> tuple[Arrays, np.ndarray, dict[str, Any]]:
    """Return ``(gradients reduced over the examples, norms before, state)``; the input is left alone.

    `grads`: a tree of arrays whose first axis is that of the examples. `rule`: `ByGlobalNorm` clips each example by
    the norm over all its arrays, `ByNorm` each array of each example, `AdaptiveQuantile` with a limit that follows
    a quantile of their norms. `reduce`: ``"mean"``, ``"sum"`` or ``"none"``. An example with an entry that is not
    finite becomes zeros, and counts. The norms have shape (examples,), for a rule per tensor (arrays, examples).
    Raises `Unsupported` for other rules, `InvalidArgument` for arrays without a common first axis.

    >>> import numpy as np, karikomi as kk
    >>> grads = {"a": np.array([[3.0, 4.0], [0.0, 1.0]])}
    >>> mean, norms, state = clip_examples(grads, kk.clip.ByGlobalNorm(1.0))
    >>> mean["a"].round(3).tolist(), norms.tolist()
    ([0.3, 0.9], [5.0, 1.0])
    """
    check_examples_rule(rule, reduce, where=WHERE)
    grads = tree.collected(grads)
    found = {n: array for n, array in named(grads, where=WHERE).items() if array is not None}
    check_arrays(found, where=WHERE)
    count = check_examples({name: np.shape(array) for name, array in found.items()}, where=WHERE)
    order, flat = order_of(rule), rule.scope is Scope.GLOBAL
    sizes = np.array([[norm(array[n], order) for n in range(count)] for array in found.values()])
    norms = np.array([norm(column, order) for column in sizes.T]) if flat else sizes
    inner = {k.removeprefix(PREFIX): np.asarray(v) for k, v in (state or {}).items()}
    attempted = int(inner.pop("attempted", 0))
    inner = inner or rule.init(np.zeros(1), xp=np)
    good = np.isfinite(norms)
    decision, after = rule.decide(
        np.where(good, norms, 0.0).ravel(),
        inner,
        present=good.ravel(),
        facts={"step": np.asarray(float(attempted))},
        xp=np,
    )
    factors = np.where(good, np.asarray(decision.factor).reshape(norms.shape), 0.0)
    done = {}
    for place, (name, array) in enumerate(found.items()):
        own = factors if flat else factors[place]
        pairs = zip(array, own, strict=True)
        clipped = [scaled(g, float(f)) if f else np.zeros_like(g) for g, f in pairs]
        done[name] = _reduced(np.array(clipped, dtype=array.dtype).reshape(array.shape), reduce)
    plain = {PREFIX + key: np.asarray(value).tolist() for key, value in after.items()}
    return like(grads, done, where=WHERE), norms, {"attempted": attempted + 1, **plain}


def _reduced(array: np.ndarray, reduce: str) -> np.ndarray:
    if reduce == "none":
        return array
    total = np.sum(array, axis=0, dtype=np.result_type(array.dtype, np.float64))
    total = total / max(len(array), 1) if reduce == "mean" else total
    return np.asarray(total).astype(array.dtype)
