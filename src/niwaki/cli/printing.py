"""What every verb puts on stdout: one JSON object, or text; all else goes to stderr."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

import click

as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON object."
)


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the result as JSON or as the text that says the same."""
    click.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else text)


def terminal_width() -> int:
    """Return the columns of the terminal, or 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns
