"""An extension of griffe that makes the project's docstrings Markdown: examples fenced, ranges escaped."""

from __future__ import annotations

import re
from typing import Any

import griffe

# From a prompt to the next empty line; further blocks after an empty line begin with a prompt again.
EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)
# A range such as "> 0" that happens to begin a line would be a quotation.
COMPARISON = re.compile(r"^(?=>=? )", re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Fence each doctest example as ``pycon``, and escape comparisons at the start of a line."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            text = COMPARISON.sub(r"\\", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", text)
