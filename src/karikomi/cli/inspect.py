"""``karikomi inspect``: the size of each tensor of a packed file, beside the entropy bound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from karikomi.cli.printing import PATH, as_json, show, terminal_width

if TYPE_CHECKING:
    from karikomi.pack import Inspection

_KEYS = "name shape dtype codec quantizer elements nonzero bits_per_weight".split()


@click.command(epilog="Example: karikomi inspect model.karikomi --json")
@click.argument("file", metavar="FILE", type=PATH)
@as_json
def command(file: Path, as_json: bool) -> None:
    """Verify FILE (.karikomi) and show for each tensor its codec, quantizer and size.

    bytes: payload and tables; what tensors that are coded together share is shared out by their
    bounds. bits/w: the same in bits per weight. bound: bytes that an ideal coder
    of single symbols needs (order-0 entropy); a codec that looks at neighbours can go below it.
    """
    from karikomi.pack import inspect

    seen = inspect(file)
    show(_result(file, seen), _text(file, seen), as_json)


def _result(file: Path, seen: Inspection) -> dict[str, Any]:
    return {
        "file": str(file),
        "bytes_packed": seen.total,
        "bytes_payload": seen.payload,
        "bytes_indices": seen.indices,
        "bytes_left_over": seen.left_over,
        "bytes_tables": seen.tables,
        "bytes_scales": seen.scales,
        "bytes_header": seen.header,
        "bytes_manifest": seen.manifest,
        "bytes_decoded": seen.dense,
        "ratio_decoded": seen.ratio,
        "entropy_bound": seen.shannon,
        "notes": seen.notes,
        "tensors": [
            {
                **{key: getattr(entry, key) for key in _KEYS},
                "shape": list(entry.shape),
                "bytes": entry.payload + entry.tables,
                "bytes_decoded": entry.dense,
                "entropy_bound": entry.shannon,
            }
            for entry in seen.entries
        ],
    }


def _text(file: Path, seen: Inspection) -> str:
    from karikomi.report.result_checks import shape
    from karikomi.report.terminal import align, printable, text_block
    from karikomi.report.wording import count, ratio, size

    head = ("tensor", "shape", "codec", "quantizer", "bytes", "bits/w", "bound")
    rows = [
        (
            entry.name,
            shape(list(entry.shape)),
            entry.codec,
            entry.quantizer,
            count(entry.payload + entry.tables),
            f"{entry.bits_per_weight:.2f}",
            count(entry.shannon),
        )
        for entry in seen.entries
    ]
    parts = (
        ("payload", seen.payload),
        ("tables", seen.tables),
        ("header", seen.header),
        ("manifest", seen.manifest),
        ("file", seen.total),
    )
    inside = (
        ("indices, of the payload", seen.indices),
        ("not quantized, of the payload", seen.left_over),
        ("bound of the payload", seen.shannon),
        ("scales and codebooks, of the tables", seen.scales),
    )
    return text_block(
        [
            *align([head, *rows], left=4, width=terminal_width()),
            "",
            *align([(name, count(value)) for name, value in parts]),
            "",
            *align([(name, count(value)) for name, value in inside]),
            "",
            f"{printable(file)}: {size(seen.dense)} -> {size(seen.total)} ({ratio(seen.ratio)})",
        ]
    )
