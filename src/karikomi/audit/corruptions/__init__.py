"""Corruptions of inputs at five severities, for images, tokens and signals; each is registered by name."""

from __future__ import annotations

from karikomi import registry
from karikomi.audit.corruptions.corruption import Corruption, corruptions_of, modality_of

__all__ = ["Corruption", "corruptions_of", "modality_of"]

registry.discover(__name__, __path__, "corruption")
