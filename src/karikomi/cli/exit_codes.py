"""The exit codes of the verbs, by the verdict of what they judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

HELD, ERROR, USAGE, UNDECIDED, MISSED, INTERRUPTED = 0, 1, 2, 3, 4, 130

BY_VERDICT = {"held": HELD, "undecided": UNDECIDED, "missed": MISSED}
"""Verdict -> exit code: undecided is also what was not run, so that a skipped check is never green."""


def end(result: Mapping[str, Any]) -> None:
    """End the verb with the exit code of its result's ``verdict``; without one, nothing was judged."""
    code = BY_VERDICT[result.get("verdict") or "held"]
    if code:
        click.get_current_context().exit(code)
