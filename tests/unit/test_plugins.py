"""Sinks for tools that need not be installed, against stand-ins that record the calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from karikomi.errors import InvalidArgument, Unavailable, UnknownName, Unsupported, Unwritable
from karikomi.plugins import MLflow, TensorBoard, WandB
from karikomi.record import Recorder, Sink, read

ROW = {
    "event": "step",
    "step": 5,
    "norm": 2.5,
    "clipped": True,
    "loss": None,
    "stage": "train",
    "gradients": {"tensors": 3},
}
CURVES = {"karikomi/norm": 2.5, "karikomi/clipped": 1.0}


class Writer:
    """As torch's SummaryWriter: add_scalar(tag, scalar_value, global_step=None, ...)."""

    def __init__(self, log_dir: str | None = None) -> None:
        self.log_dir, self.calls = log_dir, []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        self.calls.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


class Run:
    """As a W&B run: log(data, step=None, commit=None), define_metric(name, step_metric=None, ...)."""

    def __init__(self) -> None:
        self.defined: list[Any] = []
        self.logged: list[Any] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(
        self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
    ) -> None:
        self.logged.append((data, step, commit))


def test_tensorboard_draws_scalars_and_leaves_a_given_writer_open() -> None:
    writer = Writer()
    sink = TensorBoard(writer)
    sink.write(ROW)
    sink.write({"event": "epoch", "epoch": 1, "validation": 0.5})
    sink.close()
    assert writer.calls == [*((name, value, 5) for name, value in CURVES.items()), "flush"]
    assert isinstance(sink, Sink)


def test_tensorboard_takes_a_writer_that_cannot_be_flushed() -> None:
    calls: list[Any] = []
    sink = TensorBoard(SimpleNamespace(add_scalar=lambda *call: calls.append(call)))
    sink.write(ROW)
    sink.flush()
    sink.close()
    assert len(calls) == 2


def _with_torch_writer(monkeypatch: pytest.MonkeyPatch, writer: Any) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)


def test_tensorboard_opens_and_closes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    made: list[Writer] = []
    _with_torch_writer(monkeypatch, lambda log_dir: made.append(Writer(log_dir)) or made[-1])
    sink = TensorBoard(tmp_path / "curves")
    sink.write(ROW)
    sink.close()
    assert made[0].log_dir == str(tmp_path / "curves") and made[0].calls[-1] == "close"


def test_tensorboard_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Unavailable, match=r"pip install '\.\[torch,track\]'"):
        TensorBoard(tmp_path)


def test_tensorboard_names_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")

    def full(log_dir: str) -> Any:
        raise OSError(28, "No space left on device")

    _with_torch_writer(monkeypatch, full)
    with pytest.raises(Unwritable, match="curves: cannot write for TensorBoard .No space"):
        TensorBoard(tmp_path / "curves")


@pytest.mark.parametrize("to", [None, 3, Writer, object()])
def test_tensorboard_refuses_what_is_neither_writer_nor_folder(to: Any) -> None:
    with pytest.raises(InvalidArgument, match="neither a writer nor a folder"):
        TensorBoard(to)


@pytest.mark.parametrize("commit", [True, False])
def test_wandb_logs_over_its_own_axis_without_a_step(commit: bool) -> None:
    run = Run()
    sink = WandB(run, commit=commit)
    sink.write(ROW)
    sink.write({"event": "epoch", "epoch": 1})
    sink.flush()
    sink.close()
    assert run.defined == [("karikomi/step", None), ("karikomi/*", "karikomi/step")]
    assert run.logged == [({**CURVES, "karikomi/step": 5}, None, commit)]
    assert isinstance(sink, Sink)


@pytest.mark.parametrize("run", [None, "project", SimpleNamespace(log=print)])
def test_wandb_refuses_what_is_no_run(run: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"not a run of W&B.*wandb\.init"):
        WandB(run)


class Client:
    """As MlflowClient: log_batch(run_id, metrics=(), params=(), tags=()), get_run(run_id)."""

    batches: list[Any] = []

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        if len(metrics) > 1_000:
            raise ValueError("at most 1000 metrics")
        self.batches.append((run_id, metrics))

    def get_run(self, run_id: str) -> None:
        if run_id != "known":
            raise RuntimeError(f"Run '{run_id}' not found")


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient = Client  # type: ignore[attr-defined]
    module.active_run = lambda: None  # type: ignore[attr-defined]
    entities.Metric = lambda key, value, timestamp, step: (key, value, timestamp, step)  # type: ignore[attr-defined]
    monkeypatch.setattr(Client, "batches", [])
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return module


def test_mlflow_sends_metrics_in_batches_when_flushed(mlflow: Any) -> None:
    sink = MLflow("known")
    sink.write(ROW)
    sink.write({"event": "epoch", "epoch": 1})
    assert Client.batches == []
    sink.flush()
    sink.flush()
    ((run_id, metrics),) = Client.batches
    assert run_id == "known" and isinstance(sink, Sink)
    assert [(key, value, step) for key, value, _, step in metrics] == [
        (name, value, 5) for name, value in CURVES.items()
    ]
    assert all(isinstance(time, int) and time > 1.6e12 for _, _, time, _ in metrics)


def test_mlflow_keeps_to_the_limits_of_one_request(mlflow: Any) -> None:
    sink = MLflow("known")
    for step in range(1_250):
        sink.write({**ROW, "step": step, "rate (1/s)": 1})
    sink.close()
    assert [len(metrics) for _, metrics in Client.batches] == [1_000, 1_000, 1_000, 750]
    assert Client.batches[0][1][2][0] == "karikomi/rate _1/s_"


def test_mlflow_logs_to_the_run_that_was_active_when_it_was_made(mlflow: Any) -> None:
    with pytest.raises(Unsupported, match=r"no run of MLflow is active.*start_run"):
        MLflow()
    mlflow.active_run = lambda: SimpleNamespace(info=SimpleNamespace(run_id="first"))
    sink = MLflow()
    mlflow.active_run = lambda: SimpleNamespace(info=SimpleNamespace(run_id="second"))
    sink.write(ROW)
    sink.close()
    assert [run_id for run_id, _ in Client.batches] == ["first"]


def test_mlflow_names_a_run_that_is_not_there(mlflow: Any) -> None:
    with pytest.raises(UnknownName, match=r"does not find this run; got 'x'; Run 'x' not found"):
        MLflow("x")


def test_mlflow_does_not_hoard_what_a_failed_request_held(
    mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = MLflow("known")
    with monkeypatch.context() as patch:
        patch.setattr(Client, "log_batch", lambda *_, **__: 1 / 0)
        sink.write(ROW)
        with pytest.raises(ZeroDivisionError):
            sink.flush()
    sink.write({**ROW, "step": 6})
    sink.flush()
    assert [step for _, metrics in Client.batches for *_, step in metrics] == [6, 6]


def test_mlflow_says_that_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(Unavailable, match="pip install mlflow"):
        MLflow()


def test_all_of_them_behind_one_recorder(tmp_path: Path, mlflow: Any) -> None:
    writer, run = Writer(), Run()
    with Recorder(
        tmp_path / "r", sinks=[TensorBoard(writer), WandB(run), MLflow("known")]
    ) as recorder:
        recorder.step(1, facts={"loss": 0.5})
    assert [call for call in writer.calls if call != "flush"] == [("karikomi/loss", 0.5, 1)]
    assert run.logged == [({"karikomi/loss": 0.5, "karikomi/step": 1}, None, True)]
    assert [metric[0] for _, metrics in Client.batches for metric in metrics] == ["karikomi/loss"]
    assert [row["event"] for row in read(tmp_path / "r")] == ["start", "step"]
