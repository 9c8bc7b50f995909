"""Options for those who come from a peer: bad entries alone, examples one by one, units by rank."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, vmap

import karikomi as kk
from contract.frameworks import FRAMEWORKS, SHAPES
from contract.namespaces import load_quietly
from contract.row import Row
from depth import examples
from karikomi.errors import InvalidArgument, Unsupported
from parity import published

EAGER = ["numpy", "torch_module", "torch_attach", "jax", "keras on torch", "tensorflow"]
CLIPS = [
    kk.clip.ByGlobalNorm(1.0),
    kk.clip.ByNorm(0.5, norm=1),
    kk.clip.ByValue(0.3),
    kk.clip.AGC(0.1),
    kk.clip.Chain(kk.clip.ByValue(0.5), kk.clip.ByGlobalNorm(1.0)),
]


@settings(max_examples=examples(12, full=200))
@given(
    rule=st.sampled_from(CLIPS),
    framework=st.sampled_from([name for name in EAGER if name in FRAMEWORKS]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    name=st.sampled_from(["linear.weight", "linear.bias", "gain"]),
    seed=st.integers(0, 99),
)
def test_only_bad_entries_become_zeros(
    rule: Any, framework: str, bad: float, name: str, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    clean = {n: np.asarray(generator.normal(0.0, 2.0, shape)) for n, shape in SHAPES.items()}
    clean[name].flat[-1] = 0.0
    spoilt = {n: array.copy() for n, array in clean.items()}
    spoilt[name].flat[-1] = bad
    row, apply = Row(rule=rule, reference=lambda arrays, axes: arrays), FRAMEWORKS[framework]
    wanted, _, _ = apply(row, clean, nonfinite="zero_entries")
    found, outcome, state = apply(row, spoilt, nonfinite="zero_entries")
    for key, array in found.items():
        np.testing.assert_allclose(array, wanted[key], rtol=1e-12, atol=1e-300)
    assert (outcome.action, outcome.nonfinite) == ("zeroed", (name,))
    assert math.isfinite(outcome.post) and not outcome.skipped
    assert (state["accepted"], state["bad_in_a_row"]) == (1, 1)


def test_a_step_without_bad_entries_is_measured_once_and_as_ever() -> None:
    grads = {"a": np.array([3.0, 4.0])}
    for policy in ("skip", "zero_entries"):
        clipped, outcome, _ = kk.numpy.clip(grads, kk.clip.ByNorm(1.0), nonfinite=policy)
        assert (outcome.action, outcome.pre) == ("clipped", 5.0)
        np.testing.assert_allclose(clipped["a"], [0.6, 0.8])


def test_bad_entries_of_sparse_gradients_are_zeros_of_theirs() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    table.weight.grad = table.weight.grad.coalesce()
    table.weight.grad.values()[1, 0] = math.inf
    outcome, _ = kk.torch.clip_(table, kk.clip.ByGlobalNorm(1.0), nonfinite="zero_entries")
    dense = table.weight.grad.to_dense()
    assert table.weight.grad.is_sparse and float(dense.norm()) == pytest.approx(1.0)
    assert dense[3].tolist() == pytest.approx([0.0, 1 / 3], rel=1e-6) and outcome.nonfinite == (
        "weight",
    )


def batch() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    loss = lambda weights, x: functional_call(model, weights, x[None]).square().sum()  # noqa: E731
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return model, vmap(grad(loss), in_dims=(None, 0))(weights, 3.0 * torch.randn(6, 4))


class TestExamples:
    """Per-example clipping, whose noise and account are elsewhere."""

    @pytest.mark.parametrize("reduce", ["mean", "sum", "none"])
    @pytest.mark.parametrize(
        "rule",
        [
            kk.clip.ByGlobalNorm(0.7),
            kk.clip.ByGlobalNorm(0.7, norm=1),
            kk.clip.ByNorm(0.3),
            kk.clip.ByNorm(0.3, norm=math.inf),
            kk.clip.AdaptiveQuantile(0.7, quantile=0.25),
            kk.clip.Normalize(0.5),
        ],
        ids=str,
    )
    def test_all_frameworks_do_what_a_clip_of_each_does(self, rule: Any, reduce: str) -> None:
        jax = load_quietly("jax")
        _, grads = batch()
        plain = {name: g.numpy() for name, g in grads.items()}
        single = [{n: g[place] for n, g in plain.items()} for place in range(6)]
        alone = [kk.numpy.clip(example, rule)[0] for example in single]
        stacked = {name: np.stack([example[name] for example in alone]) for name in plain}
        join = {"mean": np.mean, "sum": np.sum, "none": lambda array, axis: array}[reduce]
        wanted = {name: join(array, axis=0) for name, array in stacked.items()}
        for given_to, clip in (
            (plain, kk.numpy.clip_examples),
            (grads, kk.torch.clip_examples),
            (jax.tree.map(jax.numpy.asarray, plain), kk.jax.clip_examples),
        ):
            found, norms, state = clip(given_to, rule, reduce=reduce)
            for name, array in wanted.items():
                np.testing.assert_allclose(np.asarray(found[name]), array, rtol=1e-5, atol=1e-7)
            assert tuple(norms.shape) == ((4, 6) if isinstance(rule, kk.clip.ByNorm) else (6,))
            again, _, state = clip(given_to, rule, state, reduce=reduce)
            assert int(np.asarray(state["attempted"])) == 2

    def test_flat_clipping_is_that_of_opacus(self) -> None:
        _, grads = batch()
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factors = (0.7 / (norms + 1e-6)).clamp(max=1.0)
        mean, found, _ = kk.torch.clip_examples(grads, kk.clip.ByGlobalNorm(0.7))
        torch.testing.assert_close(found.float(), norms)
        for name, gradient in grads.items():
            wanted = torch.einsum("i,i...", factors, gradient) / 6
            torch.testing.assert_close(mean[name], wanted, rtol=1e-5, atol=1e-7)

    def test_the_adaptive_limit_is_that_of_opacus(self) -> None:
        generator = np.random.default_rng(0)
        rule = kk.clip.AdaptiveQuantile(5.0, quantile=0.7, rate=0.3, least=0.1, most=50.0)
        bound, state = 5.0, None
        for _ in range(60):
            norms = generator.lognormal(0.0, 0.5, 32)
            _, _, state = kk.numpy.clip_examples({"w": norms[:, None]}, rule, state)
            unclipped = np.mean(norms <= bound)
            bound = min(max(bound * math.exp(-0.3 * (unclipped - 0.7)), 0.1), 50.0)
            assert state["rule.bound"][0] == pytest.approx(bound)
        quantile = float(np.quantile(generator.lognormal(0.0, 0.5, 100_000), 0.7))
        assert bound == pytest.approx(quantile, rel=0.2)

    def test_the_same_as_optax(self) -> None:
        jax, optax = load_quietly("jax"), load_quietly("optax")
        grads = {n: jax.numpy.asarray(g.numpy()) for n, g in batch()[1].items()}
        total, _ = optax.per_example_global_norm_clip(grads, 0.7)
        ours, _, _ = jax.jit(
            lambda g: kk.jax.clip_examples(g, kk.clip.ByGlobalNorm(0.7), reduce="sum")
        )(grads)
        for name, array in total.items():
            np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-7)
        tx = kk.jax.clip(kk.clip.ByGlobalNorm(0.7))
        states = jax.vmap(tx.init)(grads)
        mapped, states = jax.jit(jax.vmap(tx.update))(grads, states)
        for name, array in total.items():
            np.testing.assert_allclose(mapped[name].sum(0), array, rtol=1e-5, atol=1e-7)

    def test_a_bad_example_is_zeros_and_the_others_are_as_without_it(self) -> None:
        _, grads = batch()
        grads["0.bias"][2, 1] = math.nan
        for clip, given_to in (
            (kk.torch.clip_examples, grads),
            (kk.numpy.clip_examples, {n: g.numpy() for n, g in grads.items()}),
        ):
            each, norms, _ = clip(given_to, kk.clip.ByGlobalNorm(0.7), reduce="none")
            assert not any(np.asarray(g)[2].any() for g in each.values())
            assert (
                np.isnan(float(norms[2])) and np.isfinite(np.asarray(norms)[[0, 1, 3, 4, 5]]).all()
            )

    def test_what_it_cannot_do_is_refused(self) -> None:
        grads = {"w": np.ones((3, 2))}
        for rule in (kk.clip.ZClip(), kk.clip.Chain(kk.clip.ByNorm(1.0)), kk.clip.ByValue(1.0)):
            with pytest.raises(Unsupported, match="single examples"):
                kk.numpy.clip_examples(grads, rule)
        with pytest.raises(InvalidArgument, match="first axis"):
            kk.numpy.clip_examples({"w": np.ones((3, 2)), "b": np.ones(2)}, kk.clip.ByNorm(1.0))
        with pytest.raises(InvalidArgument, match="reduction"):
            kk.numpy.clip_examples(grads, kk.clip.ByNorm(1.0), reduce="max")
        with pytest.raises(InvalidArgument, match="mapping from names"):
            kk.torch.clip_examples([torch.ones(2)], kk.clip.ByNorm(1.0))  # type: ignore[arg-type]
        _, _, state = kk.numpy.clip_examples(grads, kk.clip.AdaptiveQuantile(1.0))
        with pytest.raises(InvalidArgument, match="another rule"):
            kk.torch.clip_examples(batch()[1], kk.clip.ByGlobalNorm(1.0), state)


class TestUnitsByRank:
    """AGC as timm and optax take the units of a tensor."""

    def test_the_same_as_timm_for_layers_of_every_kind(self) -> None:
        def layers() -> torch.nn.ModuleList:
            torch.manual_seed(0)
            kinds = [
                torch.nn.Linear(4, 3),
                torch.nn.ConvTranspose2d(2, 3, 2),
                torch.nn.Conv1d(3, 2, 2),
                torch.nn.LayerNorm(5),
                torch.nn.Embedding(6, 2),
            ]
            for parameter in (found := torch.nn.ModuleList(kinds)).parameters():
                parameter.grad = torch.randn_like(parameter)
            return found

        ours, theirs, by_layer = layers(), layers(), layers()
        published.TimmUtils.dispatch_clip_grad(theirs.parameters(), 0.05, mode="agc")
        kk.torch.clip_(ours.parameters(), kk.clip.AGC(0.05, unit="timm"))
        kk.torch.clip_(by_layer, kk.clip.AGC(0.05))
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-8)
        assert not torch.allclose(by_layer[1].weight.grad, theirs[1].weight.grad)

    def test_the_same_as_optax_for_every_rank(self) -> None:
        jax, optax = load_quietly("jax"), load_quietly("optax")
        generator = np.random.default_rng(0)
        shapes = {
            "s": (),
            "b": (3,),
            "row": (1, 4),
            "w": (4, 3),
            "qkv": (4, 2, 3),
            "k": (2, 2, 3, 4),
        }
        params = {
            n: jax.numpy.asarray(generator.normal(0, 1, s), "float32") for n, s in shapes.items()
        }
        grads = {
            n: jax.numpy.asarray(generator.normal(0, 1, s), "float32") for n, s in shapes.items()
        }
        theirs, ours = optax.adaptive_grad_clip(0.1), kk.jax.clip(kk.clip.AGC(0.1, unit="optax"))
        wanted, _ = jax.jit(theirs.update)(grads, theirs.init(params), params)
        found, _ = jax.jit(ours.update)(grads, ours.init(params), params)
        plain = {n: np.asarray(array) for n, array in grads.items()}
        weights = {n: np.asarray(array) for n, array in params.items()}
        rule = kk.clip.AGC(0.1, unit="optax")
        reference, _, _ = kk.numpy.clip(plain, rule, weights=weights)
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5)
            np.testing.assert_allclose(reference[name], array, rtol=1e-5)

    def test_units_are_taken_in_one_way(self) -> None:
        model = torch.nn.Linear(2, 2)
        model.weight.grad = torch.ones(2, 2)
        rule = kk.clip.Chain(kk.clip.AGC(0.1, unit="timm"), kk.clip.AGC(0.1))
        with pytest.raises(Unsupported, match="in one way.*layer, timm"):
            kk.torch.clip_(model, rule)
        cube = torch.nn.Parameter(torch.ones(2, 3, 4))
        cube.grad = torch.ones(2, 3, 4)
        with pytest.raises(Unsupported, match="several axes"):
            kk.torch.clip_([cube], kk.clip.AGC(0.1, unit="optax"))


def test_conditional_steps_of_optax_hold_the_state_of_a_rule() -> None:
    jax, optax = load_quietly("jax"), load_quietly("optax")
    inner = kk.jax.clipped(optax.sgd(0.1), kk.clip.ZClip(warmup=2))
    tx = optax.conditionally_mask(inner, lambda step: step % 2 == 0)
    params = {"w": jax.numpy.ones(3)}
    state = tx.init(params)
    for step in range(4):
        updates, state = tx.update(params, state, params)
        assert bool(jax.numpy.any(updates["w"] != 0)) == (step % 2 == 0)
    assert int(state.inner_state.clip.rule["attempted"]) == 2
