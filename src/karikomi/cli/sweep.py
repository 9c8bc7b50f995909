"""``karikomi sweep``: the same training at many limits and sparsities, as a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from karikomi.cli.printing import FOLDER, as_json, data_file, quiet, show, to_stderr


class Numbers(click.ParamType):
    """Numbers between commas; ``inf`` and ``none`` both mean no limit."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Return the numbers of a text such as ``0.1,1,inf``."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        try:
            return tuple(float("inf" if part == "none" else part) for part in parts)
        except ValueError:
            self.fail(
                f"{value!r} is not a list of numbers between commas, such as 0.1,1,inf", param, ctx
            )


@click.command(epilog="Example: karikomi sweep digits --limits 0.1,1,inf --seeds 2 --epochs 20")
@click.argument("task", default="digits")
@click.option(
    "--limits",
    type=Numbers(),
    default="0.1,1,10,inf",
    show_default=True,
    help="Limits of the gradients' global norm; inf clips nothing.",
)
@click.option(
    "--sparsities",
    type=Numbers(),
    default="0,0.9",
    show_default=True,
    help="Shares of weights that are pruned while training.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs per point."
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Epochs per run [default: the recipe's]."
)
@data_file
@click.option("--out", type=FOLDER, help="Folder [default: runs/sweep-TASK].")
@as_json
@quiet
def command(
    task: str,
    limits: tuple[float, ...],
    sparsities: tuple[float, ...],
    seeds: int,
    epochs: int | None,
    data: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train TASK at every limit, sparsity and seed, and compare.

    Shows accuracy on the test split, generalization gap, time per step, packed size and the share
    of steps clipped. The folder gets sweep.json, sweep.html and a record of every run. A sweep that
    was stopped continues with the same command.
    """
    from karikomi import report
    from karikomi.search.grid import sweep
    from karikomi.tasks import load

    with to_stderr():
        chosen = load(task, data=data)
        folder = Path("runs") / f"sweep-{chosen.name}" if out is None else out
        result = sweep(
            chosen,
            limits=limits,
            sparsities=sparsities,
            seeds=seeds,
            epochs=epochs,
            out=folder,
            progress=not quiet,
        )
    page = report.write_page(folder / "sweep.html", report.sweep_page(result))
    written = {"file": str(folder / "sweep.json"), "report": str(page)}
    text = "\n".join([report.sweep_table(result), "", *written.values()])
    show({**result, **written}, text, as_json)
