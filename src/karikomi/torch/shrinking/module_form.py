"""The smaller network as a module of the original class, where its code allows that."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from karikomi.errors import KarikomiError
from karikomi.shrink.cuts import Cut
from karikomi.torch.exporting.exported import exported
from karikomi.torch.exporting.proof import TOLERANCE, apart
from karikomi.torch.exporting.rewriting import Changed, Rewritten, owner_of
from karikomi.torch.modules.deep_copies import copied, undisturbed
from karikomi.torch.modules.resizing import set_sizes_
from karikomi.torch.shrinking.scale_folding import fold_scales_
from karikomi.torch.shrinking.unit_scores import tensors_of
from karikomi.torch.tracing.batches import leaves

SIZES = frozenset({"size", "shape", "sizes", "split_size", "split_sizes", "normalized_shape"})
GUESSES = (frozenset[str](), SIZES, SIZES | {"start", "end", "length", "index", "pad"})
"""Arguments whose numbers may be attributes of the module that calls the operator, from the surest on."""


@torch.no_grad()
def take_tensors_(module: nn.Module, done: Rewritten) -> None:
    """Replace the tensors of a module by those of the smaller graph, also where a tensor has several names."""
    every = tensors_of(module)
    new: dict[int, torch.Tensor] = {}
    for name in done.stored:
        old = every.get(name, _attribute(module, name))
        own = _attribute(done.graph, name)
        if not isinstance(old, torch.Tensor) or (
            name not in done.indices and torch.equal(old, own)
        ):
            continue
        made = own.detach().clone()
        new[id(old)] = (
            nn.Parameter(made, old.requires_grad) if isinstance(old, nn.Parameter) else made
        )
        every.setdefault(name, old)
    for name, old in every.items():
        if id(old) in new:
            owner, leaf = owner_of(module, name)
            setattr(owner, leaf, new[id(old)])


def cuts_of(module: nn.Module, done: Rewritten) -> dict[str, dict[int, Cut]]:
    """Return tensor name -> axis -> what stays of it, a shared tensor under each of its names."""
    every = tensors_of(module)
    named: dict[int, list[str]] = {}
    for name, tensor in every.items():
        named.setdefault(id(tensor), []).append(name)
    found = {}
    for name, axes in done.indices.items():
        old = every.get(name)
        cuts = {
            axis: Cut(done.stored[name][axis], kept.numpy().astype(np.int64))
            for axis, kept in axes.items()
        }
        found.update(dict.fromkeys(named.get(id(old), [name]), cuts))
    return found


def _attribute(module: nn.Module, name: str) -> Any:
    try:
        owner, leaf = owner_of(module, name)
    except AttributeError:
        return None
    return getattr(owner, leaf, None)


def set_attributes_(
    module: nn.Module, changed: Sequence[Changed], guessed: Collection[str]
) -> None:
    """Set the attributes that state the sizes of layers.

    A layer's own number that the forward uses has the name of its argument (``groups``). For the arguments in
    `guessed`, any attribute of the module in whose forward the number stands is set if it has its value; of
    several new values the first.
    """
    for layer in module.modules():
        set_sizes_(layer)
    paths = dict(module.named_modules())
    new: dict[tuple[str, str], Any] = {}
    for change in changed:
        for name in attributes_of(module, change, guessed):
            new.setdefault((change.path, name), change.after)
    for (path, name), value in new.items():
        old = getattr(paths[path], name)
        setattr(paths[path], name, tuple(value) if isinstance(old, tuple) else value)
    for layer in module.modules():
        set_sizes_(layer)


def attributes_of(module: nn.Module, change: Changed, guessed: Collection[str]) -> list[str]:
    """Return the attributes that have the value of a number before, by its argument's name or by guess."""
    layer = dict(module.named_modules()).get(change.path)
    own = {} if layer is None else vars(layer)
    fitting = [name for name, value in own.items() if _equal(value, change.before)]
    if change.argument in guessed:
        return [name for name in fitting if not name.startswith("_")]
    return [name for name in fitting if name == change.argument]


def _equal(value: Any, before: Any) -> bool:
    if isinstance(value, tuple | list) and isinstance(before, tuple | list):
        return list(value) == list(before)
    return type(value) is int and type(before) is int and value == before


@torch.no_grad()
def in_module_form(
    module: nn.Module, done: Rewritten, inputs: tuple[Any, ...], options: dict[str, Any]
) -> nn.Module | None:
    """Return a smaller copy of the module that computes what the graph does, or None if its code does not allow it."""
    with undisturbed(done.graph):
        expected = leaves(done.graph(*inputs, **options))
    for guessed in GUESSES:
        small = copied(module)
        take_tensors_(small, done)
        set_attributes_(small, done.changed, guessed)
        modes = [part.training for part in small.modules()]
        worst = _difference(small.eval(), expected, inputs, options)
        if worst > TOLERANCE and math.isfinite(worst):
            # It runs, with factors of its own.
            _fold_(small, done.graph, inputs, options)
            worst = _difference(small, expected, inputs, options)
        if worst <= TOLERANCE:
            for part, mode in zip(small.modules(), modes, strict=True):
                part.training = mode
            return small
    return None


def _fold_(
    small: nn.Module, graph: fx.GraphModule, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Fold the factors that the module computes from its widths."""
    with suppress(KarikomiError):
        fold_scales_(small, graph, exported(small, inputs, options))


def _difference(
    small: nn.Module, expected: list[torch.Tensor], inputs: tuple[Any, ...], options: dict[str, Any]
) -> float:
    """Return how far the outputs are from those of the graph; infinity if the module does not run."""
    try:
        with undisturbed(small):
            got = leaves(small(*inputs, **options))
        return max(map(apart, expected, got), default=0.0)
    except Exception:
        # Any error of the user's forward has one meaning here: its code does not fit the smaller tensors.
        return math.inf
