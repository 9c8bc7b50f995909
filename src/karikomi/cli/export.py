"""``karikomi export``: the network of a packed file as an ONNX file, in floats or for integer kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from karikomi.cli.printing import PATH, as_json, data_file, show, to_stderr

CALIBRATIONS = ("minmax", "percentile", "mse", "entropy")


@click.command(
    epilog="Example: karikomi export model.karikomi --onnx model.onnx --task digits --int8"
)
@click.argument("file", metavar="FILE", type=PATH)
@click.option("--onnx", "out", metavar="OUT", type=PATH, required=True, help="The ONNX file.")
@click.option(
    "--task", required=True, help="Built-in task, package.module:attribute, or a .py file."
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
    out: Path,
    task: str,
    data: Path | None,
    int8: bool,
    calibration: str,
    examples: int,
    speed: bool,
    as_json: bool,
) -> None:
    """Write the network in FILE (.karikomi) as an ONNX file.

    The task has the network's code and data. Quantized weights keep their integers and scales. With --int8,
    onnxruntime runs layers in integers; layers that fell back to float are listed with the reason.
    """
    from karikomi import registry
    from karikomi.errors import BadFile, InvalidArgument
    from karikomi.tasks import load

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
        report = export_task(file, out, chosen, splits, examples=examples, **choices)
        timed = _timed(file, out, chosen, splits) if speed else {}
    text = "\n".join([str(report), *(str(item) for item in timed.get("rows", ()))])
    rows = {"speed": [item.as_dict() for item in timed["rows"]]} if timed else {}
    show({**report.as_dict(), **rows}, text, as_json)


def _timed(file: Path, out: Path, task: Any, data: Any) -> dict[str, Any]:
    """Return the latency beside that of the same network in float32."""
    import tempfile

    from karikomi.torch.onnx_export.latency import measure_onnx
    from karikomi.torch.tasks.other_forms import export_task

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        export_task(file, plain, task, data, codes={})
        rows = measure_onnx({"float32": plain, out.name: out})
    return {"rows": rows}
