"""Tensors restored after a block, also after an error, unless the block keeps what it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


class Snapshot:
    """Copies of named tensors; `find` returns the tensors, again when they are restored."""

    kept = False

    def __init__(self, find: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._find = find
        self.copies = {name: tensor.detach().clone() for name, tensor in find().items()}

    @torch.no_grad()
    def restore_(self) -> None:
        """Copy everything back."""
        tensors = {} if self.kept else self._find()
        for name, copied in self.copies.items():
            tensors[name].copy_(copied)

    def keep(self) -> None:
        """Keep the tensors as they are now: drop the copies."""
        self.kept = True
        self.copies.clear()


@contextmanager
def restored_unless_kept(find: Callable[[], Mapping[str, torch.Tensor]]) -> Iterator[Snapshot]:
    """Restore tensors bit for bit after the block, also after an error, unless it calls `keep`.

    >>> weight = torch.zeros(2)
    >>> with restored_unless_kept(lambda: {"weight": weight}):
    ...     _ = weight.fill_(1.0)
    >>> weight
    tensor([0., 0.])
    """
    snapshot = Snapshot(find)
    try:
        yield snapshot
    finally:
        snapshot.restore_()
