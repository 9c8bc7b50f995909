"""The front door without a framework behind it."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import sys
sys.modules["torch"] = None
import karikomi as kk
assert kk.numpy.clip and kk.save and kk.clip.ByNorm
try:
    kk.torch
except kk.KarikomiError as error:
    assert isinstance(error, ImportError) and "pip install '.[torch]'" in str(error), error
else:
    raise SystemExit("torch was there")
"""


def test_a_missing_framework_says_how_to_install_it() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
