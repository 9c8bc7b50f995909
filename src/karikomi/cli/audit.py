"""``karikomi audit``: two files of one network, compared on the task that they were made for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from karikomi.cli.printing import PATH, as_json, data_file, end, show, to_stderr

if TYPE_CHECKING:
    from karikomi.audit.gates import Verdict


@click.command(
    epilog="Example: karikomi audit runs/digits/dense.safetensors runs/digits/model.karikomi --task digits"
)
@click.argument("before", type=PATH)
@click.argument("after", type=PATH)
@click.option(
    "--task", required=True, help="Built-in task, package.module:attribute, or a .py file."
)
@data_file
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the noise."
)
@click.option("--out", type=PATH, help="Folder for audit.json and audit.html.")
@click.option(
    "--most",
    type=click.IntRange(min=1),
    default=2_000,
    show_default=True,
    help="Examples that are corrupted: 50 evaluations of both networks each.",
)
@click.option(
    "--slices",
    type=PATH,
    help="An .npz file: name -> a boolean or a label per test example; groups that must not pay.",
)
@click.option(
    "--fail-if",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="End with 4 if it is true, with 3 if it cannot be decided: 'drop>0.005', 'class_drop>0.03@holm', and likewise"
    " negative_flips, churn, slice_drop, corruption_drop, attack_drop, calibration_error, alignment<, explanation<."
    " Repeatable.",
)
@click.option(
    "--population",
    type=click.IntRange(min=0),
    default=0,
    metavar="K",
    help="Audit K more small networks, drawn by the rounding errors of AFTER: which flips are chance?",
)
@click.option(
    "--replicate",
    "replicates",
    type=PATH,
    multiple=True,
    help="Instead of K: a small network made as AFTER was, with another seed. Repeatable.",
)
@click.option(
    "--original",
    "originals",
    type=PATH,
    multiple=True,
    help="A further network made as BEFORE was. Repeatable.",
)
@click.option("--markdown", type=PATH, help="File for the result as Markdown (a pull request).")
@as_json
def command(
    before: Path,
    after: Path,
    task: str,
    data: Path | None,
    seed: int,
    out: Path | None,
    most: int,
    slices: Path | None,
    conditions: tuple[str, ...],
    population: int,
    replicates: tuple[Path, ...],
    originals: tuple[Path, ...],
    markdown: Path | None,
    as_json: bool,
) -> None:
    """Show what the network in AFTER does differently from the one in BEFORE.

    Both are .karikomi, .safetensors or .npz files. On the task's test split: accuracy per class,
    predictions that changed, robustness against noise, and agreement of the input gradients.
    """
    from karikomi import report
    from karikomi.audit import audit
    from karikomi.audit.gates import gate_of, judged, verdict_of
    from karikomi.cli.array_files import read_arrays, read_notes
    from karikomi.files import write_json, write_text
    from karikomi.tasks import load

    if population and replicates:
        raise click.UsageError("--population draws networks, --replicate names them: give one")
    gates = [gate_of(text) for text in conditions]
    groups = read_arrays(slices) if slices else None
    pair = [read_arrays(path) for path in (before, after)]
    with to_stderr():
        chosen = load(task, data=data)
        result = audit(
            chosen,
            *pair,
            seed=seed,
            labels=(str(before), str(after)),
            notes=[read_notes(path) for path in (before, after)],
            slices=groups,
            most=most,
            population=population,
            replicates=[read_arrays(path) for path in replicates],
            originals=[read_arrays(path) for path in originals],
            sizes=(before.stat().st_size, after.stat().st_size),
        )
    tried = [judged(gate, result) for gate in gates]
    if tried:
        result |= {"gates": [found.as_dict() for found in tried], "verdict": verdict_of(tried)}
    result["command"] = _command(click.get_current_context())
    text = "\n".join([report.audit_table(result), *map(_line, tried)])
    written: dict[str, str | None] = {"file": None, "report": None, "markdown": None}
    if out is not None:
        written |= {"file": str(out / "audit.json"), "report": str(out / "audit.html")}
        write_json(out / "audit.json", result)
        report.write_page(out / "audit.html", report.audit_page(result))
        text += f"\n\n{out / 'audit.json'}\n{out / 'audit.html'}"
    if markdown is not None:
        written["markdown"] = str(write_text(markdown, report.audit_markdown(result)))
        text += f"\n{markdown}"
    show({**result, **written}, text, as_json)
    end(result)


def _command(context: click.Context) -> str:
    """Return the command line that makes the same result again, quoted for a shell."""
    words = ["karikomi", "audit"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif parameter.name not in _NO_RESULT and value not in (None, (), False):
            values = value if isinstance(value, tuple) else (value,)
            words += [word for item in values for word in (parameter.opts[-1], str(item))]
    return shlex.join(words)


# They change where the result goes, and not the result.
_NO_RESULT = ("out", "markdown", "as_json")


def _line(found: Verdict) -> str:
    where = f", {found.where}" if found.where else ""
    interval = (
        "" if found.interval is None else f", {found.interval[0]:.4g} to {found.interval[1]:.4g}"
    )
    value = "not measured" if found.value is None else f"{found.value:.4g}{interval}{where}"
    return f"gate      {found.outcome}: {found.gate.text} ({value})"
