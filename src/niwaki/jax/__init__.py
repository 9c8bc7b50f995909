"""niwaki for JAX: rules as optax transforms, bounds as transforms and as projections."""

from niwaki.jax.clipping import ClippedState, ClipState, clip, clipped
from niwaki.jax.reading import check, outcome
from niwaki.jax.weights import BoundState, bound, project

__all__ = [
    "BoundState",
    "ClipState",
    "ClippedState",
    "bound",
    "check",
    "clip",
    "clipped",
    "outcome",
    "project",
]
