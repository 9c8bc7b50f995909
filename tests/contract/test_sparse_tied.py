"""Torch x clip x law: sparse gradients are clipped as the dense ones, tied weights count once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import niwaki as nw
from contract.rows import CLIPS, Row, norm

clips = pytest.mark.parametrize("row", CLIPS, ids=str)
DENSE = np.array([[0.0, 0.0], [3.0, 4.0], [0.1, 0.0], [5.0, -1.0], [0.0, 0.0]])


def _parameter(gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
    parameter.grad = gradient
    return parameter


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
    sparse = _parameter(_sparse(coalesced=coalesced))
    outcome, _ = nw.torch.clip_(sparse, row.rule, row.start())
    assert sparse.grad is not None and sparse.grad.is_sparse and outcome.engaged
    found = sparse.grad.to_dense().numpy()
    np.testing.assert_allclose(found, row.reference([DENSE], [0])[0], rtol=1e-12)
    assert outcome.pre == pytest.approx(5.0 if row.by_element else norm(DENSE), rel=1e-12)


@clips
@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_a_bad_sparse_gradient_is_no_step(row: Row, entry: float) -> None:
    gradient = _sparse(coalesced=True)
    gradient._values()[0, 1] = entry
    parameter = _parameter(gradient)
    outcome, state = nw.torch.clip_(parameter, row.rule)
    assert outcome.skipped and parameter.grad is None and state["bad_in_a_row"] == 1


@clips
@pytest.mark.parametrize("attached", [True, False])
def test_tied_weights_count_once(row: Row, attached: bool) -> None:
    model = nn.ModuleDict({"encode": nn.Linear(2, 5), "decode": nn.Linear(2, 5, bias=False)})
    model["decode"].weight = model["encode"].weight
    model.double()
    model["encode"].weight.grad = torch.from_numpy(DENSE.copy())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if attached:
        handle = nw.torch.attach(optimizer, model, clip=row.rule)
        start = row.start()
        if start is not None:
            handle.load_state_dict({"steps": 0, "masks": None, "bound": None, "clip": start})
        optimizer.step()
        outcome = handle.last
    else:
        outcome, _ = nw.torch.clip_(model, row.rule, row.start())
    assert outcome is not None and outcome.names == ("encode.weight", "encode.bias")
    assert outcome.pre == pytest.approx(5.0 if row.by_element else norm(DENSE), rel=1e-12)
    found = model["decode"].weight.grad.numpy()
    np.testing.assert_allclose(found, row.reference([DENSE], [0])[0], rtol=1e-12)
