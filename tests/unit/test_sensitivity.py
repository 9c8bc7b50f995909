"""Sensitivity: each point is what pruning that weight alone costs, and the network stays as it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import karikomi as kk
from karikomi.errors import (
    BadFile,
    InvalidArgument,
    KarikomiError,
    NonFinite,
    UnknownName,
    Unsupported,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 4))
    )
    module[1].eval()
    return module


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 32, 5, generator=generator)
    return [(one, one[:, :4].argmax(1)) for one in inputs]


def judge(module: nn.Module) -> float:
    inputs, targets = data()[0]
    return -float(F.cross_entropy(module(inputs), targets))


def state(module: nn.Module) -> dict[str, bytes]:
    return {k: one.detach().numpy().tobytes() for k, one in module.state_dict().items()}


@pytest.mark.parametrize("score", ["magnitude", "taylor", "wanda", "random", "synflow", "obc"])
def test_each_point_is_what_prune_does_to_that_weight_alone(score: str) -> None:
    module = network()
    before = state(module)
    kwargs: dict[str, Any] = {"score": score, "data": data(), "loss": F.cross_entropy}
    curves = kk.torch.sensitivity(module, judge, sparsities=(0.9, 0.5), **kwargs)
    assert state(module) == before and [one.training for one in module] == [
        True,
        False,
        *[True] * 3,
    ]
    assert list(curves) == ["0.weight", "4.weight"] and list(curves["0.weight"]) == [0.5, 0.9]
    with torch.no_grad():
        dense = judge(copy.deepcopy(module).eval())
        assert curves.dense == dense
        for name, curve in curves.items():
            for share, loss in curve.items():
                alone = copy.deepcopy(module)
                kk.torch.prune_(alone, share, only=name, **kwargs)
                assert loss == pytest.approx(dense - judge(alone.eval()), abs=1e-6)


def test_the_curves_of_an_error_are_what_it_rises_by(tmp_path: Path) -> None:
    how: dict[str, Any] = {"sparsities": (0.9,), "checkpoint": tmp_path / "curves.json"}
    score = kk.torch.sensitivity(network(), judge, sparsities=(0.9,))
    error = kk.torch.sensitivity(network(), lambda module: -judge(module), goal="min", **how)
    assert {name: dict(curve) for name, curve in error.items()} == {
        name: dict(curve) for name, curve in score.items()
    }
    assert error.dense == -score.dense
    with pytest.raises(Unsupported, match="of another goal"):
        kk.torch.sensitivity(network(), lambda module: -judge(module), **how)


def test_the_curves_are_the_facts_of_the_allocation() -> None:
    module = network()
    curves = kk.torch.sensitivity(module, judge, progress=False)
    masks = kk.torch.prune_(module, 0.6, allocation="sensitivity", facts={"curve": curves})
    plain = copy.deepcopy(dict(curves))
    other = kk.torch.prune_(network(), 0.6, allocation="sensitivity", facts={"curve": plain})
    assert masks.counts() == other.counts() and masks.sparsity == pytest.approx(0.6, abs=0.01)
    uniform = kk.torch.prune_(network(), 0.6, allocation="uniform")
    assert masks.counts() != uniform.counts()
    with pytest.raises(InvalidArgument, match="4.weight.*curve"):
        part = kk.torch.sensitivity(network(), judge, exclude="4.*")
        kk.torch.prune_(network(), 0.6, allocation="sensitivity", facts={"curve": part})


@given(st.sets(st.floats(0.0, 0.99), min_size=1, max_size=4))
@settings(max_examples=15)
def test_what_a_judge_of_weights_sees_never_rises_with_sparsity(shares: set[float]) -> None:
    module = network()

    def kept(one: nn.Module) -> float:
        return sum(float(p.detach().abs().double().sum()) for p in one.parameters())

    curves = kk.torch.sensitivity(module, kept, sparsities=[*shares])
    for curve in curves.values():
        assert list(curve) == sorted(shares)
        assert list(curve.values()) == sorted(curve.values()) and min(curve.values()) >= 0.0


def test_it_prints_as_a_table() -> None:
    curves = kk.torch.sensitivity(network(), lambda one: 0.5, sparsities=(0.5, 0.875))
    assert str(curves).splitlines() == [
        "tensor        50%    87.5%",
        "0.weight   0.0000   0.0000",
        "4.weight   0.0000   0.0000",
        "dense      0.5000",
    ]


class Stopped(Exception):
    """Somebody pulls the plug."""


def counting(stop: int = 10**6) -> tuple[Any, list[int]]:
    calls: list[int] = []

    def judged(module: nn.Module) -> float:
        calls.append(1)
        if len(calls) > stop:
            raise Stopped
        return judge(module)

    return judged, calls


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_killed_and_resumed_measures_only_what_is_missing(stop: int, tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    wanted = kk.torch.sensitivity(network(), judge, sparsities=(0.5, 0.7, 0.9))
    module = network()
    before = state(module)
    with pytest.raises(Stopped):
        kk.torch.sensitivity(module, counting(stop)[0], sparsities=(0.5, 0.7, 0.9), checkpoint=path)
    assert state(module) == before and module.training
    judged, calls = counting()
    found = kk.torch.sensitivity(module, judged, sparsities=(0.5, 0.7, 0.9), checkpoint=path)
    # Once for the dense network each time, and once per point in all.
    assert dict(found) == dict(wanted) and found.dense == wanted.dense
    assert len(calls) == 1 + 6 - (stop - 1)
    judged, calls = counting()
    more = kk.torch.sensitivity(module, judged, sparsities=(0.8, 0.9), checkpoint=path)
    assert len(calls) == 1 + 2 and list(more["0.weight"]) == [0.8, 0.9]


def test_a_checkpoint_of_another_question_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    module = network()
    kk.torch.sensitivity(module, judge, sparsities=(0.5,), checkpoint=path)
    text = path.read_text()
    with pytest.raises(Unsupported, match="of another score"):
        kk.torch.sensitivity(module, judge, score="random", checkpoint=path)
    with pytest.raises(Unsupported, match="of another judge"):
        kk.torch.sensitivity(module, lambda one: 0.0, checkpoint=path)
    with torch.no_grad():
        module.get_parameter("0.bias").add_(1e-7)
    with pytest.raises(Unsupported, match="of another module"):
        kk.torch.sensitivity(module, judge, checkpoint=path)
    broken = json.loads(text)
    broken["curves"]["0.weight"][0][1] = float("nan")
    for content in ("", "[]", text[:40], text.replace("sensitivity 1", "x"), json.dumps(broken)):
        path.write_text(content)
        with pytest.raises(BadFile, match="not curves of sensitivity") as caught:
            kk.torch.sensitivity(network(), judge, checkpoint=path)
        assert "\n" not in str(caught.value)


BAD: dict[str, tuple[dict[str, Any], type[KarikomiError], str]] = {
    "judge": ({"judge": 0.9}, InvalidArgument, "the judge is a function"),
    "nan": ({"judge": lambda one: float("nan")}, NonFinite, "nan for the dense module"),
    "share": ({"sparsities": (0.5, 1.0)}, InvalidArgument, "sparsities"),
    "none": ({"sparsities": ()}, InvalidArgument, "one or more shares"),
    "number": ({"sparsities": 0.5}, InvalidArgument, "one or more shares"),
    "name": ({"only": "5.weight"}, UnknownName, "matches no tensor"),
    "bias": ({"only": "*.bias"}, Unsupported, "nothing of this can be pruned"),
    "units": ({"score": "apoz"}, Unsupported, "scores units"),
    "data": ({"score": "taylor"}, InvalidArgument, "needs gradient"),
    "iterator": ({"data": iter(())}, InvalidArgument, "iterator yields it once"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests_are_one_line_and_leave_the_network(kind: str) -> None:
    kwargs, error, words = BAD[kind]
    module = network()
    before = state(module)
    with pytest.raises(error, match=words) as caught:
        kk.torch.sensitivity(**{"module": module, "judge": judge, **kwargs})
    assert "\n" not in str(caught.value) and state(module) == before


def test_a_judge_that_fails_on_a_pruned_network_names_the_point() -> None:
    module = network()
    before, answers = state(module), iter([1.0, 0.5, float("inf")])
    with pytest.raises(NonFinite, match="inf for 0.weight at sparsity 0.9"):
        kk.torch.sensitivity(module, lambda one: next(answers), sparsities=(0.5, 0.9))
    assert state(module) == before and module.training


def test_names_with_the_characters_of_globs_are_names() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"[ab]": nn.Linear(3, 2), "a": nn.Linear(3, 2), "*": nn.Linear(3, 2)})
    before = state(module)

    def judged(one: nn.Module) -> float:
        return -float(sum(int((p == 0).sum()) for p in one.parameters()))

    curves = kk.torch.sensitivity(module, judged, sparsities=(0.5,))
    assert {name: curve[0.5] for name, curve in curves.items()} == dict.fromkeys(
        ["[ab].weight", "a.weight", "*.weight"], 3.0
    )
    assert state(module) == before
