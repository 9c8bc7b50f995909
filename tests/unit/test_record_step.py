"""The row of a step: what the clip did, and what it says of single tensors in bounded space."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karikomi.errors import InvalidArgument
from karikomi.record import Recorder, read
from karikomi.record.log_codes import MOST, decoded, encoded, log2_of, pools
from karikomi.record.tensors import LEVELS, joint, sketched
from karikomi.rules.outcome import Outcome

NAN, INF = math.nan, math.inf


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.jsonl"


def _outcome(norms: dict[str, float], **more: Any) -> Outcome:
    numbers = np.array(list(norms.values()))
    return Outcome(tuple(norms), numbers, numbers, False, **more)


def _row(path: Path, *arguments: Any, recorder: Any = None, **norms: Any) -> dict[str, Any]:
    with Recorder(path, **(recorder or {})) as opened:
        opened.step(*arguments, **norms)
    return list(read(path))[-1]


def test_a_row_has_what_the_clip_did_the_facts_and_the_largest_tensors(path: Path) -> None:
    outcome = Outcome(("a", "b", "c"), np.array([3.0, 0.0, 4.0]), np.array([1.5, 0, 2.0]), False)
    row = _row(path, 7, outcome, {"loss": 0.25, "stage": "train"}, recorder={"most": 2})
    assert row == {
        "event": "step",
        "step": 7,
        "norm": 5.0,
        "factor": 0.5,
        "clipped": True,
        "skipped": False,
        "loss": 0.25,
        "stage": "train",
        "gradients": {
            "tensors": 3,
            "top": {"c": 4.0, "a": 3.0},
            "quantiles": [0.0, 0.0, 0.0, 3.0, 4.0, 4.0, 4.0],
        },
        "codes": {"gradients": encoded(np.array([3.0, 0.0, 4.0]))},
    }
    assert list(row["gradients"]["top"]) == ["c", "a"]


def test_weights_and_updates_have_their_own_norms_and_sketches(path: Path) -> None:
    row = _row(path, 1, weights={"a": 3.0, "b": np.float32(4.0)}, updates={"a": 1e-3})
    assert row["weight_norm"] == 5.0 and row["update_norm"] == 1e-3
    assert row["weights"]["top"] == {"b": 4.0, "a": 3.0}
    assert row["updates"] == {"tensors": 1, "top": {"a": 1e-3}, "quantiles": [1e-3] * len(LEVELS)}
    assert "gradients" not in row and "norm" not in row


def test_the_first_non_finite_tensor_is_named(path: Path) -> None:
    names = {f"t{place}": 1.0 for place in range(40)} | {"t30": NAN, "t3": INF, "t39": NAN}
    row = _row(path, 1, _outcome(names), weights={"x": 1.0, "y": NAN})
    assert row["nonfinite"][0] == "t3" == row["gradients"]["nonfinite"][0]
    assert row["gradients"]["tensors"] == 40 and row["gradients"]["quantiles"] == [1.0] * 7
    assert row["weights"]["nonfinite"] == ["y"] and row["weight_norm"] is None


def test_units_are_joined_to_their_tensors(path: Path) -> None:
    outcome = Outcome(("a", "a", "b"), np.array([3.0, 4.0, 1.0]), np.ones(3), False)
    assert _row(path, 1, outcome)["gradients"]["top"] == {"a": 5.0, "b": 1.0}


def test_largest_magnitudes_do_not_stand_among_norms(path: Path) -> None:
    outcome = _outcome({"a": 3.0, "peak": 9.0}, peaks=frozenset({"peak"}))
    assert _row(path, 1, outcome)["gradients"]["top"] == {"a": 3.0}


def test_all_tensors_stand_in_the_order_of_names_written_once(path: Path) -> None:
    norms = {"b": 1 / 3, "a": NAN}
    with Recorder(path, tensors="all") as recorder:
        recorder.step(1, _outcome(norms))
        recorder.step(2, _outcome(norms), weights={"w": 2.0})
        recorder.step(3, _outcome({"c": 1.0}), weights={"w": 2.0})
    events = [(row["event"], row.get("gradients"), row.get("weights")) for row in read(path)][1:]
    assert events == [
        ("names", ["b", "a"], None),
        ("step", [0.333333, None], None),
        ("names", ["b", "a"], ["w"]),
        ("step", [0.333333, None], [2.0]),
        ("names", ["c"], ["w"]),
        ("step", [1.0], [2.0]),
    ]


def test_names_are_written_again_only_if_the_file_has_not_got_them(path: Path) -> None:
    def run(start: int, stop: int, place: int | None = None) -> int:
        recorder = Recorder(path, tensors="all")
        if place is not None:
            recorder.rewind(place)
        for step in range(start, stop):
            recorder.step(step, _outcome({"a": 1.0} if step < 4 else {"b": 1.0}))
        return recorder.flush()

    run(1, 3)
    place = run(3, 4)
    run(4, 9)
    whole = path.read_bytes()
    run(4, 9, place)
    assert path.read_bytes() == whole
    events = [row["event"] for row in read(path)]
    assert events.count("names") == 2 and events[1] == "names"
    run(1, 4, 0)
    assert [row["event"] for row in read(path)] == ["start", "names", "step", "step", "step"]


def test_none_leaves_only_the_joint_numbers(path: Path) -> None:
    row = _row(path, 1, _outcome({"a": 2.0}), weights={"a": 3.0}, recorder={"tensors": "none"})
    assert row["norm"] == 2.0 and row["weight_norm"] == 3.0
    assert not {"gradients", "weights"} & row.keys()


@pytest.mark.parametrize("bad", [False, True])
def test_a_row_is_bounded_whatever_the_number_of_tensors(path: Path, bad: bool) -> None:
    """The longest that the docstring promises: names of 100 bytes, numbers of the greatest length."""
    sizes = []
    for tensors in (512 - 20 * bad, 10_000):
        norms = {f"{place:0100d}": 1.23456789e-300 * (1 + place) for place in range(tensors)}
        if bad:
            norms |= {f"{place:0100d}": NAN for place in range(20)}
        with Recorder(path) as recorder:
            recorder.step(10**9, _outcome(norms), weights=norms, updates=norms)
        sizes.append(len(path.read_bytes().splitlines()[-1]))
    assert max(sizes) < 12 * 1024
    assert abs(sizes[1] - sizes[0]) < 100


@pytest.mark.parametrize(
    "name", ["event", "step", "norm", "clipped", "gradients", "weight_norm", "left_out"]
)
def test_a_fact_with_the_name_of_an_own_entry_is_refused(path: Path, name: str) -> None:
    with (
        Recorder(path) as recorder,
        pytest.raises(InvalidArgument, match=rf"entries of this name itself; got \['{name}'\]"),
    ):
        recorder.step(1, _outcome({"a": 1.0}), {name: 1, "loss": 2})
    assert len(list(read(path))) == 1


@pytest.mark.parametrize("norms", [[1.0], {"a": "much"}, {"a": None}, 3.0])
def test_what_is_no_table_of_norms_is_refused(path: Path, norms: Any) -> None:
    with (
        Recorder(path) as recorder,
        pytest.raises(InvalidArgument, match=r"Recorder\.step\(weights\): not a table"),
    ):
        recorder.step(1, weights=norms)


@pytest.mark.parametrize("step", [-1, 1.0, "1", None])
def test_a_step_that_is_no_count_is_refused(path: Path, step: Any) -> None:
    with Recorder(path) as recorder, pytest.raises(InvalidArgument, match="step must be a whole"):
        recorder.step(step)


NORMS = st.floats(0.0, 1e300) | st.sampled_from([NAN, INF])


@given(st.dictionaries(st.text(max_size=5), NORMS, max_size=30), st.integers(1, 5))
def test_a_sketch_is_plain_ranked_and_in_range(norms: dict[str, float], most: int) -> None:
    found = sketched(norms, most)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    top, quantiles = found["top"], found["quantiles"]
    finite = sorted(norm for norm in norms.values() if math.isfinite(norm))
    assert list(top.values()) == sorted(top.values(), reverse=True)
    assert len(top) == min(most, sum(norm > 0 for norm in finite))
    assert all(norms[name] == pytest.approx(norm, rel=1e-5) for name, norm in top.items())
    assert quantiles == sorted(quantiles)
    if finite:
        ranks = [round(level * (len(finite) - 1)) for level in LEVELS]
        assert quantiles[0] == pytest.approx(finite[0], rel=1e-5)
        assert quantiles[-1] == pytest.approx(finite[-1], rel=1e-5)
        for rank, quantile in zip(ranks, quantiles, strict=True):
            near = finite[max(0, rank - 1) : rank + 2]
            assert any(quantile == pytest.approx(one, rel=1e-5) for one in near)
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    assert found.get("nonfinite", []) == bad[:most]


def test_the_joint_norm_survives_overflow_and_says_nothing_of_what_is_not_finite() -> None:
    assert joint({"a": 3e200, "b": 4e200}) == pytest.approx(5e200)
    assert joint({"a": 1.0, "b": NAN}) is None and joint({}) == 0.0


@given(st.lists(st.floats(1e-37, 1e37), min_size=1, max_size=9))
def test_codes_are_off_by_at_most_a_seventh_of_a_percent(norms: list[float]) -> None:
    found = np.exp2(log2_of(decoded(encoded(np.array(norms)))).astype(np.float64))
    np.testing.assert_allclose(found, norms, rtol=2 ** (0.5 / 256) - 1 + 1e-5)


def test_codes_keep_zero_apart_from_small_and_nan_apart_from_large() -> None:
    codes = decoded(encoded(np.array([0.0, 1e-300, 1e300, NAN, INF])))
    assert codes.tolist() == [0, 1, 65534, 65535, 65535]


def test_the_codes_of_a_row_are_those_of_all_tensors_in_the_order_of_the_names(path: Path) -> None:
    with Recorder(path) as recorder:
        recorder.step(1, _outcome({"b": 2.0, "a": 1.0}), weights={"a": 8.0})
        recorder.step(2, _outcome({"b": 4.0, "a": 1.0}), weights={"a": 8.0})
    events = [row["event"] for row in read(path)]
    assert events == ["start", "names", "step", "step"]
    names, *rows = list(read(path))[1:]
    assert names["gradients"] == ["b", "a"] and names["weights"] == ["a"]
    octaves = [log2_of(decoded(row["codes"]["gradients"])).tolist() for row in rows]
    assert octaves == [[1.0, 0.0], [2.0, 0.0]]


def test_names_are_not_repeated_by_a_recorder_that_goes_on(path: Path) -> None:
    for step in (1, 2):
        with Recorder(path) as recorder:
            recorder.describe({"optimizer": "SGD"})
            recorder.step(step, _outcome({"a": 1.0}))
    assert [row["event"] for row in read(path)] == ["start", "run", "names", "step", "step"]


def test_tensors_beyond_the_limit_are_pooled_by_module() -> None:
    names = [f"layer.{layer}.{part}" for layer in range(MOST // 2) for part in ("q", "k", "v")]
    found = pools(names)
    assert list(found)[:2] == ["layer.0.*", "layer.1.*"] and found["layer.1.*"] == [3, 4, 5]
    flat = pools([f"t{place}" for place in range(1025)])
    assert len(flat) <= MOST and flat["t0 .. t2"] == [0, 1, 2]
    assert sorted(place for own in flat.values() for place in own) == list(range(1025))


def test_a_pool_has_the_joint_norm_of_its_tensors(path: Path) -> None:
    names = {f"layer.{n // 2}.{n}": 3.0 + n % 2 for n in range(MOST + 2)} | {"layer.0.0": NAN}
    row = _row(path, 1, _outcome(names))
    octaves = log2_of(decoded(row["codes"]["gradients"]))
    assert len(octaves) == MOST // 2 + 1 and math.isnan(octaves[0])
    assert 2.0 ** float(octaves[1]) == pytest.approx(5.0, rel=2e-3)
