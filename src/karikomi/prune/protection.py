"""Kinds of layers that are not pruned unless requested, with the reasons that are reported."""

from __future__ import annotations

from collections.abc import Collection

from karikomi.errors import UnknownName, suggest

PROTECTED = {
    "first": "the first layer: it sees the inputs",
    "last": "the last layer: its units are the outputs",
    "norms": "a scale of a normalisation",
    "embeddings": "an embedding",
    "recurrent": "a recurrent cell, whose rows are gates",
    "attention": "a fused projection of attention, whose rows are queries, keys and values",
}
"""What `protect` can name, with the reason that is reported."""

BY_DEFAULT = ("norms", "embeddings")
"""What is protected by default."""

STACKED = ("recurrent", "attention")
"""Weights that stack several projections: their rows are no units, and layers are not whole without them."""


def check_protect(protect: Collection[str]) -> None:
    """Raise `UnknownName` for a kind of layer that cannot be protected."""
    for which in [protect] if isinstance(protect, str) else protect:
        if isinstance(protect, str) or which not in PROTECTED:
            raise UnknownName(
                "protect takes a tuple of kinds of layers",
                where="protect",
                got=repr(which),
                hint=suggest(which, PROTECTED),
            )
