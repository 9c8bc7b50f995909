"""The smaller network as a module of the original class, where its code allows that."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from karikomi.errors import KarikomiError
from karikomi.torch.internals import norm_type
from karikomi.torch.modules.prunable import CONVOLUTIONS, TRANSPOSED
from karikomi.torch.shrinking.copies import copied, undisturbed
from karikomi.torch.shrinking.exported import exported
from karikomi.torch.shrinking.proof import TOLERANCE, apart
from karikomi.torch.shrinking.rewriting import Changed, Rewritten, owner_of
from karikomi.torch.shrinking.scale_folding import fold_scales_
from karikomi.torch.shrinking.unit_scores import tensors_of
from karikomi.torch.tracing.batches import leaves

SIZES = frozenset({"size", "shape", "sizes", "split_size", "split_sizes", "normalized_shape"})
HOOKED = ("weight", "weight_orig", "weight_v")
"""Names of a weight, and of what hooks of `torch.nn.utils` compute it of."""

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

    A layer's own number that the forward uses has the name of its argument (``groups``). For the arguments in `guessed`, any attribute of
    the module in whose forward the number stands is set if it has its value; of several new values the first.
    """
    for layer in module.modules():
        _set_known_(layer)
    paths = dict(module.named_modules())
    new: dict[tuple[str, str], Any] = {}
    for change in changed:
        for name, value in vars(paths[change.path]).items() if change.path in paths else ():
            named = name == change.argument or (change.argument in guessed and not name.startswith("_"))
            if named and _equal(value, change.before):
                new.setdefault((change.path, name), change.after)
    for (path, name), value in new.items():
        old = getattr(paths[path], name)
        setattr(paths[path], name, tuple(value) if isinstance(old, tuple) else value)
    for layer in module.modules():
        _set_known_(layer)


def _equal(value: Any, before: Any) -> bool:
    if isinstance(value, tuple | list) and isinstance(before, tuple | list):
        return list(value) == list(before)
    return type(value) is int and type(before) is int and value == before


def _set_known_(layer: Any) -> None:
    """Set what torch's own layers state about the sizes of their tensors."""
    if isinstance(layer, nn.MultiheadAttention):
        if (
            layer.in_proj_weight is not None
            and len(layer.in_proj_weight) == 3 * layer.out_proj.in_features
        ):
            layer.embed_dim = layer.kdim = layer.vdim = layer.in_proj_weight.shape[1]
            layer.head_dim = layer.out_proj.in_features // layer.num_heads
        return
    if isinstance(layer, nn.RNNBase):
        layer.hidden_size = layer.weight_hh_l0.shape[0] // {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
        layer.input_size = layer.weight_ih_l0.shape[1]
        layer.proj_size = layer.weight_hh_l0.shape[1] if layer.proj_size else 0
        return
    weight = _weight_of(layer)
    if isinstance(layer, norm_type()):
        own = weight if weight is not None else getattr(layer, "running_mean", None)
        layer.num_features = layer.num_features if own is None else len(own)
    if weight is None:
        return
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        inputs, outputs = weight.shape[:2] if layer.transposed else reversed(weight.shape[:2])
        layer.in_channels = inputs if layer.transposed else inputs * layer.groups
        layer.out_channels = outputs * layer.groups if layer.transposed else outputs
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(weight)
    elif isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        layer.embedding_dim = weight.shape[1]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(weight)


def _weight_of(layer: Any) -> torch.Tensor | None:
    """Return the weight of a layer, or what a hook or a parametrization computes it of or as."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.weight
    own = dict(layer.named_parameters(recurse=False))
    return next((own[name] for name in HOOKED if name in own), None)


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
