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


@click.command(
    epilog="Example: karikomi sweep digits --limits 0.1,1,10,inf --rule 'AutoClip(20)' --seeds 5 --workers 2"
)
@click.argument("task", default="digits")
@click.option(
    "--limits",
    type=Numbers(),
    default="0.1,1,10,inf",
    show_default=True,
    help="Limits of the gradients' global norm; inf clips nothing.",
)
@click.option("--rule", "rules", multiple=True, help="A clip rule beside them: 'AutoClip(20)'.")
@click.option(
    "--bound",
    "bounds",
    multiple=True,
    help="A bound on the weights beside none: 'MaxNorm(2.0)'.",
)
@click.option("--rates", type=Numbers(), help="Learning rates [default: the recipe's].")
@click.option(
    "--sparsities",
    type=Numbers(),
    default="0,0.9",
    show_default=True,
    help="Shares of weights that are pruned while training.",
)
@click.option(
    "--bits",
    type=Numbers(),
    help="Bits that weights are rounded to after training; none leaves them [default: none].",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Runs per setting, the same seeds for all.",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Epochs per run [default: the recipe's]."
)
@click.option(
    "--target",
    type=float,
    help="Of the metric, for the epochs until it is reached [default: the chosen setting's].",
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes."
)
@click.option("--scheduler", help="A dask scheduler, tcp://host:port, whose workers train.")
@data_file
@click.option("--out", type=FOLDER, help="Folder [default: runs/sweep-TASK].")
@as_json
@quiet
def command(
    task: str,
    rates: tuple[float, ...] | None,
    bounds: tuple[str, ...],
    bits: tuple[float, ...] | None,
    data: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train TASK at every setting with the same seeds, and say which to take.

    The answer is chosen on the validation split and reported on the test split: the loosest setting within one
    standard error of the best, what is within noise, what diverges and how often, and how many seeds a
    claim needs. The folder gets sweep.json, sweep.html and a record of every run. A sweep that was stopped at any
    moment continues with the same command; more seeds or settings are added to what is done.
    """
    from karikomi import report
    from karikomi.search.grid import sweep

    with to_stderr():
        result = sweep(
            task,
            rates=(None,) if rates is None else rates,
            bounds=(None, *(bound for bound in bounds if bound != "none")),
            bits=(None,) if bits is None else tuple(map(_whole, bits)),
            data=data,
            out=out,
            progress=not quiet,
            **options,
        )
        folder = Path("runs") / f"sweep-{result['task']}" if out is None else out
        page = report.write_page(folder / "sweep.html", report.sweep_page(result))
    written = {"file": str(folder / "sweep.json"), "report": str(page)}
    text = "\n".join([report.sweep_table(result), "", *written.values()])
    show({**result, **written}, text, as_json)


def _whole(size: float) -> Any:
    """Return a number of bits; None for ``none``, and what is none as it is, to be refused."""
    if size == float("inf"):
        return None
    return int(size) if size == int(size) else size
