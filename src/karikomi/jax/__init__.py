"""karikomi for JAX: rules as optax transforms, bounds as transforms and as projections, masks of pytrees."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import jax as _jax  # noqa: F401  (a missing JAX raises an error here)

from karikomi.errors import Unavailable, install_hint, suggest

if TYPE_CHECKING:
    from karikomi.jax.bounding import BoundState as BoundState
    from karikomi.jax.bounding import bound as bound
    from karikomi.jax.bounding import project as project
    from karikomi.jax.clipping import ClippedState as ClippedState
    from karikomi.jax.clipping import ClipState as ClipState
    from karikomi.jax.clipping import clip as clip
    from karikomi.jax.clipping import clipped as clipped
    from karikomi.jax.outcomes import check as check
    from karikomi.jax.outcomes import outcome as outcome
    from karikomi.jax.penalties import penalty as penalty
    from karikomi.jax.per_example import clip_examples as clip_examples
    from karikomi.jax.pruning import masked as masked
    from karikomi.jax.pruning import masked_moments as masked_moments
    from karikomi.jax.pruning import prune as prune
    from karikomi.jax.pruning import scores as scores
    from karikomi.jax.pruning import straight_through as straight_through
    from karikomi.jax.pruning import update_masks as update_masks
    from karikomi.jax.quantizing import decode as decode
    from karikomi.jax.quantizing import quantize as quantize
    from karikomi.jax.sparse_training.masked_optimizer import PrunedState as PrunedState
    from karikomi.jax.sparse_training.masked_optimizer import masks as masks
    from karikomi.jax.sparse_training.masked_optimizer import masks_at as masks_at
    from karikomi.jax.sparse_training.masked_optimizer import pruned as pruned

_PLACES = {
    "BoundState": "bounding",
    "ClipState": "clipping",
    "ClippedState": "clipping",
    "PrunedState": "sparse_training.masked_optimizer",
    "bound": "bounding",
    "check": "outcomes",
    "clip": "clipping",
    "clip_examples": "per_example",
    "clipped": "clipping",
    "decode": "quantizing",
    "masked": "pruning",
    "masked_moments": "pruning",
    "masks": "sparse_training.masked_optimizer",
    "masks_at": "sparse_training.masked_optimizer",
    "outcome": "outcomes",
    "penalty": "penalties",
    "project": "bounding",
    "prune": "pruning",
    "pruned": "sparse_training.masked_optimizer",
    "quantize": "quantizing",
    "straight_through": "pruning",
    "scores": "pruning",
    "update_masks": "pruning",
}

__all__ = [*_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"karikomi.jax has no {name!r}; {suggest(name, __all__)}")
    try:
        value = getattr(importlib.import_module(f"karikomi.jax.{_PLACES[name]}"), name)
    except ImportError as error:
        raise Unavailable(f"optax is not installed ({error})", hint=install_hint("jax")) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
