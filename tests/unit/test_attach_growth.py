"""Optimizers that grow, shrink or get other parameters in the middle of a run."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import Unsupported
from karikomi.prune import Iterative, OneShot
from unit.test_attach import assert_same, backward, model_of, step, weights

pytestmark = pytest.mark.filterwarnings("ignore:karikomi. of the parameters that attach acts on")
SAID = r"2 are new in the optimizer or the model \(2.bias, 2.weight\)"
STEPS, AFTER = 4, 9


def two_groups(model: Any) -> list[dict[str, Any]]:
    return [
        {"params": list(model[0].parameters()), "lr": 0.01},
        {"params": list(model[2].parameters()), "lr": 0.002},
    ]


def optimizer_of(kind: str, groups: Any) -> Any:
    return torch.optim.SGD(groups, momentum=0.9) if kind == "sgd" else torch.optim.Adam(groups)


def unfrozen(kind: str, grows: bool, **rules: Any) -> tuple[Any, Any, Any]:
    """Train the first layer, then both: the second joins the optimizer, or was held frozen by it."""
    model = model_of()
    model[2].requires_grad_(False)
    groups = two_groups(model)
    optimizer = optimizer_of(kind, groups[:1] if grows else groups)
    handle = kk.torch.attach(optimizer, model, **rules)
    for seed in range(AFTER):
        if seed == STEPS:
            model[2].requires_grad_(True)
            if grows:
                optimizer.add_param_group(groups[1])
        step(model, optimizer, seed)
    return model, optimizer, handle


RULES: dict[str, dict[str, Any]] = {
    "global": {"clip": kk.clip.ZClip(warmup=3)},
    "per tensor": {"clip": kk.clip.AdaGC(1.05, warmup=2)},
    "per unit": {"clip": kk.clip.AGC(0.01)},
    "moments of our own": {"clip": kk.clip.SPAM(2.0, warmup=1)},
    "a chain": {"clip": kk.clip.Chain(kk.clip.AdaGC(warmup=1), kk.clip.AutoClip(50))},
    "updates": {"update": kk.clip.AutoClip(50)},
    "a bound": {"bound": kk.bound.SpectralCap(0.5)},
    "a bound by fan-in": {"bound": kk.bound.InitScaled(0.3)},
    "masks": {"prune": kk.prune.Gradual(0.6, steps=(2, 8), every=2)},
    "scores in training": {"prune": OneShot(0.5, step=8, score="taylor")},
    "dropping and regrowing": {"prune": kk.prune.SET(0.5, until=8, every=3)},
    "rewinding": {"prune": Iterative(0.5, steps=(3, 8), rounds=2, rewind=1)},
}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_layer_that_joins_equals_one_that_was_held_frozen(rules: Any, kind: str) -> None:
    model, _, handle = unfrozen(kind, True, **rules)
    other, _, expected = unfrozen(kind, False, **rules)
    assert_same(weights(model), weights(other))
    assert str(handle.last) == str(expected.last) and handle.steps == AFTER
    assert "2.weight" in handle.last.names
    assert handle.sparsity == expected.sparsity
    one, two = handle.state_dict(), expected.state_dict()
    assert str(one["clip"]) == str(two["clip"]) and str(one["bound"]) == str(two["bound"])


def test_new_parameters_are_clipped_from_the_next_step_on_and_said_once() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.01)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    backward(model, 0)
    optimizer.add_param_group({"params": [model[2].weight, model[2].bias]})
    joint = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    with pytest.warns(UserWarning, match=SAID):
        optimizer.step()
    assert handle.last is not None and handle.last.pre == pytest.approx(float(joint), rel=1e-6)
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(total) == pytest.approx(1.0, rel=1e-6)
    with warnings.catch_warnings(action="error"):
        step(model, optimizer, 1)


def test_a_resumed_run_after_growth_continues_bit_for_bit() -> None:
    rules = {"clip": kk.clip.AdaGC(warmup=2), "prune": RULES["rewinding"]["prune"]}
    model, optimizer, handle = unfrozen("adam", True, **rules)
    resumed = model_of()
    resumed.load_state_dict(model.state_dict())
    again = optimizer_of("adam", two_groups(resumed)[:1])
    second = kk.torch.attach(again, resumed, **rules)
    again.add_param_group(two_groups(resumed)[1])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state_dict(copy.deepcopy(handle.state_dict()))
    for seed in range(AFTER, AFTER + 3):
        step(model, optimizer, seed)
        step(resumed, again, seed)
        assert str(handle.last) == str(second.last)
    assert_same(weights(resumed), weights(model))


def test_given_masks_hold_for_a_layer_that_joins() -> None:
    model = model_of()
    masks = kk.torch.prune_(model, sparsity=0.5)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.01)
    handle = kk.torch.attach(optimizer, model, prune=masks)
    assert set(handle.masks or ()) == {"0.weight"}
    optimizer.add_param_group(two_groups(model)[1])
    step(model, optimizer, 0)
    assert handle.masks is not None and set(handle.masks) == {"0.weight", "2.weight"}
    assert not model[2].weight[~masks["2.weight"]].any() and handle.sparsity == 0.5


def test_a_layer_that_joins_after_the_last_masks_stays_dense_and_is_listed() -> None:
    model, optimizer, handle = unfrozen("sgd", True, prune=OneShot(0.5, step=0))
    assert set(handle.masks) == {"0.weight"} and handle.sparsity == 0.5
    reason = "it joined the optimizer after these masks were made"
    assert handle.masks.left_alone["2.weight"] == reason and (model[2].weight != 0).all()


def test_several_optimizers_with_a_joint_norm_grow() -> None:
    model = model_of()
    first = torch.optim.SGD([model[0].weight], lr=0.01)
    second = torch.optim.SGD([model[2].weight], lr=0.01)
    handle = kk.torch.attach([first, second], model, clip=kk.clip.ByGlobalNorm(1.0))
    for optimizer, bias in ((first, model[0].bias), (second, model[2].bias)):
        model.zero_grad()
        backward(model, 0)
        first.step(), second.step()
        optimizer.add_param_group({"params": [bias]})
    model.zero_grad()
    backward(model, 0)
    first.step(), second.step()
    assert handle.steps == 3 and len(handle.last.names) == 4
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(total) == pytest.approx(1.0, rel=1e-6)


def test_a_layer_that_leaves_the_optimizer_is_left_alone() -> None:
    rules = {"clip": kk.clip.AdaGC(warmup=1), "prune": OneShot(0.5, step=0)}
    model = model_of()
    optimizer = torch.optim.SGD(two_groups(model))
    handle = kk.torch.attach(optimizer, model, **rules)
    for seed in range(3):
        step(model, optimizer, seed)
    del optimizer.param_groups[1]
    with pytest.warns(UserWarning, match=r"2 are no more in the optimizer or the model \(2.bias"):
        step(model, optimizer, 3)
    assert (
        set(handle.last.names)
        == {"0.weight", "0.bias"}
        == set(handle.state_dict()["clip"]["names"])
    )
    # Nothing moves it, and it stays masked.
    assert handle.sparsity == 0.5 and set(handle.masks) == {"0.weight", "2.weight"}


def seen(handle: Any) -> dict[str, int]:
    """Return parameter name -> the steps of its warm-up."""
    state = handle.state_dict()["clip"]
    (key,) = (key for key in state if key.endswith("seen"))
    return dict(zip(state["names"], state[key], strict=True))


@pytest.mark.parametrize("units", [3, 5])
def test_a_replaced_layer_begins_with_fresh_statistics_and_without_a_mask(units: int) -> None:
    rules = {"clip": kk.clip.AdaGC(warmup=1), "prune": OneShot(0.5, step=0)}
    model = model_of()
    optimizer = torch.optim.SGD(two_groups(model))
    handle = kk.torch.attach(optimizer, model, bound=kk.bound.SpectralCap(1.0), **rules)
    for seed in range(3):
        step(model, optimizer, seed)
    assert seen(handle) == {"0.weight": 1, "0.bias": 1, "2.weight": 1, "2.bias": 1}
    model[2] = nn.Linear(8, units)
    optimizer.param_groups[1]["params"] = list(model[2].parameters())
    with pytest.warns(UserWarning, match=r"2 are replaced in the optimizer or the model \(2.bias"):
        optimizer.zero_grad()
        optimizer.step()  # without gradients nothing is learned
    assert seen(handle) == {"0.weight": 1, "0.bias": 1, "2.weight": 0, "2.bias": 0}
    assert set(handle.masks) == {"0.weight"} and (model[2].weight != 0).all()
    step(model, optimizer, 4)


def test_a_layer_that_was_replaced_in_the_model_alone_is_refused_at_the_next_step() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    step(model, optimizer, 0)
    model[2] = nn.Linear(8, 3)
    before = weights(model)
    with pytest.raises(
        Unsupported, match=r"holds 2 parameter.*that the model does not.*was replaced"
    ):
        step(model, optimizer, 1)
    assert_same(weights(model), before)


def test_parameters_of_another_model_are_refused_at_the_next_step() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(Unsupported, match="holds 1 parameter"):
        step(model, optimizer, 0)


def test_an_optimizer_that_was_attached_with_bare_parameters_does_not_grow() -> None:
    model: Any = model_of()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    bare: Any = list(model[0].parameters())
    kk.torch.attach(optimizer, bare, clip=kk.clip.ByGlobalNorm(1.0))
    optimizer.add_param_group(two_groups(model)[1])
    with pytest.raises(Unsupported, match="attach with the module"):
        step(model, optimizer, 0)
