"""``karikomi list``: everything that is chosen by name, each with its formula and its source."""

from __future__ import annotations

import textwrap
from typing import Any

import click

from karikomi import registry
from karikomi.cli.printing import as_json, show, terminal_width
from karikomi.errors import suggest

TITLES = {
    "clip": "clip: rules for gradients",
    "bound": "bound: rules for weights",
    "prune": "prune: schedules of pruning",
    "score": "score: what a weight is worth",
    "allocation": "allocation: which tensors give up how many",
    "allocator": "allocator: allocations with arguments",
    "pattern": "pattern: what is removed as one",
    "penalty": "penalty: what prepares a network for pruning",
    "quantizer": "quantizer: how weights are rounded to a grid",
    "corruption": "corruption: what an audit does to the inputs",
    "task": "task: model, data, loss and metric",
}


class ListedKind(click.Choice):
    """A kind of the registry; an error names the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the kind, or fail."""
        if value not in self.choices:
            known = ", ".join(map(repr, self.choices))
            hint = suggest(value, self.choices)
            self.fail(f"{value!r} is not one of {known}; {hint}", param, ctx)
        return super().convert(value, param, ctx)


@click.command(epilog="Example: karikomi list task")
@click.argument("kind", required=False, type=ListedKind(registry.KINDS))
@as_json
def command(kind: str | None, as_json: bool) -> None:
    """List what is registered under KIND, or everything: name, formula, source."""
    entries = registry.entries(kind)
    rows = [
        {"kind": entry.kind, "name": entry.name, "formula": entry.formula, "source": entry.source}
        for entry in entries
    ]
    show({"entries": rows}, _text(entries), as_json)


def _text(entries: list[registry.Entry]) -> str:
    kinds = dict.fromkeys(entry.kind for entry in entries)
    column = 2 + max((len(entry.name) for entry in entries), default=0)
    blocks = [
        "\n".join(
            [TITLES[kind], *(_lines(entry, column) for entry in entries if entry.kind == kind)]
        )
        for kind in kinds
    ]
    return "\n\n".join(blocks)


def _lines(entry: registry.Entry, column: int) -> str:
    indent = " " * (column + 2)
    width = max(terminal_width(), column + 40)
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_on_hyphens=False)
    lines = []
    for start, text in ((f"  {entry.name:<{column}}", entry.formula), (indent, entry.source)):
        wrapper.initial_indent = start
        lines += wrapper.wrap(text)
    return "\n".join(lines)
