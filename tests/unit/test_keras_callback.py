"""The callback that watches a clipped optimizer: rows, logs, two lines, and the end of a run of bad steps."""

from __future__ import annotations

import csv
import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers = keras.layers

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, NonFinite, Unsupported  # noqa: E402
from karikomi.keras import Monitor, clipped  # noqa: E402
from karikomi.keras.callbacks.summary import Tally  # noqa: E402
from karikomi.record import Recorder, read, tally  # noqa: E402
from keras_backends import BACKEND, only, slow_on  # noqa: E402

BATCHES, BATCH = 4, 8


def data(*, bad: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(BATCHES * BATCH, 3)).astype("float32")
    targets = (inputs @ rng.normal(size=(3, 2))).astype("float32")
    targets[BATCH] = 100.0  # one sample of the second batch
    if bad:
        inputs[:] = np.nan
    return inputs, targets


def network(rule: Any = None, *, rate: float = 0.01, wrap: Any = None, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="head")], name="net")
    rule = kk.clip.ByGlobalNorm(10.0) if rule is None else rule
    optimizer = clipped(keras.optimizers.SGD(rate), rule, **options)
    model.compile(optimizer if wrap is None else wrap(optimizer), loss="mse")
    return model


def fit(model: Any, *callbacks: Any, bad: bool = False, **options: Any) -> Any:
    settings = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **options}
    return model.fit(*data(bad=bad), callbacks=list(callbacks), **settings)


def steps(path: Path) -> list[dict[str, Any]]:
    return [row for row in read(path) if row["event"] == "step"]


def test_every_step_has_a_row_with_the_loss_of_its_batch(tmp_path: Path) -> None:
    model = network(rate=0.0)
    inputs, targets = data()
    predicted = keras.ops.convert_to_numpy(model(inputs))
    losses = np.square(predicted - targets).reshape(BATCHES, -1).mean(axis=1)
    fit(model, Monitor(tmp_path / "run.jsonl"), epochs=2)
    rows = steps(tmp_path / "run.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 2 * BATCHES + 1))
    assert [row["epoch"] for row in rows] == [0] * BATCHES + [1] * BATCHES
    # Keras adds losses up in float32, and one of them is a thousand times the others.
    np.testing.assert_allclose([row["loss"] for row in rows], np.tile(losses, 2), rtol=1e-3)
    assert [row["clipped"] for row in rows] == [False, True, False, False] * 2
    last = model.optimizer.last
    assert rows[-1]["norm"] == last.pre and rows[1]["factor"] == pytest.approx(
        10.0 / rows[1]["norm"]
    )
    assert list(rows[0]["gradients"]["top"])[0] == last.top(1)[0][0]


def test_the_logs_have_the_norm_and_the_share_of_clipped_steps(tmp_path: Path) -> None:
    model, table = network(rate=0.0), tmp_path / "log.csv"
    history = fit(
        model,
        Monitor(tmp_path / "run.jsonl"),
        keras.callbacks.CSVLogger(table),
        epochs=2,
        validation_data=data(),
    ).history
    norms = [row["norm"] for row in steps(tmp_path / "run.jsonl")]
    assert history["clipped"] == [0.25, 0.25]
    assert history["grad_norm"] == [np.median(norms[:4]), np.median(norms[4:])]
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["grad_norm"]) for row in rows] == history["grad_norm"]
    epochs = [row for row in read(tmp_path / "run.jsonl") if row["event"] == "epoch"]
    assert [row["validation"] for row in epochs] == history["val_loss"]


@only("torch")
def test_the_row_of_an_epoch_has_both_losses(tmp_path: Path) -> None:
    held_out = tuple(array[:BATCH] for array in data())
    model, monitor = network(), Monitor(tmp_path / "run.jsonl")
    history = fit(model, monitor, epochs=2, validation_data=held_out).history
    epochs = [row for row in read(tmp_path / "run.jsonl") if row["event"] == "epoch"]
    assert [row["loss"] for row in epochs] == history["loss"]
    assert [row["validation"] for row in epochs] == history["val_loss"]
    assert history["loss"] != history["val_loss"]


@only("torch")
def test_the_bar_shows_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor()
    fit(network(), monitor, verbose=1)
    shown = capsys.readouterr().out
    assert "grad_norm: " in shown and "clipped: 0.25" in shown
    assert shown.endswith("\n".join([*monitor.summary, ""]))
    assert monitor.summary[0].startswith(
        "karikomi: 4 steps, 1 clipped (25.0%), 0 skipped; median gradient norm "
    )
    most, largest = monitor.summary[1].split("; ")
    assert most == "karikomi: net/head/kernel contributed most in 100% of them"
    assert re.fullmatch(
        r"the largest of a tensor was [\d.]+, of net/head/kernel in step \d", largest
    )


@only("torch")
@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (kk.clip.ByGlobalNorm(1e9), "the limit was never met"),
        (kk.clip.ByGlobalNorm(1e-9), "the limit was met nearly always"),
        (kk.clip.ByGlobalNorm(float("inf")), ""),
        (kk.clip.Normalize(), ""),
    ],
)
def test_a_limit_that_says_nothing_is_spoken_of(
    rule: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = Monitor()
    fit(network(rule), monitor)
    assert said in monitor.summary[1] and ("limit" in monitor.summary[1]) == bool(said)
    assert capsys.readouterr().out == ""  # verbose=0


@only("torch")
def test_skipped_steps_count_neither_as_taken_nor_as_steps_with_a_norm() -> None:
    tally, rule = Tally(), kk.clip.ByGlobalNorm(1.0)
    for sizes in ([6.0, 8.0], [float("nan"), 0.0], [20.0, 15.0], [3.0, 4.0]):
        grads = {name: np.array([size]) for name, size in zip("ab", sizes, strict=True)}
        tally.add(kk.numpy.clip(grads, rule)[1])
    assert tally.lines(rule) == [
        "karikomi: 4 steps, 3 clipped (75.0%), 1 skipped; median gradient norm 10",
        "karikomi: b contributed most in 67% of them; the largest of a tensor was 20, of a in step 3; "
        "the limit was met nearly always, so it sets the length of the steps",
    ]


def test_a_run_of_bad_steps_ends_the_training_and_is_on_record(tmp_path: Path) -> None:
    path, drawn = tmp_path / "run.jsonl", tmp_path / "clip.html"
    monitor = Monitor(path, report=kk.report.TrainingPage(drawn))
    with pytest.raises(NonFinite, match="3 steps in a row .*net/head/kernel"):
        fit(network(stop_after=3), monitor, bad=True)
    del monitor
    gc.collect()
    rows = steps(path)
    assert all(row["skipped"] and "net/head/kernel" in row["nonfinite"] for row in rows)
    if BACKEND == "torch":  # The step itself raises, before a callback could see it.
        assert len(rows) == 2
    else:
        assert len(rows) == 3 and "3 were skipped" in drawn.read_text(encoding="utf-8")


def test_a_skipped_step_is_seen_though_the_optimizer_did_not_move(tmp_path: Path) -> None:
    model, path = network(stop_after=99), tmp_path / "run.jsonl"
    monitor = Monitor(path)
    fit(model, monitor, bad=True)
    assert tally(read(path)) == {"steps": 4, "clipped": 0, "skipped": 4}
    assert monitor.summary[1] == "karikomi: every gradient was zero or not finite"
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 0


@slow_on("tensorflow")
def test_a_resumed_training_goes_on_with_its_record(tmp_path: Path) -> None:
    path, saved = tmp_path / "run.jsonl", tmp_path / "model.keras"
    model = network()
    fit(model, Monitor(path), epochs=1)
    model.save(saved)
    fit(model, Monitor(path), epochs=3, initial_epoch=1)  # and then the machine went down
    assert len(steps(path)) == 3 * BATCHES
    again = keras.models.load_model(saved)
    fit(again, Monitor(path), epochs=2, initial_epoch=1)
    assert [row["step"] for row in steps(path)] == list(range(1, 2 * BATCHES + 1))
    fresh = network()
    fit(fresh, Monitor(path), epochs=2, initial_epoch=1)  # another optimizer: rows are added
    assert len(steps(path)) == 3 * BATCHES
    fit(network(), Monitor(path))  # another training: the file begins anew
    assert len(steps(path)) == BATCHES


@only("torch")
def test_a_recorder_of_ones_own_is_neither_cut_nor_closed(tmp_path: Path) -> None:
    path, pages = tmp_path / "run.jsonl", []
    with Recorder(path) as recorder:
        recorder.write({"event": "note", "step": 99})
        fit(network(), Monitor(recorder, report=lambda rows: pages.append(list(rows))))
        recorder.write({"event": "note", "text": "still open"})
    events = [row["event"] for row in read(path)]
    assert [name for name in events if name not in ("names", "run")] == [
        *("start", "note"),
        *["step"] * BATCHES,
        *("epoch", "note"),
    ]
    assert [row["event"] for row in pages[0]] == events[:-1]


@only("torch")
def test_a_page_that_cannot_be_drawn_costs_no_training(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "run.jsonl", report=kk.report.TrainingPage(tmp_path))
    with pytest.warns(UserWarning, match="the report was not drawn .Unwritable"):
        assert len(fit(network(), monitor).history["loss"]) == 1


@only("torch")
def test_one_step_in_several_is_enough(tmp_path: Path) -> None:
    path, monitor = tmp_path / "run.jsonl", Monitor(tmp_path / "run.jsonl", every=2)
    losses = fit(network(rate=0.0), monitor).history["loss"]
    assert [row["step"] for row in steps(path)] == [2, 4]
    assert np.mean([row["loss"] for row in steps(path)]) == pytest.approx(losses[0], rel=1e-4)
    assert monitor.summary[0].startswith("karikomi: 2 steps")


def test_a_loss_scale_and_accumulation_stand_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    fit(network(wrap=keras.optimizers.LossScaleOptimizer), Monitor(path))
    assert len(steps(path)) >= 1 and all(row["norm"] < 1e3 for row in steps(path))
    model = network()
    model.compile(
        clipped(keras.optimizers.SGD(0.01, gradient_accumulation_steps=2), kk.clip.ByNorm(1.0)),
        loss="mse",
    )
    fit(model, Monitor(path))
    assert [row["step"] for row in steps(path)] == [1, 2]


@only("torch")
def test_an_optimizer_that_does_not_clip_is_refused_with_the_next_step() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("adam", loss="mse")
    with pytest.raises(
        Unsupported, match=r"clips nothing.* got Adam; model\.compile\(kk\.keras\.clipped"
    ):
        fit(model, Monitor())


@only("torch")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every n-th batch; got 0"),
        (
            {"record": "r", "report": "clip.html"},
            r"report=kk\.report\.TrainingPage\('clip\.html'\)",
        ),
        ({"report": print}, "drawn from a record"),
        ({"record": 3}, "path"),
    ],
)
def test_arguments_of_another_kind_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Monitor(**options)


def test_a_callback_that_is_called_from_a_thread_is_refused() -> None:
    """Keras does so for a callback that is given without a list, but not on TensorFlow."""
    model, monitor = network(), Monitor()
    if BACKEND == "tensorflow":
        model.fit(*data(), batch_size=BATCH, verbose=0, callbacks=monitor)
        assert len(monitor.summary) == 2
        return
    with pytest.raises(Unsupported, match=r"callbacks=\[monitor\]"):
        model.fit(*data(), batch_size=BATCH, verbose=0, callbacks=monitor)
