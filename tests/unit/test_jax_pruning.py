"""Masks of pytrees and of plain arrays in training loops: the same weights go, and a stop changes nothing."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported  # noqa: E402

GRADUAL = kk.prune.Gradual(0.8, steps=(5, 25), every=5, only="*kernel")
CLIP, BOUND, PENALTY = kk.clip.ZClip(2.0, warmup=3), kk.bound.Clamp(0.5), kk.prune.L1(1e-3)
STEPS, STOP = 30, 17


def params(seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    shapes = {"kernel": (6, 8), "bias": (8,)}, {"kernel": (8, 3), "bias": (3,)}
    made = [{n: jnp.asarray(generator.normal(0, 0.4, s)) for n, s in one.items()} for one in shapes]
    return {"hidden": made[0], "head": made[1]}


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.random.default_rng(step).normal(size=(16, 6))
    return inputs, np.sin(inputs[:, :3]) * (40.0 if step == 12 else 1.0)


def forward(own: Any, inputs: Any, xp: Any) -> Any:
    hidden = xp.tanh(inputs @ own["hidden"]["kernel"] + own["hidden"]["bias"])
    return hidden @ own["head"]["kernel"] + own["head"]["bias"]


def leaves_equal(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# --- masks


@given(
    sparsity=st.floats(0.0, 0.99),
    seed=st.integers(0, 99),
    score=st.sampled_from(["magnitude", "random"]),
)
def test_the_same_weights_go_as_in_numpy(sparsity: float, seed: int, score: str) -> None:
    tree = params(seed)
    pruned, masks = kk.jax.prune(tree, sparsity=sparsity, score=score)
    arrays = jax.tree.map(np.asarray, tree)
    expected, kept = kk.numpy.prune(arrays, sparsity=sparsity, score=score)
    assert leaves_equal(pruned, expected)
    assert {n: np.asarray(m).tolist() for n, m in masks.items()} == {
        n: m.tolist() for n, m in kept.items()
    }
    assert sum(int((~m).sum()) for m in masks.values()) == round(sparsity * 83)


def test_bfloat16_is_scored_as_it_is_and_stays_so() -> None:
    tree = {"w": jnp.arange(-8, 8, dtype=jnp.bfloat16), "none": None}
    pruned, masks = kk.jax.prune(tree, sparsity=0.5)
    assert pruned["w"].dtype == jnp.bfloat16 and pruned["none"] is None
    # Magnitudes 0 to 3 once or twice: seven weights; then the first of the two fours.
    assert np.flatnonzero(~np.asarray(masks["w"])).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


def test_units_by_layout_and_what_was_gone_stays_gone() -> None:
    tree = params()
    axes = {"hidden.kernel": kk.prune.Layout(units=-1, inputs=-2)}
    first, masks = kk.jax.prune(
        tree, width=0.5, pattern="units", layouts=axes, only="hidden.kernel"
    )
    assert int((np.asarray(masks["hidden.kernel"]).any(axis=0)).sum()) == 4
    _, more = kk.jax.prune(first, sparsity=0.75, only="hidden.kernel", masks=masks)
    assert not (np.asarray(more["hidden.kernel"]) & ~np.asarray(masks["hidden.kernel"])).any()
    assert int(more["hidden.kernel"].sum()) == 12


def test_masked_runs_compiled_and_zeroes_whatever_stands_there() -> None:
    masks = {"w": jnp.array([True, False, False, False])}
    tree = {"w": jnp.array([-1.0, jnp.nan, -jnp.inf, -2.0]), "b": jnp.ones(1), "none": None}
    found = jax.jit(kk.jax.masked)(tree, masks)
    assert found["w"].tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert not np.signbit(np.asarray(found["w"])[1:]).any()
    assert found["b"].tolist() == [1.0] and found["none"] is None
    slopes = jax.grad(lambda t: (kk.jax.masked(t, masks)["w"] ** 2).sum())({"w": jnp.ones(4)})
    assert slopes["w"].tolist() == [2.0, 0.0, 0.0, 0.0]


def test_moments_of_masked_weights_are_forgotten() -> None:
    tree, tx = params(), kk.jax.clipped(optax.adam(0.1), kk.clip.ZClip())
    updates, state = tx.update(tree, tx.init(tree), tree)
    _, masks = kk.jax.prune(tree, sparsity=0.5)
    found = jax.jit(kk.jax.masked_moments)(state, tree, masks)
    for moment in ("mu", "nu"):
        before, after = (getattr(one.inner[0], moment) for one in (state, found))
        assert leaves_equal(after, kk.jax.masked(before, masks))
        assert not leaves_equal(after, before)
    assert int(found.inner[0].count) == 1 and leaves_equal(found.clip, state.clip)


@pytest.mark.parametrize("way", ["masked", "prefix", "multi_transform"])
def test_moments_of_a_part_of_the_params_are_forgotten(way: str) -> None:
    tree = params()
    inner, freeze = optax.adam(0.1), optax.set_to_zero()
    kernels = jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path[-1]), tree)
    labels = jax.tree.map(lambda kernel: "train" if kernel else "freeze", kernels)
    tx, names = {
        "masked": (optax.masked(inner, kernels), ("hidden.kernel", "head.kernel")),
        "prefix": (optax.masked(inner, {"hidden": False, "head": True}), ("head.kernel",)),
        "multi_transform": (
            optax.multi_transform({"train": inner, "freeze": freeze}, labels),
            ("hidden.kernel", "head.kernel"),
        ),
    }[way]
    _, state = tx.update(tree, tx.init(tree), tree)
    _, masks = kk.jax.prune(tree, sparsity=0.5)
    found = jax.jit(kk.jax.masked_moments)(state, tree, masks)
    assert jax.tree.structure(found) == jax.tree.structure(state)

    def adam(of: Any) -> Any:
        return (of.inner_states["train"] if way == "multi_transform" else of).inner_state[0]

    for name in names:
        layer, leaf = name.split(".")
        for moment in ("mu", "nu"):
            before, after = (getattr(adam(of), moment)[layer][leaf] for of in (state, found))
            assert leaves_equal(after, jnp.where(masks[name], before, 0.0))
            assert not leaves_equal(after, before)
    assert int(adam(found).count) == 1
    with pytest.raises(UnknownName, match="'w'"):
        kk.jax.masked_moments(state, tree, {"w": jnp.ones(2, bool)})


def test_counters_and_keys_beside_weights_stay() -> None:
    weights = jnp.arange(4.0)
    tree = {"w": weights, "step": jnp.array(3), "key": jax.random.key(0), "name": "a", "x": None}
    pruned, masks = kk.jax.prune(tree, sparsity=0.5, only="w")
    assert pruned["w"].tolist() == [0.0, 0.0, 2.0, 3.0] and list(masks) == ["w"]
    assert all(pruned[name] is tree[name] for name in ("step", "key", "name", "x"))
    rule = kk.prune.OneShot(0.5, step=2, only="w")
    for step in range(4):
        later, masks = kk.jax.update_masks(tree, rule, step, masks)
        assert later["w"].tolist() == pruned["w"].tolist() and later["key"] is tree["key"]
    for name in ("step", "key", "name"):
        with pytest.raises(InvalidArgument, match=f"{name}: not a floating array"):
            kk.jax.prune(tree, sparsity=0.5, only=["w", name])
    with pytest.raises(InvalidArgument, match="step: not a floating array"):
        kk.jax.masked(tree, {"step": jnp.array(True)})


def test_between_the_steps_of_a_schedule_weights_stay_masked() -> None:
    rule = kk.prune.Gradual(0.5, steps=(0, 4), every=4)
    masks = {"w": jnp.array([True, False, True])}
    moved = {"w": jnp.array([1.0, 2.0, 3.0]), "b": jnp.array([4.0])}
    after, kept = kk.jax.update_masks(moved, rule, 3, masks)
    assert (after["w"].tolist(), after["b"].tolist()) == ([1.0, 0.0, 3.0], [4.0])
    assert kept["w"].tolist() == [True, False, True]


def test_a_part_of_a_state_with_other_shapes_is_no_moment() -> None:
    weights, masks = {"w": jnp.ones((2, 3))}, {"w": jnp.zeros((2, 3), bool)}
    state = {"rows": {"w": jnp.ones(2)}, "moments": {"w": jnp.ones((2, 3))}}
    after = kk.jax.masked_moments(state, weights, masks)
    assert after["rows"]["w"].tolist() == [1.0, 1.0] and not after["moments"]["w"].any()


def test_a_byte_of_bfloat16_counts_as_one() -> None:
    tree = {"w": jnp.arange(1, 17, dtype=jnp.bfloat16)}
    _, masks = kk.jax.prune(tree, bytes=18)
    # Sixteen bits for the mask, and two bytes each.
    assert int(masks["w"].sum()) == 8


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda t: kk.jax.prune(t), InvalidArgument, "one target"),
        (lambda t: kk.jax.prune(t, sparsity=0.5, only="kernels"), UnknownName, "kernels"),
        (lambda t: jax.jit(lambda x: kk.jax.prune(x, sparsity=0.5))(t), Unsupported, "under jit"),
        (lambda t: kk.jax.masked(t, {"w": jnp.ones(2, bool)}), UnknownName, "'w'"),
        (lambda t: kk.jax.masked(t, {"head.bias": jnp.ones(2, bool)}), InvalidArgument, "head.b"),
        (lambda t: kk.jax.masked(t, {"head.bias": jnp.ones(3)}), InvalidArgument, "bool (3,)"),
        (lambda t: kk.jax.update_masks(t, 0.5, 1), InvalidArgument, "schedule"),
        (lambda t: kk.jax.update_masks(t, GRADUAL, "5"), InvalidArgument, "whole number"),
        (lambda t: kk.jax.update_masks(t, GRADUAL, 5, [1]), InvalidArgument, "names of leaves"),
        (lambda t: kk.jax.update_masks(t, GRADUAL, 6, [1]), InvalidArgument, "names of leaves"),
        (lambda t: kk.jax.masked(t, None), InvalidArgument, "names of leaves; got NoneType"),
        (lambda t: kk.jax.prune(t, sparsity=0.5, score="obc"), Unsupported, "kk.torch.prune_"),
        (
            lambda t: kk.jax.prune(t, sparsity=0.5, facts={"gradient": jnp.ones(3)}),
            InvalidArgument,
            "facts['gradient']: not a mapping",
        ),
        (lambda t: kk.jax.update_masks(t, kk.prune.SET(0.5, until=9), 1), Unsupported, "attach"),
        (
            lambda t: kk.jax.prune({"w": jnp.array([jnp.nan, 1.0])}, sparsity=0.5),
            NonFinite,
            "w: a weight",
        ),
    ],
)
def test_what_means_nothing_is_refused(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as raised:
        call(params())
    assert said in str(raised.value) and "\n" not in str(raised.value)


# --- all together, killed and resumed


@functools.cache
def jax_loop() -> tuple[Any, Any]:
    """Return an optimizer of everything, and its compiled step."""
    tx = kk.jax.clipped(optax.chain(optax.adamw(0.05), kk.jax.bound(BOUND)), CLIP)

    @jax.jit
    def step(own: Any, state: Any, masks: Any, inputs: Any, targets: Any) -> Any:
        def loss(own: Any) -> Any:
            error = jnp.mean((forward(own, inputs, jnp) - targets) ** 2)
            return error + kk.jax.penalty(own, PENALTY, only="*kernel")

        grads = kk.jax.masked(jax.grad(loss)(own), masks)
        updates, state = tx.update(grads, state, own)
        return kk.jax.masked(optax.apply_updates(own, updates), masks), state

    return tx, step


def train_jax(saved: Any, steps: range) -> Any:
    _, step = jax_loop()
    own, state, masks = saved["params"], saved["state"], saved["masks"]
    for number in steps:
        own, state = step(own, state, masks, *batch(number))
        if GRADUAL.due(number):
            own, masks = kk.jax.update_masks(own, GRADUAL, number, masks)
            state = kk.jax.masked_moments(state, own, masks)
    return {"params": own, "state": state, "masks": masks}


@pytest.mark.parametrize("way", ["orbax", "npz"])
def test_jax_clip_bound_penalty_and_pruning_killed_and_resumed(way: str, tmp_path: Path) -> None:
    fresh = {"params": params(), "state": jax_loop()[0].init(params()), "masks": {}}
    straight = train_jax(fresh, range(1, STEPS + 1))
    half = train_jax(fresh, range(1, STOP + 1))
    resumed = train_jax(through(half, way, tmp_path), range(STOP + 1, STEPS + 1))
    assert leaves_equal(resumed, straight)
    check_trained(straight["params"], straight["masks"])
    assert kk.jax.outcome(straight["state"]).pre > 0.0


def through(saved: Any, way: str, folder: Path) -> Any:
    """Return what a new process would read, of the structure that it would know."""
    if way == "npz":
        leaves, form = jax.tree.flatten(saved)
        np.savez(folder / "state.npz", *[np.asarray(leaf) for leaf in leaves])
        with np.load(folder / "state.npz") as file:
            return jax.tree.unflatten(form, [jnp.asarray(file[name]) for name in file.files])
    ocp = pytest.importorskip("orbax.checkpoint")
    fresh = {"params": params(), "state": jax_loop()[0].init(params())}
    like = fresh | {
        "masks": {name: jnp.ones(mask.shape, bool) for name, mask in saved["masks"].items()}
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "step", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "step", like)


def check_trained(own: Any, masks: Any) -> None:
    """Check that all four did what they say."""
    kernels = {f"{layer}.kernel": np.asarray(own[layer]["kernel"]) for layer in own}
    assert set(masks) == set(kernels)
    assert sum(int((~np.asarray(mask)).sum()) for mask in masks.values()) == round(0.8 * 72)
    for name, kernel in kernels.items():
        assert not kernel[~np.asarray(masks[name])].any()
        assert np.abs(kernel).max() <= 0.5 + 1e-6


# --- the same in plain NumPy


def train_numpy(saved: dict[str, Any], steps: range) -> dict[str, Any]:
    own, momentum = saved["weights"], saved["momentum"]
    clip, bound, masks = saved["clip"], saved["bound"], saved["masks"]
    for number in steps:
        inputs, targets = batch(number)
        grads = slopes(own, inputs, targets)
        _, pull = kk.numpy.penalty(own, PENALTY, only="*kernel")
        grads = kk.numpy.masked(total(grads, pull), masks)
        grads, _, clip = kk.numpy.clip(grads, CLIP, clip)
        momentum = kk.numpy.masked(total(momentum, grads, 0.9), masks)
        own, _, bound = kk.numpy.bound(total(own, momentum, 1.0, -0.05), BOUND, bound)
        own, masks = kk.numpy.prune_at(own, GRADUAL, number, masks)
    return {"weights": own, "momentum": momentum, "clip": clip, "bound": bound, "masks": masks}


def total(one: Any, other: Any, *factors: float) -> Any:
    first, second = factors if len(factors) == 2 else (*factors, 1.0) if factors else (1.0, 1.0)
    return jax.tree.map(lambda a, b: first * a + second * b, one, other)


def slopes(own: Any, inputs: np.ndarray, targets: np.ndarray) -> Any:
    hidden = np.tanh(inputs @ own["hidden"]["kernel"] + own["hidden"]["bias"])
    back = 2.0 * (forward(own, inputs, np) - targets) / targets.size
    inner = (back @ own["head"]["kernel"].T) * (1.0 - hidden**2)
    return {
        "hidden": {"kernel": inputs.T @ inner, "bias": inner.sum(0)},
        "head": {"kernel": hidden.T @ back, "bias": back.sum(0)},
    }


def test_numpy_clip_bound_penalty_and_pruning_killed_and_resumed(tmp_path: Path) -> None:
    own = jax.tree.map(lambda a: np.asarray(a, np.float64), params())
    still = jax.tree.map(np.zeros_like, own)
    fresh = {"weights": own, "momentum": still, "clip": None, "bound": None, "masks": {}}
    straight = train_numpy(fresh, range(1, STEPS + 1))
    half = train_numpy(fresh, range(1, STOP + 1))
    leaves, form = jax.tree.flatten((half["weights"], half["momentum"], half["masks"]))
    np.savez(tmp_path / "arrays.npz", *leaves)
    states = json.loads(json.dumps({"clip": half["clip"], "bound": half["bound"]}))
    with np.load(tmp_path / "arrays.npz") as file:
        read = jax.tree.unflatten(form, [file[name] for name in file.files])
    again = dict(zip(("weights", "momentum", "masks"), read, strict=True)) | states
    resumed = train_numpy(again, range(STOP + 1, STEPS + 1))
    assert leaves_equal(resumed, straight)
    check_trained(straight["weights"], straight["masks"])


def test_numpy_schedules_of_other_kinds() -> None:
    own = {"w": np.arange(1.0, 101.0)}
    rule = kk.prune.Iterative(0.488, steps=(1, 3), rounds=3)
    masks, left = None, []
    for step in range(5):
        # What is gone has moved far from zero, and is gone all the same.
        moved = np.where(own["w"] == 0.0, 999.0, own["w"] + 1.0)
        own, masks = kk.numpy.prune_at({"w": moved}, rule, step, masks)
        left.append(int(np.count_nonzero(own["w"])))
    assert left == [100, 80, 64, 51, 51]
    assert np.flatnonzero(own["w"]).tolist() == list(range(49, 100))
    pattern = kk.prune.OneShot(0.5, step=2, pattern=kk.prune.NofM(keep=2, of=4))
    axes = {"w": kk.prune.Layout(units=0, inputs=1)}
    grid = {"w": np.arange(1.0, 17.0).reshape(2, 8)}
    pruned, _ = kk.numpy.prune_at(grid, pattern, 2, layouts=axes)
    assert [int(np.count_nonzero(row)) for row in pruned["w"]] == [4, 4]
    for other in (
        kk.prune.RigL(0.5, until=9),
        kk.prune.Iterative(0.5, steps=(1, 3), rounds=2, rewind=0),
    ):
        with pytest.raises(Unsupported, match="brings weights back"):
            kk.numpy.prune_at(own, other, 1)
