"""Runs that other tools have logged: real files where the tool is installed, else by hand; torn and hostile ones."""

from __future__ import annotations

import json
import math
import sqlite3
import struct
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import karikomi as kk
from karikomi.advising.formats import open_run
from karikomi.advising.formats.event_files import masked_crcs
from karikomi.advising.recorded import Recorded
from karikomi.errors import BadFile, InvalidArgument, UnknownName

STEPS = 60


def norms(steps: int = STEPS) -> np.ndarray:
    return np.exp(0.2 * np.random.default_rng(0).standard_normal(steps))


def losses(steps: int = STEPS) -> np.ndarray:
    return 2.0 * np.exp(-np.arange(steps) / 50.0)


def check(run: Recorded, *, rtol: float = 1e-6, first: int = 1, loss: bool = True) -> None:
    assert run.steps.tolist() == list(range(first, first + STEPS))
    np.testing.assert_allclose(run.columns["norm"], norms(), rtol=rtol)
    if loss:
        np.testing.assert_allclose(run.columns["loss"], losses(), rtol=rtol)
    advice = kk.advise(run.source)
    assert advice.limit is not None
    assert advice.limit.median == pytest.approx(np.median(norms()[STEPS // 2 :]), rel=0.05)
    assert json.loads(json.dumps(advice.as_dict(), allow_nan=False))["format"] == run.format


# TensorBoard


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, from its polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def event(step: int, tag: str, value: float, *, as_tensor: bool = False) -> bytes:
    if as_tensor:
        tensor = b"\x08\x01" + field(4, struct.pack("<f", value))
        body = field(1, tag.encode()) + field(8, tensor)
    else:
        body = field(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
    return b"\x09" + struct.pack("<d", 1.0) + b"\x10" + varint(step) + field(5, field(1, body))


def events(steps: Iterable[int], **how: bool) -> list[bytes]:
    pairs = zip(steps, norms(), losses(), strict=False)
    return [
        frame(event(step, tag, value, **how))
        for step, norm, loss in pairs
        for tag, value in (("train/grad_norm", norm), ("train/loss", loss))
    ]


VERSION = frame(b"\x09" + struct.pack("<d", 1.0) + field(3, b"brain.Event:2"))


@pytest.mark.parametrize("data", [b"", b"a", b"123456789", bytes(range(256))])
def test_checksums_are_those_of_the_polynomial(data: bytes) -> None:
    found = masked_crcs(np.frombuffer(data, np.uint8).reshape(1, -1))
    assert int(found[0]).to_bytes(4, "little") == masked(data)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_scalars_of_tensorboard(tmp_path: Path, as_tensor: bool) -> None:
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(VERSION + b"".join(events(range(1, STEPS + 1), as_tensor=as_tensor)))
    check(open_run(path), rtol=1e-6)
    check(open_run(tmp_path), rtol=1e-6)


def test_a_real_file_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, (norm, loss) in enumerate(zip(norms(), losses(), strict=True), start=1):
            writer.add_scalar("train/grad_norm", norm, step)
            writer.add_scalar("train/loss", loss, step, new_style=True)
            writer.add_histogram("weights", np.arange(1000.0), step)
    check(open_run(tmp_path), rtol=1e-6)


def test_a_later_file_replaces_the_steps_that_a_killed_run_wrote(tmp_path: Path) -> None:
    spoilt = [frame(event(step, "train/grad_norm", 99.0)) for step in range(41, 56)]
    first = VERSION + b"".join([*events(range(1, 41)), *spoilt])
    (tmp_path / "events.out.tfevents.1").write_bytes(first)
    again = VERSION + b"".join(events(range(1, STEPS + 1))[80:])
    (tmp_path / "events.out.tfevents.2").write_bytes(again)
    run = open_run(tmp_path)
    check(run)
    assert run.lost == ["15 points that were written again after a restart"]


def test_a_torn_event_file_is_read_up_to_the_tear(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes((VERSION + b"".join(events(range(1, STEPS + 1))))[:-3])
    run = open_run(path)
    assert len(run) == STEPS and np.isnan(run.columns["loss"][-1])
    assert "ends within a frame" in run.lost[0] and "lost: events.out" in str(kk.advise(path))


def test_an_altered_frame_is_left_out_and_named(tmp_path: Path) -> None:
    frames = events(range(1, STEPS + 1))
    frames[10] = frames[10][:-8] + b"\x00\x00\x00\x00" + frames[10][-4:]
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(VERSION + b"".join(frames))
    run = open_run(path)
    assert len(run) == STEPS - 1 and 6 not in run.steps
    assert "1 frames whose checksum is wrong" in run.lost[0]


@pytest.mark.parametrize("length", [1 << 62, 1 << 20])
def test_a_length_beyond_the_file_is_not_allocated(tmp_path: Path, length: int) -> None:
    head = struct.pack("<Q", length)
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(VERSION + b"".join(events(range(1, 21))) + head + masked(head))
    run = open_run(path)
    assert len(run) == 20 and "ends within a frame" in run.lost[0]


def test_frames_that_are_no_events_are_named(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1"
    hostile = [b"\xff" * 30, field(5, field(1, b"\xff" * 12)), b"\x0a\xff\xff\xff\xff\x0f"]
    path.write_bytes(VERSION + b"".join([*map(frame, hostile), *events(range(1, 21))]))
    run = open_run(path)
    assert len(run) == 20 and sum("no event" in text for text in run.lost) >= 2


# Hugging Face, Lightning


def state_rows(every: int = 1) -> list[dict[str, float]]:
    rows = [
        {"loss": loss, "grad_norm": norm, "learning_rate": 1e-3, "epoch": 0.1, "step": step * every}
        for step, (norm, loss) in enumerate(zip(norms(), losses(), strict=True), start=1)
    ]
    return [*rows, {"eval_loss": 1.0, "epoch": 1.0, "step": STEPS * every}]


def test_a_real_state_of_transformers(tmp_path: Path) -> None:
    callback = pytest.importorskip("transformers.trainer_callback")
    state = callback.TrainerState(log_history=state_rows(), global_step=STEPS)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    run = open_run(tmp_path)
    check(run)
    assert run.format == "trainer_state.json of Hugging Face" and run.mean_of == 1.0


def test_a_stride_is_said_and_no_claim_is_made_about_spikes(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": state_rows(500)}))
    advice = kk.advise(path)
    assert advice.stride == 500 and advice.limit is not None and advice.limit.confidence != "good"
    text = " ".join(str(advice).split())
    assert (
        "each loss is the mean of about 500 steps" in text
        and "no claim about single spikes" in text
    )


def test_bare_nan_in_a_state_is_a_fact(tmp_path: Path) -> None:
    rows = state_rows()
    rows[30]["grad_norm"] = math.nan
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": rows}))
    assert "NaN" in path.read_text()
    run = open_run(path)
    assert run.bad[30] and run.bad.sum() == 1 and kk.advise(path).regime == "rescue"


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_real_table_of_lightning(tmp_path: Path, package: str) -> None:
    loggers = pytest.importorskip(f"{package}.loggers")
    logger = loggers.CSVLogger(str(tmp_path), name="", version="")
    for step, (norm, loss) in enumerate(zip(norms(), losses(), strict=True)):
        logger.log_metrics({"grad_2.0_norm_total": norm, "grad_2.0_norm/fc.weight": norm / 2}, step)
        logger.log_metrics({"train_loss": loss}, step)
    logger.save()
    (path,) = tmp_path.rglob("metrics.csv")
    run = open_run(path)
    check(run, first=0, rtol=1e-5)
    assert run.names == ("fc.weight",) and run.measured("gradients")


# W&B, MLflow, Megatron, CSV


def history() -> list[dict[str, float | None]]:
    found: list[dict[str, float | None]] = []
    for step, (norm, loss) in enumerate(zip(norms(), losses(), strict=True), start=1):
        found += [{"_step": step, "train/grad_norm": norm}, {"_step": step, "train/loss": loss}]
    return found


def as_list(path: Path) -> Path:
    path = path / "history.json"
    path.write_text(json.dumps(history()))
    return path


def as_lines(path: Path) -> Path:
    path = path / "history.jsonl"
    path.write_text("\n".join(map(json.dumps, history())))
    return path


def as_columns(path: Path) -> Path:
    rows, path = history(), path / "history.json"
    keys = ("_step", "train/grad_norm", "train/loss")
    columns = {key: {str(n): row.get(key) for n, row in enumerate(rows)} for key in keys}
    path.write_text(json.dumps(columns))
    return path


def as_csv(path: Path) -> Path:
    path = path / "wandb_export.csv"
    lines = [
        f"{row['_step']},{row.get('train/grad_norm', '')},{row.get('train/loss', '')}"
        for row in history()
    ]
    path.write_text("\n".join(["_step,train/grad_norm,train/loss", *lines, ""]))
    return path


@pytest.mark.parametrize("write", [as_list, as_lines, as_columns, as_csv])
def test_histories_of_wandb(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    run = open_run(write(tmp_path))
    check(run)
    assert run.format == "history of W&B"


def test_a_history_of_wandb_as_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "0000.parquet"
    keys = ("_step", "train/grad_norm", "train/loss")
    rows = [{key: row.get(key) for key in keys} for row in history()]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    check(open_run(path))


def of_a_real_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its skinny package writes files; the database needs the full one, and is made by hand below."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run():
        for step, (norm, loss) in enumerate(zip(norms(), losses(), strict=True), start=1):
            mlflow.log_metrics({"grad_norm": norm, "loss": loss}, step=step)
    check(open_run(tmp_path / "mlruns"))


# It cannot be installed beside TensorFlow, whose protobuf is newer.
if find_spec("mlflow"):
    test_a_real_store_of_mlflow = of_a_real_store


def test_files_of_mlflow(tmp_path: Path) -> None:
    folder = tmp_path / "mlruns" / "0" / "abc" / "metrics"
    folder.mkdir(parents=True)
    (folder.parent / "meta.yaml").write_text("run_id: abc\n")
    for key, values in (("grad_norm", norms()), ("loss", losses())):
        lines = [
            f"17000{step} {value!r} {step}" for step, value in enumerate(values.tolist(), start=1)
        ]
        (folder / key).write_text("\n".join([*lines, "torn"]))
    for where in (tmp_path / "mlruns", folder.parent, folder):
        run = open_run(where)
        check(run)
        assert run.lost == ["2 lines that are no metric"]


def test_a_database_of_mlflow_has_its_newest_run_and_not_finite_values(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE metrics (key VARCHAR(250), value DOUBLE, timestamp BIGINT, run_uuid VARCHAR(32), "
            "step BIGINT, is_nan BOOLEAN)"
        )
        rows = [
            ("grad_norm", norm, step, "new", step, 0)
            for step, norm in enumerate(norms().tolist(), 1)
        ]
        rows[20] = ("grad_norm", 0.0, 21, "new", 21, 1)
        rows[40] = ("grad_norm", 1.7976931348623157e308, 41, "new", 41, 0)
        rows += [("grad_norm", 5.0, 0, "old", 1, 0)]
        connection.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
    connection.close()
    run = open_run(path)
    assert len(run) == STEPS and np.flatnonzero(run.bad).tolist() == [20, 40]
    assert "1 other runs; this is new" in run.lost[0]


def test_a_log_of_megatron(tmp_path: Path) -> None:
    lines = ["> building model", "done | with | pipes"]
    for step, (norm, loss) in enumerate(zip(norms(), losses(), strict=True), start=1):
        lines.append(
            f" [2026-01-01 00:00:00] iteration {step:8d}/ 500 | consumed samples: 64 | elapsed time per iteration "
            f"(ms): 1.0 | Learning Rate: 1.2E-06 | lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: {norm:.6f} | "
            "number of skipped iterations:   0 |"
        )
    path = tmp_path / "train.log"
    path.write_text("\n".join(lines))
    run = open_run(path)
    check(run, rtol=1e-5)
    assert run.columns["lr"][3] == 1.2e-6 and run.columns["loss_scale"][3] == 1.0


def test_any_csv_with_a_map(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    lines = [
        f"{step},{norm!r},{loss!r},x"
        for step, norm, loss in zip(range(1, 99), norms().tolist(), losses().tolist(), strict=False)
    ]
    path.write_text("\n".join(["n,g,l,word", *lines, "61,1."]))
    run = open_run(path, columns={"step": "n", "norm": "g", "loss": "l"})
    np.testing.assert_allclose(run.columns["norm"], norms())
    assert run.steps[-1] == STEPS and "1 rows with another number of cells" in run.lost[0]
    with pytest.raises(BadFile, match="no column of gradient norms"):
        open_run(path)
    with pytest.raises(UnknownName, match="no column 'h'"):
        open_run(path, columns={"norm": "h"})
    with pytest.raises(InvalidArgument, match="unknown quantity"):
        open_run(path, columns={"gradient": "g"})


def test_norms_after_a_clip_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "clipped.csv"
    path.write_text(
        "\n".join(["step,grad_norm", *(f"{n},{min(x, 1.0)}" for n, x in enumerate(norms()))])
    )
    advice = kk.advise(path)
    assert advice.limit is not None and any("after a clip" in text for text in advice.limit.doubts)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[" * 100_000, "nested too deep|not JSON"),
        ("a.json", b'{"a": 1}', "holds no rows"),
        ("a.json", b'[{"step": 1, "loss": "x"}]', "no column of gradient norms"),
        ("a.csv", b"step,step\n1,2\n", "does not name the columns"),
        ("a.csv", b"", "does not name the columns|no column"),
        ("a.csv", b"step,grad_norm\n1,\n", "no column of gradient norms"),
        ("a.db", b"SQLite format 3\x00" + b"\x00" * 200, "not a database of MLflow"),
        ("a.bin", bytes(range(256)), "no known format of a run"),
        ("a.parquet", b"PAR1 and nothing else", "cannot read this parquet|needs pyarrow"),
    ],
)
def test_hostile_files_end_in_one_line(
    tmp_path: Path, name: str, content: bytes, text: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(kk.KarikomiError, match=text) as raised:
        kk.advise(path)
    assert "\n" not in str(raised.value)


def test_what_is_not_there_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no such file"):
        kk.advise(tmp_path / "nothing")
    with pytest.raises(BadFile, match="this folder holds no run"):
        kk.advise(tmp_path)
    with pytest.raises(InvalidArgument, match="not a record"):
        kk.advise(3)  # type: ignore[arg-type]
