"""A small file of a character LSTM without further training: ``python benchmarks/quantize_lstm.py``.

Tiny Shakespeare and the network of ``shrink_lstm.py`` (two layers of 512 hidden units, trained for `--epochs`; its
weights are stored in ``runs/``), calibrated on training text without targets. The bytes are those of the whole file;
perplexity is that of a character of the last tenth of the text.

    python benchmarks/quantize_lstm.py [--quick] [--epochs 2] [--rates 4.0,3.0] [--seed 0]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shrink_lstm import Characters, perplexity, text, train_, windows

import karikomi as kk


def main() -> None:
    """Print bytes and perplexities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the text")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rates", default="4.0,3.5,3.0")
    parser.add_argument("--methods", default="gptq,uniform")
    parser.add_argument("--batches", type=int, default=4, help="of 64 x 64 characters to calibrate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, valid, kinds = text()
    if arguments.quick:
        train, valid = train[: len(train) // 20], valid[: len(valid) // 10]
    torch.manual_seed(arguments.seed)
    dense = Characters(kinds, 512)
    path = (
        Path("runs") / f"shrink_lstm_{len(train)}_{arguments.epochs}_{arguments.seed}.safetensors"
    )
    if path.exists():
        dense.load_state_dict(load_file(path))
    else:
        train_(dense, train, arguments.epochs, 2e-3, arguments.seed)
        path.parent.mkdir(exist_ok=True)
        save_file(dense.state_dict(), path)
    state = dense.eval().state_dict()
    data = [x for x, _ in windows(train, arguments.seed)[: arguments.batches]]
    floats, before = 4 * sum(item.numel() for item in state.values()), perplexity(dense, valid)
    print(f"dense: {floats:,} bytes, {before:.4f}", flush=True)
    for method in arguments.methods.split(","):
        for rate in map(float, arguments.rates.split(",")):
            module, start = Characters(kinds, 512).eval(), time.perf_counter()
            module.load_state_dict(state)
            kk.torch.quantize_(module, rate=rate, method=method, data=data)
            spent = time.perf_counter() - start
            with tempfile.TemporaryDirectory() as folder:
                size = kk.save(module, Path(folder) / "small.karikomi").stat().st_size
            after = perplexity(module, valid)
            print(
                f"{method} {rate:g}: {size:,} bytes, {floats / size:.2f}x, perplexity {after:.4f} "
                f"({after / before - 1:+.2%}; at most +0.5 % at 8x), {spent:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
