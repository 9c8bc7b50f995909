"""NNCodec's side of `benchmarks/quantize_resnet.py`, run by the interpreter of its own environment (NumPy below 2).

    python quantize_peer.py WEIGHTS.npz FOLDER QP [QP ...]

For each quantization parameter it codes the weights with the trellis (dependent) quantization, writes what they decode
to as ``FOLDER/QP.npz``, and prints a line of JSON: the parameter and the bytes of the bitstream.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from pack_peer import empty_modules_


def main(weights: str, folder: str, *parameters: str) -> None:
    """Code the weights with each parameter."""
    empty_modules_()
    from nncodec import nnc

    with np.load(weights) as stored:
        tensors = {name: stored[name] for name in stored.files}
    for qp in map(int, parameters):
        stream = nnc.compress(
            dict(tensors),
            qp=qp,
            use_dq=True,
            bitstream_path=None,
            return_bitstream=True,
            verbose=False,
        )
        np.savez(Path(folder) / f"{qp}.npz", **nnc.decompress(stream, verbose=False))
        print(json.dumps([qp, len(stream)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
