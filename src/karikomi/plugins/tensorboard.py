"""A record's scalars in TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from karikomi.errors import InvalidArgument, Unavailable, Unwritable, install_hint
from karikomi.files import as_path
from karikomi.plugins.scalars import scalars


class TensorBoard:
    """A sink that writes the scalars of all steps as ``karikomi/norm``, ``karikomi/factor`` and so on.

    `to`: an existing writer (torch's ``SummaryWriter``, or any other object with
    ``add_scalar(tag, value, step)``), which stays open; or the folder for a new ``SummaryWriter``,
    which `close` closes. Rows that a resumed run writes again are drawn again, unless the writer
    was created with ``purge_step``.

    Raises `Unavailable` for a folder without torch and tensorboard, `Unwritable` for a folder that cannot
    be created, and `InvalidArgument` for other types.

    >>> class Writer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(tag, value, step)
    >>> TensorBoard(Writer()).write({"event": "step", "step": 3, "norm": 0.5})
    karikomi/norm 0.5 3
    """

    def __init__(self, to: Any) -> None:
        self._own = isinstance(to, type) or not callable(getattr(to, "add_scalar", None))
        self._writer = _opened(to) if self._own else to

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the scalars of one row."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row.get("step"))

    def flush(self) -> None:
        """Flush the writer, if it has a `flush`."""
        flush = getattr(self._writer, "flush", None)
        if flush is not None:
            flush()

    def close(self) -> None:
        """Close the writer if it was opened here, else flush it."""
        if self._own:
            self._writer.close()
        else:
            self.flush()


def _opened(folder: Any) -> Any:
    if not isinstance(folder, str | os.PathLike):
        raise InvalidArgument(
            "this is neither a writer nor a folder",
            where="TensorBoard",
            got=type(folder).__name__,
            allowed="an object with add_scalar, or a path",
        )
    path = as_path(folder)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Unavailable(
            f"writing for TensorBoard needs torch and tensorboard ({error})",
            hint=f"{install_hint('torch,track')}, or pass a writer",
        ) from error
    try:
        return SummaryWriter(log_dir=str(path))
    except OSError as error:
        raise Unwritable(
            f"cannot write for TensorBoard ({error.strerror or error})", where=str(path)
        ) from error
