"""Nested trees of arrays in `karikomi.numpy`, how `karikomi.tree` names their leaves, and masks of them."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict, deque
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import karikomi as kk
from karikomi import tree
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported

RNG = np.random.default_rng(0)


class Layer(NamedTuple):
    weight: Any
    bias: Any = None


def network() -> dict[str, Any]:
    """Return a tree with every kind of container, and a gradient that is absent."""
    layers = [Layer(RNG.normal(size=(4, 3)), RNG.normal(size=4)), Layer(RNG.normal(size=(2, 4)))]
    head = OrderedDict(weight=RNG.normal(size=(2, 2)), scale=np.float32(3.0))
    return {"layers": layers, "head": head, "rest": (RNG.normal(size=5), {}), "alone": np.ones(1)}


NAMES = (
    *("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"),
    *("head.weight", "head.scale", "rest.0", "alone"),
)


def same_containers(one: Any, other: Any) -> bool:
    """Return whether two trees have the same types, keys and order, whatever their leaves are."""
    if isinstance(one, dict):
        alike = type(one) is type(other) and list(one) == list(other)
        return alike and all(same_containers(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        alike = type(one) is type(other) and len(one) == len(other)
        return alike and all(map(same_containers, one, other))
    return not isinstance(other, dict | list | tuple)


def trees() -> st.SearchStrategy[Any]:
    keys = st.text("abc", min_size=1, max_size=2)
    nested = st.recursive(
        st.integers() | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
            | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
            | st.builds(Layer, inner, inner)
        ),
        max_leaves=12,
    )
    return st.dictionaries(keys, nested, max_size=3) | st.lists(nested, max_size=3)


@given(trees())
def test_a_tree_is_its_leaves_and_its_containers(whole: Any) -> None:
    leaves = tree.flatten(whole)
    again = tree.unflatten(whole, leaves)
    assert again == whole and same_containers(again, whole)
    marked = tree.unflatten(whole, {name: name for name in leaves})
    assert list(tree.flatten(marked).items()) == [(name, name) for name in leaves]


def test_an_arrays_name_is_the_path_to_it() -> None:
    assert tuple(tree.flatten(network())) == NAMES


@pytest.mark.parametrize(
    "container",
    [
        OrderedDict(b=1, a=2),
        defaultdict(int, b=1, a=2),
        MappingProxyType({"b": 1, "a": 2}),
        Layer(1, 2),
        type("Pair", (tuple,), {})([1, 2]),
        type("Row", (list,), {})([1, 2]),
        type("Facts", (dict,), {})(b=1, a=2),
    ],
)
def test_containers_keep_type_order_and_more(container: Any) -> None:
    before = list(tree.flatten(container).items())
    made = tree.unflatten(container, {name: 10 * leaf for name, leaf in before})
    assert type(made) is type(container) and list(tree.flatten(container).items()) == before
    assert list(tree.flatten(made).items()) == [(name, 10 * leaf) for name, leaf in before]
    assert getattr(made, "default_factory", None) is getattr(container, "default_factory", None)


def cyclic() -> dict[str, Any]:
    inner: dict[str, Any] = {"w": np.ones(1)}
    inner["back"] = [inner]
    return {"top": inner}


def deep() -> list[Any]:
    whole: list[Any] = [np.ones(1)]
    for _ in range(5000):
        whole = [whole]
    return whole


@pytest.mark.parametrize(
    ("whole", "text"),
    [
        (
            {"a.b": np.ones(1), "a": {"b": np.ones(1)}},
            r"two leaves have the name 'a.b'; got \['a.b'\] and \['a'\]\['b'\]$",
        ),
        ({"a": {3: np.ones(1)}}, r"a: the keys of a tree are names, strings; got 3 \(int\)$"),
        ({("a", "b"): np.ones(1)}, r"the keys of a tree are names.*got \('a', 'b'\) \(tuple\)$"),
        (cyclic(), r"the tree contains itself at \['top'\]\['back'\]\[0\]$"),
        (deep(), r"the tree is too deep; got \[0\]\[0\]\[0\]\[0\]\[0\]; allowed: 100 levels$"),
        ({"a": iter([np.ones(1)])}, "a: an iterator cannot be part of a tree"),
        ({"a": {"b": [np.arange(3)]}}, "a.b.0: not a floating array; got int64"),
        ({"a": {"b": deque([np.ones(1)])}}, "a.b: not a floating array; got deque"),
        ({"a": {}, "b": []}, "there is no array to act on"),
        ("text", "not a dict or list of arrays; got str"),
    ],
)
@pytest.mark.parametrize("function", ["clip", "bound", "prune"])
def test_what_is_no_tree_of_arrays_is_refused(function: str, whole: Any, text: str) -> None:
    rules = {"clip": kk.clip.ByNorm(1.0), "bound": kk.bound.Clamp(1.0)}
    with pytest.raises(InvalidArgument, match=rf"^numpy\.{function}: {text}"):
        if function == "prune":
            kk.numpy.prune(whole, sparsity=0.5)
        else:
            getattr(kk.numpy, function)(whole, rules[function])


def test_the_same_container_twice_is_no_cycle() -> None:
    shared = {"w": np.full(4, 1.0)}
    found, outcome, _ = kk.numpy.clip({"a": shared, "b": shared}, kk.clip.ByNorm(1.0))
    assert outcome.names == ("a.w", "b.w") and found["b"]["w"].tolist() == [0.5] * 4


def test_a_container_that_cannot_be_made_anew_is_refused(tmp_path: Any) -> None:
    np.savez(tmp_path / "w.npz", w=np.ones(2))
    with (
        np.load(tmp_path / "w.npz") as file,
        pytest.raises(
            Unsupported, match=r"^numpy\.bound: a NpzFile cannot be built anew.*pass a dict"
        ),
    ):
        kk.numpy.bound(file, kk.bound.Clamp(0.5))


def test_other_leaves_than_the_trees_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="tree: these are not the leaves.*got a.b, a.c$"):
        tree.unflatten({"a": {"b": 1}}, {"a.c": 1})


@pytest.mark.parametrize("make", [iter, deque, lambda arrays: (a for a in arrays)])
def test_what_is_walked_once_comes_back_as_a_list(make: Any) -> None:
    arrays = [{"w": np.full(4, 1.0)}, (np.full(1, 2.0),)]
    found, outcome, _ = kk.numpy.clip(make(arrays), kk.clip.ByNorm(0.5))
    assert type(found) is list and outcome.names == ("0.w", "1.0")
    assert found[0]["w"].tolist() == [0.25] * 4 and found[1][0].tolist() == [0.5]


RULES = [
    *(kk.clip.ByValue(0.4), kk.clip.ByNorm(0.7), kk.clip.ByGlobalNorm(1.0), kk.clip.AGC(0.3)),
    *(kk.clip.AutoClip(50), kk.clip.AdaGC(), kk.clip.SPAM(), kk.clip.SkipSpikes()),
    kk.clip.Chain(kk.clip.ByValue(0.5), kk.clip.ByGlobalNorm(1.0)),
    kk.clip.Groups({"layers.*": kk.clip.AGC(0.1), "head.*": None}, default=kk.clip.ByNorm(1.0)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_clipping_a_tree_is_clipping_the_flat_dict_of_its_leaves(rule: Any) -> None:
    def facts(grads: Any, name: bool) -> dict[str, Any]:
        filled = {
            n: np.full(np.shape(g), 0.5) for n, g in tree.flatten(grads).items() if g is not None
        }
        filled |= {n: np.ones(2) for n, g in tree.flatten(grads).items() if g is None}
        kind = dict(filled) if name else tree.unflatten(grads, filled)
        return {"weights": kind, "second_moments": kind}

    nested_state = flat_state = None
    for _ in range(4):
        grads = network()
        flat = tree.flatten(grads)
        nested, nested_outcome, nested_state = kk.numpy.clip(
            grads, rule, nested_state, unit_axes={"*weight": 0}, **facts(grads, name=False)
        )
        axes = {name: 0 for name in NAMES if name.endswith("weight")}
        found, flat_outcome, flat_state = kk.numpy.clip(
            flat, rule, flat_state, unit_axes=axes, **facts(flat, name=True)
        )
        assert same_containers(grads, nested)
        for name, leaf in tree.flatten(nested).items():
            assert (leaf is None) == (flat[name] is None), name
            np.testing.assert_array_equal(leaf, found[name], err_msg=name)
        assert nested_outcome.names == flat_outcome.names
        # What was learned belongs to names, so either may go on from the other's state.
        assert nested_state == flat_state
        nested_state = json.loads(json.dumps(flat_state))


@pytest.mark.parametrize(
    ("rule", "facts"),
    [
        (kk.bound.Clamp(0.4), {}),
        (kk.bound.NonNegative(), {}),
        (kk.bound.MaxNorm(0.7), {"unit_axes": {"*weight": 0}}),
        (kk.bound.SpectralCap(0.7), {"unit_axes": {"*weight": 0}}),
        (kk.bound.InitScaled(0.7), {"fan_in": {"layers.0.*": 3, "head.weight": 2}}),
    ],
    ids=lambda one: type(one).__name__,
)
def test_bounding_a_tree_is_bounding_the_flat_dict_of_its_leaves(rule: Any, facts: Any) -> None:
    weights = network()
    weights["layers"][1] = Layer(*weights["layers"][0])
    nested, outcome, state = kk.numpy.bound(weights, rule, **facts)
    flat, flat_outcome, flat_state = kk.numpy.bound(tree.flatten(weights), rule, **facts)
    assert same_containers(weights, nested) and list(tree.flatten(nested)) == list(flat)
    for name, leaf in tree.flatten(nested).items():
        np.testing.assert_array_equal(leaf, flat[name], err_msg=name)
    assert outcome.names == flat_outcome.names and outcome.left_alone == flat_outcome.left_alone
    assert outcome.engaged and state == flat_state


def test_heads_are_scaled_inside_of_a_tree() -> None:
    weights = {"attn": {"q": np.ones((4, 2)), "k": np.ones((4, 2))}}
    found, _, _ = kk.numpy.bound(
        weights,
        kk.bound.QKClip(1.0),
        logits={"attn": [4.0, 1.0]},
        attention={"attn": ("attn.q", "attn.k")},
    )
    product = found["attn"]["q"][:, 0] * found["attn"]["k"][:, 0]
    np.testing.assert_allclose(product, [0.25, 0.25, 1.0, 1.0])


def test_a_name_goes_before_a_glob_and_an_earlier_glob_before_a_later_one() -> None:
    weights = {"a": {"w": np.ones((2, 3))}, "b": {"w": np.ones((2, 3))}, "c": np.ones((2, 3))}
    axes = {"a*": 0, "*w": 1, "*": 1, "c": 0}
    _, outcome, _ = kk.numpy.bound(weights, kk.bound.MaxNorm(1.0), unit_axes=axes)
    assert [outcome.names.count(name) for name in ("a.w", "b.w", "c")] == [2, 3, 2]


@pytest.mark.parametrize(
    ("axes", "error", "text"),
    [
        ({"*wieght": 0}, UnknownName, r".*unit_axes\): the pattern.*got '\*wieght'; did you"),
        ({"a.weight": 2}, InvalidArgument, r"a.weight: the tensor has no such axis; got 2"),
        ({"*": 0}, InvalidArgument, r"gain: the tensor has no such axis; got 0"),
        ({"a.*": "0"}, InvalidArgument, r"a.weight: the tensor has no such axis; got 0"),
        ({"a.*": True}, InvalidArgument, r"a.weight: the tensor has no such axis; got True"),
        ({7: 0}, UnknownName, r".*unit_axes\): the pattern.*got '7'; known: a.weight, gain"),
        (0, InvalidArgument, r"unit_axes go by the names of tensors; got 0; .*'\*kernel'"),
    ],
)
@pytest.mark.parametrize("function", ["clip", "bound"])
def test_axes_that_fit_no_tensor_are_refused(
    function: str, axes: Any, error: type, text: str
) -> None:
    weights = {"a": {"weight": np.ones((2, 3))}, "gain": np.ones(())}
    rule = kk.clip.AGC(0.1) if function == "clip" else kk.bound.MaxNorm(1.0)
    beside = {"weights": weights} if function == "clip" else {}
    with pytest.raises(error, match=rf"^numpy\.{function}:? ?{text}"):
        getattr(kk.numpy, function)(weights, rule, unit_axes=axes, **beside)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"a": {"v": np.ones(2)}}, "a.w: this does not go with the gradients; got nothing of this"),
        ({"a": {"w": np.ones(3)}}, r"a.w: .*; got shape \(3,\); allowed: shape \(2,\)$"),
        ({"a": {"w": None}}, r"a.w: .*; got None; allowed: shape \(2,\)$"),
        ({"a": [np.ones(2)]}, "a.w: .*; got nothing of this name"),
        ({"a": {"w": np.array(["x", "y"])}}, "a.w: not a floating array; got <U1"),
        (np.ones(2), "not a dict or list of arrays; got ndarray"),
    ],
)
def test_weights_of_another_tree_are_refused(weights: Any, text: str) -> None:
    grads = {"a": {"w": np.ones(2)}}
    with pytest.raises(InvalidArgument, match=rf"^numpy\.clip\(weights\): {text}"):
        kk.numpy.clip(grads, kk.clip.AGC(0.1), weights=weights)


def test_weights_may_have_more_and_a_generator_stands_for_a_list() -> None:
    weights = ({"w": np.full(4, size), "frozen": np.ones(9)} for size in (1.0, 2.0))
    found, _, _ = kk.numpy.clip(
        [{"w": np.full(4, 1.0)}, {"w": np.full(4, 1.0)}], kk.clip.AGC(0.1), weights=weights
    )
    assert found[0]["w"].tolist() == pytest.approx([0.1] * 4)
    assert found[1]["w"].tolist() == pytest.approx([0.2] * 4)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masks_are_those_of_torch_ties_and_earlier_masks_too(allocation: str, dtype: type) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 5)).to(
        torch.float32 if dtype is np.float32 else torch.float64
    )
    weights: Any = [
        {"weight": np.round(RNG.normal(size=shape), 1).astype(dtype), "bias": np.ones(shape[0])}
        for shape in ((7, 9), (5, 7))
    ]
    masks = theirs = None
    for sparsity in (0.3, 0.3, 0.8):
        for layer, own in zip(module, weights, strict=True):
            layer.weight.data = torch.from_numpy(own["weight"].copy())
        weights, masks = kk.numpy.prune(
            weights, sparsity=sparsity, allocation=allocation, only="*weight", masks=masks
        )
        theirs = kk.torch.prune_(module, sparsity=sparsity, allocation=allocation, masks=theirs)
        assert set(masks) == {"0.weight", "1.weight"}
        for name, mask in masks.items():
            assert np.array_equal(mask, theirs[name].numpy()), name
        for layer, own in zip(module, weights, strict=True):
            assert np.array_equal(layer.weight.detach().numpy(), own["weight"])
            assert own["weight"].dtype == dtype and own["bias"].all()
        # Weights that grow again are masked; the others move on.
        weights = [{**own, "weight": np.round(own["weight"] + 0.1, 1)} for own in weights]


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30), st.floats(0, 0.99))
def test_exactly_the_asked_number_goes_and_nothing_larger(entries: list[int], share: float) -> None:
    weights = {"a": {"w": np.array(entries, dtype=np.float64)}}
    pruned, masks = kk.numpy.prune(weights, sparsity=share)
    kept = masks["a.w"]
    assert np.count_nonzero(~kept) == round(share * len(entries))
    sizes = np.abs(entries)
    assert max(sizes[~kept], default=0) <= min(sizes[kept], default=9)
    assert np.array_equal(pruned["a"]["w"], np.where(kept, entries, 0.0))
    assert not np.signbit(pruned["a"]["w"][~kept]).any()
    assert weights["a"]["w"].tolist() == entries


def test_gradients_are_masked_as_weights_and_absent_ones_stay() -> None:
    masks = {"0.w": np.array([True, False]), "1.w": np.array([False, False])}
    grads = [{"w": np.array([-1.0, -2.0]), "b": np.ones(1)}, {"w": None}]
    found = kk.numpy.masked(grads, masks)
    assert found[0]["w"].tolist() == [-1.0, 0.0] and found[0]["b"] is grads[0]["b"]
    assert found[1]["w"] is None and grads[0]["w"].tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("weights", "options", "error", "text"),
    [
        ({"w": np.ones(2)}, {"sparsity": 1.0}, InvalidArgument, "sparsity: the share of weights"),
        ({"w": np.ones(2)}, {"only": "*v"}, UnknownName, r"numpy\.prune: the pattern matches no"),
        ({"w": np.ones(2)}, {"score": "size"}, UnknownName, "score"),
        ({"w": np.ones(2)}, {"masks": {"v": np.ones(2, bool)}}, UnknownName, "a mask without its"),
        ({"w": np.ones(2)}, {"masks": {"w": np.ones(3, bool)}}, InvalidArgument, "w: the mask"),
        ({"w": np.ones(2)}, {"masks": {"w": np.ones(2)}}, InvalidArgument, "got float64"),
        ({"w": np.ones(2)}, {"masks": {"w": None}}, InvalidArgument, "w: .*; got NoneType"),
        ({"w": np.ones(2)}, {"masks": [1]}, InvalidArgument, "masks go by the names of arrays"),
        ({"a": [np.array([np.nan])]}, {}, NonFinite, r"^numpy\.prune: a\.0: a weight or its score"),
        ({"w": np.array([1e300])}, {}, NonFinite, "w: a weight is infinite in float32"),
        ({"w": np.array([1j])}, {}, InvalidArgument, "w: complex weights have no scores"),
        ({"w": None}, {}, InvalidArgument, "w: not a floating array; got NoneType"),
    ],
)
def test_what_cannot_be_pruned_is_refused(
    weights: Any, options: Any, error: type, text: str
) -> None:
    with pytest.raises(error, match=text):
        kk.numpy.prune(weights, **{"sparsity": 0.5, **options})
