"""Torch x clip x law: sparse gradients are clipped as the dense ones, tied weights count once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import karikomi as kk
from contract.frameworks import idle
from contract.row import Row, norm
from contract.rows import CLIPS

clips = pytest.mark.parametrize("row", [row for row in CLIPS if not row.of_updates], ids=str)
DENSE = np.array([[0.0, 0.0], [3.0, 4.0], [0.1, 0.0], [5.0, -1.0], [0.0, 0.0]])


def _embedding(gradient: torch.Tensor) -> nn.Embedding:
    weights = torch.ones(gradient.shape, dtype=gradient.dtype)
    model = nn.Embedding.from_pretrained(weights, freeze=False)
    model.weight.grad = gradient
    return model


def _measured(row: Row) -> float:
    return row.largest(DENSE) if row.by_element else norm(DENSE)


def _sparse(*, coalesced: bool) -> torch.Tensor:
    """Return ``DENSE`` as a sparse tensor, row 1 in two parts unless coalesced."""
    rows = torch.from_numpy(DENSE)
    if coalesced:
        return rows.to_sparse(1).coalesce()
    values = torch.stack([rows[1] - 10.0, rows[2], rows[3], torch.full((2,), 10.0).double()])
    return torch.sparse_coo_tensor(torch.tensor([[1, 2, 3, 1]]), values, rows.shape)


@clips
@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_gradient_is_clipped_as_the_dense_one(row: Row, coalesced: bool) -> None:
    model = _embedding(_sparse(coalesced=coalesced))
    optimizer = idle(row, model.parameters())
    outcome, _ = kk.torch.clip_(model, row.rule, row.start(), optimizer=optimizer)
    found = model.weight.grad
    assert found is not None and outcome.engaged
    assert found.is_sparse
    found = found.to_dense().numpy()
    np.testing.assert_allclose(found, row.reference([DENSE], [0])[0], rtol=1e-12)
    assert outcome.pre == pytest.approx(_measured(row), rel=1e-12)


@clips
@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_a_bad_sparse_gradient_is_no_step(row: Row, entry: float) -> None:
    gradient = _sparse(coalesced=True)
    gradient._values()[0, 1] = entry
    model = _embedding(gradient)
    outcome, state = kk.torch.clip_(model, row.rule)
    assert outcome.skipped and model.weight.grad is None and state["bad_in_a_row"] == 1


@clips
@pytest.mark.parametrize("attached", [True, False])
def test_tied_weights_count_once(row: Row, attached: bool) -> None:
    encode, decode = nn.Linear(2, 5), nn.Linear(2, 5, bias=False)
    decode.weight = encode.weight
    model = nn.ModuleDict({"encode": encode, "decode": decode}).double()
    nn.init.ones_(encode.weight)
    encode.weight.grad = torch.from_numpy(DENSE.copy())
    optimizer = idle(row, model.parameters())
    if attached:
        handle = kk.torch.attach(optimizer, model, clip=row.rule)
        start = row.start()
        if start is not None:
            handle.load_state_dict({"steps": 0, "masks": None, "bound": None, "clip": start})
        optimizer.step()
        outcome = handle.last
    else:
        outcome, _ = kk.torch.clip_(model, row.rule, row.start(), optimizer=optimizer)
    assert outcome is not None and [*outcome.tensors()] == ["encode.weight", "encode.bias"]
    assert outcome.pre == pytest.approx(_measured(row), rel=1e-12)
    assert decode.weight.grad is not None
    found = decode.weight.grad.numpy()
    np.testing.assert_allclose(found, row.reference([DENSE], [0])[0], rtol=1e-12)
