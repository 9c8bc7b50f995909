"""What `attach` writes to a record besides the clip: norms of weights and updates, learning rates, facts of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.record.log_codes import decoded, log2_of
from karikomi.torch.attachment.step_norms import MOST, StepNorms


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def _trained(path: Path, model: nn.Module, steps: int = 4, **more: Any) -> list[dict[str, Any]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with kk.record.Recorder(path, **more) as recorder:
        handle = kk.torch.attach(optimizer, model, record=recorder)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.zero_grad()
            inputs = torch.full((3, 6), 1.0 + step, dtype=next(model.parameters()).dtype)
            model(inputs).square().mean().backward()
            optimizer.step()
        handle.detach()
    return list(kk.record.read(path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_update_norms_are_those_of_plain_sgd(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = _trained(tmp_path / "r.jsonl", _model(dtype))
    names = next(row for row in rows if row["event"] == "names")
    assert names["updates"] == names["weights"] == names["gradients"]
    # In bfloat16 the weights round what is added to them, and the update is what they did.
    loose, step_of_weights = (0.3, 2.0**-9) if dtype is torch.bfloat16 else (0.005, 0.0)
    for step, row in enumerate(row for row in rows if row["event"] == "step"):
        gradients, updates = (
            np.exp2(log2_of(decoded(row["codes"][of]))) for of in ("gradients", "updates")
        )
        assert row["lr"] == 0.1 / (1 + step)
        np.testing.assert_allclose(updates, row["lr"] * gradients, rtol=loose, atol=step_of_weights)
        assert row["update_norm"] == pytest.approx(row["lr"] * row["norm"], rel=loose)


def test_every_nth_step_or_none_has_norms_of_weights(tmp_path: Path) -> None:
    for every, expected in ((2, [2, 4]), (0, [])):
        rows = _trained(tmp_path / f"{every}.jsonl", _model(), weights_every=every)
        assert [row["step"] for row in rows if "update_norm" in row] == expected
        (run,) = [row for row in rows if row["event"] == "run"]
        assert (run["updates"] is None) == (every == 0)


def test_a_step_that_is_skipped_changes_no_weight(tmp_path: Path) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with kk.record.Recorder(tmp_path / "r.jsonl") as recorder:
        kk.torch.attach(optimizer, model, record=recorder)
        model(torch.full((1, 6), torch.nan)).sum().backward()
        optimizer.step()
    row = list(kk.record.read(tmp_path / "r.jsonl"))[-1]
    assert row["skipped"] and row["update_norm"] == 0.0 and row["weight_norm"] > 0.0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_are_estimated_from_a_sample(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 64, 3, 3).to(memory_format=layout)
    small = torch.randn(40, 3)
    norms = StepNorms({"large": weight, "small": small, "empty": torch.empty(0)})
    assert norms.sampled and weight.numel() > MOST
    norms.remember()
    change, shift = 1e-3 * torch.randn_like(weight), 1e-2 * torch.randn_like(small)
    weight += change
    small += shift
    weights, updates = norms.measure()
    assert weights is not None and updates is not None
    assert weights["large"] == pytest.approx(float(weight.norm()), rel=0.03)
    assert updates["large"] == pytest.approx(float(change.norm()), rel=0.03)
    assert updates["small"] == pytest.approx(float(shift.norm()), rel=1e-4)
    assert weights["empty"] == updates["empty"] == 0.0
    assert norms.measure() == (None, None)
