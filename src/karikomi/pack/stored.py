"""A tensor in the file's terms: name, shape, type, grid, and one flat little-endian array."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import InvalidArgument
from karikomi.quantize import Coded, Grid

DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
MOST_NAME = 512
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One tensor: `dtype` is that of the decoded tensor, `flat` holds its codes or its numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: Grid | None
    flat: NDArray

    def value(self) -> np.ndarray | Coded:
        """Return the tensor: an array of the original type, or codes with their grid."""
        if self.grid is not None:
            return Coded(self.flat.reshape(self.shape), self.grid)
        return self.flat.view(np.dtype(f"<{self.dtype}")).reshape(self.shape)

    def decoded(self) -> NDArray:
        """Return the tensor with its codes, if any, turned into float32."""
        value = self.value()
        return value.decode() if isinstance(value, Coded) else value


def describe(name: str, tensor: object) -> Stored:
    """Return a tensor ready for the codecs; raise `InvalidArgument` for what cannot be packed."""
    if isinstance(tensor, Coded):
        flat = np.ascontiguousarray(tensor.codes).reshape(-1).astype(tensor.grid.code_dtype)
        return Stored(name, tensor.shape, "f4", tensor.grid, flat)
    if not isinstance(tensor, (np.ndarray, np.generic)):
        raise InvalidArgument(
            "only NumPy arrays and Coded tensors can be packed",
            where=f"tensor {name!r}",
            got=type(tensor).__name__,
            hint="kk.save(module, path), or tensor.detach().cpu().numpy()"
            if hasattr(tensor, "detach")
            else "convert it with numpy.asarray",
        )
    array = np.asarray(tensor)
    kind = f"{array.dtype.kind}{array.dtype.itemsize}"
    if kind not in DTYPES:
        raise InvalidArgument(
            "this type cannot be packed",
            where=f"tensor {name!r}",
            got=array.dtype,
            allowed="bool, integers, float16, float32, float64",
            hint="convert bfloat16 to float32 first: NumPy has no bfloat16",
        )
    flat = np.ascontiguousarray(array).reshape(-1).astype(f"<{kind}", copy=False)
    return Stored(name, array.shape, kind, None, flat.view(code_dtype(kind, None)))


def code_dtype(kind: str, grid: Grid | None) -> np.dtype:
    """Return the type of the flat array: that of the codes, or of the numbers (bool as a byte)."""
    if grid is not None:
        return grid.code_dtype
    return np.dtype("<u1" if kind == "b1" else f"<{kind}")


def digest(array: NDArray) -> str:
    """Return the first 16 bytes of SHA-256 over the little-endian C-order bytes, in hex."""
    flat = np.ascontiguousarray(array).reshape(-1)
    little = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(little.view(np.uint8).data).hexdigest()[: 2 * DIGEST_BYTES]


def name_fault(name: object) -> str | None:
    """Return the fault of a tensor's name, or ``None``.

    >>> name_fault("layers/0.weight"), name_fault("../weight")
    (None, "a segment is '..'")
    """
    if not isinstance(name, str) or not name or name == "__metadata__":
        return "it is empty or reserved"
    if len(name) > MOST_NAME:
        return f"it is longer than {MOST_NAME} characters"
    if not name.isprintable():
        return "it has unprintable characters"
    if unicodedata.normalize("NFC", name) != name:
        return "it is not in Unicode's normal form NFC"
    segments = name.replace("\\", "/").split("/")
    if segments[0] == "" or segments[0][1:] == ":":
        return "it is an absolute path"
    return "a segment is '..'" if ".." in segments else None
