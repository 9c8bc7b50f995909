"""The Trainer of transformers: the callback trains like `attach` by hand, the mixin logs the true norm."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import karikomi as kk  # noqa: E402
from karikomi.errors import BadFile, InvalidArgument, Unavailable, Unsupported  # noqa: E402
from karikomi.plugins import TransformersCallback, TransformersMixin  # noqa: E402
from karikomi.plugins.json_state import from_json, to_json  # noqa: E402
from parity.table_rows import code, table_rows  # noqa: E402

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
BATCH = 5
STEPS = len(INPUTS) // BATCH


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        self.net = torch.nn.Sequential(*parts)

    def forward(self, inputs: Any) -> dict[str, Any]:
        return {"loss": 30.0 * self.net(inputs).square().mean(1).sum()}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *data: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class TrueNorm(TransformersMixin, InOrder): ...


def sgd(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def trainer_of(folder: Path, callback: Any, kind: Any = TrueNorm, **options: Any) -> Any:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    quiet |= {"dataloader_pin_memory": False, "save_strategy": "no", "num_train_epochs": 2}
    quiet |= {"per_device_train_batch_size": BATCH, "lr_scheduler_type": "constant"}
    arguments = transformers.TrainingArguments(
        str(folder), **(quiet | {"max_grad_norm": 0} | options)
    )
    model = Network()
    return kind(
        model,
        arguments,
        train_dataset=[{"inputs": row} for row in INPUTS],
        eval_dataset=[{"inputs": row} for row in INPUTS],
        optimizers=(sgd(model), None),
        callbacks=[callback] if callback is not None else [],
    )


def by_hand(accumulate: int = 1, dtype: Any = None, **rules: Any) -> Any:
    model = Network()
    optimizer = sgd(model)
    handle = kk.torch.attach(optimizer, model, **rules)
    for _ in range(2):
        # Fresh copies as the Trainer's are: a sum over a view may be rounded differently.
        batches = [batch.clone() for batch in INPUTS.split(BATCH)]
        for window in (batches[i : i + accumulate] for i in range(0, STEPS, accumulate)):
            optimizer.zero_grad()
            for batch in window:
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    loss = model(batch)["loss"]
                (loss / len(window)).backward()
            optimizer.step()
    return model, handle


def assert_same(one: Any, other: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", [InOrder, TrueNorm])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_training_is_the_loop_by_hand(tmp_path: Path, kind: Any, accumulate: int) -> None:
    rules = {"clip": kk.clip.ZClip(), "bound": kk.bound.MaxNorm(0.6)}
    callback = TransformersCallback(**rules)
    trainer = trainer_of(tmp_path, callback, kind, gradient_accumulation_steps=accumulate)
    trainer.train()
    model, handle = by_hand(accumulate, **rules)
    assert_same(trainer.model, model)
    assert callback.handle is not None and callback.handle.steps == handle.steps > 0
    unclipped, _ = by_hand(accumulate)
    assert not torch.equal(trainer.model.net[0].weight, unclipped.net[0].weight)


def test_bfloat16_is_clipped_as_by_hand(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, TransformersCallback(clip=kk.clip.ByGlobalNorm(1.0)), bf16=True)
    trainer.train()
    model, _ = by_hand(dtype=torch.bfloat16, clip=kk.clip.ByGlobalNorm(1.0))
    assert_same(trainer.model, model)


ROWS = [row for row in table_rows("Trainers") if row.theirs.startswith("Hugging Face, ")]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_rows_of_the_docs_train_alike(tmp_path: Path, row: Any) -> None:
    options = eval(code(row.theirs.removeprefix("Hugging Face, ")), {"TrainingArguments": dict})
    theirs = trainer_of(tmp_path, None, InOrder, **options)
    ours = trainer_of(tmp_path, eval(code(row.ours), {"kk": kk}), InOrder)
    for trainer in (theirs, ours):
        trainer.train()
    for one, other in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


STATEFUL = {
    "statistics": {"clip": kk.clip.ZClip(), "bound": kk.bound.SpectralCap(1.0)},
    "moments of our own": {"clip": kk.clip.SPAM(5.0)},
    "masks": {"clip": kk.clip.AdaGC(), "prune": kk.prune.Gradual(0.5, steps=(3, 30), every=3)},
    "updates": {"update": kk.clip.AutoClip(10)},
}


@pytest.mark.parametrize("rules", STATEFUL.values(), ids=STATEFUL)
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_training_equals_one_that_never_stopped(
    tmp_path: Path, rules: Any, restore: bool
) -> None:
    options = {"num_train_epochs": 4, "restore_callback_states_from_checkpoint": restore}
    unbroken = TransformersCallback(**rules)
    saved = {"save_strategy": "steps", "save_steps": 2 * STEPS + 3}
    whole = trainer_of(tmp_path, unbroken, **options, **saved)
    whole.train()
    half = tmp_path / f"checkpoint-{2 * STEPS + 3}"
    resumed = TransformersCallback(**rules)
    rest = trainer_of(tmp_path, resumed, **options)
    rest.train(resume_from_checkpoint=str(half))
    assert_same(whole.model, rest.model)
    assert unbroken.handle is not None and resumed.handle is not None
    assert resumed.handle.steps == unbroken.handle.steps == 4 * STEPS
    assert str(resumed.handle.last) == str(unbroken.handle.last)
    assert sum(one is resumed for one in rest.callback_handler.callbacks) == 1
    # The state is what makes them the same: without it they are not, and it is said.
    path = half / "trainer_state.json"
    state = json.loads(path.read_text("utf-8"))
    del state["stateful_callbacks"]["TransformersCallback"]
    path.write_text(json.dumps(state), "utf-8")
    forgetful = trainer_of(tmp_path, TransformersCallback(**rules), **options)
    with pytest.warns(UserWarning, match="has no state of this callback"):
        forgetful.train(resume_from_checkpoint=str(half))
    assert not torch.equal(forgetful.model.net[0].weight, whole.model.net[0].weight)


def test_a_second_training_starts_afresh(tmp_path: Path) -> None:
    callback = TransformersCallback(clip=kk.clip.ZClip())
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    first = callback.handle
    trainer.train()
    assert callback.handle is not first and callback.handle.steps == 2 * STEPS


def test_the_logged_norm_is_the_one_before_the_clip(tmp_path: Path) -> None:
    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            norms.append(callback.handle.last.pre)

    norms: list[float] = []
    callback = TransformersCallback(clip=kk.clip.ByGlobalNorm(1.0))
    trainer = trainer_of(tmp_path, callback, logging_strategy="steps", logging_steps=3)
    trainer.add_callback(Watch())
    trainer.train()
    *rows, last = trainer.state.log_history
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15]
    assert [row["grad_norm"] for row in rows] == [norms[i] for i in range(2, 16, 3)]
    assert all(row["karikomi/factor"] == pytest.approx(1 / row["grad_norm"]) for row in rows)
    assert all(row["karikomi/clipped"] == 1.0 for row in rows) and "grad_norm" not in last


@pytest.mark.parametrize("kind", [InOrder, TrueNorm])
def test_a_bad_step_is_skipped_and_with_the_mixin_only_the_culprit_is_named(
    tmp_path: Path, kind: Any
) -> None:
    callback = TransformersCallback()
    trainer = trainer_of(
        tmp_path, callback, kind, max_steps=3, logging_strategy="steps", logging_steps=1
    )
    hook = trainer.model.net[2].bias.register_hook(
        lambda grad: grad * (math.inf if trainer.state.global_step == 2 else 1.0)
    )
    trainer.train()
    hook.remove()
    assert callback.handle is not None and callback.handle.last is not None
    assert callback.handle.last.action == "skipped"
    every = tuple(name for name, _ in trainer.model.named_parameters())
    assert callback.handle.last.nonfinite == (("net.2.bias",) if kind is TrueNorm else every)
    assert not math.isfinite(trainer.state.log_history[2]["grad_norm"])
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_tied_weights_of_a_language_model_count_once(tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 20}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens))
    rows = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    callback = TransformersCallback(clip=kk.clip.ByGlobalNorm(0.1))
    trainer = trainer_of(tmp_path, callback, logging_strategy="steps", logging_steps=1)
    own = TrueNorm(
        model,
        trainer.args,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[callback],
    )
    own.train()
    names = callback.handle.last.names
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    assert callback.handle.last.action == "clipped"


def test_a_trainer_that_clips_as_well_is_refused(tmp_path: Path) -> None:
    for rules in ({"clip": kk.clip.ByGlobalNorm(1.0)}, {"update": kk.clip.AutoClip(10)}):
        trainer = trainer_of(tmp_path, TransformersCallback(**rules), max_grad_norm=1.0)
        with pytest.raises(Unsupported, match=r"clips as well, to max_grad_norm=1\.0.*norm=0\)"):
            trainer.train()


@pytest.mark.parametrize("kind", [InOrder, TrueNorm])
def test_without_a_clip_the_trainer_clips_and_logs_its_own_norm(tmp_path: Path, kind: Any) -> None:
    callback = TransformersCallback(bound=kk.bound.MaxNorm(0.6))
    logs = {"logging_strategy": "steps", "logging_steps": 1}
    trainer = trainer_of(tmp_path, callback, kind, max_grad_norm=0.5, **logs)
    trainer.train()
    model, handle = by_hand(clip=kk.clip.ByGlobalNorm(0.5), bound=kk.bound.MaxNorm(0.6))
    torch.testing.assert_close(trainer.model.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)
    assert callback.handle is not None and callback.handle.last is not None
    assert callback.handle.last.pre == pytest.approx(0.5, rel=1e-4)
    assert handle.last is not None and handle.last.pre > 0.6
    logged = trainer.state.log_history[2 * STEPS - 1]["grad_norm"]
    assert logged == pytest.approx(handle.last.pre, rel=1e-3)


def test_a_bad_step_that_the_trainer_clipped_is_skipped(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, TransformersCallback, InOrder, max_grad_norm=1.0, max_steps=1)
    (callback,) = (
        one for one in trainer.callback_handler.callbacks if isinstance(one, TransformersCallback)
    )
    trainer.model.net[2].bias.register_hook(lambda grad: grad * math.nan)
    trainer.train()
    assert callback.handle is not None and callback.handle.last is not None
    assert callback.handle.last.action == "skipped" and len(callback.handle.last.nonfinite) == 4
    assert_same(trainer.model, Network())


WAYS = {"pickle": lambda one: pickle.loads(pickle.dumps(one)), "copy": copy.deepcopy}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_copy_is_another_callback_that_trains_alike(tmp_path: Path, way: Any) -> None:
    rules = {"clip": kk.clip.ZClip(), "bound": kk.bound.MaxNorm(0.6)}
    callback = TransformersCallback(**rules)
    trainer_of(tmp_path, callback).train()
    again, first = way(callback), callback.handle
    assert again is not callback and isinstance(again, transformers.TrainerCallback)
    assert again.handle is None and type(again)() is again and type(callback)() is callback
    trainer = trainer_of(tmp_path, again)
    trainer.train()
    assert_same(trainer.model, by_hand(**rules)[0])
    steps = again.handle and again.handle.steps
    assert steps == 2 * STEPS and callback.handle is first


def test_the_mixin_needs_a_callback_and_stands_first(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"no callback that clips; callbacks=\[kk"):
        trainer_of(tmp_path, None).train()
    with pytest.raises(Unsupported, match=r"Wrong: the mixin is listed after the Trainer"):

        class Wrong(InOrder, TransformersMixin): ...


@pytest.mark.parametrize("fails", [False, True])
def test_the_hooks_come_off_at_the_end_and_with_the_mixin_after_an_exception(
    tmp_path: Path, fails: bool
) -> None:
    class Fails(transformers.TrainerCallback):
        def on_epoch_end(self, *given: Any, **more: Any) -> None:
            raise ZeroDivisionError

    callback = TransformersCallback(clip=kk.clip.ByGlobalNorm(1.0))
    trainer = trainer_of(tmp_path, callback, num_train_epochs=1)
    if fails:
        trainer.add_callback(Fails())
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    else:
        trainer.train()
    trainer.optimizer.step()
    assert callback.handle is not None and callback.handle.steps == STEPS
    kk.torch.attach(trainer.optimizer, trainer.model).detach()


def test_without_the_mixin_a_training_after_an_exception_attaches_again(tmp_path: Path) -> None:
    callback = TransformersCallback(clip=kk.clip.ByGlobalNorm(1.0))
    trainer = trainer_of(tmp_path, callback, InOrder)
    step = trainer.training_step
    trainer.training_step = lambda *given: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.training_step = step
    trainer.train()
    assert callback.handle is not None and callback.handle.steps == 2 * STEPS


def test_options_and_their_absence() -> None:
    with pytest.raises(InvalidArgument, match="no option 'rule'"):
        TransformersCallback(rule=kk.clip.ByGlobalNorm(1.0))
    one, other = TransformersCallback(), TransformersCallback()
    assert one is not other and isinstance(one, transformers.TrainerCallback)
    assert type(one).__name__ == "TransformersCallback" and type(one)() is one


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers.trainer_callback", None)
    with pytest.raises(Unavailable, match="pip install transformers"):
        TransformersCallback()


def test_a_state_is_json_to_the_last_bit() -> None:
    state = {
        "steps": 3,
        "clip": {"rule.mean": [0.1, 1e-300], "second_moment": {"tensor": torch.randn(2, 3)}},
        "masks": {"w": {"bits": torch.tensor([3, 255], dtype=torch.uint8), "shape": [2, 5]}},
        "bound": {"half": torch.tensor(1.5, dtype=torch.bfloat16), "none": torch.empty(0)},
        "update": None,
    }
    again = from_json(json.loads(json.dumps(to_json(state), sort_keys=True)))
    assert again["clip"]["rule.mean"] == [0.1, 1e-300] and again["update"] is None
    assert again["masks"]["w"]["shape"] == [2, 5] and again["steps"] == 3
    for one, other in (
        (again["clip"]["second_moment"]["tensor"], state["clip"]["second_moment"]["tensor"]),
        (again["masks"]["w"]["bits"], state["masks"]["w"]["bits"]),
        (again["bound"]["half"], state["bound"]["half"]),
        (again["bound"]["none"], state["bound"]["none"]),
    ):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    "stored", [None, {}, {"plain": {}, "tensors": "%"}, {"plain": {}, "tensors": "AAAA"}]
)
def test_what_is_no_state_is_one_clear_error(stored: Any) -> None:
    with pytest.raises(BadFile, match="checkpoint: not a state of karikomi"):
        from_json(stored)


class FirstIsBest(InOrder):
    def evaluate(self, *data: Any, **more: Any) -> dict[str, float]:
        return {"eval_loss": float(self.state.global_step)}


def test_masks_hold_in_the_best_model_at_the_end(tmp_path: Path) -> None:
    callback = TransformersCallback(prune=kk.prune.OneShot(0.5, step=STEPS + 2))
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = trainer_of(tmp_path, callback, FirstIsBest, **options)
    with pytest.warns(UserWarning, match=r"36 masked weight\(s\) .* masked again now"):
        trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"-{STEPS}")
    zeros = sum(int((trainer.model.net[place].weight == 0).sum()) for place in (0, 2))
    assert zeros == 36 and callback.handle is not None and callback.handle.sparsity == 0.5


@pytest.mark.filterwarnings("ignore:karikomi. of the parameters that attach acts on")
def test_a_layer_that_a_callback_unfreezes_is_clipped(tmp_path: Path) -> None:
    class Unfreeze(transformers.TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.epoch == 1:
                # The schedulers of torch do not take a further group.
                group = more["optimizer"].param_groups[0]
                group["params"] += list(more["model"].net[2].parameters())

    callback = TransformersCallback(clip=kk.clip.ByGlobalNorm(1.0))
    trainer = trainer_of(tmp_path, callback)
    trainer.optimizer = torch.optim.SGD(trainer.model.net[0].parameters(), lr=0.01)
    trainer.add_callback(Unfreeze())
    trainer.train()
    assert callback.handle is not None and callback.handle.steps == 2 * STEPS
    assert len(callback.handle.last.names) == 4


def test_the_linear_layers_of_gpt2_are_pruned_by_their_units_and_shrunk_with_its_cache_on() -> None:
    """Their weights are (inputs, units), and an exported graph has no form for the cache of keys and values."""
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = {"input_ids": torch.arange(6)[None]}
    small, report = kk.torch.shrink(model, tokens, width=0.5, only="*mlp.c_fc*")
    assert report.widths_after["transformer.h.0.mlp.c_fc"] == 16 and model.config.use_cache
    assert small(**tokens).past_key_values is not None, "the smaller network has its cache"
    account = kk.torch.prune_(model, 0.5, pattern="units", only="*mlp.c_fc.weight")
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert account.sparsity == 0.5 and ((weight == 0).all(0).sum(), len(weight)) == (16, 8)
