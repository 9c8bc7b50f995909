"""The protocol of a corruption, and which ones fit an array of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np

from karikomi import registry
from karikomi.errors import InvalidArgument

SEVERITIES = (1, 2, 3, 4, 5)
MODALITIES = ("image", "tokens", "signal")


class Corruption(Protocol):
    """A class without arguments that is registered as a ``"corruption"``."""

    modality: ClassVar[str]
    """What it corrupts: ``"image"``, ``"tokens"`` or ``"signal"``."""

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted inputs of the same shape, in float64 for images and signals.

        Images come as (n, height, width, channels) in [0, 1]; signals as they are, with deviation 1 over all; tokens as
        integers (n, steps). `severity`: 1 to 5. Random numbers do not depend on the inputs.
        """
        ...


def modality_of(inputs: object) -> str | None:
    """Return what an array of inputs looks like; None for several arrays and for what has no corruptions.

    Integers of rank 2 are tokens. Floats, or bytes, of rank 4 with 1 or 3 channels, first or last, are images; other
    floats of rank 2 or more are signals.

    >>> modality_of(np.zeros((8, 3, 32, 32))), modality_of(np.zeros((8, 20), int)), modality_of(np.zeros((8, 64)))
    ('image', 'tokens', 'signal')
    """
    if not isinstance(inputs, np.ndarray) or inputs.ndim < 2:
        return None
    if inputs.dtype.kind in "iu":
        image = inputs.dtype == np.uint8 and channel_axis(inputs) is not None
        return "image" if image else "tokens" if inputs.ndim == 2 else None
    if inputs.dtype.kind != "f":
        return None
    return "signal" if channel_axis(inputs) is None else "image"


def channel_axis(inputs: np.ndarray) -> int | None:
    """Return the axis of the channels of images (n, channels, height, width) or (n, height, width, channels)."""
    if inputs.ndim != 4:
        return None
    fitting = [axis for axis in (1, 3) if inputs.shape[axis] in (1, 3)]
    return fitting[0] if fitting else None


def corruptions_of(modality: str) -> Mapping[str, Corruption]:
    """Return name -> corruption of a modality."""
    if modality not in MODALITIES:
        raise InvalidArgument(
            "unknown modality", where="audit", got=repr(modality), allowed=MODALITIES
        )
    return {
        entry.name: entry.thing()
        for entry in registry.entries("corruption")
        if entry.thing.modality == modality
    }
