"""The bounds by themselves, on NumPy arrays: arguments, what is refused, the share at the bound."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import karikomi as kk
from karikomi import spec
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported
from karikomi.schedule import Linear

AXIS = {"w": 0}
ALL = [
    kk.bound.Clamp(1.0),
    kk.bound.MaxNorm(1.0),
    kk.bound.UnitNorm(2.0, per="tensor"),
    kk.bound.NonNegative(),
    kk.bound.InitScaled(3.0),
    kk.bound.SpectralCap(1.0),
    kk.bound.QKClip(50.0, alpha=0.25),
]


def weights(seed: int = 0, shape: tuple[int, ...] = (4, 6), scale: float = 1.0) -> dict[str, Any]:
    return {"w": np.random.default_rng(seed).normal(0.0, scale, shape)}


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
def test_a_bound_is_plain_data_and_back(rule: Any) -> None:
    assert spec.from_dict(json.loads(json.dumps(spec.to_dict(rule, "bound"))), "bound") == rule


@pytest.mark.parametrize(
    "name", ["Clamp", "MaxNorm", "UnitNorm", "InitScaled", "SpectralCap", "QKClip"]
)
@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), "1", True, None])
def test_limits_that_are_none_are_refused(name: str, limit: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: the limit must be"):
        getattr(kk.bound, name)(limit)


@pytest.mark.parametrize("name", ["MaxNorm", "UnitNorm"])
@pytest.mark.parametrize("per", ["layer", None, 0])
def test_another_extent_is_refused(name: str, per: Any) -> None:
    with pytest.raises(
        InvalidArgument, match=rf"^{name}\(per\): unknown extent .* 'unit', 'tensor'"
    ):
        getattr(kk.bound, name)(1.0, per=per)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.5", True])
def test_an_alpha_that_is_no_share_is_refused(alpha: Any) -> None:
    with pytest.raises(InvalidArgument, match="^QKClip: alpha is a share; .*allowed: 0 to 1"):
        kk.bound.QKClip(100.0, alpha=alpha)


def test_short_units_grow_long_ones_shrink_and_zeros_stay() -> None:
    array = np.array([[3.0, 4.0], [0.0, 1e-20], [0.0, 0.0], [0.0, 2.0]])
    found, outcome, _ = kk.numpy.bound({"w": array}, kk.bound.UnitNorm(2.0), unit_axes=AXIS)
    assert np.linalg.norm(found["w"], axis=1).tolist() == pytest.approx([2.0, 2.0, 0.0, 2.0])
    assert found["w"][3].tobytes() == array[3].tobytes()
    assert outcome.engaged and outcome.share_at_bound == 0.75


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_norm_next_to_nothing_has_no_direction(dtype: type) -> None:
    array = np.full((1, 1), np.finfo(dtype).smallest_subnormal)
    found, outcome, _ = kk.numpy.bound({"w": array}, kk.bound.UnitNorm(1.0), unit_axes=AXIS)
    assert found["w"][0, 0] == (1.0 if dtype is np.float16 else array[0, 0])
    assert outcome.engaged == (dtype is np.float16)


def test_per_tensor_is_one_norm_for_all_entries() -> None:
    found, outcome, _ = kk.numpy.bound(weights(), kk.bound.UnitNorm(3.0, per="tensor"))
    assert np.linalg.norm(found["w"]) == pytest.approx(3.0) and outcome.names == ("w",)


def test_a_limit_may_be_a_schedule() -> None:
    rule = kk.bound.UnitNorm(Linear(1.0, 3.0, steps=(0, 2)))
    state, sizes, shares = None, [], []
    for _ in range(3):
        found, outcome, state = kk.numpy.bound(weights(), rule, state, unit_axes=AXIS)
        sizes.append(float(np.linalg.norm(found["w"][0])))
        shares.append(outcome.share_at_bound)
    assert sizes == pytest.approx([1.0, 2.0, 3.0]) and shares == [1.0, 1.0, 1.0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_nothing_stays_below_zero_and_the_rest_keeps_its_bits(numbers: list[float]) -> None:
    array = np.array(numbers)
    found, outcome, _ = kk.numpy.bound({"w": array}, kk.bound.NonNegative())
    assert found["w"].min() >= 0.0 and not np.signbit(found["w"][array < 0]).any()
    assert found["w"][array > 0].tobytes() == array[array > 0].tobytes()
    assert outcome.pre == max(0.0, -float(array.min())) and outcome.post == 0.0
    assert outcome.share_at_bound == np.mean(array <= 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", ALL[:-1], ids=lambda rule: type(rule).__name__)
def test_a_bad_weight_is_named_on_either_side(rule: Any, bad: float) -> None:
    array = np.array([[1.0, bad], [2.0, 3.0]])
    with pytest.raises(NonFinite, match="non-finite entries in w$"):
        kk.numpy.bound({"w": array}, rule, unit_axes=AXIS, fan_in={"w": 2})


def test_the_range_of_a_layer_holds_for_weight_and_bias() -> None:
    named = {"b": np.full(3, -9.0), "w": np.full((3, 4), 9.0), "gain": np.full(3, 9.0)}
    rule = kk.bound.InitScaled(2.0)
    found, outcome, _ = kk.numpy.bound(named, rule, fan_in={"w": 4, "b": 4})
    assert set(found["w"].ravel()) == {1.0} and set(found["b"]) == {-1.0}
    assert found["gain"] is named["gain"] and outcome.left_alone == {"gain": "no fan-in was named"}
    assert outcome.share_at_bound == 1.0


@pytest.mark.parametrize(
    ("rule", "arguments", "error", "text"),
    [
        (ALL[4], {}, InvalidArgument, "no tensor to bound; name fan-ins"),
        (ALL[4], {"fan_in": {"w": 0}}, InvalidArgument, "w: a fan-in is a number of inputs; got 0"),
        (
            ALL[4],
            {"fan_in": {"v": 4}},
            UnknownName,
            r"\(fan_in\): the pattern matches no .*got 'v'",
        ),
        (ALL[5], {}, InvalidArgument, "no tensor to bound; name unit axes"),
        (ALL[6], {}, Unsupported, "QKClip needs the largest logit of every head"),
        (ALL[6], {"logits": {"a": [1.0]}}, Unsupported, "QKClip needs the largest logit"),
    ],
)
def test_what_a_rule_needs_must_be_given(rule: Any, arguments: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=f"^numpy.bound:? ?{text}"):
        kk.numpy.bound(weights(), rule, **arguments)


def test_several_bounds_in_one_are_refused() -> None:
    chain = kk.clip.Chain(kk.bound.Clamp(1.0), kk.bound.NonNegative())
    with pytest.raises(
        Unsupported, match="^numpy.bound: bounds are applied one at a time; got Chain"
    ):
        kk.numpy.bound(weights(), chain)  # type: ignore[arg-type]


def test_what_stands_at_the_bound_is_reported_as_standing() -> None:
    for rule in (kk.bound.MaxNorm(1.0), kk.bound.SpectralCap(1.0)):
        found, outcome, state = kk.numpy.bound(weights(scale=9.0), rule, unit_axes=AXIS)
        assert outcome.share_at_bound == 1.0 and outcome.engaged
        again, outcome, _ = kk.numpy.bound(found, rule, state, unit_axes=AXIS)
        assert outcome.share_at_bound == 1.0 and not outcome.engaged
        assert again["w"].tobytes() == found["w"].tobytes()


class TestSpectralCap:
    """Power iteration on NumPy arrays."""

    RULE = kk.bound.SpectralCap(1.0)

    @pytest.mark.parametrize("shape", [(4, 6), (40, 3), (5, 2, 3, 3), (60, 80)])
    def test_the_first_step_has_converged(self, shape: tuple[int, ...]) -> None:
        named = weights(1, shape)
        sigma = np.linalg.svd(named["w"].reshape(shape[0], -1))[1][0]
        found, outcome, _ = kk.numpy.bound(named, self.RULE, unit_axes=AXIS)
        assert outcome.pre == pytest.approx(sigma, rel=1e-6) and outcome.post <= 1.0
        assert np.linalg.svd(found["w"].reshape(shape[0], -1))[1][0] == pytest.approx(1.0, rel=1e-6)

    def test_the_vector_travels_in_the_state_through_json(self) -> None:
        state = resumed = None
        for seed in range(4):
            named = {"w": weights(0)["w"] + 0.01 * weights(seed)["w"]}
            found, outcome, state = kk.numpy.bound(named, self.RULE, state, unit_axes=AXIS)
            again, _, resumed = kk.numpy.bound(named, self.RULE, resumed, unit_axes=AXIS)
            resumed = json.loads(json.dumps(resumed))
            assert again["w"].tobytes() == found["w"].tobytes()
            sigma = np.linalg.svd(named["w"])[1][0]
            assert sigma * 0.999 < outcome.pre <= sigma * (1 + 1e-12)
        assert list(state["vectors"]) == ["w"]

    def test_vectors_of_another_shape_are_refused(self) -> None:
        _, _, state = kk.numpy.bound(weights(), self.RULE, unit_axes=AXIS)
        with pytest.raises(InvalidArgument, match="vectors: w: these vectors are of another array"):
            kk.numpy.bound(weights(0, (4, 7)), self.RULE, state, unit_axes=AXIS)

    def test_zeros_that_grow_again_are_found_again(self) -> None:
        _, _, state = kk.numpy.bound({"w": np.zeros((2, 3))}, self.RULE, unit_axes=AXIS)
        state["vectors"] = {"w": np.eye(3)[:, :2].tolist()}
        grown = {"w": np.array([[0.0, 0.0, 5.0], [0.0, 0.0, 0.0]])}
        found, outcome, _ = kk.numpy.bound(grown, self.RULE, state, unit_axes=AXIS)
        assert outcome.pre == pytest.approx(5.0) and found["w"][0, 2] == pytest.approx(1.0)

    def test_complex_weights_and_foreign_states_are_refused(self) -> None:
        with pytest.raises(Unsupported, match="w: the spectral norm of complex entries"):
            kk.numpy.bound({"w": np.ones((2, 2), complex)}, self.RULE, unit_axes=AXIS)
        _, _, state = kk.numpy.bound(weights(), kk.bound.Clamp(1.0))
        with pytest.raises(InvalidArgument, match="SpectralCap: this state has no vectors"):
            kk.numpy.bound(weights(), self.RULE, state, unit_axes=AXIS)


class TestQKClip:
    """Heads as rows of several arrays."""

    ATTENTION = {"a": (["wq", "bq"], ["wk", "bk"])}

    @staticmethod
    def projections(heads: int = 4, key_heads: int = 4, width: int = 3) -> dict[str, Any]:
        draw = np.random.default_rng(5).normal
        q, k = heads * width, key_heads * width
        return {
            "wq": draw(size=(q, 8)),
            "bq": draw(size=q),
            "wk": draw(size=(k, 8)),
            "bk": draw(size=k),
        }

    @staticmethod
    def logits(named: dict[str, Any], heads: int, key_heads: int) -> np.ndarray:
        """Return the largest logit of each head for fixed inputs."""
        x = np.random.default_rng(6).normal(size=(20, 8))
        q = (x @ named["wq"].T + named["bq"]).reshape(20, heads, -1)
        k = (x @ named["wk"].T + named["bk"]).reshape(20, key_heads, -1)
        k = np.repeat(k, heads // key_heads, axis=1)
        return np.einsum("ihd,jhd->hij", q, k).max((1, 2)) / np.sqrt(q.shape[-1])

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
    def test_every_head_pays_for_itself_alone(
        self, heads: int, key_heads: int, alpha: float
    ) -> None:
        named = self.projections(heads, key_heads)
        before = self.logits(named, heads, key_heads)
        rule = kk.bound.QKClip(float(np.median(before)), alpha=alpha)
        found, outcome, _ = kk.numpy.bound(
            named, rule, logits={"a": before}, attention=self.ATTENTION
        )
        expected = np.minimum(before, rule.limit)
        np.testing.assert_allclose(self.logits(found, heads, key_heads), expected, rtol=1e-12)
        np.testing.assert_allclose(outcome.after, expected)
        assert outcome.share_at_bound == np.mean(before >= rule.limit)
        assert outcome.pre == before.max() and outcome.names == ("a",) * heads

    def test_shared_key_heads_keep_their_bits(self) -> None:
        named = self.projections(4, 2)
        arguments: Any = {"logits": {"a": [500.0] * 4}, "attention": self.ATTENTION}
        found, _, _ = kk.numpy.bound(named, kk.bound.QKClip(), **arguments)
        assert found["wk"] is named["wk"] and found["bk"] is named["bk"]
        np.testing.assert_allclose(found["wq"], named["wq"] / 5)

    def test_a_negative_largest_logit_is_below_every_limit(self) -> None:
        named = self.projections()
        arguments: Any = {"logits": {"a": [-500.0] * 4}, "attention": self.ATTENTION}
        found, outcome, _ = kk.numpy.bound(named, kk.bound.QKClip(), **arguments)
        assert outcome.action == "kept" and all(found[name] is named[name] for name in named)

    @pytest.mark.parametrize(
        ("logits", "attention", "error", "text"),
        [
            ({"b": [1.0]}, {"a": ("wq", "wk")}, UnknownName, "unknown attention"),
            ({"a": 1.0}, {"a": ("wq", "wk")}, InvalidArgument, "one largest logit per head"),
            ({"a": [np.nan] * 4}, {"a": ("wq", "wk")}, NonFinite, "non-finite logits in a"),
            ({"a": [1.0] * 4}, {"a": ("wq", "wv")}, UnknownName, "names no such tensor; got 'wv'"),
            (
                {"a": [1.0] * 5},
                {"a": ("wq", "wk")},
                InvalidArgument,
                "wq: the rows are not a whole",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, logits: Any, attention: Any, error: type, text: str
    ) -> None:
        with pytest.raises(error, match=text):
            kk.numpy.bound(
                self.projections(), kk.bound.QKClip(), logits=logits, attention=attention
            )
