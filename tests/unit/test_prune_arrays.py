"""Pruning of plain arrays by scores, allocations and schedules of one's own: what does not fit is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import karikomi as kk
from karikomi import registry
from karikomi.errors import InvalidArgument, KarikomiError, NonFinite, UnknownName, Unsupported
from karikomi.numpy import prune, prune_at, prune_file
from karikomi.prune import Layout, NofM, OneShot, Pool, PruningSchedule, Tensor, allocate
from karikomi.selection import block_scores
from karikomi.selection.block_scores import FEW, pool_threshold
from karikomi.selection.granularity import of_values

ROWS = {"a": Layout(units=0, inputs=1)}
WEIGHTS = np.arange(1.0, 13.0, dtype=np.float32).reshape(3, 4)


def kept(masks: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}


# --- scores of one's own


class Returns(kk.prune.Score):
    """A score that makes anything of its weights."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def of_weights(self, weights: Any, facts: Any, *, xp: Any) -> Any:
        return self.make(weights)

    def of_groups(self, weights: Any, facts: Any, *, xp: Any) -> Any:
        return self.make(weights)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: np.abs(w)[:-1],
        lambda w: np.abs(w).reshape(-1).tolist(),
        lambda w: 1.0,
        lambda w: np.float32(1.0),
        lambda w: None,
        lambda w: w.astype(complex),
        lambda w: w.astype(str),
    ],
)
@pytest.mark.parametrize("how", ["single", "n:m", "blocks", "file"])
def test_what_is_not_one_number_per_weight_is_refused(make: Any, how: str, tmp_path: Path) -> None:
    score = Returns(make)
    with pytest.raises(InvalidArgument, match=r"a: Returns.* gives one real number per") as raised:
        if how == "file":
            save_file({"a": WEIGHTS}, tmp_path / "w.safetensors")
            prune_file(tmp_path / "w.safetensors", tmp_path / "out", sparsity=0.5, score=score)
        elif how == "n:m":
            prune({"a": WEIGHTS}, score=score, pattern=NofM(keep=2, of=4), layouts=ROWS)
        elif how == "blocks":
            pattern = kk.prune.Blocks(1, 2)
            prune({"a": WEIGHTS}, sparsity=0.5, score=score, pattern=pattern, layouts=ROWS)
        else:
            prune({"a": WEIGHTS}, sparsity=0.5, score=score)
    assert "\n" not in str(raised.value)


def test_a_score_of_whole_tensors_is_held_to_their_shape() -> None:
    class Whole(Returns):
        of_tensors: ClassVar[bool] = True

        def of_tensor(self, weights: Any, facts: Any, *, xp: Any) -> Any:
            return self.make(weights)

    with pytest.raises(InvalidArgument, match="a: Whole gives one real number per weight"):
        prune({"a": WEIGHTS}, sparsity=0.5, score=Whole(np.ravel))
    _, masks = prune([np.array(2.0), np.array([1.0, 3.0])], sparsity=0.5, score=Whole(np.abs))
    assert kept(masks) == {"0": [], "1": [1]}


def test_no_score_changes_the_weights() -> None:
    def in_place(weights: np.ndarray) -> np.ndarray:
        weights *= -1.0
        return weights

    before = {"a": WEIGHTS.copy()}
    with pytest.raises(ValueError, match="read-only"):
        prune(before, sparsity=0.5, score=Returns(in_place))
    assert np.array_equal(before["a"], WEIGHTS) and before["a"].flags.writeable


@dataclasses.dataclass(frozen=True)
class Trust(kk.prune.Score):
    """|w| times a fact that nobody else knows."""

    needs: ClassVar[frozenset[str]] = frozenset({"trust"})

    def of_weights(self, weights: Any, facts: Any, *, xp: Any) -> Any:
        return xp.abs(weights) * facts["trust"]


def test_a_fact_of_ones_own() -> None:
    trust = np.array([4.0, 1.0, 1.0, 1.0])
    _, masks = prune({"a": np.ones(4)}, sparsity=0.75, score=Trust(), facts={"trust": {"a": trust}})
    assert kept(masks) == {"a": [0]}
    with pytest.raises(KarikomiError, match="unknown fact; got 'trust'"):
        prune({"a": np.ones(4)}, sparsity=0.75, facts={"trust": {"a": trust}})


def test_a_fact_of_ones_own_in_torch() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(4, 1)
    trust = torch.tensor([1e6, 1.0, 1.0, 1.0])
    facts = {"trust": {"weight": trust}}
    masks = kk.torch.prune_(module, sparsity=0.75, score=Trust(), facts=facts)
    assert masks["weight"].tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("score", ["obc", "sparsegpt", kk.prune.OBC()])
def test_what_reconstructs_does_not_prune_by_magnitude_instead(score: Any) -> None:
    for call in (
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, score=score, layouts=ROWS),
        lambda: prune_at({"a": WEIGHTS}, OneShot(0.5, score=score), 0, layouts=ROWS),
    ):
        with pytest.raises(Unsupported, match=r"re-fits .*kk\.torch\.prune_"):
            call()


# --- numbers that float32 does not hold


def test_weights_that_float32_does_not_hold_are_named() -> None:
    small = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    with pytest.raises(Unsupported, match="a: all weights are zero in float32"):
        prune({"a": small * 1e-50}, sparsity=0.4)
    with pytest.raises(NonFinite, match="a: a weight is infinite in float32"):
        prune({"a": small * 1e200}, sparsity=0.4)
    with pytest.raises(Unsupported, match="a: all weights"):
        prune({"a": small[None, :4] * 1e-50}, pattern=NofM(keep=2, of=4), layouts=ROWS)
    # The hint: one power of two for all of them.
    _, masks = prune({"a": np.ldexp(small * 1e-50, 160)}, sparsity=0.4)
    assert kept(masks) == {"a": [0, 1, 2]}


def test_single_weights_next_to_zero_and_zeros_are_no_matter() -> None:
    arrays = {"a": np.array([1.0, 1e-50, 2.0]), "b": np.zeros(2), "c": np.zeros(0)}
    _, masks = prune(arrays, sparsity=0.6)
    assert kept(masks) == {"a": [0, 2], "b": [], "c": []}
    # LAMP compares shares, whatever the scale.
    _, masks = prune({"a": np.array([5.0, 4.0, 3.0, 2.0]) * 1e-50}, sparsity=0.5, score="lamp")
    assert kept(masks) == {"a": [0, 1]}


def test_types_of_ml_dtypes() -> None:
    values = np.array([3.0, -1.0, 2.0, -4.0])
    arrays = {
        "a": values.astype(ml_dtypes.bfloat16),
        "b": (values / 4).astype(ml_dtypes.float8_e4m3fn),
    }
    pruned, masks = prune(arrays, sparsity=0.5)
    assert kept(masks) == {"a": [0, 2, 3], "b": [3]}
    assert {n: one.dtype for n, one in pruned.items()} == {n: a.dtype for n, a in arrays.items()}
    assert np.array_equal(pruned["a"], np.where(masks["a"], arrays["a"], 0).astype("bfloat16"))
    # Two bytes a weight, and a bit for its mask: of eight bytes five are for half a byte and two weights.
    _, masks = prune({"a": arrays["a"]}, bytes=5 / 8)
    assert kept(masks) == {"a": [0, 3]}


# --- many small tensors


@given(
    st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1e-45, 0.5, 2.0]), min_size=1, max_size=30),
    st.data(),
)
def test_few_scores_have_the_threshold_of_many(values: list[float], data: st.DataObject) -> None:
    gone = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    remove = data.draw(st.integers(0, len(values)))
    few = of_values("few", np.array(values), gone)
    # The same below many that never go, which are counted.
    padded = np.concatenate([values, np.full(FEW, 9.0)])
    many = of_values("many", padded, np.concatenate([gone, np.zeros(FEW, bool)]))
    assert pool_threshold([few], remove) == pool_threshold([many], remove)


def test_no_key_is_counted_for_a_tiny_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_scores, "threshold", None)
    arrays = {str(n): np.random.default_rng(n).normal(size=4) for n in range(50)}
    _, masks = prune(arrays, sparsity=0.5, allocation="uniform")
    assert {int(mask.sum()) for mask in masks.values()} == {2}


# --- allocations and schedules of one's own


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "isomorphic", "lamp"])
def test_an_empty_array_is_no_matter(allocation: str) -> None:
    arrays = {"none": np.zeros((0, 4)), "a": WEIGHTS, "b": 2 * WEIGHTS}
    _, masks = prune(arrays, sparsity=0.5, allocation=allocation)
    assert masks["none"].shape == (0, 4) and sum(int((~m).sum()) for m in masks.values()) == 12
    assert allocate(allocation, {"none": Tensor(items=0)}, 0.5) == [Pool(("none",), 0)]


@pytest.mark.parametrize(
    ("pools", "said"),
    [
        (None, "returns a list of Pool"),
        ({"a": 1}, "returns a list of Pool"),
        ([("a", 1)], "returns a list of Pool"),
        ([Pool(("a",), 1)], "'b' in 0"),
        ([Pool(("a", "b"), 1), Pool(("b",), 0)], "'b' in 2"),
        ([Pool(("a", "b", "c"), 1)], "'c' in 1"),
        ([Pool(("a", "b"), 9)], "got 9; allowed: a whole number, 0 to 8"),
        ([Pool(("a", "b"), -1)], "got -1"),
        ([Pool(("a", "b"), 1.5)], "got 1.5"),  # type: ignore[arg-type]
    ],
)
def test_pools_of_an_allocation_of_ones_own_are_checked(
    pools: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find", lambda kind, name: lambda tensors, sparsity: pools)
    with pytest.raises(InvalidArgument, match="allocation own") as raised:
        allocate("own", {"a": Tensor(items=4), "b": Tensor(items=4)}, 0.5)
    assert said in str(raised.value) and "\n" not in str(raised.value)


class Half(PruningSchedule):
    """A schedule that does not say from what."""

    sparsity, score, allocation, only = 0.5, "magnitude", None, None

    def due(self, step: int) -> bool:
        return True

    def sparsity_at(self, step: int) -> float:
        return 0.5


class Whole(Half):
    """One that says everything."""

    pattern, exclude = "unstructured", None


def test_a_schedule_of_ones_own() -> None:
    with pytest.raises(InvalidArgument, match="Half: .*got no pattern, exclude; allowed: sparsity"):
        prune_at({"a": WEIGHTS}, Half(), 0)
    _, masks = prune_at({"a": WEIGHTS}, Whole(), np.int64(0))  # type: ignore[arg-type]
    assert int(masks["a"].sum()) == 6


def taylor(gradient: Any) -> Any:
    facts = {"gradient": {"a": gradient}}
    return prune({"a": WEIGHTS}, sparsity=0.5, score="taylor", facts=facts)


def test_what_goes_together_is_of_these_arrays() -> None:
    coupled = [kk.prune.Coupled("a", 3, (kk.prune.Member("a", 0), kk.prune.Member("bias", 0)))]
    with pytest.raises(UnknownName, match="coupled 'a'.*'bias'"):
        prune({"a": WEIGHTS}, width=0.5, pattern="units", coupled=coupled)


@pytest.mark.parametrize(
    "call",
    [
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, layouts={"a": (0, 1)}),  # type: ignore[dict-item]
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, layouts=[ROWS["a"]]),  # type: ignore[arg-type]
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, layouts={"a": Layout(2)}),
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, layouts={"a": Layout(-1, 1)}),
        lambda: Layout(1, 1),
        lambda: Layout("0", 1),  # type: ignore[arg-type]
        lambda: Layout(0, 1.5),  # type: ignore[arg-type]
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, facts={"gradient": WEIGHTS}),  # type: ignore[dict-item]
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, facts=[WEIGHTS]),  # type: ignore[arg-type]
        lambda: prune({"a": WEIGHTS}, macs=0.5, facts={"macs": {"a": "many"}}),
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, facts={"curve": {"a": 0.5}}),
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, masks=[WEIGHTS > 1]),  # type: ignore[arg-type]
        lambda: taylor("text"),
        lambda: taylor(None),
        lambda: prune({"a": WEIGHTS}, width=0.5, pattern="units", coupled=[1]),  # type: ignore[list-item]
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, allocation=3),  # type: ignore[arg-type]
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, only=5),  # type: ignore[arg-type]
        lambda: prune({"a": WEIGHTS}, sparsity=0.5, exclude=["a", 5]),  # type: ignore[list-item]
        lambda: OneShot(0.5, allocation=3),  # type: ignore[arg-type]
        lambda: prune_at({"a": WEIGHTS}, OneShot(0.5), "3"),  # type: ignore[arg-type]
        lambda: prune_at({"a": WEIGHTS}, OneShot(0.5), None),  # type: ignore[arg-type]
        lambda: prune_at({"a": WEIGHTS}, OneShot(0.5), -1),
        lambda: prune_at({"a": WEIGHTS}, OneShot(0.5), 3, [WEIGHTS > 1]),  # type: ignore[arg-type]
        lambda: OneShot(0.5, only=5),  # type: ignore[arg-type]
        lambda: OneShot(0.5, exclude=["a", 5]),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_an_invalid_argument(call: Any) -> None:
    with pytest.raises(InvalidArgument) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_shares_may_be_numpy_s_and_facts_0d_arrays() -> None:
    half: Any = np.float32(0.5)
    for sparsity in (half, {"a": half}):
        _, masks = prune({"a": WEIGHTS}, sparsity=sparsity)
        assert int(masks["a"].sum()) == 6
    macs = {"a": np.array(12.0)}
    _, masks = prune({"a": WEIGHTS}, macs=0.5, facts={"macs": macs})
    assert int(masks["a"].sum()) == 6


def test_masks_are_not_written_over_weights_by_another_name(tmp_path: Path) -> None:
    source = tmp_path / "w.safetensors"
    save_file({"a": WEIGHTS}, source)
    (tmp_path / "link").symlink_to(source)
    for target, masks in (("p", "sub/../p"), ("p", "link"), ("p", "./p")):
        with pytest.raises(Unsupported, match="two files"):
            prune_file(source, tmp_path / target, sparsity=0.5, masks=tmp_path / masks)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "w.safetensors"]


@pytest.mark.parametrize(
    ("sparsity", "up", "nearest"),
    [(0.1, 0.25, 0.0), (0.2, 0.25, 0.25), (0.25, 0.25, 0.25), (0.3, 0.5, 0.25), (0.375, 0.5, 0.5)],
)
def test_whole_blocks_make_at_least_a_sparsity_or_the_nearest(
    sparsity: float, up: float, nearest: float
) -> None:
    weights = {"w": np.random.default_rng(0).normal(size=(4, 4))}
    arguments = {
        "sparsity": sparsity,
        "pattern": kk.prune.Blocks(units=2, inputs=2),
        "layouts": {"w": Layout(units=0, inputs=1)},
    }
    for rounding, share in (("up", up), ("nearest", nearest)):
        for prune_arrays in (prune, kk.jax.prune):
            _, masks = prune_arrays(weights, rounding=rounding, **arguments)
            assert 1 - float(np.asarray(masks["w"]).mean()) == share


def test_a_rounding_is_of_a_sparsity() -> None:
    with pytest.raises(InvalidArgument, match=r"unknown rounding; got 'down'; allowed: .*nearest"):
        prune({"w": np.ones((2, 2))}, sparsity=0.5, rounding="down")
    with pytest.raises(InvalidArgument, match="only a sparsity is rounded"):
        prune({"w": np.ones((2, 2))}, parameters=0.5, rounding="nearest")
