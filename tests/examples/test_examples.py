"""Every example runs, and says what its page quotes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_bounds_and_bits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    runpy.run_path(str(EXAMPLES / "bounds_and_bits.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    table = {
        " ".join(row[:-6]): [float(cell.replace(",", "")) for cell in row[-6:]] for row in rows
    }
    assert table["weights bounded"][0] <= 0.25
    assert table["weights bounded"][3] < table["nothing"][3]
    assert abs(table["weights pruned"][4] - 90.0) < 0.1
    assert table["weights pruned"][5] < 0.25 * table["nothing"][5]
