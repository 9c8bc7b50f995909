"""Threads change the time that selection takes, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite
from karikomi.prune import Score
from karikomi.selection import block_scores, threads
from karikomi.selection.threads import each, evenly, workers


@pytest.fixture(params=["1", "2", "5"])
def several(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setenv("OMP_NUM_THREADS", request.param)
    monkeypatch.setattr(threads, "ENOUGH", 1)
    monkeypatch.setattr(block_scores, "BLOCK", 64)
    monkeypatch.setattr(block_scores, "FEW", 0)
    yield int(request.param)


def arrays(kind: str) -> dict[str, np.ndarray]:
    """Return tensors of unequal sizes."""
    generator = np.random.default_rng(3)
    found = {f"w{n}": generator.standard_normal((n, 37)).astype(np.float32) for n in (1, 90, 7, 40)}
    if kind == "equal":
        return {name: np.ones_like(one) for name, one in found.items()}
    if kind == "few values":
        return {name: one.round() for name, one in found.items()}
    return found


def by_sorting(weights: dict[str, np.ndarray], remove: int) -> np.ndarray:
    """Return what a stable sort of all magnitudes keeps."""
    every = np.abs(np.concatenate([one.ravel() for one in weights.values()]))
    kept = np.ones(len(every), bool)
    kept[np.argsort(every, kind="stable")[:remove]] = False
    return kept


@pytest.mark.parametrize("sample", [1 << 15, 64])
@pytest.mark.parametrize("remembered", [0, 50, 1 << 21])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("kind", ["normal", "few values", "equal"])
def test_masks_are_those_of_a_stable_sort(
    several: int,
    kind: str,
    sparsity: float,
    remembered: int,
    sample: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_scores, "REMEMBERED", remembered)
    monkeypatch.setattr(block_scores, "SAMPLE", sample)
    weights = arrays(kind)
    total = sum(one.size for one in weights.values())
    masks = kk.numpy.prune(weights, sparsity=sparsity)[1]
    kept = np.concatenate([one.ravel() for one in masks.values()])
    np.testing.assert_array_equal(kept, by_sorting(weights, round(sparsity * total)))
    # And again, among what is left.
    more = kk.numpy.prune(weights, sparsity=0.95, masks=masks)[1]
    kept = np.concatenate([one.ravel() for one in more.values()])
    np.testing.assert_array_equal(kept, by_sorting(weights, round(0.95 * total)))


@pytest.mark.parametrize("allocation", ["uniform", "erk", "lamp"])
def test_pools_side_by_side(several: int, allocation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = arrays("few values")
    weights["w90"][0, 0] = 7.0
    found = kk.numpy.prune(weights, sparsity=0.7, allocation=allocation)[1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = kk.numpy.prune(weights, sparsity=0.7, allocation=allocation)[1]
    assert all(np.array_equal(found[name], alone[name]) for name in weights)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_bad_tensor_is_named(several: int, bad: float, masked: bool) -> None:
    weights = arrays("normal")
    masks = kk.numpy.prune(weights, sparsity=0.2)[1] if masked else None
    for name in ("w7", "w90"):
        places = np.argwhere(masks[name]) if masks else [(3, 3)]
        weights[name][tuple(places[-1])] = bad
    with pytest.raises(NonFinite, match="w90"):
        kk.numpy.prune(weights, sparsity=0.5, masks=masks)


def test_modules_and_files(several: int, tmp_path: Path) -> None:
    weights = arrays("few values")
    total = sum(one.size for one in weights.values())
    kept = by_sorting(weights, round(0.6 * total))
    layers = nn.Sequential(*[nn.Linear(37, len(one), bias=False) for one in weights.values()])
    for layer, one in zip(layers, weights.values(), strict=True):
        layer.weight = nn.Parameter(torch.from_numpy(one.copy()))
    masks = kk.torch.prune_(layers, 0.6)
    np.testing.assert_array_equal(torch.cat([one.ravel() for one in masks.values()]), kept)
    pairs = zip(layers, masks.values(), strict=True)
    assert all((layer.weight[~mask] == 0).all() for layer, mask in pairs)
    save_file(weights, tmp_path / "dense.safetensors")
    kk.numpy.prune_file(tmp_path / "dense.safetensors", tmp_path / "half.safetensors", sparsity=0.6)
    half = load_file(tmp_path / "half.safetensors")
    # safetensors orders tensors by itself.
    order = sorted(weights)
    own = by_sorting({name: weights[name] for name in order}, round(0.6 * total))
    found = np.concatenate([half[name].ravel() != 0 for name in order])
    np.testing.assert_array_equal(
        found, own & (np.concatenate([weights[name].ravel() for name in order]) != 0)
    )


class _Refusing(Score):
    """A score that does not like one tensor."""

    def of_weights(self, weights: Any, facts: Any, *, xp: Any) -> Any:
        if (weights == 7.0).any():
            raise InvalidArgument("not this one", where="score")
        return xp.abs(weights)


def test_what_a_score_raises_is_raised(several: int) -> None:
    weights = arrays("normal")
    weights["w40"][1, 1] = 7.0
    with pytest.raises(InvalidArgument, match="not this one"):
        kk.numpy.prune(weights, sparsity=0.5, score=_Refusing())


def test_each_keeps_the_order_and_starts_no_threads_within_threads(several: int) -> None:
    def outer(one: int) -> tuple[int, set[int]]:
        seen = each(lambda _: threading.get_ident(), range(4), entries=100)
        return one, set(seen) ^ {threading.get_ident()} if several > 1 else set()

    assert each(outer, range(20), entries=100) == [(one, set()) for one in range(20)]
    alone = each(lambda _: threading.get_ident(), range(20), entries=0)
    assert set(alone) == {threading.get_ident()}


@pytest.mark.parametrize("lists", [1, 2, 5, 20])
def test_evenly_gives_every_list_about_the_same(lists: int) -> None:
    found = evenly([1, 9, 1, 1, 1, 1, 1, 1, 1, 1], lists, entries=int)
    assert sorted(one for several in found for one in several) == [1] * 9 + [9]
    assert len(found) == min(lists, 10) and max(map(sum, found)) == (18 if lists == 1 else 9)


@pytest.mark.parametrize("cores", [3, 64])
@pytest.mark.parametrize("given", ["", "0", "-1", "2,1", "many", None])
def test_without_a_number_of_threads_it_is_that_of_the_cores(
    given: str | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert workers() == min(cores, 8)
