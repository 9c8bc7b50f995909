"""Both packages of Lightning: the callback trains like `attach` in a loop by hand, and resumes bit for bit."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
PACKAGES = ("lightning.pytorch", "pytorch_lightning")

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, Unavailable, Unsupported  # noqa: E402
from karikomi.plugins import LightningCallback  # noqa: E402
from parity.table_rows import code, table_rows  # noqa: E402

pytestmark = [
    # Lightning 2.6 asks isinstance(spec, LeafSpec) of torch's pytrees, which torch 2.13 deprecates.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),
    # Advice on data loading, which a test of forty rows on one core does not take.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
BATCH = 5
STEPS = len(INPUTS) // BATCH


def imported(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest) -> Any:
    return imported(request.param)


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def loss_of(net: Any, inputs: Any) -> Any:
    return 30.0 * net(inputs).square().mean(1).sum()


def module_of(pl: Any, make: Any = sgd) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    return Module()


def data() -> Any:
    return torch.utils.data.DataLoader(INPUTS, batch_size=BATCH)


def batches() -> list[Any]:
    """Return the loader's batches: fresh copies, because a sum over a view may be rounded differently."""
    return [batch.clone() for batch in INPUTS.split(BATCH)]


def trainer_of(pl: Any, callback: Any, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 2}
    callbacks = callback if isinstance(callback, list) else [callback]
    return pl.Trainer(callbacks=callbacks, **(quiet | options))


def by_hand(epochs: int = 2, accumulate: int = 1, dtype: Any = None, **rules: Any) -> Any:
    net = network()
    optimizer = sgd(net.parameters())
    handle = kk.torch.attach(optimizer, net, **rules)
    for _ in range(epochs):
        for index, batch in enumerate(batches()):
            if index % accumulate == 0:
                optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = loss_of(net, batch) / accumulate
            loss.backward()
            if (index + 1) % accumulate == 0 or index + 1 == STEPS:
                optimizer.step()
    return net, handle


def assert_same(one: Any, other: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_fit_is_the_loop_by_hand(pl: Any, accumulate: int) -> None:
    rules = {"clip": kk.clip.ZClip(), "bound": kk.bound.MaxNorm(0.6)}
    callback, module = LightningCallback(**rules), module_of(pl)
    trainer_of(pl, callback, accumulate_grad_batches=accumulate).fit(module, data())
    net, handle = by_hand(accumulate=accumulate, **rules)
    assert_same(module.net, net)
    assert isinstance(callback, LightningCallback) and isinstance(callback, pl.Callback)
    assert callback.handle is not None and callback.handle.steps == handle.steps > 0
    unclipped, _ = by_hand(accumulate=accumulate)
    assert not torch.equal(module.net[0].weight, unclipped[0].weight)


ROWS = [row for row in table_rows("Trainers") if row.theirs.startswith("Lightning, ")]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_rows_of_the_docs_train_alike(row: Any) -> None:
    lightning, (theirs, ours) = imported(PACKAGES[0]), (network(), network())
    options = eval(code(row.theirs.removeprefix("Lightning, ")), {"Trainer": dict})
    callback = eval(code(row.ours), {"kk": kk})
    for callbacks, net, given in (([], theirs, options), ([callback], ours, {})):
        module = module_of(lightning)
        trainer_of(lightning, callbacks, **given).fit(module, data())
        net.load_state_dict(module.net.state_dict())
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


FABRIC = [row for row in table_rows("Trainers") if row.theirs.startswith("Fabric, ")]


@pytest.mark.parametrize("row", FABRIC, ids=str)
def test_the_rows_of_fabric_clip_alike(row: Any) -> None:
    fabric = imported("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    grad_norm = imported("lightning.pytorch.utilities").grad_norm
    found = []
    for cell in (row.theirs.removeprefix("Fabric, "), row.ours):
        net = network()
        loss_of(net, INPUTS).backward()
        names = {"model": net, "optimizer": sgd(net.parameters()), "fabric": fabric, "kk": kk}
        value = eval(code(cell), names | {"grad_norm": grad_norm})
        found.append([*(p.grad for p in net.parameters()), value])
    for theirs, ours in zip(*found, strict=True):
        if isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    if "grad_norm" in row.theirs:
        assert found[1][-1] == pytest.approx(float(found[0][-1]), rel=1e-4)


STATEFUL = {
    "statistics": {"clip": kk.clip.ZClip(), "bound": kk.bound.SpectralCap(1.0)},
    "moments of our own": {"clip": kk.clip.SPAM(5.0)},
    "masks": {"clip": kk.clip.AdaGC(), "prune": kk.prune.Gradual(0.5, steps=(3, 30), every=3)},
    "updates": {"update": kk.clip.AutoClip(10)},
}


def module_that_counts(pl: Any) -> Any:
    """Return a module with a batch for each step: a plain loader cannot resume within an epoch."""
    module = module_of(pl)
    module.training_step = lambda batch, batch_idx: loss_of(
        module.net, batches()[module.trainer.global_step % STEPS]
    )
    return module


# Which is why Lightning warns, and of the checkpoint's ModelCheckpoint, which the second fit has not.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize("rules", STATEFUL.values(), ids=STATEFUL)
@pytest.mark.parametrize("stop", [2 * STEPS, 2 * STEPS + 3])
def test_a_resumed_fit_equals_one_that_never_stopped(
    pl: Any, tmp_path: Path, rules: Any, stop: int
) -> None:
    keep = sys.modules[f"{pl.__name__}.callbacks"].ModelCheckpoint
    keep = keep(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    whole, unbroken = module_that_counts(pl), LightningCallback(**rules)
    trainer_of(pl, [unbroken, keep], max_epochs=4, enable_checkpointing=True).fit(whole, data())
    rest, resumed = module_that_counts(pl), LightningCallback(**rules)
    path = tmp_path / f"step={stop}.ckpt"
    trainer_of(pl, resumed, max_epochs=4).fit(rest, data(), ckpt_path=path, weights_only=True)
    assert_same(whole, rest)
    assert resumed.handle is not None and unbroken.handle is not None
    assert resumed.handle.steps == unbroken.handle.steps == 4 * STEPS
    assert str(resumed.handle.last) == str(unbroken.handle.last)
    # The state is what makes them the same: without it they are not.
    fresh = module_that_counts(pl)
    with pytest.warns(UserWarning, match="has no state of this callback"):
        forgetful = LightningCallback(optimizers=0, **rules)
        trainer_of(pl, forgetful, max_epochs=4).fit(fresh, data(), ckpt_path=path)
    assert not torch.equal(fresh.net[0].weight, whole.net[0].weight)


def test_without_its_state_a_resumed_fit_would_differ_and_says_so(pl: Any, tmp_path: Path) -> None:
    trainer = trainer_of(pl, [])
    trainer.fit(module_of(pl), data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    callback = LightningCallback(clip=kk.clip.ZClip())
    with pytest.warns(UserWarning, match="has no state of this callback"):
        trainer_of(pl, callback, max_epochs=3).fit(
            module_of(pl), data(), ckpt_path=tmp_path / "half.ckpt"
        )
    assert callback.handle is not None and callback.handle.steps == STEPS


def test_a_search_for_a_learning_rate_before_the_fit_leaves_no_trace(
    pl: Any, tmp_path: Path
) -> None:
    callbacks = sys.modules[f"{pl.__name__}.callbacks"]
    finder = callbacks.LearningRateFinder(num_training_steps=6, update_attr=False)
    callback, module = LightningCallback(clip=kk.clip.ZClip()), module_of(pl)
    module.lr = 0.01
    trainer_of(pl, [callback, finder], default_root_dir=tmp_path).fit(module, data())
    assert callback.handle is not None and callback.handle.steps == 2 * STEPS


def test_a_second_fit_starts_afresh_and_a_validation_touches_nothing(
    pl: Any, tmp_path: Path
) -> None:
    callback = LightningCallback(clip=kk.clip.ZClip())
    trainer = trainer_of(pl, callback)
    trainer.fit(module_of(pl), data())
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    first = callback.handle
    assert first is not None and first.steps == 2 * STEPS
    before = str(first.last)

    class Module(type(module_of(pl))):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    trainer.validate(Module(), data(), ckpt_path=tmp_path / "all.ckpt", verbose=False)
    assert callback.handle is first and first.steps == 2 * STEPS and str(first.last) == before
    trainer_of(pl, callback, max_epochs=1).fit(module_of(pl), data())
    assert callback.handle is not first and callback.handle.steps == STEPS


def test_bfloat16_is_clipped_as_by_hand(pl: Any) -> None:
    callback, module = LightningCallback(clip=kk.clip.ByGlobalNorm(1.0)), module_of(pl)
    trainer_of(pl, callback, precision="bf16-mixed").fit(module, data())
    net, _ = by_hand(dtype=torch.bfloat16, clip=kk.clip.ByGlobalNorm(1.0))
    assert_same(module.net, net)


def adam(fused: bool) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=fused)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_a_scaler_has_scaled_are_clipped_by_their_own_norm(
    pl: Any, fused: bool
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=4)
    plugin = sys.modules[f"{pl.__name__}.plugins"].MixedPrecision("16-mixed", "cpu", scaler)
    callback = LightningCallback(clip=kk.clip.ByGlobalNorm(1.0))
    module = module_of(pl, adam(fused))
    norms = []
    module.on_train_batch_end = lambda *_: norms.append(callback.handle.last.pre)
    trainer_of(pl, callback, plugins=[plugin]).fit(module, data())
    net = network()
    handle = kk.torch.attach(adam(fused)(net.parameters()), net, clip=kk.clip.ByGlobalNorm(1.0))
    plain = []
    for batch in 2 * batches():
        net.zero_grad()
        loss_of(net, batch).backward()
        handle._optimizers[0].step()
        plain.append(handle.last.pre)
    assert scaler.get_scale() > 16.0 and len(norms) == 2 * STEPS
    assert norms == pytest.approx(plain, rel=0.02)
    torch.testing.assert_close(module.net.state_dict(), net.state_dict(), rtol=0.02, atol=5e-3)


def test_what_the_last_step_did_is_logged_as_often_as_the_trainer_logs(
    pl: Any, tmp_path: Path
) -> None:
    csv = sys.modules[f"{pl.__name__}.loggers"].CSVLogger(tmp_path)
    callback, module, norms = LightningCallback(clip=kk.clip.ByGlobalNorm(100.0)), module_of(pl), []
    module.on_train_batch_end = lambda *_: norms.append(callback.handle.last.pre)
    trainer = trainer_of(pl, callback, logger=csv, log_every_n_steps=3)
    seen = csv.experiment.metrics
    csv.experiment.save = lambda: None
    trainer.fit(module, data())
    assert [row["step"] for row in seen] == [2, 5, 8, 11, 14]
    assert [row["karikomi/norm"] for row in seen] == pytest.approx(
        [norms[i] for i in range(2, 16, 3)]
    )
    assert {float(row["karikomi/clipped"]) for row in seen} == {0.0, 1.0}
    assert all({"karikomi/factor", "karikomi/skipped"} < row.keys() for row in seen)


def test_the_norm_can_be_monitored_without_a_logger(pl: Any) -> None:
    callback = LightningCallback()
    stop = sys.modules[f"{pl.__name__}.callbacks"].EarlyStopping
    stop = stop("karikomi/norm", check_on_train_epoch_end=True, stopping_threshold=1e9, patience=9)
    trainer = trainer_of(pl, [callback, stop], log_every_n_steps=1, max_epochs=5)
    trainer.fit(module_of(pl), data())
    assert trainer.current_epoch == 1


def test_a_bad_step_is_skipped_and_logged_as_skipped(pl: Any) -> None:
    module = module_of(pl)
    module.training_step = lambda batch, batch_idx: (
        loss_of(module.net, batch) * (float("nan") if batch_idx == 2 else 1.0)
    )
    callback, actions = LightningCallback(), []
    module.on_train_batch_end = lambda *_: actions.append(callback.handle.last.action)
    trainer = trainer_of(pl, callback, max_epochs=1, log_every_n_steps=1, limit_train_batches=3)
    trainer.fit(module, data())
    assert actions == ["kept", "kept", "skipped"]
    assert trainer.callback_metrics["karikomi/skipped"] == 1.0
    assert all(torch.isfinite(p).all() for p in module.parameters())


def gan_of(pl: Any) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.generator, self.critic = torch.nn.Linear(6, 4), torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            turn = 0 if batch_idx % 3 == 0 else 1
            optimizer = self.optimizers()[turn]
            self.zero_grad()
            self.manual_backward(100.0 * self.critic(self.generator(batch)).sum())
            optimizer.step()

        def configure_optimizers(self) -> Any:
            parts = (self.generator, self.critic)
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

    return Module()


def test_every_optimizer_of_a_gan_has_a_handle_of_its_own(pl: Any) -> None:
    callback = LightningCallback(clip=kk.clip.ByGlobalNorm(1.0))
    trainer = trainer_of(pl, callback, max_epochs=1, log_every_n_steps=1)
    trainer.fit(gan_of(pl), data())
    assert [handle.steps for handle in callback.handles] == [3, 5]
    assert [handle.last.names for handle in callback.handles] == [
        ("generator.weight", "generator.bias"),
        ("critic.weight", "critic.bias"),
    ]
    assert {"karikomi/0/norm", "karikomi/1/norm"} < trainer.callback_metrics.keys()


def test_every_optimizer_of_a_gan_resumes_its_own_state(pl: Any, tmp_path: Path) -> None:
    callback = LightningCallback(clip=kk.clip.ZClip())
    trainer = trainer_of(pl, callback, max_epochs=1, limit_train_batches=5)
    trainer.fit(gan_of(pl), data())
    trainer.save_checkpoint(tmp_path / "gan.ckpt")
    before = [handle.state_dict() for handle in callback.handles]
    assert [handle.steps for handle in callback.handles] == [2, 3]
    again = LightningCallback(clip=kk.clip.ZClip())
    trainer = trainer_of(pl, again, max_epochs=1, limit_train_batches=5)
    trainer.fit(gan_of(pl), data(), ckpt_path=tmp_path / "gan.ckpt")
    assert [handle.steps for handle in again.handles] == [2, 3]
    assert [handle.state_dict() for handle in again.handles] == before


def test_one_optimizer_can_be_chosen_and_several_can_share_a_norm(pl: Any) -> None:
    critic = LightningCallback(optimizers=1, bound=kk.bound.Clamp(0.01))
    generator = LightningCallback(optimizers=0, clip=kk.clip.ByGlobalNorm(1.0))
    module = gan_of(pl)
    trainer = trainer_of(pl, [critic, generator], max_epochs=1)
    trainer.fit(module, data())
    assert module.critic.weight.abs().max() <= 0.01 < module.generator.weight.abs().max()
    assert [callback.handle.steps for callback in (generator, critic)] == [3, 5]
    assert critic.state_key != generator.state_key
    both = LightningCallback(optimizers=(0, 1), clip=kk.clip.ByGlobalNorm(1.0))
    trainer_of(pl, both, max_epochs=1, limit_train_batches=1).fit(gan_of(pl), data())
    assert [len(handle.last.names) for handle in both.handles] == [4]
    with pytest.raises(InvalidArgument, match="no such optimizer; got 2; allowed: 0 to 1"):
        trainer_of(pl, LightningCallback(optimizers=2)).fit(gan_of(pl), data())


def test_the_optimizer_that_a_module_sees_is_the_one_that_has_a_handle(pl: Any) -> None:
    module, refusals = module_of(pl), []

    def on_train_start() -> None:
        with pytest.raises(Unsupported, match="has a handle already") as caught:
            kk.torch.attach(module.optimizers(), module)
        refusals.append(caught)

    module.on_train_start = on_train_start
    trainer_of(pl, LightningCallback()).fit(module, data())
    assert len(refusals) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_hooks_come_off_at_the_end_and_after_an_exception(pl: Any, fails: bool) -> None:
    module, made = module_of(pl), []
    module.configure_optimizers = lambda: made.append(sgd(module.parameters())) or made[-1]
    callback = LightningCallback(clip=kk.clip.ByGlobalNorm(1.0))
    if fails:
        module.on_train_epoch_end = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer_of(pl, callback).fit(module, data())
    else:
        trainer_of(pl, callback, max_epochs=1).fit(module, data())
    assert callback.handle is not None and callback.handle.steps == STEPS
    loss_of(module.net, 1e6 * INPUTS).backward()
    made[0].step()
    assert callback.handle.steps == STEPS
    kk.torch.attach(made[0], module).detach()


def test_a_trainer_that_clips_as_well_is_refused(pl: Any) -> None:
    callback = LightningCallback(clip=kk.clip.ByGlobalNorm(1.0))
    with pytest.raises(Unsupported, match=r"clips as well, to gradient_clip_val=0\.5"):
        trainer_of(pl, callback, gradient_clip_val=0.5).fit(module_of(pl), data())

    class Module(type(module_of(pl))):
        def configure_gradient_clipping(self, optimizer: Any, **limits: Any) -> None: ...

    with pytest.raises(
        Unsupported, match=r"Module\.configure_gradient_clipping would clip as well"
    ):
        trainer_of(pl, callback).fit(Module(), data())
    trainer_of(pl, callback, gradient_clip_val=0.0, max_epochs=1).fit(module_of(pl), data())


CLIPS = {"clip": {"clip": kk.clip.ByGlobalNorm(1.0)}, "update": {"update": kk.clip.AutoClip(10)}}


@pytest.mark.parametrize("rules", CLIPS.values(), ids=CLIPS)
def test_either_clip_beside_that_of_the_trainer_is_refused(pl: Any, rules: Any) -> None:
    with pytest.raises(Unsupported, match="clips as well"):
        trainer_of(pl, LightningCallback(**rules), gradient_clip_val=0.5).fit(module_of(pl), data())


@pytest.mark.parametrize("how", ["trainer", "module"])
def test_without_a_clip_the_trainer_clips_and_what_it_left_is_measured(pl: Any, how: str) -> None:
    class Module(type(module_of(pl))):
        def configure_gradient_clipping(self, optimizer: Any, **limits: Any) -> None:
            self.clip_gradients(optimizer, 0.5, "norm")

    module = Module() if how == "module" else module_of(pl)
    callback = LightningCallback(bound=kk.bound.MaxNorm(0.6))
    options = {} if how == "module" else {"gradient_clip_val": 0.5}
    trainer_of(pl, callback, **options).fit(module, data())
    assert callback.handle is not None and callback.handle.last is not None
    assert callback.handle.last.pre == pytest.approx(0.5, rel=1e-4)
    norms = [part.weight.norm(dim=1).max().item() for part in (module.net[0], module.net[2])]
    assert max(norms) <= 0.6001
    both = kk.bound.MaxNorm(0.6)
    net, _ = by_hand(clip=kk.clip.ByGlobalNorm(0.5), bound=both)
    torch.testing.assert_close(module.net.state_dict(), net.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_bad_step_that_the_trainer_clipped_is_skipped_and_names_every_tensor(pl: Any) -> None:
    module, callback = module_of(pl), LightningCallback()
    module.net[2].bias.register_hook(lambda grad: grad * float("nan"))
    before = copy.deepcopy(module.net)
    trainer_of(pl, callback, gradient_clip_val=0.5, limit_train_batches=1, max_epochs=1).fit(
        module, data()
    )
    assert_same(module.net, before)
    assert callback.handle is not None and callback.handle.last is not None
    assert callback.handle.last.action == "skipped" and len(callback.handle.last.nonfinite) == 4


class Named(LightningCallback):
    """A person's own callback."""


WAYS = {"pickle": lambda one: pickle.loads(pickle.dumps(one)), "copy": copy.deepcopy}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("own", [LightningCallback, Named])
def test_a_copy_trains_as_the_callback_does_and_has_no_handle(pl: Any, own: Any, way: Any) -> None:
    rules = {"clip": kk.clip.ZClip(), "bound": kk.bound.MaxNorm(0.6)}
    callback = own(optimizers=0, **rules)
    trainer_of(pl, callback).fit(module_of(pl), data())
    again, module = way(callback), module_of(pl)
    assert type(again) is type(callback) and again.state_key == callback.state_key
    assert again.handles == [] and callback.handle is not None and callback.handle.steps > 0
    trainer_of(pl, again).fit(module, data())
    assert_same(module.net, by_hand(**rules)[0])
    assert again.handle.steps == 2 * STEPS and way(again).handles is not way(again).handles


def test_callbacks_of_one_class_have_one_type() -> None:
    imported(PACKAGES[0])
    assert type(LightningCallback()) is type(LightningCallback()) is not type(Named())


@pytest.mark.parametrize(
    ("strategy", "reason"), [("FSDPStrategy", "FSDP1 flattens"), ("DeepSpeedStrategy", "DeepSpeed")]
)
def test_strategies_that_hide_the_gradients_are_refused(
    pl: Any, strategy: str, reason: str
) -> None:
    trainer, own = trainer_of(pl, []), getattr(sys.modules[f"{pl.__name__}.strategies"], strategy)
    # Made without its constructor, which wants devices that are not here.
    trainer._accelerator_connector.strategy = object.__new__(own)
    with pytest.raises(Unsupported, match=reason):
        LightningCallback().setup(trainer, module_of(pl), "fit")


def test_what_attach_refuses_is_refused_when_the_fit_starts(pl: Any) -> None:
    with pytest.raises(Unsupported, match="LBFGS"):
        trainer_of(pl, LightningCallback()).fit(module_of(pl, torch.optim.LBFGS), data())
    module = module_of(pl)
    module.configure_optimizers = lambda: None
    with (
        pytest.warns(UserWarning, match="returned `None`"),
        pytest.raises(Unsupported, match="returned no optimizer"),
    ):
        trainer_of(pl, LightningCallback()).fit(module, data())


def test_an_option_that_does_not_exist_is_named_at_once(pl: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"no option 'clips'; did you mean 'clip'"):
        LightningCallback(clips=kk.clip.ByGlobalNorm(1.0))


def test_the_class_is_of_the_package_that_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = map(imported, PACKAGES)
    assert isinstance(LightningCallback(), new.Callback) and isinstance(
        LightningCallback(), old.Callback
    )
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    alone = LightningCallback()
    assert isinstance(alone, old.Callback) and not isinstance(alone, new.Callback)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    with pytest.raises(Unavailable, match=r"import lightning\.pytorch or pytorch_lightning first"):
        LightningCallback()


def test_a_checkpoint_of_other_optimizers_is_refused(pl: Any, tmp_path: Path) -> None:
    callback = LightningCallback()
    callback.load_state_dict({"handles": [{}, {}]})
    trainer, module = trainer_of(pl, []), module_of(pl)
    trainer.strategy.optimizers = [sgd(module.parameters())]
    with pytest.raises(Unsupported, match="another number of optimizers; got 2; allowed: 1"):
        callback.on_fit_start(trainer, module)
    callback.teardown(trainer, module, "fit")


@pytest.mark.filterwarnings("ignore:karikomi. .*masked again now")
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("average", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_masks_hold_in_averages_of_weights(average: str, first: bool, tmp_path: Path) -> None:
    pl = imported(PACKAGES[0])
    kind = getattr(pl.callbacks, average)
    averaging = kind(decay=0.9) if average.startswith("EMA") else kind(0.01, swa_epoch_start=1)
    callback, module = LightningCallback(prune=kk.prune.OneShot(0.5, step=9)), module_of(pl)
    validated = []

    def sparsity(state: Any) -> float:
        found = [state[f"net.{name}.weight"] for name in (0, 2)]
        return sum(int((item == 0).sum()) for item in found) / sum(item.numel() for item in found)

    module.validation_step = lambda *batch: validated.append(sparsity(module.state_dict()))
    last = pl.callbacks.ModelCheckpoint(tmp_path, filename="last", save_top_k=1)
    callbacks = [callback, averaging] if first else [averaging, callback]
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "max_epochs": 3}
    trainer_of(pl, [*callbacks, last], **options).fit(module, data(), data())
    # The first epoch ends at step 8.
    assert set(validated[:8]) == {0.0} and set(validated[8:]) == {0.5}
    assert sparsity(torch.load(tmp_path / "last.ckpt")["state_dict"]) == 0.5
    assert sparsity(module.state_dict()) == 0.5
    assert callback.handle is not None and callback.handle.sparsity == 0.5


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.filterwarnings("ignore:karikomi. of the parameters that attach acts on")
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
def test_a_layer_that_a_callback_unfreezes_is_clipped_and_resumed(
    first: bool, tmp_path: Path
) -> None:
    pl = imported(PACKAGES[0])

    class Unfreeze(pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.005)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch > 1:
                # Lightning restores the groups of the optimizer, and leaves the layer frozen.
                self.make_trainable(pl_module.net[0])

    def fit(epochs: int, **options: Any) -> tuple[Any, Any, Any]:
        def make(parameters: Any) -> Any:
            return sgd([item for item in parameters if item.requires_grad])

        rules = {"clip": kk.clip.AdaGC(1.05, warmup=2), "prune": kk.prune.OneShot(0.5, step=20)}
        callback, module = LightningCallback(**rules), module_of(pl, make)
        callbacks = [callback, Unfreeze()] if first else [Unfreeze(), callback]
        trainer = trainer_of(pl, callbacks, max_epochs=epochs)
        trainer.fit(module, data(), **options)
        return trainer, module, callback.handle

    _, whole, expected = fit(4)
    assert len(expected.last.names) == 4 and expected.sparsity == 0.5
    trainer, _, _ = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, module, handle = fit(4, ckpt_path=str(tmp_path / "half.ckpt"))
    assert_same(module.net, whole.net)
    assert str(handle.last) == str(expected.last) and handle.steps == expected.steps
