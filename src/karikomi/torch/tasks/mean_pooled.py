"""Sentence embeddings: the mean of an encoder's last states over the tokens of each sentence."""

from __future__ import annotations

import torch
from torch import nn

ROWS = 32


class MeanPooled(nn.Module):
    """One embedding per sentence: ``sum(mask * states) / sum(mask)``, of the first output of an encoder.

    `input_ids`, `attention_mask`: (n, tokens), padded; returns (n, width). Outside of training and of exports,
    sentences of like length are run together without the padding that they do not need: the same embeddings, sooner.

    >>> class Encoder(nn.Module):
    ...     def forward(self, input_ids, attention_mask):
    ...         return (input_ids[..., None].float(),)
    >>> ids, mask = torch.tensor([[1, 3, 9], [4, 5, 6]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> MeanPooled(Encoder()).eval()(ids, mask).tolist()
    [[2.0], [5.0]]

    Source: Reimers and Gurevych 2019, Sentence-BERT (mean pooling).
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the embeddings."""
        if self.training or torch.compiler.is_compiling() or len(input_ids) <= 1:
            return self._pooled(input_ids, attention_mask)
        lengths = attention_mask.sum(1)
        order = torch.argsort(lengths, stable=True)
        parts = []
        for rows in order.split(ROWS):
            longest = max(int(lengths[rows].max()), 1)
            parts.append(self._pooled(input_ids[rows, :longest], attention_mask[rows, :longest]))
        return torch.cat(parts)[torch.argsort(order)]

    def _pooled(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1).clamp(min=1)
