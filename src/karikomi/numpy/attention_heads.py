"""Scale the query and key projections of attention heads held as NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from karikomi.bound.qk_clip import QKClip
from karikomi.bound.standing import standing
from karikomi.errors import NonFinite, UnknownName, Unsupported, check, suggest
from karikomi.numpy.scaling import scaled_units
from karikomi.rule import State
from karikomi.rules import checkpoint, decide
from karikomi.rules.outcome import Outcome

Names = str | Sequence[str]
WHERE = "numpy.bound"


def bound_heads(
    found: Mapping[str, np.ndarray],
    rule: QKClip,
    state: State | None,
    *,
    logits: Mapping[str, object] | None,
    attention: Mapping[str, tuple[Names, Names]] | None,
) -> tuple[dict[str, np.ndarray], Outcome, State]:
    """Return ``(arrays, outcome, state)`` after scaling every head by its own largest logit.

    `logits`: attention -> largest logit per query head. `attention`: attention -> ``(query, key)``
    names of the tensors whose first axis runs over heads and the entries of each. Raises `Unsupported`
    without logits, `InvalidArgument` for what does not fit, `NonFinite` for logits that are not finite.
    """
    if not logits or not attention:
        raise Unsupported(
            "QKClip needs the largest logit of every head, which no weight tells",
            where=WHERE,
            hint="pass logits={'attn': [...]}, attention={'attn': ('wq', 'wk')}",
        )
    sizes = {name: _sizes(name, logits, attention) for name in logits}
    norms = np.concatenate(list(sizes.values()))
    owners = [name for name, heads in sizes.items() for _ in heads]
    present = np.ones(len(norms), dtype=bool)
    verdict, after = checkpoint.decide_named(rule, owners, norms, state, present=present)
    left = decide.norms_after(norms, verdict, xp=np)
    arrays, start = dict(found), 0
    for name, heads in sizes.items():
        gamma = verdict.factor[start : start + len(heads)]
        start += len(heads)
        _scale(arrays, name, gamma, rule, *map(_several, attention[name]))
    attempted = int(after["attempted"]) - 1
    touched = {item for pair in attention.values() for names in pair for item in _several(names)}
    outcome = Outcome(
        names=tuple(owners),
        norms=norms,
        after=left,
        skipped=False,
        element_wise=True,
        left_alone={name: "no query or key projection" for name in found if name not in touched},
        share_at_bound=float(standing(rule, left, verdict.factor, attempted=attempted).mean()),
    )
    return arrays, outcome, after


def _several(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _sizes(
    name: str, logits: Mapping[str, object], attention: Mapping[str, tuple[Names, Names]]
) -> np.ndarray:
    if name not in attention:
        raise UnknownName(
            "logits for an unknown attention", where=WHERE, hint=suggest(name, attention)
        )
    sizes = np.asarray(logits[name], dtype=np.float64)
    good = sizes.ndim == 1 and sizes.size
    got = f"shape {sizes.shape}"
    check(f"{WHERE}: {name}", (good, "one largest logit per head", got, None))
    if not np.all(np.isfinite(sizes)):
        raise NonFinite(f"non-finite logits in {name}", where=WHERE)
    # A head whose largest logit is negative is as far from any limit as one at 0.
    return np.maximum(sizes, 0.0)


def _scale(
    arrays: dict[str, np.ndarray],
    name: str,
    gamma: np.ndarray,
    rule: QKClip,
    queries: list[str],
    keys: list[str],
) -> None:
    for item in (*queries, *keys):
        if item not in arrays:
            raise UnknownName(
                "attention names no such tensor",
                where=f"{WHERE}: {name}",
                got=repr(item),
                hint=suggest(item, arrays),
            )
    width, rest = divmod(len(arrays[queries[0]]), len(gamma))
    shared = not rest and width > 0 and len(arrays[keys[0]]) < len(arrays[queries[0]])
    query, key = rule.split(gamma, shared=shared)
    for item, factors in [(q, query) for q in queries] + [(k, key) for k in keys]:
        rows, repeated = len(arrays[item]), np.repeat(factors, width)
        fits = rest == 0 and width > 0 and rows % width == 0 and len(repeated) % max(rows, 1) == 0
        what = "the rows are not a whole number of heads"
        allowed = f"a share of {len(gamma)} heads of {width}"
        check(f"{WHERE}: {item}", (fits, what, f"{rows} rows", allowed))
        arrays[item] = scaled_units(arrays[item], repeated, 0)
