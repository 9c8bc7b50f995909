"""Weights that something other than the optimizer's step writes: what is reported is what is in the model."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import karikomi as kk
from karikomi.prune import OneShot
from karikomi.torch.modules.parameters import unwrapped
from unit.test_attach import model_of, step

WRITTEN = "are not zero: something other than the optimizer's step"
ALL, HALF = 72, 36  # weights of both layers that can be pruned, and half of them


def pruned(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer, Any, dict[str, Any]]:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    best = copy.deepcopy(model.state_dict())
    handle = kk.torch.attach(optimizer, model, prune=OneShot(0.5, step=0))
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, optimizer, handle, best


def zeros(model: nn.Module) -> int:
    found = dict(unwrapped(model).named_parameters())
    return sum(int((found[name] == 0).sum()) for name in ("0.weight", "2.weight"))


def by_checkpoint(model: nn.Module, best: dict[str, Any]) -> None:
    model.load_state_dict(best)


def by_data(model: nn.Module, best: dict[str, Any]) -> None:
    # The version of a parameter does not change: this is how averages are swapped in.
    for name, parameter in model.named_parameters():
        parameter.data.copy_(best[name])


WRITERS = [by_checkpoint, by_data]


@pytest.mark.parametrize("write", WRITERS)
def test_the_sparsity_is_that_of_the_weights(write: Callable[..., None]) -> None:
    model, optimizer, handle, best = pruned()
    write(model, best)
    with pytest.warns(UserWarning, match=rf"36 masked weight\(s\) of 0.weight, 2.weight {WRITTEN}"):
        assert handle.sparsity == 0.0
    with warnings.catch_warnings(action="error"):
        assert handle.sparsity == 0.0  # one warning
        step(model, optimizer, 9)
        assert handle.sparsity == 0.5 and zeros(model) == HALF


def test_a_part_of_the_masked_weights_that_was_written_counts_as_a_part() -> None:
    model, _, handle, _ = pruned()
    mask = handle.masks["2.weight"]
    with torch.no_grad():
        model[2].weight[~mask] = 1.0
    removed = HALF - int((~mask).sum())
    with pytest.warns(UserWarning, match="of 2.weight are not zero"):
        assert handle.sparsity == removed / ALL


SAVES: dict[str, Callable[..., Any]] = {
    "handle": lambda model, handle, path: handle.state_dict(),
    "model": lambda model, handle, path: torch.save(model.state_dict(), path / "model.pt"),
    "whole": lambda model, handle, path: torch.save(model, path / "model.pt"),
    "best": lambda model, handle, path: copy.deepcopy(model),
    "kk": lambda model, handle, path: kk.save(model, path / "model.karikomi"),
    "wrapped": lambda model, handle, path: nn.DataParallel(model).state_dict(),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_saving_warns_of_masks_that_do_not_hold(save: Callable[..., Any], tmp_path: Path) -> None:
    model, _, handle, best = pruned()
    with warnings.catch_warnings(action="error"):
        save(model, handle, tmp_path)
    by_data(model, best)
    with pytest.warns(UserWarning, match=WRITTEN):
        save(model, handle, tmp_path)
    with warnings.catch_warnings(action="error"):
        handle.masks.apply_(model)
        save(model, handle, tmp_path)


@pytest.mark.parametrize("write", WRITERS)
def test_the_end_masks_weights_that_were_written(write: Callable[..., None]) -> None:
    model, optimizer, handle, best = pruned()
    write(model, best)
    with pytest.warns(UserWarning, match=rf"36 masked .* {WRITTEN}.*masked again now"):
        handle.detach()
    assert zeros(model) == HALF and handle.sparsity == 0.5
    with warnings.catch_warnings(action="error"):
        handle.detach()
        model.load_state_dict(best)
        model.state_dict()
        step(model, optimizer, 0)
    assert zeros(model) == 0  # nothing is masked, or said, after the end


def test_masks_apply_to_an_averaged_copy() -> None:
    model, optimizer, handle, best = pruned(0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    for seed in range(3):
        step(model, optimizer, seed)
        average.update_parameters(model)
    assert zeros(average) < HALF
    handle.masks.apply_(average)
    assert zeros(average) == HALF and handle.sparsity == 0.5


class Lookahead:
    """The wrapper as it is commonly written: every second step goes half of the way from the slow weights."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self.slow = [(p, p.detach().clone()) for p in held]
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for parameter, slow in self.slow:
                slow.lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(slow)


def test_a_wrapper_that_writes_after_the_step_is_not_reported_as_pruned() -> None:
    model = model_of()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    outer: Any = Lookahead(inner)
    handle = kk.torch.attach(inner, model, prune=OneShot(0.5, step=0))
    for seed in range(4):
        step(model, outer, seed)
    assert zeros(model) == 0
    with pytest.warns(UserWarning, match="a wrapper of the optimizer"):
        assert handle.sparsity == 0.0
    with pytest.warns(UserWarning, match="masked again now"):
        handle.detach()
    assert zeros(model) == HALF


def test_a_model_with_a_handle_is_copied_and_pickled() -> None:
    model, _, handle, best = pruned()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), torch.load(stored, weights_only=False)]
    model.load_state_dict(best)
    with warnings.catch_warnings(action="error"):
        for item in copies:  # the copies have no handle, and nothing to be said about
            assert zeros(item) == HALF
            item.load_state_dict(best)
            item.state_dict()
    handle.masks.apply_(model)
