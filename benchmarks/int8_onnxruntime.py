"""Quantized networks in onnxruntime, int8 beside float32: ``python benchmarks/int8_onnxruntime.py``.

The given CIFAR-10 ResNets (weights as published, 8-bit weights, ranges of activations from 512 training images
without labels; accuracy on all 10,000 test images), and with `--minilm FOLDER` all-MiniLM-L6-v2 (`shrink_minilm.py`
says where its files are; ranges on 512 sentences of WikiText-2's validation text; mean cosine of the sentence
embeddings to those of float32 on the first sentences of the test text). Latency on one thread at batch 1 and 32, both
files in turns, medians of processor time and of wall-clock time; the peer is onnxruntime with the float32 file.

    python benchmarks/int8_onnxruntime.py [--quick] [--calibration minmax] [--minilm FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prune_resnet20 import images, trained
from safetensors.numpy import load_file
from shrink_minilm import batches, sentences
from shrink_resnet20 import training_images
from shrink_resnet56 import DATA, ResNet56
from torch import nn

import karikomi as kk
from karikomi.torch.onnx_export.engine_runs import session_of
from karikomi.torch.onnx_export.latency import instructions

SECONDS = 4.0
LENGTH = 32
"""Tokens of a sentence where the latency is measured."""


def resnet56() -> nn.Module:
    """Return the ResNet-56 with the published weights."""
    module = ResNet56()
    arrays = load_file(DATA / "resnet56_cifar10.safetensors")
    module.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=False)
    return module.eval()


def calibration_images(count: int) -> list[torch.Tensor]:
    """Return training images in batches of 64."""
    from prune_resnet20 import normalised

    pixels, _ = training_images(count)
    x = normalised(pixels).contiguous()
    return list(x.split(64))


def accuracy(path: Path, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the accuracy of a file, in percent."""
    session = session_of(path)
    name = session.get_inputs()[0].name
    hits = 0
    for part, labels in zip(x.split(100), y.split(100), strict=True):
        logits = session.run(None, {name: part.numpy()})[0]
        hits += int((logits.argmax(1) == labels.numpy()).sum())
    return 100 * hits / len(y)


def show_speed(name: str, files: dict[str, Path], **given: Any) -> None:
    """Print the latency of float32 and int8, and the ratio."""
    rows = kk.torch.measure_onnx(files, seconds=SECONDS, **given)
    for plain, fast in zip(rows[::2], rows[1::2], strict=True):
        print(
            f"| {name} | {plain.batch} | {plain.cpu_ms:.3f} | {fast.cpu_ms:.3f} | {fast.ratio:.2f} |"
            f" {plain.ms_least / fast.ms_least:.2f} | {fast.runs} |",
            flush=True,
        )


def convolutional(name: str, module: nn.Module, calibration: str, count: int) -> None:
    """Print what the export of a ResNet loses and gains."""
    x, y = images("cifar10_test.npz", slice(0, count))
    x, data = x.contiguous(), calibration_images(512)
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"{kind}.onnx" for kind in ("float32", "int8")}
        kk.torch.export_onnx(module, x[:2], files["float32"], fold=True)
        report = kk.torch.export_onnx(
            module,
            x[:2],
            files["int8"],
            activations="int8",
            data=data,
            calibration=calibration,
        )
        print(report, flush=True)
        before, after = (accuracy(path, x, y) for path in files.values())
        print(
            f"{name}: accuracy {before:.2f} -> {after:.2f} % of {len(y):,} images (at most 0.3 less)"
        )
        show_speed(name, files)


def sentence_encoder(folder: Path, calibration: str, count: int) -> None:
    """Print the same of MiniLM."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = AutoModel.from_pretrained(folder).eval()
    data = batches(sentences(tokenizer, "valid", 512), 32)
    test = batches(sentences(tokenizer, "test", count), 50)
    with tempfile.TemporaryDirectory() as text:
        files = {kind: Path(text) / f"{kind}.onnx" for kind in ("float32", "int8")}
        example = {"input_ids": data[4]["input_ids"], "attention_mask": data[4]["attention_mask"]}
        kk.torch.export_onnx(module, example, files["float32"], dynamic="all")
        report = kk.torch.export_onnx(
            module,
            example,
            files["int8"],
            activations="int8",
            data=data,
            calibration=calibration,
            dynamic="all",
        )
        print(report, flush=True)
        embedded = [embeddings(path, test) for path in files.values()]
        cosine = float(torch.cosine_similarity(embedded[0], embedded[1]).mean())
        print(f"MiniLM: mean cosine {cosine:.4f} of {len(embedded[0]):,} sentences (at least 0.99)")
        feeds = {
            batch: {
                "input_ids": np.random.default_rng(0).integers(1000, 20_000, (batch, LENGTH)),
                "attention_mask": np.ones((batch, LENGTH), np.int64),
            }
            for batch in (1, 32)
        }
        show_speed("MiniLM", files, feeds=feeds)


def embeddings(path: Path, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return the mean of the last states over the tokens of each sentence."""
    session, found = session_of(path), []
    for batch in data:
        states = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in batch.items()})[0])
        mask = batch["attention_mask"][..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 test images, 200 sentences")
    parser.add_argument("--calibration", default="minmax")
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--only", choices=("resnet20", "resnet56", "minilm"))
    arguments = parser.parse_args()
    kinds = {"resnet20": trained, "resnet56": resnet56}
    print(f"{instructions()}; one thread")
    print("| network | batch | float32 ms | int8 ms | ratio | of the fastest | runs |")
    print("| :--- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, make in kinds.items():
        if arguments.only in (None, name):
            count = 1_000 if arguments.quick else 10_000
            convolutional(name, make(), arguments.calibration, count)
    if arguments.minilm and arguments.only in (None, "minilm"):
        count = 200 if arguments.quick else 2_000
        sentence_encoder(arguments.minilm, arguments.calibration, count)


if __name__ == "__main__":
    main()
