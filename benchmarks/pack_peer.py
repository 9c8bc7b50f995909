"""NNCodec's side of `benchmarks/pack.py`, run by the interpreter of its own environment (NumPy below 2).

    python pack_peer.py SETTINGS REPEATS

Reads paths of cases and prints a line of JSON for each: of every setting the bytes of the bitstream and the least CPU
seconds of encoding and decoding.
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


def empty_modules_() -> None:
    """Replace what NNCodec imports, does not need, and is not installed."""
    sys.meta_path.append(_Empty())


def main(settings: list[dict], repeats: int) -> None:
    """Read paths of cases, one a line, and print the result of all settings for each."""
    empty_modules_()
    from nncodec import nnc

    for line in sys.stdin:
        with np.load(line.strip()) as stored:
            tensors = {name: stored[name].astype(np.int32) for name in stored.files}
        rows = [row(nnc, tensors, setting, repeats) for setting in settings]
        print(json.dumps(rows), flush=True)


def row(nnc: ModuleType, tensors: dict[str, np.ndarray], setting: dict, repeats: int) -> dict:
    """Return bytes, least CPU seconds, and whether the tensors came back."""
    encode, decode = [], []
    options = {"return_bitstream": True, "verbose": False, "bitstream_path": None} | setting
    for _ in range(repeats):
        start = time.process_time()
        stream = nnc.compress(dict(tensors), **options)
        encode.append(time.process_time() - start)
        start = time.process_time()
        back = nnc.decompress(stream, verbose=False)
        decode.append(time.process_time() - start)
    same = all(np.array_equal(back[name], tensors[name]) for name in tensors)
    return {"bytes": len(stream), "encode": min(encode), "decode": min(decode), "lossless": same}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
