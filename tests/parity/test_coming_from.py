"""Each row of ``docs/coming-from.md``: the peer's call and ours have the same results, or both run."""

from __future__ import annotations

import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from contract.namespaces import INSTALLED
from karikomi.rule import Composite, Rule
from parity import published
from parity.table_rows import TableRow, code, set_up, table_rows

# What Keras' constraints add to norms, and torch to a limit that is exceeded.
CLOSE = {"rtol": 3e-5, "atol": 1e-6}


@cache
def names_of(section: str) -> dict[str, Any]:
    if section == "timm":
        timm = SimpleNamespace(utils=published.TimmUtils, models=published.TimmModels)
        return set_up("torch", timm=timm)
    if section == "Published code":
        return set_up("torch", "Published code")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return set_up("torch", section)


def state(model: torch.nn.Module) -> list[np.ndarray]:
    # A parametrization has other parameters than the weight that it makes.
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    return [tensor.detach().numpy() for tensor in tensors]


def arrays(value: Any) -> list[np.ndarray]:
    """Return the leaves of a result in the order of names."""
    if isinstance(value, dict):
        return [leaf for name in sorted(value) for leaf in arrays(value[name])]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in arrays(item)]
    return [np.asarray(value)]


def results(row: TableRow, cell: str) -> list[np.ndarray]:
    """Return what a cell computes, and in sections about torch what it makes of the model."""
    names = dict(names_of(row.section))
    if row.section not in ("torch", "timm"):
        return arrays(eval(cell, names))
    names["model"] = names["fresh"]()
    value = eval(cell, names)
    number = isinstance(value, float) or (isinstance(value, torch.Tensor) and "total" in row.theirs)
    return [*([np.asarray(float(value))] if number else []), *state(names["model"])]


SECTIONS = ["torch", "timm"]
SECTIONS += ["optax"] if "jax" in INSTALLED else []
SECTIONS += ["Keras and TensorFlow"] if "tensorflow" in INSTALLED else []


@pytest.mark.parametrize(
    "row", [row for section in SECTIONS for row in table_rows(section)], ids=str
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
def test_the_calls_of_a_row_have_the_same_results(row: TableRow) -> None:
    if row.differs:
        names = dict(names_of(row.section))
        for cell in row.calls:
            names["model"] = names["fresh"]()
            eval(cell, names)
        return
    theirs, ours = (results(row, cell) for cell in row.calls)
    if "get_total_norm" in row.theirs:
        # The one measures gradients and changes none; the other has a limit out of reach.
        theirs, ours = theirs[:1], ours[:1]
    assert len(theirs) == len(ours) > 0
    for their, our in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(our, their, **CLOSE)


@pytest.mark.parametrize("row", table_rows("Published code"), ids=str)
def test_ours_stands_for_published_code(row: TableRow) -> None:
    names = names_of("Published code")
    value = eval(code(row.ours), names)
    if "clip_examples" in row.ours:
        means = value[0]
        assert set(means) == set(names["weights"]) and all(
            m.isfinite().all() for m in means.values()
        )
    else:
        assert isinstance(value, Rule | Composite)


def test_every_peer_has_a_table() -> None:
    counts = {name: len(table_rows(name)) for name in [*SECTIONS, "Published code", "Trainers"]}
    assert min(counts.values()) >= 4 and counts["torch"] >= 15
    public = {name for name in dir(torch.nn.utils.clip_grad) if "clip" in name or "total" in name}
    public = {name for name in public if not name.startswith("_")} - {"clip_grad_norm"}
    text = " ".join(row.theirs for row in table_rows("torch"))
    assert [name for name in sorted(public) if f"{name}(" not in text] == []


def test_a_table_that_is_wrong_is_found() -> None:
    theirs = "`torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)`"
    row = TableRow("torch", theirs, "`kk.torch.clip_(model, kk.clip.ByValue(0.02))`", "")
    pairs = zip(*(results(row, cell) for cell in row.calls), strict=True)
    assert any(not np.allclose(their, our, **CLOSE) for their, our in pairs)
