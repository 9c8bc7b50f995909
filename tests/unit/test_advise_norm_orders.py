"""Records of p-norms other than 2: the row names p, and advice and replay are of this norm."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import karikomi as kk
from karikomi.advising.formats import open_run
from karikomi.record import Recorder, read

NAMES = ("a", "b", "c")


def written(path: Path, rule: Any, steps: int = 300, seed: int = 0, first: int = 1) -> list[float]:
    """Record gradients of three tensors as a rule measures them, and return the norms."""
    noise = np.random.default_rng(seed)
    state, found = None, []
    with Recorder(path) as recorder:
        for step in range(first, first + steps):
            scale = np.exp(0.2 * noise.standard_normal())
            grads = {name: scale * noise.standard_normal(5) for name in NAMES}
            _, outcome, state = kk.numpy.clip(grads, rule, state)
            recorder.step(step, outcome, {"loss": 1.0 + 0.1 * noise.random()})
            found.append(outcome.pre)
    return found


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (kk.clip.ByGlobalNorm(math.inf, norm=1), 1.0),
        (kk.clip.ByGlobalNorm(math.inf, norm=1.5), 1.5),
        (kk.clip.ByGlobalNorm(math.inf, norm=math.inf), math.inf),
        (kk.clip.ByValue(100.0), math.inf),
        (kk.clip.ByNorm(100.0, norm=1), 1.0),
        (kk.clip.Chain(kk.clip.ByGlobalNorm(100.0), kk.clip.ByValue(100.0)), 2.0),
    ],
)
def test_the_row_names_the_order_of_its_norm(tmp_path: Path, rule: Any, order: float) -> None:
    norms = written(tmp_path / "r.jsonl", rule, steps=9)
    steps = [row for row in read(tmp_path / "r.jsonl") if row["event"] == "step"]
    # A 2-norm needs no name, so records of it are as they were.
    assert {float(row.get("norm_order", 2.0)) for row in steps} == {order}
    assert ("norm_order" in steps[0]) == (order != 2.0)
    run = open_run(tmp_path / "r.jsonl", columns=None, stage=None)
    assert run.order == order
    np.testing.assert_allclose(run.columns["norm"], norms)


@pytest.mark.parametrize(("p", "text"), [(1.0, "norm=1"), (math.inf, "norm=math.inf")])
def test_advice_is_for_the_norm_that_was_recorded(tmp_path: Path, p: float, text: str) -> None:
    norms = np.array(written(tmp_path / "r.jsonl", kk.clip.ByGlobalNorm(math.inf, norm=p)))
    advice = kk.advise(tmp_path / "r.jsonl")
    assert advice.limit is not None
    assert advice.limit.median == pytest.approx(np.median(norms[150:]), rel=0.03)
    assert f"clip=kk.clip.ByGlobalNorm({advice.limit.value:g}, {text})" in str(advice).replace(
        "\n  ", " "
    )
    rule = eval(advice.limit.rule, {"ByGlobalNorm": kk.clip.ByGlobalNorm, "math": math})  # noqa: S307
    assert (rule.limit, rule.order) == (advice.limit.value, p)
    # What learns from 2-norms cannot be replayed; fixed limits are, on these norms.
    assert advice.replay and all(row.limit is not None for row in advice.replay)
    for row in advice.replay:
        assert row.limit is not None
        assert row.engaged == pytest.approx(np.mean(norms > row.limit))
    assert "were not replayed" in str(advice).replace("\n  ", " ")
    plain = json.loads(json.dumps(advice.as_dict(), allow_nan=False))
    assert plain["limit"]["order"] == f"{p:g}" and plain["limit"]["rule"] == advice.limit.rule


def test_rows_of_another_order_are_left_out_by_name(tmp_path: Path) -> None:
    """A run that went on with another rule: the last norms count."""
    path = tmp_path / "r.jsonl"
    written(path, kk.clip.ByGlobalNorm(math.inf), steps=40)
    norms = written(path, kk.clip.ByGlobalNorm(math.inf, norm=1), steps=60, first=41)
    advice = kk.advise(path)
    assert advice.rows == 60
    assert (
        "40 rows with 2-norms, which cannot be compared with the 1-norms at the end"
        in (advice.lost[0])
    )
    assert advice.limit is not None
    assert advice.limit.median == pytest.approx(np.median(norms[30:]), rel=0.03)


@pytest.mark.parametrize("given", [None, "two", -1, 0.5, True, [1]])
def test_an_order_that_is_none_counts_as_2(tmp_path: Path, given: Any) -> None:
    path = tmp_path / "r.jsonl"
    written(path, kk.clip.ByGlobalNorm(math.inf, norm=1), steps=3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{**row, **({"norm_order": given} if "norm" in row else {})} for row in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert open_run(path, columns=None, stage=None).order == 2.0


@pytest.mark.parametrize(("key", "order"), [("1.0", 1.0), ("inf", math.inf), ("2.0", 2.0)])
def test_keys_of_lightning_name_the_order(tmp_path: Path, key: str, order: float) -> None:
    path = tmp_path / "metrics.csv"
    head = f"epoch,grad_{key}_norm/fc.weight,grad_{key}_norm_total,step,train_loss\n"
    path.write_text(head + "".join(f"0,0.5,{1 + t / 10},{t},1.0\n" for t in range(20)))
    run = open_run(path, columns=None, stage=None)
    assert (run.order, run.names) == (order, ("fc.weight",))


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_a_tensor_that_dominates_is_found_in_any_norm(tmp_path: Path, p: float) -> None:
    noise = np.random.default_rng(0)
    path, rule, state = tmp_path / "r.jsonl", kk.clip.ByGlobalNorm(math.inf, norm=p), None
    with Recorder(path) as recorder:
        for t in range(300):
            sizes = {"a": 1.0, "b": 1.0, "c": 0.01}
            grads = {
                name: size * np.exp(0.1 * noise.standard_normal(8)) for name, size in sizes.items()
            }
            if t >= 200:
                grads["c"] = grads["c"] * 4.0 ** min(t - 199, 8)
            _, outcome, state = kk.numpy.clip(grads, rule, state)
            recorder.step(t, outcome, {"loss": 1.0})
    advice = kk.advise(path)
    assert (advice.cause, advice.tensor) == ("single_tensor", "c")
    assert 0.5 < advice.findings[0].numbers["share"] <= 1.0


def test_a_fact_cannot_take_the_name(tmp_path: Path) -> None:
    with (
        Recorder(tmp_path / "r.jsonl") as recorder,
        pytest.raises(kk.errors.InvalidArgument, match="norm_order"),
    ):
        recorder.step(1, facts={"norm_order": 1.0})
