"""``karikomi unpack``: a packed file back to dense safetensors."""

from __future__ import annotations

from pathlib import Path

import click

from karikomi.cli.printing import PATH, as_json, show


@click.command(epilog="Example: karikomi unpack model.karikomi model.safetensors")
@click.argument("source", metavar="FILE", type=PATH)
@click.argument("out", metavar="OUT", type=PATH)
@click.option("--base", type=PATH, help="The file that FILE was packed against, if it was.")
@as_json
def command(source: Path, out: Path, base: Path | None, as_json: bool) -> None:
    """Decode FILE (.karikomi), check every digest, and write OUT (.safetensors), dense."""
    from karikomi import pack
    from karikomi.cli.array_files import refuse_same
    from karikomi.errors import InvalidArgument
    from karikomi.report.wording import size

    if out.suffix != ".safetensors":
        raise InvalidArgument(
            "the output is a safetensors file",
            where="unpack",
            got=str(out),
            allowed="a name ending in .safetensors",
        )
    refuse_same(source, out)
    if base is not None:
        refuse_same(base, out)
    pack.expand(source, out, base=base)
    result = {
        "file": str(out),
        "bytes_packed": source.stat().st_size,
        "bytes": out.stat().st_size,
    }
    text = f"{out}: {size(result['bytes_packed'])} -> {size(result['bytes'])}"
    show(result, text, as_json)
