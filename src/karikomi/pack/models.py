"""`kk.save` and `kk.load`: models of any framework in and out of packed files, dicts of arrays as well."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from karikomi import registry, tree
from karikomi.errors import check
from karikomi.pack.read_budget import Budget
from karikomi.pack.reader import load as load_arrays
from karikomi.pack.reader import load_with_notes
from karikomi.pack.writer import save as save_arrays
from karikomi.quantize import Coded


def save(
    model: Any, path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Path:
    """Write a model, or a tree of arrays, to a packed file and return its path.

    `model`: a model of torch or Keras, or a dict, list or tuple of arrays of NumPy, torch (a ``state_dict``), JAX or
    Keras, of `kk.quantize.Coded` and of one another; nested ones are stored under names such as
    ``layers.0.weight``. Of equal tensors (tied weights) one is stored. What ``quantize_`` rounded is stored
    as codes, everything else without loss; of what ``kk.torch.shrink`` made smaller, the kept units too. The file
    is a valid safetensors file, is written atomically, and the same model gives the same bytes. `base`: an earlier
    file of the same network; differences from it are stored where they are smaller, and it must be given to `load`
    again.

    Raises `Unsupported` when weights changed after they were quantized, `Unwritable` for a full disk.

    >>> import tempfile, pathlib, numpy as np
    >>> path = save({"w": np.zeros((64, 64), np.float32)}, pathlib.Path(tempfile.mkdtemp()) / "w.karikomi")
    >>> load(path)["w"].shape
    (64, 64)
    """
    if isinstance(model, Mapping | list | tuple):
        named = tree.flatten(model, where="save")
        arrays = {name: _array(name, value) for name, value in named.items()}
        return save_arrays(arrays, path, base=base)
    framework = registry.framework_of(model)
    notes = framework.notes_of(model)
    return save_arrays(framework.to_stored(model), path, notes=notes, base=base)


def load(
    path: str | os.PathLike[str],
    *,
    into: Any = None,
    only: Collection[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
) -> Any:
    """Return the named arrays of a packed file, or fill a model with them and return it.

    Without `into` types that NumPy has not (bfloat16, float8) come as `ml_dtypes` has them; ``jax.numpy.asarray`` takes
    them as they are. `into`: a model with the same tensor names, also on the meta device, such as a fresh instance
    of the class that was shrunk: its layers, and the attributes that state their sizes, get as small as those in the
    file. What was quantized can be saved again as codes. `only`: names of
    the tensors that are wanted, without `into`; nothing else is decoded but what is coded together with them. `base`:
    the file that it was saved against, if it was. `budget`:
    upper bounds for what is read. Nothing in a file is ever executed, imported or followed.

    Raises `BadFile` naming the tensor and the fact for a file that is cut short, altered, hostile or
    from a later version; nothing is filled then.
    """
    if into is None:
        return load_arrays(path, only=only, base=base, budget=budget)
    check("load", (only is None, "a model takes all tensors", "only and into", "one of them"))
    return registry.framework_of(into).fill_(into, *load_with_notes(path, base=base, budget=budget))


def _array(name: Any, value: Any) -> Any:
    """Return what a mapping holds as an array of NumPy; what is none is left for `save` to refuse."""
    if isinstance(value, np.ndarray | np.generic | Coded) or not hasattr(value, "__array__"):
        return value
    if type(value).__module__.partition(".")[0] in registry.OF_MODELS:
        return registry.framework_of(value).as_array(value, str(name))
    return np.asarray(value)
