"""Loops with accelerate: `attach` takes what it prepared, and the explicit clip knows when it is due."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper  # noqa: E402
from accelerate.utils.megatron_lm import MegatronLMOptimizerWrapper  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi.errors import Unsupported  # noqa: E402
from karikomi.plugins import accelerate_clip_  # noqa: E402
from parity.table_rows import code, table_rows  # noqa: E402

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
BATCH = 5


@pytest.fixture(autouse=True)
def _a_state_for_each_test() -> Iterator[None]:
    # accelerate keeps precision and accumulation in singletons of the process.
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def sgd(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def adam(model: Any, fused: bool = False) -> Any:
    return torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)


def loss_of(model: Any, inputs: Any) -> Any:
    return 30.0 * model(inputs).square().mean(1).sum()


def accelerator_of(**options: Any) -> Any:
    return accelerate.Accelerator(cpu=True, **options)


def half_precision() -> Any:
    """Return an accelerator that scales losses for float16, which accelerate itself asks a GPU for."""
    accelerator = accelerator_of()
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)
    return accelerator


def by_hand(accumulate: int = 1, epochs: int = 2, make: Any = sgd, **rules: Any) -> Any:
    model = network()
    optimizer = make(model)
    handle = kk.torch.attach(optimizer, model, **rules)
    norms = []
    for _ in range(epochs):
        for index, batch in enumerate(INPUTS.split(BATCH), start=1):
            (loss_of(model, batch) / accumulate).backward()
            if index % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                norms.append(handle.last.pre)
    return model, norms


def train(accelerator: Any, model: Any, optimizer: Any, each: Any = None, epochs: int = 2) -> None:
    for _ in range(epochs):
        for batch in INPUTS.split(BATCH):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if each is not None:
                    each()
                optimizer.step()
                optimizer.zero_grad()


def assert_same(one: Any, other: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_attach_takes_what_was_prepared(accumulate: int) -> None:
    rules = {"clip": kk.clip.ZClip(), "bound": kk.bound.MaxNorm(0.6)}
    accelerator = accelerator_of(gradient_accumulation_steps=accumulate)
    raw = network()
    model, optimizer = accelerator.prepare(raw, sgd(raw))
    assert isinstance(optimizer, AcceleratedOptimizer)
    handle = kk.torch.attach(optimizer, model, **rules)
    train(accelerator, model, optimizer)
    other, norms = by_hand(accumulate, **rules)
    assert_same(raw, other)
    assert handle.steps == len(norms) == 16 // accumulate
    with pytest.raises(Unsupported, match="has a handle already"):
        kk.torch.attach(optimizer.optimizer, model)


def test_attach_sees_through_compilation_and_wrappers_of_wrappers() -> None:
    accelerator = accelerator_of()
    raw = network()
    optimizer = accelerator.prepare(accelerator.prepare(sgd(raw)))
    model = accelerator.prepare(torch.compile(raw, backend="eager"))
    handle = kk.torch.attach(AcceleratedOptimizer(optimizer), model)
    train(accelerator, model, optimizer, epochs=1)
    assert handle.steps == 8
    assert handle.last is not None and handle.last.names[0] == "0.weight"


def test_several_prepared_optimizers_share_a_joint_norm() -> None:
    accelerator = accelerator_of()
    raw = network()
    model, *both = accelerator.prepare(raw, sgd(raw[0]), sgd(raw[2]))
    handle = kk.torch.attach(both, model, clip=kk.clip.ByGlobalNorm(1.0))
    joined = SimpleNamespace(
        step=lambda: [one.step() for one in both], zero_grad=lambda: raw.zero_grad()
    )
    train(accelerator, model, joined)
    other, _ = by_hand(clip=kk.clip.ByGlobalNorm(1.0))
    assert handle.steps == 16
    assert_same(raw, other)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_gradients_scaled_for_float16_are_clipped_by_their_own_norm(
    fused: bool, explicit: bool
) -> None:
    accelerator, norms = half_precision(), []
    raw = network()
    model, optimizer = accelerator.prepare(raw, adam(raw, fused))
    assert optimizer.scaler is accelerator.scaler
    rule, state = kk.clip.ByGlobalNorm(1.0), None
    handle = None if explicit else kk.torch.attach(optimizer, model, clip=rule)

    def each() -> None:
        nonlocal state
        if explicit:
            outcome, state = accelerate_clip_(accelerator, model, rule, state, optimizer=optimizer)
            norms.append(outcome.pre)
        elif handle is not None and handle.last is not None:
            norms.append(handle.last.pre)

    train(accelerator, model, optimizer, each)
    other, plain = by_hand(make=adam, clip=rule)
    assert accelerator.scaler.get_scale() > 64.0
    assert norms == pytest.approx(plain if explicit else plain[:-1], rel=0.02)
    torch.testing.assert_close(raw.state_dict(), other.state_dict(), rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("explicit", [False, True])
def test_an_overflow_of_the_scaler_is_a_step_not_taken(explicit: bool) -> None:
    accelerator = half_precision()
    raw = network()
    before = [parameter.clone() for parameter in raw.parameters()]
    model, optimizer = accelerator.prepare(raw, sgd(raw))
    if not explicit:
        kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    accelerator.backward(loss_of(model, INPUTS) * float("inf"))
    if explicit:
        outcome, _ = accelerate_clip_(accelerator, model, kk.clip.ByGlobalNorm(1.0))
        assert outcome is not None and outcome.action == "skipped"
    optimizer.step()
    assert accelerator.optimizer_step_was_skipped and accelerator.scaler.get_scale() == 32.0
    assert all(torch.equal(a, b) for a, b in zip(before, raw.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_explicit_clip_waits_for_the_last_part_of_a_step(accumulate: int) -> None:
    accelerator, state = accelerator_of(gradient_accumulation_steps=accumulate), None
    raw, outcomes = network(), []
    model, optimizer = accelerator.prepare(raw, sgd(raw))

    def each() -> None:
        nonlocal state
        outcome, state = accelerate_clip_(accelerator, model, kk.clip.ZClip(), state)
        outcomes.append(outcome)

    train(accelerator, model, optimizer, each)
    other, norms = by_hand(accumulate, clip=kk.clip.ZClip())
    assert_same(raw, other)
    assert [one is not None for one in outcomes] == [i % accumulate == 0 for i in range(1, 17)]
    assert [one.pre for one in outcomes if one is not None] == norms


def test_the_explicit_clip_knows_the_moments_of_a_prepared_optimizer() -> None:
    accelerator = accelerator_of()
    raw = network()
    model, optimizer = accelerator.prepare(raw, adam(raw))
    accelerator.backward(loss_of(model, INPUTS))
    _, state = accelerate_clip_(accelerator, model, kk.clip.SPAM(5.0), optimizer=optimizer)
    assert state is not None and "second_moment" not in state
    _, state = accelerate_clip_(accelerator, model, kk.clip.SPAM(5.0))
    assert state is not None and "second_moment" in state


@pytest.mark.parametrize("syncs", [True, False])
def test_the_explicit_clip_beside_a_handle_is_refused(syncs: bool) -> None:
    accelerator = accelerator_of(gradient_accumulation_steps=1 if syncs else 2)
    raw, rule = network(), kk.clip.ByGlobalNorm(1.0)
    model, optimizer = accelerator.prepare(raw, sgd(raw))
    handle = kk.torch.attach(optimizer, model, clip=rule)
    with accelerator.accumulate(model):
        accelerator.backward(loss_of(model, INPUTS))
        for one in (optimizer, optimizer.optimizer):
            with pytest.raises(
                Unsupported, match=r"\(optimizer\): this optimizer has a handle already"
            ):
                accelerate_clip_(accelerator, model, rule, optimizer=one)
        handle.detach()
        outcome, _ = accelerate_clip_(accelerator, model, rule, optimizer=optimizer)
    assert (outcome is not None) is syncs


@pytest.mark.parametrize(
    "rules",
    [
        {"clip": kk.clip.ZClip(), "bound": kk.bound.SpectralCap(1.0)},
        {"clip": kk.clip.SPAM(5.0), "prune": kk.prune.Gradual(0.5, steps=(3, 30), every=3)},
    ],
    ids=["statistics", "moments and masks"],
)
def test_a_handle_is_saved_and_loaded_with_everything_else(tmp_path: Path, rules: Any) -> None:
    def prepared() -> Any:
        accelerator = accelerator_of()
        model = network()
        return (accelerator, model, *accelerator.prepare(model, sgd(model))[1:])

    accelerator, whole, optimizer = prepared()
    handle = kk.torch.attach(optimizer, whole, **rules)
    accelerator.register_for_checkpointing(handle)
    train(accelerator, whole, optimizer)
    accelerator.save_state(str(tmp_path))
    train(accelerator, whole, optimizer)

    accelerator, rest, optimizer = prepared()
    resumed = kk.torch.attach(optimizer, rest, **rules)
    accelerator.register_for_checkpointing(resumed)
    accelerator.load_state(str(tmp_path))
    assert resumed.steps == 16
    train(accelerator, rest, optimizer)
    assert_same(whole, rest)
    assert str(resumed.last) == str(handle.last) and resumed.steps == 32


@pytest.mark.parametrize(
    ("wrapper", "name"),
    [(DeepSpeedOptimizerWrapper, "DeepSpeed"), (MegatronLMOptimizerWrapper, "Megatron-LM")],
)
def test_engines_that_keep_the_gradients_are_refused(wrapper: Any, name: str) -> None:
    accelerator_of()
    model = network()
    with pytest.raises(Unsupported, match=f"{name} does not expose the gradients"):
        kk.torch.attach(wrapper(sgd(model)), model)


def test_the_optimizer_of_deepspeed_is_refused_by_name() -> None:
    """As its class for ZeRO is called, which is no optimizer of torch's."""
    engine = type("DeepSpeedOptimizer", (), {"__module__": "deepspeed.runtime.base_optimizer"})
    with pytest.raises(Unsupported, match="DeepSpeed does not expose the gradients"):
        kk.torch.attach(type("DeepSpeedZeroOptimizer", (engine,), {})(), network())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("DEEPSPEED", "DeepSpeed does not expose the gradients.*gradient_clipping"),
        ("MEGATRON_LM", "Megatron-LM does not expose"),
        ("XLA", r"not reduced yet; kk\.torch\.attach"),
        ("FSDP", "FSDP1 flattens.*FSDP2"),
    ],
)
def test_the_explicit_clip_refuses_gradients_that_are_not_there(kind: str, reason: str) -> None:
    kinds = accelerate.utils.DistributedType
    fake = SimpleNamespace(distributed_type=kinds[kind], is_fsdp2=False, sync_gradients=False)
    with pytest.raises(Unsupported, match=reason):
        accelerate_clip_(fake, network(), kk.clip.ByGlobalNorm(1.0))


def test_parameters_that_fsdp1_has_flattened_are_refused() -> None:
    flat = torch.distributed.fsdp.FullyShardedDataParallel
    # Made without its constructor, which wants a process group.
    inner = flat.__new__(flat)
    torch.nn.Module.__init__(inner)
    plain = SimpleNamespace(distributed_type="NO", sync_gradients=True)
    with pytest.raises(Unsupported, match="FSDP1 flattens"):
        accelerate_clip_(plain, torch.nn.Sequential(inner), kk.clip.ByGlobalNorm(1.0))


def test_an_fsdp2_accelerator_is_not_refused() -> None:
    kind = accelerate.utils.DistributedType.FSDP
    fake = SimpleNamespace(distributed_type=kind, is_fsdp2=True, sync_gradients=False)
    assert accelerate_clip_(fake, network(), kk.clip.ByGlobalNorm(1.0)) == (None, None)


ROWS = [row for row in table_rows("Trainers") if row.theirs.startswith("accelerate, ")]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_rows_of_the_docs_train_alike(row: Any) -> None:
    trained = []
    for theirs in (True, False):
        accelerator, model = accelerator_of(), network()
        names = {"accelerator": accelerator, "kk": kk, "model": accelerator.prepare(model)}
        names["optimizer"] = accelerator.prepare(sgd(model))
        cell = code(row.theirs.removeprefix("accelerate, ") if theirs else row.ours)
        each = None
        if theirs:
            each = lambda cell=cell, names=names: eval(cell, names)  # noqa: E731
        else:
            eval(cell, names)
        train(accelerator, names["model"], names["optimizer"], each, epochs=1)
        trained.append(model)
    assert len(ROWS) >= 3
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
