"""The way back: a packed file as a plain safetensors file that every framework opens."""

from __future__ import annotations

import os
from pathlib import Path

from karikomi.files import as_path, write_bytes
from karikomi.pack.read_budget import Budget
from karikomi.pack.reader import opened


def expand(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    budget: Budget | None = None,
) -> Path:
    """Decode a packed file and write its tensors, dense, to the safetensors file `out`.

    Notes go into the metadata. Raises `BadFile` as `load` does, `Unwritable` from the disk.

    >>> import tempfile
    >>> import numpy as np
    >>> from karikomi.pack import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     packed = save({"x": np.zeros(100, np.float32)}, folder + "/x.karikomi")
    ...     expand(packed, folder + "/x.safetensors").stat().st_size > 400
    True
    """
    from safetensors.numpy import save

    with opened(path, budget) as file:
        arrays = {entry.name: stored.decoded() for entry, stored in file.tensors()}
        content = save(arrays, metadata=file.notes or None)
    return write_bytes(as_path(out).expanduser(), content)
