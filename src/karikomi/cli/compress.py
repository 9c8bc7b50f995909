"""``karikomi compress``: the main job, from a task and a budget to a verified small file and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from karikomi.cli.printing import FOLDER, PATH, as_json, data_file, end, quiet, show, to_stderr


@click.command(epilog="Example: karikomi compress mnist-lenet300 --data mnist.npz --max-drop 0.002")
@click.argument("task", default="digits")
@data_file
@click.option(
    "--from",
    "weights",
    type=PATH,
    help="Trained weights (.safetensors, .npz or .karikomi), which then are not trained.",
)
@click.option(
    "--max-drop",
    type=float,
    default=0.005,
    show_default=True,
    help="How much worse than the dense network's the metric may be, on the validation split.",
)
@click.option("--max-ms", type=float, help="Milliseconds of a forward pass on 64 examples.")
@click.option("--max-macs", type=float, help="Multiply-accumulates of one example.")
@click.option("--max-parameters", type=float, help="Numbers in memory.")
@click.option("--max-bytes", type=float, help="Bytes of the file.")
@click.option("--preset", help="storage, cpu, deep-compression or quick [default: storage].")
@click.option("--text", type=PATH, help="Text for a folder: a third chooses, the rest judges.")
@click.option("--valid", type=PATH, help="Text for a folder that chooses (.txt, .jsonl; .xz, .gz).")
@click.option("--test", type=PATH, help="Text for a folder that judges.")
@click.option(
    "--sentences", type=click.IntRange(min=3), help="Sentences of each text [default: 2000]."
)
@click.option(
    "--no-training", is_flag=True, help="No recovery by training: rates, codebooks, 8 bits."
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes."
)
@click.option("--scheduler", help="A dask scheduler, tcp://host:port, whose workers evaluate.")
@click.option(
    "--reuse",
    type=FOLDER,
    help="Run folder of the same network whose candidates are taken over, for other budgets.",
)
@click.option("--take", type=click.IntRange(min=0), help="The point of the front to have instead.")
@click.option(
    "--export",
    help="Other forms of the network, with commas: safetensors, pt2, onnx, int8, keras, or all"
    " [default: safetensors].",
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
    weights: Path | None,
    out: Path | None,
    config: Path | None,
    no_training: bool,
    text: Path | None,
    valid: Path | None,
    test: Path | None,
    sentences: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make a network as small as the budgets allow: train, prune, quantize, pack, certify.

    TASK is a built-in task (see `karikomi list task`), package.module:attribute, a .py file whose
    attribute `task` is a kk.tasks.Task, or a folder of transformers (an encoder of sentences) with --text, or
    --valid and --test: without labels, by the cosine to its own embeddings. Without TASK it is `digits`, which
    needs no download.

    The run folder gets model.karikomi, dense.safetensors, README.md, report.html, result.json and record.jsonl. A run
    that was stopped at any moment continues with the same command. Ends with 4 where a budget was missed, and with
    3 where it holds on the validation split but could not be certified on other examples.
    """
    from karikomi import record, report
    from karikomi.cli.array_files import read_arrays
    from karikomi.files import write_json
    from karikomi.search import compress

    texts = {"text": text, "validation": valid, "test": test, "sentences": sentences}
    texts = {name: value for name, value in texts.items() if value is not None}
    with to_stderr():
        result = compress(
            _of_folder(task, texts),
            weights=None if weights is None else read_arrays(weights),
            training=not no_training,
            data=data,
            config=config,
            out=out,
            progress=not quiet,
            **options,
        )
        folder = Path(result["file"]).parent
        result["task"] = task
        if texts:
            told = {name: str(v) if isinstance(v, Path) else v for name, v in texts.items()}
            result["source"] = {"task": task, "data": None, "texts": told}
        result["report"] = str(folder / "report.html")
        given = (("data", data), ("config", config), ("from", weights))
        result |= {key: str(path) for key, path in given if path}
        report.write_page(
            result["report"], report.compress_page(result, list(record.read(result["record"])))
        )
        write_json(folder / "result.json", result)
    show(result, report.compress_table(result), as_json)
    end(result)


def _of_folder(task: str, texts: dict[str, Any]) -> Any:
    """Return the task of a folder of transformers, or the name as it is."""
    if not texts and not (Path(task) / "config.json").is_file():
        return task
    from karikomi.plugins.encoder_folder import encoder_task

    return encoder_task(task, **texts)
