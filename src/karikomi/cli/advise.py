"""``karikomi advise``: which limit fits a recorded run, what exploded first, and the suspected cause."""

from __future__ import annotations

from pathlib import Path

import click

from karikomi.cli.printing import PATH, as_json, show


@click.command(
    epilog="Example: karikomi advise runs/demo    karikomi advise log.csv --map norm=grad_l2 --map loss=train"
)
@click.argument("record", type=PATH)
@click.option(
    "--map",
    "mapped",
    multiple=True,
    metavar="QUANTITY=COLUMN",
    help="Column or key of norm, loss, lr, factor, loss_scale or step, where it is not a usual one.",
)
@click.option("--stage", help="Stage of a record of compress; by default its first.")
@click.option("--out", type=PATH, help="Also write the account as a page, an HTML file.")
@as_json
def command(
    record: Path, mapped: tuple[str, ...], stage: str | None, out: Path | None, as_json: bool
) -> None:
    """Read the record of a finished run: the regime, a clip limit for it, what exploded first and why.

    RECORD is a record of karikomi or the folder of a run, TensorBoard event files, a Hugging Face
    trainer_state.json, a Lightning metrics.csv, a W&B history (csv, json, parquet), MLflow (files or
    SQLite), a Megatron log, or any CSV.
    """
    from karikomi import report
    from karikomi.advising import advise

    advice = advise(record, columns=_columns(mapped), stage=stage)
    text, written = str(advice), {}
    if out is not None:
        report.write_page(out, report.advice_page(advice))
        text, written = f"{text}\n\n{out}", {"report": str(out)}
    show({**advice.as_dict(), **written}, text, as_json)


def _columns(mapped: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in mapped:
        quantity, equals, column = text.partition("=")
        if not (equals and quantity and column):
            raise click.BadParameter(f"{text!r} is not QUANTITY=COLUMN", param_hint="--map")
        found[quantity] = column
    return found
