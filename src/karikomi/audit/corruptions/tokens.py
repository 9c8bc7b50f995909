"""Noise on token sequences: repeated, exchanged and swapped tokens."""

from __future__ import annotations

import numpy as np

from karikomi.registry import register

SHARES = (0.02, 0.05, 0.1, 0.15, 0.25)
_SHARES = "0.02 0.05 0.10 0.15 0.25"


@register(
    "corruption",
    name="token_dropout",
    formula=f"a share of {_SHARES} of the tokens becomes the one before it",
    source="word dropout: Iyyer et al. 2015; the place is filled, as lengths stay",
)
class TokenDropout:
    """`token_dropout`."""

    modality = "tokens"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted tokens."""
        hit = generator.random(inputs.shape) < SHARES[severity - 1]
        return np.where(hit, np.roll(inputs, 1, axis=1), inputs)


@register(
    "corruption",
    name="token_noise",
    formula=f"a share of {_SHARES} of the tokens becomes one drawn from all tokens of the data",
    source="unigram noising: Xie et al. 2017",
)
class TokenNoise:
    """`token_noise`."""

    modality = "tokens"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted tokens."""
        hit = generator.random(inputs.shape) < SHARES[severity - 1]
        drawn = generator.integers(0, max(inputs.size, 1), inputs.shape)
        return np.where(hit, inputs.reshape(-1)[drawn] if inputs.size else inputs, inputs)


@register(
    "corruption",
    name="token_swap",
    formula=f"a share of {_SHARES} of the tokens changes places with the next",
    source="Belinkov and Bisk 2018, for words instead of letters",
)
class TokenSwap:
    """`token_swap`."""

    modality = "tokens"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted tokens."""
        out = inputs.copy()
        for start in (0, 1):
            first, second = out[:, start:-1:2], out[:, start + 1 :: 2]
            hit = generator.random(first.shape) < SHARES[severity - 1] / 2
            first[:], second[:] = np.where(hit, second, first), np.where(hit, first, second)
        return out
