"""Masks inside of ``jit`` equal the step-by-step reference in NumPy: scanned, mapped, skipped, stopped and resumed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported  # noqa: E402
from karikomi.jax.sparse_training import mask_plan, masked_optimizer  # noqa: E402

SHAPES = {"hidden": {"kernel": (6, 8), "bias": (8,)}, "head": {"kernel": (8, 3), "bias": (3,)}}
KERNELS = ("head.kernel", "hidden.kernel")
STEPS = 12
# A power of two, so that a step of SGD is exact in every compiled form.
RATE = 0.25
SGD = optax.sgd(RATE)


def drawn(seed: int) -> Any:
    """Return a tree of multiples of 1/64, whose sums are exact, with ties."""
    generator = np.random.default_rng(seed)
    made = lambda shape: generator.integers(-100, 100, shape).astype(np.float32) / 64  # noqa: E731
    return jax.tree.map(made, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))


PARAMS, SLOPES = (
    drawn(0),
    jax.tree.map(lambda *a: np.stack(a), *[drawn(1 + n) for n in range(STEPS)]),
)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {f"{a}.{b}": np.array(leaf) for a, own in tree.items() for b, leaf in own.items()}


@functools.cache
def compiled(tx: Any) -> Any:
    """Return a scan of training with gradients that do not depend on the weights."""

    @jax.jit
    def train(params: Any, state: Any, slopes: Any) -> Any:
        def step(carry: Any, slope: Any) -> Any:
            params, state = carry
            updates, state = tx.update(slope, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, kk.jax.masks(state))

        return jax.lax.scan(step, (params, state), slopes)

    return train


HALVES = [jax.tree.map(lambda a: a[part], SLOPES) for part in (slice(6), slice(6, None))]  # noqa: B023


@functools.cache
def optimizer(rule: Any) -> Any:
    return kk.jax.pruned(SGD, rule)


def trained(tx: Any, params: Any = PARAMS) -> Any:
    """Return ``(params, state)`` at the end, and ``(params, masks)`` after each step; scanned in two halves."""
    half, first = compiled(tx)(params, tx.init(params), HALVES[0])
    last, then = compiled(tx)(*half, HALVES[1])
    return last, jax.tree.map(lambda a, b: np.concatenate([a, b]), first, then)


def same(found: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def lowest(numbers: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """Return where the lowest are, by a stable sort."""
    order = np.argsort(np.where(among, numbers, np.inf), axis=None, kind="stable")
    found = np.zeros(among.size, bool)
    found[order[:count]] = True
    return found.reshape(among.shape)


def reference(rule: Any, masks: Any = None) -> Any:
    """Yield ``(params, masks)`` after each step of SGD, in plain NumPy, as the schedules' docstrings say."""
    weights, masks, since = flat(PARAMS), dict(masks or {}), 0
    for step in range(1, STEPS + 1):
        dense = {name: slopes[step - 1] for name, slopes in flat(SLOPES).items()}
        for name in weights:
            kept = masks.get(name, np.array(True))
            weights[name] = np.where(kept, weights[name] - np.float32(RATE) * dense[name], 0)
        due = [at for at in range(0 if step == 1 else step, step + 1) if rule.due(at)]
        if due == [0] and rule.regrows_by and masks:
            pass
        elif due and rule.regrows_by and masks:
            for name, kept in masks.items():
                count = int(rule.drop_at(due[-1]) * kept.sum())
                drop = lowest(np.abs(weights[name]), kept, count)
                gain = np.abs(dense[name])
                if rule.regrows_by == "noise":
                    gain = np.asarray(mask_plan.noise(name, kept.shape, rule.seed, due[-1]))
                masks[name] = (kept & ~drop) | lowest(-gain, ~kept | drop, count)
        elif due:
            own = {name: weights[name] for name in KERNELS}
            slopes = {name: flat(SLOPES)[name][since:step] for name in KERNELS}
            means = {name: rows.sum(0) / np.float32(len(rows)) for name, rows in slopes.items()}
            since = step
            _, masks = kk.numpy.prune(
                own,
                sparsity=rule.sparsity_at(step),
                allocation=rule.allocation,
                score=rule.scored_by(),
                facts={"gradient": means} if rule.scored_by().needs else None,
                masks=masks,
            )
        weights |= {name: np.where(kept, weights[name], 0) for name, kept in masks.items()}
        yield dict(weights), dict(masks)


RIGL = kk.prune.RigL(0.6, until=11, every=3, drop=0.5, score="magnitude", only="*kernel")


SNIP = kk.prune.Gradual(0.8, steps=(0, 9), every=4, allocation="erk", score="snip", only="*kernel")
SET = kk.prune.SET(0.6, until=11, every=2, only="*kernel")
GIVEN = {name: flat(PARAMS)[name] > 0 for name in KERNELS}


@pytest.mark.parametrize(
    ("rule", "given"), [(SNIP, None), (RIGL, None), (SET, GIVEN)], ids=["Gradual", "RigL", "SET"]
)
def test_a_scan_equals_the_reference_step_by_step(rule: Any, given: Any) -> None:
    tx = optimizer(rule) if given is None else kk.jax.pruned(SGD, rule, masks=given)
    (params, _), (after, masks) = trained(tx)
    after, changed = flat(after), 0
    before: dict[str, np.ndarray] = {}
    for step, (expected, kept) in enumerate(reference(rule, given)):
        for name, weight in expected.items():
            assert np.array_equal(after[name][step], weight), (step, name)
        for name in KERNELS:
            own = kept.get(name, np.ones(expected[name].shape, bool))
            assert np.array_equal(masks[name][step], own), (step, name)
            assert not after[name][step][~own].any()
        changed += any(not np.array_equal(kept[name], before.get(name, [])) for name in kept)
        before = kept
    assert changed >= 3
    assert same(params, jax.tree.map(lambda a: jnp.asarray(a[-1]), unflat(after)))
    if rule.regrows_by is None:
        gone = sum(int((~mask).sum()) for mask in before.values())
        assert gone == round(rule.sparsity * 72)


def unflat(arrays: dict[str, np.ndarray]) -> Any:
    return {a: {b: arrays[f"{a}.{b}"] for b in own} for a, own in SHAPES.items()}


def test_vmap_prunes_every_network_by_itself_each_at_its_own_step() -> None:
    tx = optimizer(SNIP)
    start, later = (PARAMS, tx.init(PARAMS)), compiled(tx)(drawn(99), tx.init(PARAMS), HALVES[1])[0]
    both = jax.tree.map(lambda *a: np.stack(a), start, later)
    (_, state), _ = jax.jit(jax.vmap(compiled(tx), (0, 0, None)))(*both, HALVES[0])
    assert state.steps.tolist() == [6, 12]
    for number, own in enumerate((start, later)):
        (_, alone), _ = compiled(tx)(*own, HALVES[0])
        assert same(jax.tree.map(lambda a: a[number], state.masks), alone.masks)  # noqa: B023
        assert not all(mask.all() for mask in alone.masks.values())


def test_derivatives_pass_through_a_step_that_makes_masks() -> None:
    tx = kk.jax.pruned(SGD, kk.prune.RigL(0.5, until=9, every=1, drop=0.9, score="magnitude"))
    params, slopes = jnp.array([1.0, 4.0, 3.0, 2.0]), jnp.array([4.0, -1.0, 1.0, 2.0])

    @jax.jit
    def after(factor: Any) -> Any:
        own, state = params, tx.init(params)
        for _ in range(2):
            updates, state = tx.update(factor * slopes, state, own)
            own = optax.apply_updates(own, updates)
        return own, (own, kk.jax.masks(state)["array"])

    slope, (value, mask) = jax.jacrev(after, has_aux=True)(1.0)
    # The first, whose gradient is the largest, takes the place of the third in the second step, from zero.
    assert mask.tolist() == [True, True, False, False]
    assert (value.tolist(), slope.tolist()) == ([0.0, 4.5, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0])


# --- what an optimizer holds


def test_masks_that_do_not_change() -> None:
    mask = np.array([True, False, True])
    tx = optax.chain(kk.jax.pruned(optax.sgd(0.5), {"w": mask}), optax.identity())
    params = {"w": np.array([1.0, 1e-45, 3.0], np.float32), "b": np.ones(1, np.float32)}
    slopes = {"w": np.ones(3, np.float32), "b": np.ones(1, np.float32)}
    updates, state = jax.jit(tx.update)(slopes, tx.init(params), params)
    after = {name: params[name] + np.asarray(update) for name, update in updates.items()}
    assert after["w"].tolist() == [0.5, 0.0, 2.5] and after["b"].tolist() == [0.5]
    assert kk.jax.masks(state)["w"].tolist() == mask.tolist()


def test_zeros_are_exact_in_mixed_types() -> None:
    types = {"narrow": (jnp.bfloat16, jnp.float32), "wide": (jnp.float32, jnp.bfloat16)}
    moves = optax.stateless(lambda u, _: {name: u[name].astype(types[name][1]) for name in u})
    tx = kk.jax.pruned(moves, {n: np.array([False, True, True, False]) for n in types})
    params = {n: jnp.asarray([1.001, -2.003, 3.1, 0.017], own) for n, (own, _) in types.items()}
    slopes = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.01), params)
    updates, _ = jax.jit(tx.update)(slopes, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    for name, leaf in after.items():
        assert leaf.dtype == types[name][0]
        assert (np.asarray(leaf) == 0).tolist() == [True, False, False, True]


def test_straight_through_weights_stay_dense_and_come_back() -> None:
    rule = kk.prune.Gradual(0.5, steps=(0, 99), every=1, initial=0.5)
    tx = kk.jax.pruned(SGD, rule, straight_through=True)
    params, target = jnp.array([1.0, 0.75, 0.5, 0.25]), jnp.array([0.0, 0.0, 2.0, 2.0])

    def loss(own: Any, state: Any) -> Any:
        return 0.5 * jnp.sum((kk.jax.straight_through(own, kk.jax.masks(state)) - target) ** 2)

    @jax.jit
    def step(own: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(own, state), state, own)
        return optax.apply_updates(own, updates), state

    state = tx.init(params)
    kept = []
    for _ in range(5):
        params, state = step(params, state)
        kept.append(kk.jax.masks(state)["array"].tolist())
        assert params.all()
    assert kept[0] == [True, False, True, False] and kept[-1] == [False, False, True, True]


def test_what_may_be_around_it() -> None:
    tree = {"w": jnp.array([4.0, 3.0, 2.0, 1.0]), "b": jnp.ones(2)}
    inner = kk.jax.pruned(optax.sgd(0.125), kk.prune.OneShot(0.5, step=2, only="w"))
    parts = optax.multi_transform({"p": inner, "s": optax.sgd(0.125)}, {"w": "p", "b": "s"})
    tx = optax.MultiSteps(parts, 2)
    params, state, update, gone = tree, tx.init(tree), jax.jit(tx.update), []
    for _ in range(4):
        updates, state = update(jax.tree.map(jnp.ones_like, tree), state, params)
        params = optax.apply_updates(params, updates)
        gone.append(int((params["w"] == 0).sum()))
    assert gone == [0, 0, 0, 2] and kk.jax.masks(state)["w"].tolist() == [True, True, False, False]
    assert params["b"].tolist() == [0.75, 0.75]
    doubled = optax.tree.map_params(inner, lambda leaf: 2 * leaf, inner.init(tree))
    assert doubled.masks["w"].tolist() == [2] * 4 and int(doubled.steps) == 0


# --- steps that are not taken


def test_a_skipped_step_changes_no_mask_and_masked_moments_are_zero() -> None:
    inner = kk.jax.clipped(optax.adamw(0.1, weight_decay=0.1), kk.clip.ByGlobalNorm(1.0))
    tx = kk.jax.pruned(inner, kk.prune.OneShot(0.5, step=2))
    params = {"w": jnp.array([4.0, 3.0, 2.0, 1.0])}
    state, update, gone = tx.init(params), jax.jit(tx.update), []
    for slope in (1.0, jnp.nan, jnp.inf, 1.0, 1.0):
        updates, state = update({"w": jnp.array([1.0, 1.0, 1.0, slope])}, state, params)
        params = optax.apply_updates(params, updates)
        gone.append(int((params["w"] == 0).sum()))
        if len(gone) == 3:
            assert (int(state.steps), int(state.seen)) == (3, 1)
            with pytest.raises(NonFinite, match="masks are due for 2 steps"):
                kk.jax.check(state, stop_after=2)
    assert gone == [0, 0, 0, 2, 2] and int(state.seen) == 5
    kk.jax.check(state, stop_after=1)
    adam = state.inner.inner[0]
    for moment in (adam.mu, adam.nu):
        assert (np.asarray(moment["w"]) == 0).tolist() == [False, False, True, True]
    # Of the last step: gradients of masked weights do not count.
    assert kk.jax.outcome(state).pre == pytest.approx(2**0.5)


def test_what_skips_is_recognised() -> None:
    state = optax.apply_if_finite(optax.sgd(0.1), 3).init(jnp.ones(2))
    assert not bool(masked_optimizer.skipped((state, None)))
    assert bool(masked_optimizer.skipped([state._replace(last_finite=jnp.array(False))]))


def test_weights_that_are_not_finite_change_no_mask() -> None:
    tx = kk.jax.pruned(SGD, kk.prune.RigL(0.5, until=9, every=2, score="magnitude"))
    params = {"w": jnp.array([4.0, 3.0, 2.0, 1.0])}
    update = jax.jit(tx.update)
    updates, state = update({"w": jnp.zeros(4)}, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    before = kk.jax.masks(state)["w"].tolist()
    # Of a masked weight: the largest, it would be regrown.
    _, state = update({"w": jnp.array([0.0, 0.0, jnp.nan, 0.0])}, state, params)
    assert kk.jax.masks(state)["w"].tolist() == before == [True, True, False, False]
    assert (int(state.steps), int(state.seen)) == (2, 1)


# --- checkpoints


def test_stopped_and_resumed_equals_not_stopping(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = optimizer(SNIP)
    half, _ = compiled(tx)(PARAMS, tx.init(PARAMS), HALVES[0])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", half)
        checkpointer.wait_until_finished()
        fresh = jax.tree.map(jnp.asarray, (PARAMS, tx.init(PARAMS)))
        read = checkpointer.restore(tmp_path / "step", fresh)
    assert same(compiled(tx)(*read, HALVES[1]), compiled(tx)(*half, HALVES[1]))


# --- Python numbers as leaves, and what is refused


def test_python_floats_are_leaves_of_every_transform() -> None:
    params = {"w": 3.0, "b": 0.5}
    chain = optax.chain(
        kk.jax.clip(kk.clip.ByGlobalNorm(1.0)), optax.sgd(1.0), kk.jax.bound(kk.bound.Clamp(2.0))
    )
    tx = kk.jax.pruned(chain, {"b": np.array(False)})
    updates, state = jax.jit(tx.update)({"w": 3.0, "b": 4.0}, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert {name: float(leaf) for name, leaf in after.items()} == {"w": 2.0, "b": 0.0}
    assert kk.jax.masks(state)["b"].shape == ()
    assert kk.jax.prune(params, sparsity=0.5)[0] == {"w": 3.0, "b": 0.0}
    codes = kk.jax.quantize(params, bits=8)
    assert abs(float(kk.jax.decode(codes)["w"]) - 3.0) < 0.02


ONE = kk.prune.OneShot(0.5)
NM = kk.prune.OneShot(0.5, pattern="2:4", only="w")
AXES = {"w": kk.prune.Layout(units=1, inputs=0)}
MASK = {"w": jnp.ones((2, 4), bool)}


def scored(score: str) -> Any:
    return kk.prune.OneShot(0.5, score=score)


def rigl(**more: Any) -> Any:
    return kk.prune.RigL(0.5, until=9, **more)


@pytest.mark.parametrize(
    ("prune", "more", "error", "said"),
    [
        (0.5, {}, InvalidArgument, "not a schedule"),
        ({}, {"masks": {}}, InvalidArgument, "masks are given twice"),
        (kk.prune.OneShot(0.5, only="x"), {}, UnknownName, "'x'"),
        ({"x": jnp.ones(1, bool)}, {}, UnknownName, "'x'"),
        ({"w": jnp.ones(1, bool)}, {}, InvalidArgument, "bool (2, 4)"),
        (scored("wanda"), {}, Unsupported, "input_norm"),
        (scored("movement"), {}, Unsupported, "needs moved"),
        (scored("lamp"), {}, Unsupported, "all weights of a tensor at once"),
        (scored("obc"), {}, Unsupported, "re-fits"),
        (kk.prune.OneShot(0.5, allocation="lamp"), {}, Unsupported, "depends on the scores"),
        (kk.prune.OneShot(0.5, pattern="units"), {}, Unsupported, "Units are not masked"),
        (NM, {}, InvalidArgument, "which axis"),
        (NM, {"layouts": AXES}, Unsupported, "multiple of 4 inputs"),
        (NM, {"layouts": {"w": 0}}, InvalidArgument, "not a layout"),
        (rigl(), {"straight_through": True}, Unsupported, "made anew"),
        (rigl(allocation="global"), {}, Unsupported, "shared threshold"),
        (kk.prune.Gradual(0.5, steps=(0, 99_999), every=1), {}, Unsupported, "100,000 times"),
        (kk.prune.Iterative(0.5, steps=(1, 3), rounds=2, rewind=0), {}, Unsupported, "rewind"),
    ],
)
def test_what_means_nothing_is_refused(
    prune: Any, more: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as raised:
        kk.jax.pruned(SGD, prune, **more).init({"w": jnp.ones((2, 4)), "b": jnp.ones(3)})
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda t: kk.jax.pruned(cast(Any, 0.5), ONE), InvalidArgument, "not an optax optimizer"),
        (lambda t: tx().update(t, SGD.init(t), t), InvalidArgument, "not the state of `pruned`"),
        (lambda t: tx().update(t, tx().init(t)), InvalidArgument, "params=None"),
        (lambda t: tx().update(t, tx(MASK).init(t), t), InvalidArgument, "another schedule"),
        (lambda t: tx().init({"w": jnp.ones(2, jnp.complex64)}), Unsupported, "complex"),
        (lambda t: tx().init({"w": jnp.ones(2, int)}), InvalidArgument, "not a floating array"),
        (lambda t: kk.jax.masks(SGD.init(t)), InvalidArgument, "exactly one `pruned`"),
        (lambda t: kk.jax.check(SGD.init(t)), InvalidArgument, "no clip and no mask"),
        (lambda t: kk.jax.masks_at(t, cast(Any, MASK), 0), InvalidArgument, "not a schedule"),
        (lambda t: kk.jax.straight_through(t, {"x": MASK["w"]}), UnknownName, "'x'"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as raised:
        call({"w": jnp.ones((2, 4)), "b": jnp.ones(3)})
    assert said in str(raised.value) and "\n" not in str(raised.value)


def tx(prune: Any = ONE) -> Any:
    return kk.jax.pruned(SGD, prune)


def test_where_sparsity_falls_the_masks_are_those_of_numpy() -> None:
    params = {"a": jax.random.normal(jax.random.key(0), (16, 8)), "b": jnp.linspace(-1.0, 1.0, 21)}
    rule = kk.prune.Gradual(0.5, initial=0.8, steps=(0, 4), every=1)
    tx = kk.jax.pruned(optax.sgd(0.0), rule)
    state, update = tx.init(params), jax.jit(tx.update)
    weights, masks = {name: np.asarray(value) for name, value in params.items()}, {}
    shares = []
    for step in range(1, 6):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        weights, masks = kk.numpy.prune_at(weights, rule, step, masks)
        for name, mask in kk.jax.masks(state).items():
            np.testing.assert_array_equal(mask, masks[name])
        shares.append(sum(int((~mask).sum()) for mask in masks.values()))
    assert shares == [round(149 * rule.sparsity_at(step)) for step in range(1, 6)]
    assert shares[0] > shares[-1]
