"""Clip the gradients of single examples, as `torch.func.vmap` returns them, and reduce them over the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from karikomi.errors import InvalidArgument
from karikomi.functional.per_example import (
    check_examples,
    check_examples_rule,
    clip_each_example,
)
from karikomi.rule import Rule
from karikomi.torch.numerics.library import TorchLibrary

WHERE = "torch.clip_examples"


@torch.no_grad()
def clip_examples(
    grads: Mapping[str, torch.Tensor],
    rule: Rule,
    state: Mapping[str, Any] | None = None,
    *,
    reduce: str = "mean",
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
    """Return ``(gradients reduced over the examples, norms before, state)``; nothing is written to.

    `grads`: name -> the gradients of the examples, whose first axis is that of the examples, on one device. `rule`:
    `ByGlobalNorm` clips each example by the norm over all its tensors (Opacus' flat clipping), `ByNorm` each tensor
    of each example (per layer), `AdaptiveQuantile` with a limit that follows a quantile of their norms. `reduce`:
    ``"mean"``, ``"sum"`` or ``"none"``. An example with an entry that is not finite becomes zeros, and counts. The
    norms have shape (examples,), for a rule per tensor (tensors, examples).

    Noise and the account of privacy are no part of this: add them with Opacus' accountants.
    Raises `Unsupported` for other rules, `InvalidArgument` for arrays without a common first axis.

    >>> import torch, karikomi as kk
    >>> from torch.func import functional_call, grad, vmap
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> loss = lambda weights, x: functional_call(model, weights, x).sum()
    >>> examples = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> each = vmap(grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), examples)
    >>> mean, norms, state = clip_examples(each, kk.clip.ByGlobalNorm(1.0))
    >>> [round(float(entry), 3) for entry in mean["weight"][0]], norms.tolist()
    ([0.3, 0.9], [5.0, 1.0])
    """
    check_examples_rule(rule, reduce, where=WHERE)
    if not isinstance(grads, Mapping) or not all(map(_is_tensor, grads.values())):
        raise InvalidArgument(
            "gradients of examples are a mapping from names to floating tensors",
            where=WHERE,
            got=type(grads).__name__,
        )
    check_examples({name: tuple(g.shape) for name, g in grads.items()}, where=WHERE)
    library = TorchLibrary(next(iter(grads.values())).device)
    given = None
    if state:
        given = {key: library.xp.asarray(value) for key, value in state.items()}
    found = {name: gradient.detach() for name, gradient in grads.items()}
    done = clip_each_example(rule, found, given, reduce=reduce, library=library)
    return done.arrays, done.norms, done.state


def _is_tensor(item: object) -> bool:
    return isinstance(item, torch.Tensor) and (item.is_floating_point() or item.is_complex())
