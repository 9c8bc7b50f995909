"""Run ``selection.py``, the benchmark of exact global selection; all its options are taken.

The name of this file is that of a standard module, which others in this folder may import: they get it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))


def standard_module() -> None:
    """Put the standard module in the place of this one."""
    others = [path for path in sys.path if os.path.abspath(path or ".") != FOLDER]
    spec = importlib.machinery.BuiltinImporter.find_spec("select")
    spec = spec or importlib.machinery.PathFinder.find_spec("select", others)
    assert spec is not None and spec.loader is not None
    sys.modules["select"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["select"])


if __name__ == "__main__":
    sys.path.remove(FOLDER)
    import runpy

    sys.argv[0] = os.path.join(FOLDER, "selection.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    standard_module()
