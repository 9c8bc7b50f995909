"""A digest of the package's own source, so that no result of other code is taken for one of this code."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def source_digest(folder: Path = Path(__file__).parents[2]) -> str:
    """Return 16 hexadecimal digits of all Python files below a folder, by name and content.

    >>> len(source_digest())
    16
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
