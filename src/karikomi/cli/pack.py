"""``karikomi pack``: compress a file of arrays, without loss unless an option quantizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from karikomi.cli.printing import PATH, as_json, show

if TYPE_CHECKING:
    import numpy as np

    from karikomi.quantize import Coded
    from karikomi.quantize.method import Method


@click.command(epilog="Example: karikomi pack model.safetensors model.karikomi --entries 16")
@click.argument("source", metavar="IN", type=PATH)
@click.argument("out", metavar="OUT", type=PATH)
@click.option(
    "--entries",
    type=int,
    help="Quantize: this many shared values per tensor (k-means), beside an exact zero.",
)
@click.option(
    "--bits",
    type=int,
    help="Quantize: an even grid of this many bits, one scale per index of the first axis.",
)
@click.option("--method", help="Quantize with this quantizer; `karikomi list quantizer` has them.")
@click.option(
    "--group", type=int, help="With --bits: so many consecutive weights have a scale of their own."
)
@click.option(
    "--base",
    type=PATH,
    help="Store differences from this packed file (an earlier checkpoint, what was fine-tuned) where they are"
    " smaller; `karikomi unpack` needs it again.",
)
@as_json
def command(
    source: Path,
    out: Path,
    entries: int | None,
    bits: int | None,
    method: str | None,
    group: int | None,
    base: Path | None,
    as_json: bool,
) -> None:
    """Store the arrays of IN (.safetensors or .npz) in OUT, entropy-coded.

    Without --entries and --bits every array comes back bit for bit. With --entries or --bits, arrays of two or
    more axes of 16 bits or wider floats are quantized, and come back as float32; all others, such as
    float8 and its scales, stay as they are.
    """
    if entries is not None and bits is not None:
        raise click.UsageError("--entries and --bits exclude one another")
    if entries is bits is None and (method or group is not None):
        raise click.UsageError("--method and --group go with --entries or --bits")
    from karikomi import pack
    from karikomi.cli.array_files import read_arrays, refuse_same
    from karikomi.quantize import Coded
    from karikomi.report.wording import ratio, size

    refuse_same(source, out)
    if base is not None:
        refuse_same(base, out)
    chosen = None
    if (entries, bits) != (None, None):
        from karikomi.quantize.method import PLAIN, Method

        sizes, options = {"bits": bits, "entries": entries}, {**PLAIN, "group": group}
        chosen = Method.of(method, sizes, options, where="pack")
    arrays = read_arrays(source)
    coded = {
        name: array if chosen is None else _quantized(name, array, chosen)
        for name, array in arrays.items()
    }
    pack.save(coded, out, base=base)
    seen = pack.inspect(out)
    # Of a delta the file has differences of codes, which are narrower than what they decode to.
    dense = sum(
        4 * entry.elements if entry.dense and isinstance(coded[entry.name], Coded) else entry.dense
        for entry in seen.entries
    )
    result = {
        "file": str(out),
        "bytes_in": source.stat().st_size,
        "bytes_dense": dense,
        "bytes_packed": seen.total,
        "ratio": dense / seen.total,
        "tensors": [
            {
                "name": entry.name,
                "codec": entry.codec,
                "quantizer": entry.quantizer,
                "bytes": entry.payload + entry.tables,
            }
            for entry in seen.entries
        ],
    }
    text = (
        f"{out}: {size(dense)} -> {size(seen.total)} ({ratio(result['ratio'])}),"
        f" {len(arrays)} tensors"
    )
    show(result, text, as_json)


def _quantized(name: str, array: np.ndarray, chosen: Method) -> np.ndarray | Coded:
    from karikomi.quantize import OutputUnits

    floats = array.dtype.name in ("float16", "bfloat16", "float32", "float64")
    if not floats or array.ndim < 2:
        return array
    if array.dtype.name == "bfloat16":
        array = array.astype("float32")
    return chosen.quantizer.quantize(array, chosen.size, units=OutputUnits(axis=0), name=name)
