"""``karikomi compress``: the main job, from a task and a budget to a verified small file and a page."""

from __future__ import annotations

from pathlib import Path

import click

from karikomi.cli.printing import FOLDER, PATH, as_json, data_file, quiet, show, to_stderr


@click.command(epilog="Example: karikomi compress mnist-lenet300 --data mnist.npz --max-drop 0.002")
@click.argument("task", default="digits")
@data_file
@click.option(
    "--max-drop",
    type=float,
    default=0.005,
    show_default=True,
    help="How much worse than the dense network's the metric may be, on the validation split.",
)
@click.option("--out", type=FOLDER, help="Run folder [default: runs/TASK].")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of weights and data order."
)
@click.option(
    "--config",
    type=PATH,
    help="TOML file; its keys are those of the task's recipe, and a [clip] table names a rule.",
)
@as_json
@quiet
def command(
    task: str,
    data: Path | None,
    max_drop: float,
    out: Path | None,
    seed: int,
    config: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a network, then prune, quantize and pack it within an accuracy budget.

    TASK is a built-in task (see `karikomi list task`), package.module:attribute, or a .py file whose
    attribute `task` is a kk.tasks.Task. Without TASK it is `digits`, which needs no download.

    The run folder gets model.karikomi, dense.safetensors, report.html, result.json and record.jsonl. A run
    that was stopped at any moment continues with the same command.
    """
    from karikomi import record, report
    from karikomi.files import write_json
    from karikomi.search import compress
    from karikomi.tasks import configured, load

    with to_stderr():
        chosen = load(task, data=data)
        if config is not None:
            chosen = configured(chosen, config)
        result = compress(chosen, out=out, max_drop=max_drop, seed=seed, progress=not quiet)
        folder = Path(result["file"]).parent
        result["task"] = task
        result["report"] = str(folder / "report.html")
        result |= {key: str(path) for key, path in (("data", data), ("config", config)) if path}
        report.write_page(
            result["report"], report.compress_page(result, list(record.read(result["record"])))
        )
        write_json(folder / "result.json", result)
    show(result, report.compress_table(result), as_json)
