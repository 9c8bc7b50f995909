"""Source line in the user's forward of a traced call or an error, for error messages."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)')
_TORCH = str(Path(torch.__file__).parent)
_PYTHON = sysconfig.get_paths()["stdlib"]


def called_at(node: fx.Node, *, after: str) -> str:
    """Return ``at file:line`` of the call that a traced node represents, or an empty text.

    `after`: the file that started the trace; frames outside of it are not the forward.
    """
    found = _FRAME.findall(node.stack_trace or "")
    return _innermost([(path, int(line)) for path, line, _ in found], after)


def raised_at(error: BaseException, *, after: str) -> str:
    """Return ``at file:line`` of the user's line that raised an error of the trace."""
    frames = traceback.extract_tb(error.__traceback__)
    return _innermost([(frame.filename, frame.lineno or 0) for frame in frames], after)


def _innermost(frames: Sequence[tuple[str, int]], after: str) -> str:
    starts = [i for i, (path, _) in enumerate(frames) if path == after]
    traced = frames[starts[-1] + 1 :] if starts else frames
    lines = [(path, line) for path, line in traced if not _is_library(path)]
    return f"at {lines[-1][0]}:{lines[-1][1]}" if lines else ""


def _is_library(path: str) -> bool:
    standard = path.startswith(_PYTHON) and "site-packages" not in path
    return standard or path.startswith((_TORCH, "<"))
