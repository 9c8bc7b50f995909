"""A tensor in the file's terms: name, shape, type, grid, and one flat little-endian array."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import InvalidArgument
from karikomi.quantize import Coded, Grid


class StoredType(NamedTuple):
    """What stores a type: `carrier`, NumPy's type of the flat array; `bits` in a dense file; `range` of the carrier."""

    carrier: str
    bits: int
    range: tuple[int, int] | None = None


PLAIN = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
EXTENDED = {
    "bfloat16": StoredType("<u2", 16),
    "float8_e4m3fn": StoredType("<u1", 8),
    "float8_e4m3fnuz": StoredType("<u1", 8),
    "float8_e5m2": StoredType("<u1", 8),
    "float8_e5m2fnuz": StoredType("<u1", 8),
    "float8_e8m0fnu": StoredType("<u1", 8),
    "float4_e2m1fn": StoredType("<u1", 4, (0, 15)),
    "int4": StoredType("<u1", 4, (0, 15)),
    "uint4": StoredType("<u1", 4, (0, 15)),
}
"""Types that NumPy gets from ml_dtypes, by its names; their bits are stored as integers."""
DTYPES = {
    kind: StoredType("<u1" if kind == "b1" else f"<{kind}", 8 * int(kind[1:]), None)
    for kind in PLAIN
} | EXTENDED
DTYPES["b1"] = DTYPES["b1"]._replace(range=(0, 1))
"""Type of a decoded tensor, as the manifest names it -> what stores it."""
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
        return self.flat.view(array_dtype(self.dtype)).reshape(self.shape)

    def decoded(self) -> NDArray:
        """Return the tensor with its codes, if any, turned into float32."""
        value = self.value()
        return value.decode() if isinstance(value, Coded) else value

    def carried(self, dense: NDArray | None = None) -> NDArray:
        """Return the array whose bytes a digest covers; `dense`: the decoded tensor, if there is one already."""
        if self.dtype in EXTENDED:
            return self.flat
        return self.decoded() if dense is None else dense


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
            hint="give nested ones flat names, such as 'dense/kernel'"
            if isinstance(tensor, Mapping)
            else "kk.save(module, path), or tensor.detach().cpu().numpy()"
            if hasattr(tensor, "detach")
            else "convert it with numpy.asarray",
        )
    array = np.asarray(tensor)
    kind = kind_of(array.dtype)
    if kind is None:
        raise InvalidArgument(
            "this type cannot be packed",
            where=f"tensor {name!r}",
            got=array.dtype,
            allowed="bool, integers, float16, float32, float64, and of ml_dtypes "
            + ", ".join(EXTENDED),
        )
    flat = np.ascontiguousarray(array).reshape(-1)
    if kind in PLAIN:
        flat = flat.astype(f"<{kind}", copy=False)
    flat = flat.view(code_dtype(kind, None))
    # ml_dtypes keeps four bits in a byte, and leaves the upper half open.
    return Stored(name, array.shape, kind, None, flat & 15 if DTYPES[kind].bits == 4 else flat)


def kind_of(dtype: np.dtype) -> str | None:
    """Return the name of a type in the manifest, ``None`` for one that is not stored."""
    kind = dtype.name if dtype.name in EXTENDED else f"{dtype.kind}{dtype.itemsize}"
    return kind if kind in DTYPES else None


def array_dtype(kind: str) -> np.dtype:
    """Return the type of arrays for a name in the manifest."""
    if kind in PLAIN:
        return np.dtype(f"<{kind}")
    import ml_dtypes  # only files with such types need it

    return np.dtype(getattr(ml_dtypes, kind))


def code_dtype(kind: str, grid: Grid | None) -> np.dtype:
    """Return the type of the flat array: that of the codes, or what carries the numbers (bool as a byte)."""
    return np.dtype(DTYPES[kind].carrier) if grid is None else grid.code_dtype


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
