"""`kk.save` and `kk.load`: models of any framework in and out of packed files, dicts of arrays as well."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from karikomi import registry
from karikomi.pack.read_budget import Budget
from karikomi.pack.reader import load as load_arrays
from karikomi.pack.reader import load_with_notes
from karikomi.pack.writer import save as save_arrays


def save(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write a model, or a dict of arrays, to a packed file and return its path.

    `model`: a model of a framework, or name -> NumPy array or `kk.quantize.Coded`. What
    ``kk.torch.quantize_`` rounded is stored as codes, everything else without loss; of what ``kk.torch.shrink``
    made smaller, the kept units too. The file is a valid
    safetensors file, is written atomically, and the same model gives the same bytes.

    Raises `Unsupported` when weights changed after they were quantized, `Unwritable` for a full disk.

    >>> import tempfile, pathlib, numpy as np
    >>> path = save({"w": np.zeros((64, 64), np.float32)}, pathlib.Path(tempfile.mkdtemp()) / "w.karikomi")
    >>> load(path)["w"].shape
    (64, 64)
    """
    if isinstance(model, Mapping):
        return save_arrays(model, path)
    framework = registry.framework_of(model)
    return save_arrays(framework.to_stored(model), path, notes=framework.notes_of(model))


def load(path: str | os.PathLike[str], *, into: Any = None, budget: Budget | None = None) -> Any:
    """Return the named arrays of a packed file, or fill a model with them and return it.

    `into`: a model with the same tensor names, such as a fresh instance of the class that was shrunk: its layers, and the
    attributes that state their sizes, get as small as those in the file. What was quantized can be saved again as codes. `budget`:
    upper bounds for what is read. Nothing in a file is ever executed, imported or followed.

    Raises `BadFile` naming the tensor and the fact for a file that is cut short, altered, hostile or
    from a later version; nothing is filled then.
    """
    if into is None:
        return load_arrays(path, budget=budget)
    return registry.framework_of(into).fill_(into, *load_with_notes(path, budget=budget))
