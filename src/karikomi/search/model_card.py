"""The model card of a run: what the network was, what was done, figures, data, limits, and how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.search.search_run import SearchRequest

NAME = "README.md"
_LISTED = 8


def model_card(result: Mapping[str, Any], request: SearchRequest) -> str:
    """Return the card as Markdown, with the front matter that model hubs read."""
    parts = [
        _front(result),
        f"# {_plain(result['task'])}, made smaller",
        _what(result),
        "## Figures\n\n" + _table(("", "before", "after", ""), _figures(result)),
        "## Data\n\n" + _data(result),
        "## Evidence\n\n" + _evidence(result),
        "## Files\n\n"
        + _table(("file", "what", "bytes", "difference to the network"), _files(result)),
        "## Limits\n\n" + "\n".join(f"* {line}" for line in _limits(result)),
        f"## To make it again\n\n```\n{command_of(request)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def command_of(request: SearchRequest) -> str:
    """Return the line that reproduces a run: a command, or a call where the network came as an object."""
    budgets = {f"max_{name}": limit for name, limit in request.budgets.limits.items()}
    named: dict[str, Any] = {**budgets, "preset": request.preset, "seed": request.seed or None}
    named = {name: value for name, value in named.items() if value is not None}
    name = request.source.task
    command = (name,) if isinstance(name, str) else request.task.command
    if not command:
        options = ", ".join(f"{key}={value!r}" for key, value in named.items())
        extra = "" if request.trains else ", training=False"
        return f"kk.compress({request.task.name}, ..., {options}{extra})"
    words = ["karikomi", "compress", *command]
    if request.source.data is not None:
        words += ["--data", request.source.data]
    for key, value in named.items():
        words += [
            f"--{key.replace('_', '-')}",
            f"{value:g}" if isinstance(value, float) else str(value),
        ]
    words += [] if request.trains else ["--no-training"]
    return shlex.join(words)


def _front(result: Mapping[str, Any]) -> str:
    tags = ("karikomi", "compressed", result["framework"])
    lines = ["---", "library_name: karikomi", "tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _what(result: Mapping[str, Any]) -> str:
    about = f"{_plain(result['about'])}. " if result.get("about") else ""
    chosen = next((point for point in result["front"] if point["chosen"]), None)
    steps = f" Steps: {_plain(chosen['what'])}." if chosen else ""
    units = (result.get("shrink") or {}).get("removed")
    removed = f" {units:,} units were removed." if units else ""
    trained = "" if result.get("training") else " Nothing was trained."
    return (
        f"{about}The network ({_plain(result['network'])}, {result['framework']}) was compressed with karikomi"
        f" {result['karikomi']} from {result['bytes_dense']:,} to {result['bytes_packed']:,} bytes,"
        f" {result['ratio']:.1f} times smaller.{steps}{removed}{trained}"
    )


def _figures(result: Mapping[str, Any]) -> list[Sequence[str]]:
    metric, test = result["metric"], result["examples"]["test"]
    rows: list[Sequence[str]] = [
        (
            f"{metric} ({test:,} test examples)",
            *_pair(result, "metric"),
            f"drop {result['drop']:.4g}",
        ),
        (f"{metric} (validation, which chose)", *_pair(result, "validation"), ""),
        (
            "bytes",
            f"{result['bytes_dense']:,}",
            f"{result['bytes_packed']:,}",
            f"{result['ratio']:.2f}x",
        ),
    ]
    titles = {
        "parameters": "parameters in memory",
        "macs": "multiply-accumulates of an example",
        "memory": "peak bytes of tensors in a pass",
    }
    for name, title in titles.items():
        if result.get(f"{name}_before") is not None and result.get(f"{name}_after") is not None:
            before, after = result[f"{name}_before"], result[f"{name}_after"]
            share = f"{before / after:.2f}x" if after else ""
            rows.append((title, f"{before:,}", f"{after:,}", share))
    for item in result.get("timed") or []:
        spread = f"{item['faster']:.2f}x ({item['low']:.2f} to {item['high']:.2f} at 95 %, {item['pairs']} pairs)"
        title = f"ms, batch of {item['examples']}, {result['framework']}"
        rows.append((title, f"{item['ms_before']:.3g}", f"{item['ms_after']:.3g}", spread))
    for form in result.get("exports") or []:
        for first, second in _by_two(form.get("speed") or []):
            title = f"ms, batch of {first['batch']}, {form['form']} in {form['engine']}"
            rows.append(
                (title, f"{first['ms']:.3g}", f"{second['ms']:.3g}", f"{second['ratio']:.2f}x")
            )
        if form.get("metric") is not None:
            rows.append(
                (f"{metric} of {form['file']} ({form['engine']})", "", f"{form['metric']:.6g}", "")
            )
    return rows


def _data(result: Mapping[str, Any]) -> str:
    counts = result["examples"]
    used = {
        "train": "recovery" if result.get("training") else "calibration of ranges, if at all",
        "validation": "all choices",
        "test": "measured at the end",
    }
    lines = [f"* {name}: {counts[name]:,} examples, {what}" for name, what in used.items()]
    found = result["certificate"]
    if found.get("split") == "certify":
        lines.append(f"* certify: {found['n']:,} examples, the certificate alone")
    return "\n".join(lines)


def _evidence(result: Mapping[str, Any]) -> str:
    found = result["certificate"]
    if found["status"] == "not run":
        return f"No certificate: {_plain(found['reason'])}."
    level = f"{100 * (1 - found['alpha']):g} %"
    rows = [
        (
            _plain(test["what"]),
            f"{test['search_drop']:.4g}",
            f"{test['drop']:.4g}",
            f"{test['bound']:.4g}",
            "yes" if test["passed"] else "no",
        )
        for test in found["tests"]
    ]
    head = (
        "file",
        "drop, validation",
        f"drop, {found['split']}",
        f"bound at {level}",
        "within the budget",
    )
    return (
        f"{found['status'].capitalize()} on {found['n']:,} {found['split']} examples on which nothing was chosen"
        f" ({found['tried']} files tried, tested from safe to bold):\n\n{_table(head, rows)}"
    )


def _files(result: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        (
            "model.karikomi",
            'the packed network: kk.load("model.karikomi", into=model)',
            f"{result['bytes_packed']:,}",
            "0, read back" if result["verified"] else "NOT verified",
        ),
        ("dense.safetensors", "the network before", f"{result['bytes_dense_file']:,}", ""),
    ]
    for form in result.get("exports") or []:
        if form["file"]:
            apart = f"{form['difference']:.2g} of the largest output"
            rows.append((form["file"], form["about"], f"{form['bytes']:,}", apart))
    return rows


def _limits(result: Mapping[str, Any]) -> list[str]:
    machine = result["environment"]
    lines = [
        f"the verdict of the run is {result['verdict']!r}; every figure is of these data, and says nothing of others",
        f"times are of one machine ({machine.get('machine')}, {machine.get('threads')} threads), in turn with the"
        " dense network",
        *(_plain(text) for text in result["warnings"]),
        *(
            f"{form['form']} was not written: {_plain(form['reason'])}"
            for form in result.get("exports") or []
            if form["reason"]
        ),
    ]
    alone = list((result.get("left_alone") or {}).items())
    lines += [f"not pruned: {name}: {_plain(why)}" for name, why in alone[:_LISTED]]
    lines += (
        [f"and {len(alone) - _LISTED} more that were not pruned"] if len(alone) > _LISTED else []
    )
    return lines


def _pair(result: Mapping[str, Any], name: str) -> tuple[str, str]:
    return f"{result[f'{name}_before']:.6g}", f"{result[f'{name}_after']:.6g}"


def _by_two(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return list(zip(rows[::2], rows[1::2], strict=True))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(text: object) -> str:
    """Return text on one line that a table of Markdown takes, without markup of its own."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
