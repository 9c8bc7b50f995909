"""Calls of the user's own code: any exception in it becomes one line that names its file and line."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from karikomi.errors import KarikomiError

_INSTALLED = tuple(
    str(Path(sysconfig.get_path(name))) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_OURS = str(Path(__file__).parents[1])


def called(call: Callable[[], Any], what: str, *, where: str) -> Any:
    """Return ``call()``; an exception becomes a `KarikomiError`: `what` happened, with the cause and its place."""
    try:
        return call()
    except KarikomiError:
        raise
    except (Exception, SystemExit) as error:
        raise KarikomiError(what, where=where, got=cause(error)) from error


def cause(error: BaseException) -> str:
    """Return the type and text of an exception, and the last line outside of installed packages.

    >>> cause(ValueError("too small"))
    'ValueError: too small'
    """
    return f"{type(error).__name__}: {error}{_place(error.__traceback__)}"


def _place(trace: TracebackType | None) -> str:
    place = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((*_INSTALLED, _OURS, "<frozen ")):
            place = f" ({Path(file).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
