"""The main job on a small task of its own: what it promises, how it resumes, what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import karikomi as kk  # noqa: E402
from depth import FULL  # noqa: E402
from karikomi.errors import (  # noqa: E402
    BadFile,
    InvalidArgument,
    KarikomiError,
    NonFinite,
    UnknownName,
    Unsupported,
)
from karikomi.search.accounting import fixed_width_bytes  # noqa: E402
from karikomi.search.ladder import Ladder  # noqa: E402
from karikomi.search.lock import lock  # noqa: E402
from karikomi.tasks import Data, Recipe, Split, Task  # noqa: E402

RECIPE = Recipe(
    batch_size=32,
    learning_rate=5e-3,
    train_epochs=4,
    prune_epochs=3,
    tune_epochs=2,
    sparsities=(0.5, 0.8),
    entries=(8, 4),
    rates=(4.0,),
)


def _net() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.BatchNorm1d(40), torch.nn.ReLU(), torch.nn.Linear(40, 3)
    )


def _wide() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 41), torch.nn.ReLU(), torch.nn.Linear(41, 3))


class _Residual(torch.nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        if tied:
            self.second.weight = self.first.weight
        self.last = torch.nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(inputs + torch.relu(self.second(torch.relu(self.first(inputs)))))


def _split(count: int, seed: int) -> Split:
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((count, 6), dtype=np.float32)
    return Split(inputs, np.argmax(inputs[:, :3] - inputs[:, 3:], axis=1).astype(np.int64))


def _data() -> Data:
    return Data(_split(400, 0), _split(150, 1), _split(150, 2))


def _task(**changes: Any) -> Task:
    whole = {"name": "argmax", "model": _net, "data": _data, "recipe": RECIPE, **changes}
    return Task(**whole)


def _run(task: Task, out: Path, **more: Any) -> dict[str, Any]:
    return kk.compress(task, out=out, progress=False, **{"max_drop": 0.05, **more})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, _run(_task(), folder)


def test_the_figures_are_those_of_the_file(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, result = whole
    file = Path(result["file"])
    arrays = kk.load(file)
    model = kk.load(file, into=_net()).eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(_data().test.inputs)).numpy()
    assert result["metric_after"] == kk.tasks.accuracy(outputs, _data().test.targets)
    assert result["bytes_packed"] == file.stat().st_size
    assert result["ratio"] == result["bytes_dense"] / result["bytes_packed"]
    weights = sum(np.count_nonzero(arrays[name]) for name in ("0.weight", "3.weight"))
    assert result["sparsity"] == pytest.approx(1 - weights / (6 * 40 + 40 * 3))
    assert result["verified"] is True
    assert result["validation_before"] - result["validation_after"] <= result["max_drop"]
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))


def test_every_stage_is_recorded(whole: tuple[Path, dict[str, Any]]) -> None:
    rows = list(kk.record.read(whole[1]["record"]))
    steps = [row for row in rows if row["event"] == "step"]
    assert len(steps) == whole[1]["clip"]["steps"]
    assert {row["stage"].partition("-")[0] for row in steps} == {"train", "prune", "quantize"}
    assert all(row["loss"] > 0 and row["norm"] >= 0 for row in steps)


def test_the_same_call_again_changes_nothing(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, first = whole
    bytes_before = (folder / "model.karikomi").read_bytes()
    again = _run(_task(), folder)
    assert again["resumed"] and (folder / "model.karikomi").read_bytes() == bytes_before
    volatile = {"resumed", "seconds"}
    assert {k: v for k, v in again.items() if k not in volatile} == {
        k: v for k, v in first.items() if k not in volatile
    }
    assert again["seconds"] == first["seconds"]


def test_what_was_measured_is_not_measured_again(
    whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sums over memory that lies elsewhere differ in their last digits.
    folder, first = whole
    monkeypatch.setattr("karikomi.search.result.audit", lambda *_, **__: pytest.fail("again"))
    again = _run(_task(), folder)
    assert (again["audit"], again["drop"]) == (first["audit"], first["drop"])


def test_candidates_are_taken_over_for_other_budgets(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, first = whole
    bolder = dataclasses.replace(RECIPE, rates=(8.0, 4.0))
    options = {"max_drop": 0.2}
    fresh = _run(_task(recipe=bolder), tmp_path / "fresh", **options)
    again = _run(_task(recipe=bolder), tmp_path / "again", reuse=folder, **options)
    known = (folder / "journal.jsonl").read_bytes()
    journal = (tmp_path / "again" / "journal.jsonl").read_bytes()
    assert journal.startswith(known) and len(journal) > len(known)
    proposed = [str(json.loads(line).get("proposal")) for line in journal.splitlines()]
    assert len(set(proposed)) == len(proposed), "one was evaluated again"
    assert Path(again["file"]).read_bytes() == Path(fresh["file"]).read_bytes()
    assert again["front"] == fresh["front"] and again["candidates"] == fresh["candidates"]
    assert again["audit"] == fresh["audit"]
    assert "served 1 certificate in" in " ".join(again["warnings"])
    assert "sure to 90% only" in " ".join(again["warnings"])
    assert not any("served" in text for text in fresh["warnings"])
    # The folder that was taken from is as it was, and the new one does without it.
    assert _run(_task(), folder)["metric_after"] == first["metric_after"]
    assert (folder / "journal.jsonl").read_bytes() == known
    later = _run(_task(recipe=bolder), tmp_path / "again", reuse=folder, **options)
    assert later["resumed"] and (tmp_path / "again" / "journal.jsonl").read_bytes() == journal


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"seed": 1}, Unsupported, "different: network, seed; got network = "),
        ({"recipe": {"tune_epochs": 3}}, Unsupported, r"different: recipe\.tune_epochs"),
        ({"reuse": "nowhere"}, BadFile, "holds no run"),
        ({"out": "same"}, InvalidArgument, "by itself"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(
    change: dict[str, Any],
    error: type[KarikomiError],
    text: str,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    folder, given = whole[0], dict(change)
    recipe = dataclasses.replace(RECIPE, **given.pop("recipe", {}))
    out = folder if given.pop("out", None) else tmp_path / "out"
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(error, match=text):
        _run(_task(recipe=recipe), out, **{"reuse": folder, **given})
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize("stop", range(1, 16, 2) if FULL else (1, 6, 11, 15))
def test_a_run_that_dies_in_any_epoch_ends_in_the_same_bytes(
    stop: int, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from karikomi.search.folder import Folder

    written = Folder.write_arrays
    count = 0

    def dying(self: Folder, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        written(self, *args, **kwargs)

    monkeypatch.setattr(Folder, "write_arrays", dying)
    with pytest.raises(KeyboardInterrupt):
        _run(_task(), tmp_path / "out")
    monkeypatch.undo()
    result = _run(_task(), tmp_path / "out")
    assert result["clip"] == whole[1]["clip"]
    for name in ("model.karikomi", "record.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (whole[0] / name).read_bytes()


# Runs the command line in a child for each line that it reads, and says the child's number: torch is imported once.
CHILDREN = """
import os, sys
import torch._dynamo
from karikomi.cli.app import main
import scipy.stats, torch.export._trace, torch._functorch.aot_autograd
import karikomi.cli.compress, karikomi.report, karikomi.search.pipeline, karikomi.torch.tasks.runner
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv = ["karikomi", *line.split()]
        os.dup2(2, 1)
        main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


# Of two thousand examples, so that an epoch takes long enough to be killed in.
BLOBS = """
import numpy as np
from torch import nn
from karikomi.tasks import Data, Split, Task

def split(size, seed):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 3, size)
    noise = generator.standard_normal((size, 6), dtype=np.float32)
    return Split(np.eye(3, 6, dtype=np.float32)[targets] * 3 + noise, targets)

task = Task(
    name="blobs",
    model=lambda: nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)),
    data=lambda: Data(split(2000, 0), split(200, 1), split(200, 2)),
)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_kill_9_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "blobs.py").write_text(BLOBS)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "train_epochs = 6\nprune_epochs = 3\ntune_epochs = 2\nentries = [8]\nrates = [4.0]\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", CHILDREN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None

        def begun(name: str) -> int:
            verb = f"compress {tmp_path / 'blobs.py'} --config {recipe} --max-drop 0.1 --quiet"
            print(f"{verb} --out {tmp_path / name}", file=parent.stdin, flush=True)
            return int(parent.stdout.readline())

        def ended() -> int:
            return int(parent.stdout.readline())

        begun("calm")
        assert ended() == 0
        codes = []
        for _ in range(2):
            child = begun("killed")
            candidates, seen = tmp_path / "killed" / "candidates", time.monotonic()
            while not any(candidates.glob("*/stages/checkpoint.safetensors")):
                assert time.monotonic() - seen < 60
                time.sleep(0.01)
            os.kill(child, signal.SIGKILL)
            codes.append(ended())
        assert -signal.SIGKILL in codes, "no process was alive to be killed"
        begun("killed")
        assert ended() == 0
    calm, stopped = (
        (tmp_path / name / "model.karikomi").read_bytes() for name in ("calm", "killed")
    )
    assert calm == stopped


@pytest.mark.parametrize(
    ("changes", "more", "named"),
    [
        ({}, {"seed": 1}, "seed"),
        ({}, {"max_drop": 0.1}, "max_drop"),
        ({"model": _wide}, {}, "network"),
        ({"metric": lambda outputs, targets: 0.5}, {}, "code"),
        ({"recipe": dataclasses.replace(RECIPE, train_epochs=5)}, {}, "recipe"),
        ({"data": lambda: Data(_split(400, 3), _split(150, 1), _split(150, 2))}, {}, "data"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    changes: dict[str, Any], more: dict[str, Any], named: str, whole: tuple[Path, dict[str, Any]]
) -> None:
    before = (whole[0] / "result.json").read_bytes()
    with pytest.raises(Unsupported, match=rf"another run; different: [\w, ]*\b{named}\b"):
        _run(_task(**changes), whole[0], **more)
    assert (whole[0] / "result.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "record.jsonl").write_text("mine, unfinished")
    with pytest.raises(Unsupported, match="holds files of something else; got record.jsonl"):
        _run(_task(), tmp_path)
    assert (tmp_path / "record.jsonl").read_text() == "mine, unfinished"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(Unsupported, match="another process is at work"):
        _run(_task(), tmp_path)


def test_a_tampered_stage_is_not_published(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path / "out")
    published = (tmp_path / "out" / "model.karikomi").read_bytes()
    (tmp_path / "out" / "result.json").unlink()
    for path in (tmp_path / "out" / "candidates").glob("*/stages/quantize-*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x40
        path.write_bytes(bytes(content))
    with pytest.raises(KarikomiError, match="not published"):
        _run(_task(), tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()
    assert (tmp_path / "out" / "model.karikomi").read_bytes() == published


def test_a_lost_record_is_said(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "out")
    record = tmp_path / "out" / Path(whole[1]["record"]).relative_to(whole[0])
    record.unlink()
    with pytest.raises(BadFile, match="the record of this run is gone"):
        _run(_task(), tmp_path / "out")
    record.touch()
    next((tmp_path / "out" / "candidates").glob("*/record.jsonl")).unlink()
    with pytest.raises(BadFile, match="the record of this run is gone"):
        _run(_task(), tmp_path / "out")


class _Sized(torch.nn.Module):
    """Its forward has the width in an attribute, or as a number."""

    def __init__(self, literal: bool = False) -> None:
        super().__init__()
        self.width, self.literal = 40, literal
        self.first, self.last = torch.nn.Linear(6, 40), torch.nn.Linear(40, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(inputs)).view(-1, 40 if self.literal else self.width)
        return self.last(hidden)


SHORT = dataclasses.replace(
    RECIPE,
    train_epochs=1,
    prune_epochs=1,
    tune_epochs=1,
    sparsities=(0.9,),
    entries=(8,),
    rates=(),
)


@pytest.mark.parametrize("model", [_Residual, _Sized])
def test_any_network_gets_smaller_and_its_file_too(
    model: type[torch.nn.Module], tmp_path: Path
) -> None:
    task = _task(model=model, recipe=SHORT)
    result = _run(task, tmp_path / "out", max_drop=1.0)
    shrink = result["shrink"]
    assert result["verified"] and shrink["removed"] > 0
    assert result["parameters_after"] == shrink["parameters_after"] < result["parameters_before"]
    assert result["macs_after"] < result["macs_before"]
    assert result["ms_before"] > 0 and result["ms_after"] > 0 and shrink["verdict"]
    small = kk.load(result["file"], into=model()).eval()
    assert sum(p.numel() for p in small.parameters()) == result["parameters_after"]
    with torch.no_grad():
        outputs = small(torch.from_numpy(_data().test.inputs)).numpy()
    assert result["metric_after"] == kk.tasks.accuracy(outputs, _data().test.targets)
    # A run that is continued builds the same network from the files of its stages.
    (tmp_path / "out" / "result.json").unlink()
    again = _run(task, tmp_path / "out", max_drop=1.0)
    assert again["resumed"] and {**again, **dict.fromkeys(("seconds", "resumed"))} == {
        **result,
        **dict.fromkeys(("seconds", "resumed")),
    }


def test_a_network_whose_code_does_not_allow_it_goes_on_unshrunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from karikomi.torch.tasks.runner import TorchRunner

    def quantized(*_: Any, **__: Any) -> Any:
        raise Unsupported("not here: of so small a network the dense one has the smallest file")

    monkeypatch.setattr(TorchRunner, "quantized", quantized)
    task = _task(model=functools.partial(_Sized, literal=True), recipe=SHORT)
    result = _run(task, tmp_path / "out", max_drop=1.0)
    assert result["verified"] and result["shrink"]["removed"] == 0
    reasons = " ".join(result["shrink"]["left_alone"].values())
    assert f"a number in the code counts them: view at {__file__}:" in reasons


class _Branching(_Residual):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs if inputs.sum() > 0 else -inputs)


def test_a_network_that_cannot_be_exported_goes_on_unshrunk(tmp_path: Path) -> None:
    result = _run(_task(model=_Branching), tmp_path / "out", max_drop=1.0)
    assert result["verified"] and result["shrink"]["removed"] == 0
    assert "torch.export" in result["shrink"]["left_alone"]["the network"]


def test_tied_weights_share_one_codebook(tmp_path: Path) -> None:
    task = _task(model=functools.partial(_Residual, tied=True))
    result = _run(task, tmp_path / "out", max_drop=1.0)
    assert result["verified"]
    arrays = kk.load(result["file"])
    assert np.array_equal(arrays["first.weight"], arrays["second.weight"])
    assert len(np.unique(arrays["first.weight"])) <= 9


def test_what_pruning_leaves_alone_is_named(whole: tuple[Path, dict[str, Any]]) -> None:
    left = whole[1]["left_alone"]
    assert list(left) == ["1.weight"] and "BatchNorm1d" in left["1.weight"]


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(7)
    few = Data(_split(64, 0), _split(32, 1), _split(32, 2))
    task = _task(recipe=SHORT, data=lambda: few)
    _run(task, tmp_path / "out", config={"threads": 2}, max_drop=1.0)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads


def test_when_nothing_holds_the_dense_network_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ladder, "passes", lambda self, found, finished: False)
    result = _run(_task(), tmp_path / "out", max_drop=0.0)
    assert not any(one["passed"] for one in result["candidates"])
    assert result["candidates"][-1]["what"] == "no quantization" and result["verified"]
    assert result["metric_after"] == result["metric_before"]


def _raising(*_: Any) -> Any:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": _raising}, KarikomiError, "model function raised; got RuntimeError: broken"),
        ({"data": _raising}, KarikomiError, "data function failed; got RuntimeError: broken"),
        ({"loss": _raising}, KarikomiError, "loss failed on a training batch; got RuntimeError"),
        ({"metric": _raising}, KarikomiError, "metric failed; got RuntimeError: broken"),
        ({"augment": _raising}, KarikomiError, "augment function failed; got RuntimeError"),
        ({"metric": lambda outputs, targets: float("nan")}, NonFinite, "metric is not finite"),
        ({"metric": lambda outputs, targets: None}, KarikomiError, "metric failed; got TypeError"),
        ({"loss": lambda o, t: o.sum(1)}, InvalidArgument, "the loss must be a 0-d tensor"),
        ({"loss": "hinge"}, InvalidArgument, "unknown loss"),
        ({"metric": "recall"}, InvalidArgument, "unknown metric"),
        ({"model": "lenet"}, InvalidArgument, "unknown network"),
        ({"model": lambda: 3}, InvalidArgument, "the model is not a torch module"),
        ({"data": lambda: 3}, InvalidArgument, "must return kk.tasks.Data"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_in_one_line(
    changes: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said) as caught:
        _run(_task(**changes), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_float_classes_and_broadcast_losses_are_refused(tmp_path: Path) -> None:
    def floats() -> Data:
        return Data(*(Split(s.inputs, s.targets.astype(np.float32)) for s in _parts()))

    with pytest.raises(InvalidArgument, match="accuracy needs integer classes"):
        _run(_task(data=floats, loss=lambda o, t: (o.sum(1) - t).square().mean()), tmp_path / "a")
    with pytest.raises(InvalidArgument, match="outputs and targets differ in shape"):
        _run(
            _task(data=floats, loss="mean_squared_error", metric=lambda o, t: -1.0), tmp_path / "b"
        )


def _parts() -> tuple[Split, Split, Split]:
    data = _data()
    return data.train, data.validation, data.test


@pytest.mark.parametrize("name", ["", "../evil", "a/b", ".hidden", 3])
def test_a_task_name_is_a_word(name: Any) -> None:
    with pytest.raises(InvalidArgument, match="can name a folder"):
        _task(name=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsities": (1.2,)},
        {"sparsities": (0.9, 0.5)},
        {"weight_decay": -1.0},
        {"learning_rate": float("inf")},
        {"temperature": 0.0},
        {"entries": (0,)},
        {"train_epochs": 0},
        {"threads": -1},
    ],
)
def test_recipes_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="Recipe"):
        dataclasses.replace(RECIPE, **changes)


@pytest.mark.parametrize(
    "arguments", [{"seed": -1}, {"seed": 1.5}, {"max_drop": -1}, {"max_drop": "0"}]
)
def test_arguments_are_checked_before_the_folder_is_claimed(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument):
        _run(_task(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_tasks_by_name(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("WORD = 'beside'\n")
    (tmp_path / "mine.py").write_text(
        "import karikomi as kk\nfrom neighbour import WORD\n"
        "task = kk.tasks.Task(name=WORD, model='lenet300', data=lambda: None)\n"
        "def leave(): raise SystemExit(3)\n"
    )
    assert kk.tasks.load(str(tmp_path / "mine.py")).name == "beside"
    with pytest.raises(KarikomiError, match="own code raised; got SystemExit: 3"):
        kk.tasks.load(f"{tmp_path / 'mine.py'}:leave")
    with pytest.raises(UnknownName, match="did you mean 'task'"):
        kk.tasks.load(f"{tmp_path / 'mine.py'}:tusk")
    with pytest.raises(UnknownName, match="did you mean 'digits'"):
        kk.tasks.load("digit")
    with pytest.raises(InvalidArgument, match="takes no data path"):
        kk.tasks.load("digits", data="x.npz")
    with pytest.raises(InvalidArgument, match="--data path/to/mnist.npz"):
        kk.tasks.checked_data(kk.tasks.load("mnist-lenet5"))
    (tmp_path / "mnist.npz").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(BadFile, match="MNIST archive, or it is cut short"):
        kk.tasks.checked_data(kk.tasks.load("mnist-lenet5", data=tmp_path / "mnist.npz"))


def test_mnist_is_what_the_papers_used(data_dir: Path) -> None:
    data = kk.tasks.checked_data(kk.tasks.load("mnist-lenet300", data=data_dir / "mnist.npz"))
    assert [len(data.train), len(data.validation), len(data.test)] == [55_000, 5_000, 10_000]
    assert abs(float(data.train.inputs.mean())) < 0.01
    assert abs(float(data.train.inputs.std()) - 1) < 0.01


def test_fixed_width_bytes_by_hand() -> None:
    kept = np.zeros(64, bool)
    kept[[0, 3, 40]] = True
    # Gaps 0, 2, 36: width 6 has no filler, 3 x (6 + 8) bits; width 4 has 2 fillers, 5 x 12; width 5 one, 4 x 13.
    assert fixed_width_bytes(kept, 8) == 6
    assert fixed_width_bytes(np.ones(10, bool), 32) == 40
    assert fixed_width_bytes(np.zeros(10, bool), 32) == 0


class _Text(torch.nn.Module):
    """An embedding, a frozen recurrent layer, and a head that is tied to the embedding: nothing to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell = torch.nn.Embedding(9, 9), torch.nn.GRU(9, 9, batch_first=True)
        self.cell.requires_grad_(False)
        self.head = torch.nn.Linear(9, 9)
        self.head.weight = self.words.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.words(inputs))[0][:, -1])


def _words() -> Data:
    inputs = np.random.default_rng(0).integers(0, 9, (200, 3))
    parts = (slice(0, 100), slice(100, 150), slice(150, 200))
    return Data(*(Split(inputs[part], inputs[part, -1]) for part in parts))


def test_what_cannot_be_pruned_is_quantized_and_packed_and_named(tmp_path: Path) -> None:
    short = dataclasses.replace(RECIPE, train_epochs=2, rates=())
    task = _task(model=_Text, data=_words, recipe=short)
    result = _run(task, tmp_path / "out", max_drop=1.0)
    assert [row["what"] for row in result["candidates"]] == ["8 bits per channel"]
    assert result["verified"] and "no weight of the network can be pruned" in result["warnings"][0]
    assert [*result["left_alone"]] == ["words.weight", "cell.weight_ih_l0", "cell.weight_hh_l0"]
    assert result["left_alone"]["words.weight"].endswith("; tied with head.weight")
    assert result["tied"] == {"head.weight": "words.weight"}
    quantizers = {row["name"]: row["quantizer"] for row in result["tensors"]}
    for name in ("words.weight", "head.weight", "cell.weight_ih_l0", "cell.weight_hh_l0"):
        assert quantizers[name] == "uniform 8 bits, axis 0", name
    arrays = kk.load(result["file"])
    assert np.array_equal(arrays["words.weight"], arrays["head.weight"])
    with pytest.raises(Unsupported, match=r"can be pruned; got words.weight: .*sparsities=\(0,\)"):
        kk.sweep(task, sparsities=(0.0, 0.5), out=tmp_path / "sweep", progress=False)
    assert not (tmp_path / "sweep").exists()


def test_types_that_are_not_compressed_are_refused(tmp_path: Path) -> None:
    said = r"0.weight: .*got torch.float8_e5m2; allowed: .*module.float\(\)"
    with pytest.raises(Unsupported, match=said):
        _run(_task(model=lambda: _wide().to(torch.float8_e5m2)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frozen_weights_are_left_alone_by_name(tmp_path: Path) -> None:
    def half() -> torch.nn.Module:
        made = _wide()
        made[0].requires_grad_(False)
        return made

    recipe = dataclasses.replace(RECIPE, rates=())
    result = _run(_task(model=half, recipe=recipe), tmp_path / "out", max_drop=1.0)
    assert result["left_alone"] == {"0.weight": "frozen: it requires no gradient"}
    assert {row["name"]: row["quantizer"] for row in result["tensors"]}["0.weight"] != "none"
    assert kk.load(result["file"])["0.weight"].all(), "nothing of it was pruned"


def _with(part: str, **changes: Any) -> Any:
    return lambda: dataclasses.replace(
        _data(), **{part: dataclasses.replace(getattr(_data(), part), **changes)}
    )


def _strange(part: str) -> Any:
    labels = getattr(_data(), part).targets.copy()
    labels[-1] = 7
    return _with(part, targets=labels)


class _Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(inputs), inputs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": _Pair}, r"no single tensor; got tuple of a tensor \(\d+, 3\)"),
        ({"model": lambda: torch.nn.Linear(5, 3)}, "model failed on a batch of inputs"),
        ({"model": lambda: _net().to("meta")}, "meta|no values yet"),
        ({"data": _strange("train")}, r"train: a target is no class .*got 7; allowed: 0\.\.2"),
        ({"data": _strange("validation")}, r"a target is no class .*got 7; allowed: 0\.\.2"),
        ({"data": _strange("test")}, r"a target is no class .*got 7; allowed: 0\.\.2"),
        ({"data": _with("test", inputs=np.ones((150, 5)))}, "failed on a batch of inputs"),
        ({"class_axis": 2}, "class axis 2"),
        ({"loss": lambda o, t: torch.nn.functional.nll_loss(o, t.int())}, "training batch.*Int"),
        ({"model": lambda: torch.nn.Conv1d(6, 3, 1)}, "needs integer classes|failed on a batch"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_folder_is_made(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(KarikomiError, match=said):
        _run(_task(**changes), tmp_path / "out")
    with pytest.raises(KarikomiError, match=said):
        kk.sweep(_task(**changes), out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_configured_by_a_mapping_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'tune_epochs = 2\nentries = [4]\n[clip]\nrule = "ByNorm"\nlimit = 0.5\n'
    )
    values = {"tune_epochs": 2, "entries": (4,), "clip": kk.clip.ByNorm(0.5)}
    task = _task(recipe=SHORT)
    first = _run(task, tmp_path / "a", config=tmp_path / "mine.toml")
    second = _run(task, tmp_path / "b", config=values)
    assert first["clip"]["rule"] == "ByNorm(limit=0.5)"
    files = [Path(result["file"]).read_bytes() for result in (first, second)]
    assert files[0] == files[1]
    with pytest.raises(UnknownName, match="config: .*'tune_epoch'; did you mean 'tune_epochs'"):
        _run(_task(), tmp_path / "c", config={"tune_epoch": 1})
    with pytest.raises(InvalidArgument, match="config: tune_epochs"):
        _run(_task(), tmp_path / "c", config={"tune_epochs": "1"})


def test_a_folder_of_an_older_form_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    result = _run(_task(recipe=SHORT), tmp_path / "out", max_drop=1.0)
    path = Path(result["file"]).parent / "run.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({key: known[key] for key in known if key != "format"}))
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    with pytest.raises(Unsupported, match="different: format; .*choose another --out"):
        _run(_task(recipe=SHORT), tmp_path / "out", max_drop=1.0)
    assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()} == before
