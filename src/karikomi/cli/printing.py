"""The output of every verb: one JSON object or text on stdout, all else on stderr, and the exit code of its verdict."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

HELD, ERROR, USAGE, UNDECIDED, MISSED, INTERRUPTED = 0, 1, 2, 3, 4, 130

BY_VERDICT = {"held": HELD, "undecided": UNDECIDED, "missed": MISSED}
"""Verdict -> exit code: undecided is also what was not run, so that a skipped check is never green."""

PATH: click.Path = click.Path(path_type=Path)

as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON object."
)
data_file = click.option("--data", type=PATH, help="Data file of tasks that need one.")
quiet = click.option("--quiet", is_flag=True, help="No progress bar.")


class FolderPath(click.Path):
    """A folder to make; an empty name is an error, not the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or fail for an empty name."""
        if not str(value):
            self.fail("the name of the folder is empty; '.' is the current one", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = FolderPath()


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
    """Send what a user's task prints to stderr: stdout is for the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the result as JSON or as text."""
    click.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else text)


def terminal_width() -> int:
    """Return the columns of the terminal, or 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def end(result: Mapping[str, Any]) -> None:
    """End the verb with the exit code of its result's ``verdict``; without one, nothing was judged."""
    code = BY_VERDICT[result.get("verdict") or "held"]
    if code:
        click.get_current_context().exit(code)
