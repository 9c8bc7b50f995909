"""A population of small networks: draws by hand, counts by hand, what is refused, and gates on it."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes  # noqa: F401  (which gives NumPy bfloat16)
import numpy as np
import pytest
from hypothesis import given

from audited import IMAGES, REGRESSION, Linear
from karikomi.audit import audit
from karikomi.audit.gates import HELD, MISSED, NOT_RUN, gate_of, judged
from karikomi.audit.population import commonest, population, redrawn
from karikomi.errors import InvalidArgument
from karikomi.tasks import Data, Split, Task

LABELS = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 7), st.integers(1, 9)), elements=st.integers(0, 3)
)


def test_a_draw_keeps_sizes_of_errors_zeros_and_vectors() -> None:
    generator = np.random.default_rng(0)
    before = {"w": generator.normal(size=(30, 40)).astype(np.float32), "b": np.float32([1, 2])}
    small = np.round(before["w"] * 4) / 4
    after = {"w": small.astype(np.float32), "b": np.float32([3, 4]), "n": np.int64(7)}
    before["n"] = np.int64(3)
    made = [redrawn(before, after, seed=[5, k]) for k in range(40)]
    assert all(isinstance(drawn, dict) for drawn in made)
    stack: Any = np.stack([drawn["w"] for drawn in made])  # type: ignore[index]
    kept = small != 0
    assert (stack[:, ~kept] == 0).all() and stack.dtype == np.float32
    sizes = np.abs(stack - before["w"])[:, kept]
    assert sizes == pytest.approx(np.broadcast_to(sizes[0], sizes.shape), abs=1e-6)
    signs = np.sign(stack - before["w"])[:, kept]
    assert abs(signs.mean()) < 0.05 and np.abs(signs.mean(axis=0)).max() < 1
    first: Any = made[0]
    assert first["b"].tolist() == [3, 4] and first["n"] == 7
    assert (redrawn(before, after, seed=[5, 0])["w"] == first["w"]).all()  # type: ignore[index]


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ({"w": np.ones((2, 2))}, "no weight that is left was rounded"),
        ({"w": np.zeros((2, 2))}, "no weight that is left was rounded"),
        ({"w": np.ones((1, 2))}, "another shape"),
        ({"v": np.ones((2, 2))}, "another shape"),
    ],
)
def test_where_there_is_nothing_to_draw(after: dict[str, np.ndarray], reason: str) -> None:
    assert reason in str(redrawn({"w": np.ones((2, 2))}, after, seed=0))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_types_of_weights_stay(kind: str) -> None:
    before = {"w": np.linspace(-1, 1, 12).reshape(3, 4).astype(np.dtype(kind))}
    after = {"w": (before["w"].astype(np.float32) * 1.25).astype(np.dtype(kind))}
    made: Any = redrawn(before, after, seed=0)
    assert made["w"].dtype == np.dtype(kind)
    ratio = made["w"].astype(float) / before["w"].astype(float)
    assert ((np.abs(ratio - 1.25) < 0.02) | (np.abs(ratio - 0.75) < 0.02)).all()


@given(LABELS)
def test_the_commonest_label_by_counting(labels: np.ndarray) -> None:
    known = [np.bincount(column).argmax() for column in labels.T]
    assert commonest(labels).tolist() == known


class Said:
    """A runner whose networks are the classes that they say."""

    def outputs(self, arrays: Any, inputs: np.ndarray) -> np.ndarray:
        return np.eye(4)[arrays["said"]]


def said(*classes: int) -> dict[str, np.ndarray]:
    return {"said": np.array(classes)}


def found_of(
    file: dict[str, np.ndarray], others: list[Any], originals: list[Any] | None = None
) -> dict[str, Any]:
    targets = np.array([0, 1, 2, 3])
    split = Split(np.zeros((4, 2), np.float32), targets)
    task = Task(name="t", model=dict, data=lambda: Data(split, split, split))
    runner: Any = Said()
    outputs = tuple(runner.outputs(arrays, split.inputs) for arrays in (said(0, 1, 2, 0), file))
    return population(
        task,
        runner,
        split,
        outputs,  # type: ignore[arg-type]
        smaller=others,
        originals=originals or [],
    )


def test_counts_by_hand() -> None:
    found = found_of(said(1, 1, 2, 3), [said(1, 2, 2, 3), said(2, 1, 2, 3)])
    # Against 0 1 2 0: the first example changed in all (lost), the last in all (gained), the second once.
    assert (found["in_all"], found["lost_in_all"], found["in_some"]) == (2, 1, 3)
    assert (found["of_file"], found["of_file_in_all"]) == (2, 2)
    assert found["churn"] == {"mean": pytest.approx(7 / 12), "min": 0.5, "max": 0.75}
    # Pairs: 1 and 2 differ in one, 1 and 3 in one, 2 and 3 in two of four examples.
    assert found["between"] == pytest.approx((1 / 4 + 1 / 4 + 2 / 4) / 3)
    rows = [(row["index"], row["before"], row["after"]) for row in found["examples"]]
    assert rows == [(0, "0", "1"), (3, "0", "3")]
    assert found["examples"][0]["share"] == pytest.approx(2 / 3)
    assert found["drop"] == {"mean": pytest.approx(1 / 12), "min": 0.0, "max": 0.25}
    assert (found["word"], found["before"], found["after"]) == ("flips", 1, 3)


def test_ten_on_both_sides_make_exemplars() -> None:
    assert found_of(said(1, 1, 2, 3), [said(1, 1, 2, 3)] * 9)["word"] == "flips"
    found = found_of(said(1, 1, 2, 3), [said(1, 1, 2, 3)] * 9, [said(0, 1, 2, 3)] * 9)
    assert found["word"] == "exemplars"
    assert [row["index"] for row in found["examples"]] == [0]


def test_an_audit_has_the_population_that_was_asked_for() -> None:
    found = IMAGES.result()["population"]
    assert found["drawn"] and (found["before"], found["after"]) == (1, 4)
    assert 0 < found["of_file_in_all"] <= found["in_all"] <= found["in_some"]
    assert 0 < found["between"] < 2 * found["churn"]["max"]
    other = REGRESSION.result()["population"]
    assert "in_all" not in other and other["drop"]["min"] > 0


def test_gates_on_what_every_network_changes() -> None:
    result = IMAGES.result()
    share = result["population"]["in_all"] / result["population"]["examples_judged"]
    assert judged(gate_of(f"stable_flips>{share / 9}"), result).outcome == MISSED
    assert judged(gate_of("stable_flips>0.9"), result).outcome == HELD
    assert judged(gate_of("stable_flips>0.9"), REGRESSION.result()).outcome == NOT_RUN


def test_what_cannot_be_drawn_is_not_checked() -> None:
    runner: Any = Linear(IMAGES.before["head.weight"].shape, "cross_entropy")  # type: ignore[arg-type]
    pair = (IMAGES.before, IMAGES.before)
    found = audit(IMAGES.task, *pair, runner=runner, population=3, most=20)
    assert found["population"] is None
    assert "no weight" in found["not_checked"]["population"]
    assert judged(gate_of("stable_flips>0.9"), found).outcome == NOT_RUN
    without = audit(IMAGES.task, *pair, runner=runner, most=20)
    assert without["population"] is None and "population" not in without["not_checked"]


@pytest.mark.parametrize(
    "more", [{"population": -1}, {"population": 2.0}, {"population": 2, "replicates": [{}]}]
)
def test_refused(more: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"population|replicates"):
        audit(IMAGES.task, IMAGES.before, IMAGES.after, **more)
