"""The same codes give the same file on other instruction sets: ``python benchmarks/pack_same_bytes.py``.

ResNet-20 for CIFAR-10 is rounded once (`--bits`, nearest values). Processes of other instruction sets of torch
(``ATEN_CPU_CAPABILITY``) and NumPy (``NPY_DISABLE_CPU_FEATURES``) and other numbers of threads fill a network from that
file, save it again, and the digests of the files are compared; so are those of the decoded values. The last column is
the digest where each process rounds the weights by itself, which may differ in principle: a quantizer measures.

    python benchmarks/pack_same_bytes.py [--bits 4]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = {
    "as it is": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "torch avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch default": {"ATEN_CPU_CAPABILITY": "default"},
    "NumPy without AVX512": {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX"},
    "both, one thread": {
        "ATEN_CPU_CAPABILITY": "default",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX",
        "OMP_NUM_THREADS": "1",
    },
}


def digests(source: Path, bits: int) -> str:
    """Return the digests of the file saved again, of the decoded values, and of a file rounded here."""
    import torch
    from prune_resnet20 import trained

    import karikomi as kk

    found = []
    with tempfile.TemporaryDirectory() as folder:
        module = kk.load(source, into=trained())
        found.append(hashlib.sha256(kk.save(module, Path(folder) / "again").read_bytes()))
        values = hashlib.sha256()
        for tensor in module.state_dict().values():
            values.update(tensor.contiguous().numpy().tobytes())
        found.append(values)
        own = trained()
        kk.torch.quantize_(own, bits=bits)
        found.append(hashlib.sha256(kk.save(own, Path(folder) / "own").read_bytes()))
    digests = " ".join(item.hexdigest()[:16] for item in found)
    return f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} {digests}"


def main() -> None:
    """Print one row per setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(digests(given.one, given.bits))
        return
    from prune_resnet20 import trained

    import karikomi as kk

    module = trained()
    kk.torch.quantize_(module, bits=given.bits)
    with tempfile.TemporaryDirectory() as folder:
        source = kk.save(module, Path(folder) / "source.karikomi")
        first = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
        print(f"{'setting':22} {'torch':8} threads  {'saved again':16} {'values':16} rounded here")
        kinds = set()
        for name, setting in SETTINGS.items():
            command = [sys.executable, __file__, "--one", str(source), "--bits", str(given.bits)]
            shown = subprocess.run(
                command, env={**os.environ, **setting}, capture_output=True, text=True, check=True
            )
            kind, threads, again, values, own = shown.stdout.split()
            kinds.add((again, values))
            print(f"{name:22} {kind:8} {threads:>7}  {again} {values} {own}", flush=True)
    same = len(kinds) == 1 and {again for again, _ in kinds} == {first}
    print("the same bytes and values everywhere" if same else "DIFFERENT")


if __name__ == "__main__":
    main()
