"""NNCodec's side of `benchmarks/pack.py`, run by the interpreter of its own environment (NumPy below 2).

    python pack_peer.py CASE.npz SETTINGS.json

Prints one line of JSON: for each setting the bytes of the bitstream and the least seconds of encoding and decoding.
It imports frameworks that coding does not need; what of them is missing is replaced by empty modules.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import time
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np

UNUSED = (
    "torchvision",
    "cv2",
    "ptflops",
    "torchmetrics",
    "tensorflow",
    "pandas",
    "sklearn",
    "wandb",
    "h5py",
    "timm",
)


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of `UNUSED` that are not installed, and makes them without content."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        known = name.partition(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: object) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__version__ = [], spec, "0"
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def main(case: str, settings: list[dict], repeats: int) -> list[dict]:
    """Return the result of each setting."""
    sys.meta_path.append(_Empty())
    from nncodec import nnc

    with np.load(case) as stored:
        tensors = {name: stored[name].astype(np.int32) for name in stored.files}
    rows = []
    for setting in settings:
        encode, decode = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            stream = nnc.compress(
                dict(tensors), return_bitstream=True, verbose=False, bitstream_path=None, **setting
            )
            encode.append(time.perf_counter() - start)
            start = time.perf_counter()
            back = nnc.decompress(stream, verbose=False)
            decode.append(time.perf_counter() - start)
        same = all(np.array_equal(back[name], tensors[name]) for name in tensors)
        rows.append(
            {"bytes": len(stream), "encode": min(encode), "decode": min(decode), "lossless": same}
        )
    return rows


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))))
