"""Batches that a collator pads to their own longest example: the same examples at one length, with the same outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karikomi.errors import InvalidArgument
from karikomi.tasks.padding import at_one_length

PAD = 9


def collated(lengths: list[int], side: str, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return what a collator makes of examples of these lengths, with labels of every step."""
    rng, steps = np.random.default_rng(seed), max(lengths)
    rows = [rng.integers(1, 9, n) for n in lengths]

    def at(parts: list[np.ndarray], fill: int) -> np.ndarray:
        widths = [(steps - len(p), 0) if side == "left" else (0, steps - len(p)) for p in parts]
        return np.stack(
            [np.pad(p, w, constant_values=fill) for p, w in zip(parts, widths, strict=True)]
        )

    inputs = {
        "input_ids": at(rows, PAD),
        "attention_mask": at([np.ones(n, int) for n in lengths], 0),
        "token_type_ids": at([np.zeros(n, int) for n in lengths], 0),
        "weights": np.ones(len(lengths), np.float32),
    }
    return inputs, at([row % 3 for row in rows], -100)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
)
def test_batches_are_what_one_collation_of_all_would_be(
    lengths: list[list[int]], side: str
) -> None:
    # Without padding anywhere, neither the side nor the token is known.
    lengths = [*lengths, [1, 7]]
    pairs = [collated(each, side, k) for k, each in enumerate(lengths)]
    found = at_one_length(pairs)
    for (inputs, targets), (old, labels) in zip(found, pairs, strict=True):
        n, steps = old["input_ids"].shape
        own = slice(7 - steps, 7) if side == "left" else slice(0, steps)
        rest = np.ones(7, bool)
        rest[own] = False
        fills = {"input_ids": PAD, "attention_mask": 0, "token_type_ids": 0}
        for name, fill in fills.items():
            assert inputs[name].shape == (n, 7)
            assert np.array_equal(inputs[name][:, own], old[name])
            assert (inputs[name][:, rest] == fill).all(), name
        assert np.array_equal(targets[:, own], labels) and (targets[:, rest] == -100).all()
        assert inputs["weights"] is old["weights"]


def test_labels_of_whole_examples_and_inputs_without_a_mask_stay() -> None:
    inputs, _ = collated([3, 1], "right", 0)
    longer, _ = collated([5, 2], "right", 1)
    found = at_one_length([(inputs, np.array([0, 1])), (longer, np.array([1, 1]))])
    assert found[0][0]["input_ids"].shape == (2, 5) and found[0][1].tolist() == [0, 1]
    ragged: list[Any] = [({"ids": np.ones((1, k))}, np.array([0])) for k in (2, 3)]
    assert at_one_length(ragged) == ragged
    plain = [(np.ones((1, 2)), np.array([0]))]
    assert at_one_length(plain)[0][0] is plain[0][0]


def test_loaders_of_torch_that_pad_each_batch_go_in() -> None:
    torch = pytest.importorskip("torch")
    from karikomi.torch.tasks.trained import examples

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            kept = attention_mask[..., None].float()
            return self.head((self.words(input_ids) * kept).sum(1) / kept.sum(1))

    module, batches = Pooled(), []
    for seed, lengths in enumerate([[4, 2], [6, 1], [3, 3]]):
        inputs, _ = collated(lengths, "right", seed)
        names = ("input_ids", "attention_mask")
        batches.append({**{k: torch.tensor(inputs[k]) for k in names}, "labels": torch.arange(2)})
    found, targets = examples(module, batches, where="validation")
    assert found["input_ids"].shape == (6, 6) and targets.tolist() == [0, 1] * 3
    apart = torch.cat([module(b["input_ids"], b["attention_mask"]) for b in batches])
    whole = module(*(torch.tensor(found[name]) for name in names))
    assert torch.allclose(apart, whole, atol=1e-6)
    bare = [{"input_ids": b["input_ids"], "attention_mask": None} for b in batches]
    with pytest.raises(InvalidArgument, match="the batches differ in form"):
        examples(module, bare, where="validation")
