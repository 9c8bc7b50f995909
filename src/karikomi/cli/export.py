"""``karikomi export``: the network of a packed file as an ONNX file, in floats or for integer kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from karikomi.cli.printing import PATH, as_json, data_file, show, to_stderr

CALIBRATIONS = ("minmax", "percentile", "mse", "entropy")


@click.command(
    epilog="Example: karikomi export runs/digits --forms onnx,int8; or karikomi export model.karikomi --onnx"
    " model.onnx --task digits --int8"
)
@click.argument("file", metavar="FILE", type=PATH)
@click.option("--onnx", "out", metavar="OUT", type=PATH, help="The ONNX file, of a packed file.")
@click.option(
    "--forms",
    help="Of a run folder, with commas: safetensors, pt2, onnx, int8, keras [default: all].",
)
@click.option(
    "--task",
    help="Built-in task, package.module:attribute, or a .py file [default: that of the run folder].",
)
@data_file
@click.option("--int8", is_flag=True, help="Run in integers: activations as bytes too.")
@click.option(
    "--calibration",
    type=click.Choice(CALIBRATIONS),
    default="minmax",
    show_default=True,
    help="How much of the range of an activation is covered.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Training examples to measure ranges on.",
)
@click.option("--speed", is_flag=True, help="Measure it beside float32, at batch 1 and 32.")
@as_json
def command(
    file: Path,
    out: Path | None,
    forms: str | None,
    task: str | None,
    data: Path | None,
    int8: bool,
    calibration: str,
    examples: int,
    speed: bool,
    as_json: bool,
) -> None:
    """Write the network of FILE, a run folder of compress or a packed file, in forms that other programs read.

    Of a run folder all forms are written into it, or those of --forms, each compared with the network. Of a packed
    file, with --onnx and --task, an ONNX file is written. The task has the network's code and data. Quantized
    weights keep their integers and scales. With --int8, onnxruntime runs layers in integers; layers that fell back
    to float are listed with the reason.
    """
    from karikomi import registry
    from karikomi.errors import BadFile, InvalidArgument
    from karikomi.tasks import load

    if file.is_dir():
        with to_stderr():
            rows = _of_run(file, task, data, forms)
        show({"exports": rows}, "\n".join(map(_line, rows)), as_json)
        return
    if out is None or task is None:
        raise click.UsageError(
            "A packed file has neither code nor data: give --onnx OUT and --task TASK, or the run folder;"
            " karikomi unpack writes safetensors."
        )
    if out.suffix != ".onnx":
        raise InvalidArgument(
            "the output is an ONNX file",
            where="export",
            got=str(out),
            allowed="a name ending in .onnx",
        )
    if not file.is_file():
        raise BadFile("there is no such file", where=str(file))
    registry.framework("torch")
    from karikomi.torch.tasks.other_forms import export_task

    choices: dict[str, Any] = {"calibration": calibration}
    if int8:
        choices["activations"] = "int8"
    with to_stderr():
        chosen = load(task, data=data)
        splits = chosen.data()
        report = export_task(
            file, out, _module(chosen, splits), splits, examples=examples, **choices
        )
        timed = _timed(file, out, chosen, splits) if speed else {}
    text = "\n".join([str(report), *(str(item) for item in timed.get("rows", ()))])
    rows = {"speed": [item.as_dict() for item in timed["rows"]]} if timed else {}
    show({**report.as_dict(), **rows}, text, as_json)


def _module(task: Any, data: Any) -> Any:
    from karikomi.torch import runner_for

    return runner_for(task, data, seed=0).untrained()


def _of_run(folder: Path, task: str | None, data: Path | None, forms: str | None) -> Any:
    """Write the forms of a run folder, its task taken from its result unless it is given."""
    from karikomi import registry
    from karikomi.errors import BadFile, Unsupported
    from karikomi.search.forms_written import run_exported
    from karikomi.search.lock import read_json
    from karikomi.tasks import checked_data, load

    result = read_json(folder / "result.json")
    if result is None:
        raise BadFile("no finished run of compress", where=str(folder), hint="run it to its end")
    source = result.get("source") or {}
    if task is None and source.get("task") is None:
        raise Unsupported(
            "the network of this run came as an object, whose code the folder has not",
            where=str(folder),
            hint="kk.compress(model, ..., export='all') again, which trains nothing anew; or --task TASK",
        )
    known = data if data is not None else source.get("data")
    chosen = (
        load(task, data=data)
        if task is not None
        else _again(source["task"], known, source.get("texts") or {})
    )
    content = checked_data(chosen)
    runner = registry.framework(chosen.framework).runner_for(
        chosen, content, seed=int(result.get("seed") or 0)
    )
    return run_exported(folder, runner, forms)


def _again(task: str, data: Any, texts: dict[str, Any]) -> Any:
    """Return the task of a run by what its result says of it."""
    if texts:
        from karikomi.plugins.encoder_folder import encoder_task

        return encoder_task(task, **texts)
    from karikomi.tasks import load

    return load(task, data=data)


def _line(row: dict[str, Any]) -> str:
    if row["reason"]:
        return f"{row['form']}: not written: {row['reason']}"
    metric = f", metric {row['metric']:.6g}" if row.get("metric") is not None else ""
    return (
        f"{row['form']}: {row['file']}, {row['bytes']:,} bytes, largest difference {row['difference']:.2e} of the"
        f" largest output{metric}"
    )


def _timed(file: Path, out: Path, task: Any, data: Any) -> dict[str, Any]:
    """Return the latency beside that of the same network in float32."""
    import tempfile

    from karikomi.torch.onnx_export.latency import measure_onnx
    from karikomi.torch.tasks.other_forms import export_task

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        export_task(file, plain, _module(task, data), data, codes={})
        rows = measure_onnx({"float32": plain, out.name: out})
    return {"rows": rows}
