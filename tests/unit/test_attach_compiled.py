"""Training steps that ``torch.compile`` compiles as a whole: what karikomi does is not traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import karikomi as kk
from unit.test_attach import assert_same, model_of, weights

# Of torch's own code, which Dynamo reads.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch.jit.script_method` is deprecated")

RULES: dict[str, Any] = {
    "clip": kk.clip.ZClip(warmup=2),
    "bound": kk.bound.Clamp(0.3),
    "prune": kk.prune.OneShot(0.5, step=1),
}


def trained(
    compiles: bool, prepare: Callable[..., tuple[Callable[[], Any], Callable[[], Any]]]
) -> tuple[Any, int, int]:
    """Return a model after some steps, the breaks of their compilation, and its graphs.

    `prepare`: called with model and optimizer, returns what is done before and after the optimizer's step.
    """
    torch._dynamo.reset()
    counters.clear()
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before, after = prepare(model, optimizer)

    def step(inputs: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = model(inputs).square().sum() * 30.0
        loss.backward()
        before()
        optimizer.step()
        after()

    run = torch.compile(step, backend="eager") if compiles else step
    for seed in range(4):
        run(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)))
    return model, sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


def nothing() -> None: ...


def alone(model: Any, optimizer: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return nothing, nothing


def attached(model: Any, optimizer: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    kk.torch.attach(optimizer, model, **RULES)
    return nothing, nothing


def by_hand(model: Any, optimizer: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    masks = kk.torch.prune_(model, sparsity=0.5)

    def before() -> None:
        kk.torch.clip_(model, kk.clip.ByGlobalNorm(1.0))

    def after() -> None:
        masks.apply_(model)

    return before, after


@pytest.mark.parametrize(("prepare", "more"), [(attached, 1), (by_hand, 4)])
def test_nothing_is_traced_and_the_weights_are_the_same(prepare: Any, more: int) -> None:
    _, breaks, graphs = trained(True, alone)
    model, ours, graphs_of_ours = trained(True, prepare)
    eager, _, _ = trained(False, prepare)
    assert_same(weights(model), weights(eager))
    # One break for both hooks. One for each call, which counts in `before` or `after` and in the step around it.
    assert ours <= breaks + more and graphs_of_ours <= graphs
