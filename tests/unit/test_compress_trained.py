"""Trained modules and their loaders into `compress`: forms of data, what is refused, budgets, the certificate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, KarikomiError, NonFinite, Unsupported  # noqa: E402

SHORT = {
    "rates": (4.0, 2.5),
    "batch_size": 32,
    "learning_rate": 5e-3,
    "prune_epochs": 2,
    "tune_epochs": 1,
    "sparsities": (0.5,),
    "entries": (8,),
}


def examples(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, :3] - inputs[:, 3:]).argmax(1)


def loader(n: int, seed: int, *, shuffle: bool = False, labels: bool = True) -> DataLoader[Any]:
    inputs, targets = examples(n, seed)
    dataset = TensorDataset(inputs, targets) if labels else TensorDataset(inputs)
    return DataLoader(dataset, batch_size=50, shuffle=shuffle)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Return a network of 40 units that is right on most of its data."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
    optimizer, (inputs, targets) = torch.optim.Adam(net.parameters(), lr=0.02), examples(600, 0)
    for _ in range(120):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return net


def run(model: Any, out: Path, **more: Any) -> dict[str, Any]:
    given = {"validation": loader(150, 1), "config": SHORT, "max_drop": 0.05, "progress": False}
    return kk.compress(model, out=out, **{**given, **more})


@pytest.fixture(scope="module")
def whole(
    model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return the result on loaders that shuffle."""
    out = tmp_path_factory.mktemp("run") / "net"
    shuffled = {key: loader(n, s, shuffle=True) for key, n, s in DATA}
    return out, run(model, out, **shuffled)


DATA = [("train", 300, 0), ("validation", 150, 1), ("test", 800, 2)]


def test_a_trained_module_is_not_trained_again(
    model: torch.nn.Module, whole: tuple[Path, dict[str, Any]]
) -> None:
    folder, result = whole
    before = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    dense = kk.torch.to_arrays(model)
    assert all(np.array_equal(before[name], dense[name]) for name in dense), (
        "the module is left as it was"
    )
    kept = json.loads((folder / "result.json").read_text())
    assert kept["verified"] and kept["metric"] == "accuracy" and kept["task"] == "net"
    inputs, targets = examples(800, 2)
    with torch.no_grad():
        assert result["metric_before"] == pytest.approx(
            float((model(inputs).argmax(1) == targets).float().mean())
        )
    stages = {row["stage"] for row in kk.record.read(result["record"]) if row["event"] == "step"}
    assert {stage.partition("-")[0] for stage in stages} == {"prune", "quantize"}
    small = kk.load(result["file"], into=_copy(model))
    with torch.no_grad():
        right = (small(inputs).argmax(1) == targets).float().mean()
    assert result["metric_after"] == pytest.approx(float(right))
    assert result["ratio"] > 1.5


def test_a_network_in_bfloat16_is_searched_in_float32_and_its_bytes_are_those_it_came_in(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    narrow = _copy(model).bfloat16()
    result = run(narrow, tmp_path / "out", train=loader(100, 0))
    assert narrow[0].weight.dtype == torch.bfloat16, "the module is left as it was"
    plain = run(_copy(narrow).float(), tmp_path / "plain", train=loader(100, 0))
    assert plain["bytes_dense"] - result["bytes_dense"] == 2 * (6 * 40 + 40 + 40 * 3 + 3)
    assert result["metric_before"] == plain["metric_before"] and not plain["warnings"]
    same = kk.load(result["file"]), kk.load(plain["file"])
    assert all(np.array_equal(same[0][name], same[1][name]) for name in same[1])
    assert any("came in bfloat16" in text for text in result["warnings"])
    causes = result["bytes_by_cause"]
    assert causes["dense"] == 2 * (6 * 40 + 40 + 40 * 3 + 3) and causes["pruned"] < causes["dense"]
    small = kk.load(result["file"], into=_copy(narrow))
    assert small[0].weight.dtype == torch.bfloat16
    assert result.model[0].weight.dtype == torch.float32


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(model).eval()


def test_a_loader_that_shuffles_resumes(
    model: torch.nn.Module, whole: tuple[Path, dict[str, Any]]
) -> None:
    folder, first = whole
    shuffled = {key: loader(n, s, shuffle=True) for key, n, s in DATA}
    again = run(model, folder, **shuffled)
    volatile = {"resumed", "seconds"}
    assert again["resumed"]
    assert {k: v for k, v in again.items() if k not in volatile} == {
        k: v for k, v in first.items() if k not in volatile
    }
    with pytest.raises(Unsupported, match="different: data"):
        run(model, folder, **{**shuffled, "validation": loader(150, 9)})


def test_the_certificate_is_of_examples_that_no_choice_saw(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    certificate, result = whole[1]["certificate"], whole[1]
    assert (certificate["split"], certificate["n"]) == ("test", 800)
    assert certificate["beforehand"]["verdict"] == "can"
    assert certificate["also_in_validation"] == 0 and certificate["alpha"] == 0.05
    rows = certificate["tests"]
    assert rows and all(row["examples"] == 800 and row["bound"] >= row["drop"] for row in rows)
    assert certificate["status"] == ("certified" if rows[0]["passed"] else "not certified")
    assert result["verdict"] == ("held" if rows[0]["passed"] else "undecided")
    spent = json.loads((whole[0] / "spent.json").read_text())["uses"]
    assert [line["n"] for line in spent] == [800]


def test_any_point_of_the_front_can_be_taken(
    model: torch.nn.Module, whole: tuple[Path, dict[str, Any]]
) -> None:
    folder, result = whole
    shuffled = {key: loader(n, s) for key, n, s in DATA}
    points = result["front"]
    assert [point["bytes"] for point in points] == sorted(point["bytes"] for point in points)
    taken = run(model, folder, **shuffled, take=0)
    assert taken["taken"] == 0 and taken["bytes_packed"] == points[0]["bytes"]
    assert Path(taken["file"]).read_bytes() == (folder / points[0]["file"]).read_bytes()
    with pytest.raises(InvalidArgument, match="no such point"):
        run(model, folder, **shuffled, take=len(points))
    run(model, folder, **shuffled)


class Pair(torch.nn.Module):
    """Two named inputs, and outputs by name."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.inner(torch.cat([left, right], 1)), "extra": left}


class Stream(IterableDataset[Any]):
    """Mappings of two inputs and labels, without a length."""

    def __init__(self, n: int, seed: int) -> None:
        self.inputs, self.labels = examples(n, seed)

    def __iter__(self) -> Iterator[Any]:
        for row, label in zip(self.inputs, self.labels, strict=True):
            yield {"left": row[:3], "right": row[3:], "labels": label}


def test_mappings_of_several_inputs_from_an_iterable(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    data = {
        key: DataLoader(Stream(n, s), batch_size=25)
        for key, n, s in (("train", 100, 0), ("validation", 100, 1))
    }
    result = run(Pair(model), tmp_path / "pair", **data)
    assert result["verified"] and result["metric_before"] > 0.9
    # A third of the validation examples chose, and the others judged.
    assert result["examples"] == {"train": 100, "validation": 33, "test": 67}
    assert (result["certificate"]["split"], result["certificate"]["n"]) == ("test", 67)
    assert result["certificate"]["beforehand"]["verdict"] == "unlikely"


def test_without_labels_the_outputs_of_the_module_are_the_targets(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    result = run(
        model,
        tmp_path / "out",
        validation=loader(150, 1, labels=False),
        test=loader(3000, 2, labels=False),
        max_drop=0.01,
    )
    assert result["metric"] == "cosine" and result["metric_before"] == pytest.approx(1.0)
    assert 0 <= result["drop"] < 0.02 and result["verified"]
    steps = [row for row in kk.record.read(result["record"]) if row["event"] == "step"]
    assert steps == [], "without training data nothing is trained"
    certificate = result["certificate"]
    assert certificate["status"] in ("certified", "not certified")
    assert certificate["tests"][0]["method"].startswith("Maurer")


@pytest.mark.parametrize("training", [True, False])
def test_weights_of_a_task(training: bool, model: torch.nn.Module, tmp_path: Path) -> None:
    inputs, targets = (tensor.numpy() for tensor in examples(500, 3))
    split = kk.tasks.Split(inputs, targets)
    some = [split.take(np.arange(k, k + 150)) for k in (0, 150, 300)]
    task = kk.tasks.Task(
        name="given",
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(6, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3)
        ),
        data=lambda: kk.tasks.Data(*some),
    )
    weights = kk.torch.to_arrays(model)
    result = kk.compress(
        task,
        weights=weights,
        training=training,
        config=SHORT,
        max_drop=0.1,
        out=tmp_path / "o",
        progress=False,
    )
    assert result["verified"] and result["validation_before"] > 0.9
    kinds = {row["what"] for row in result["candidates"]}
    assert "8 shared weights per tensor, not tuned" in kinds
    assert ("8 shared weights per tensor" in kinds) is training
    assert "2.5 bits a number (gptq)" in kinds


def _error(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.mean(outputs.argmax(1) != targets))


def _score(outputs: np.ndarray, targets: np.ndarray) -> float:
    return 1 - _error(outputs, targets)


def _constant(outputs: np.ndarray, targets: np.ndarray) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"validation": None}, "needs validation data"),
        ({"metric": _error}, 'needs its direction.*goal="min"'),
        ({"metric": _error, "goal": "max"}, 'better when the outputs are given.*goal="min"'),
        ({"metric": _score, "goal": "min"}, 'better when the outputs are given.*goal="max"'),
        ({"metric": _constant, "goal": "max"}, "is 0"),
        ({"metric": "f1"}, "unknown metric"),
        ({"max_drop": 5}, "5 points are 0.05"),
        ({"preset": "fast"}, "unknown preset"),
        ({"validation": [torch.zeros(4, 7)]}, "model failed on a batch"),
        ({"test": loader(20, 1, labels=False)}, "some data have targets and some have none"),
        ({"max_bytes": 0}, "max_bytes must be > 0"),
        ({"data": "here"}, "has its own data"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    more: dict[str, Any], said: str, model: torch.nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(KarikomiError, match=said):
        run(model, tmp_path / "out", **more)
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_a_network_that_guesses_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = torch.nn.Linear(6, 3)
    torch.nn.init.zeros_(net.weight)
    with pytest.raises(InvalidArgument, match="always answers the most frequent class"):
        run(net, tmp_path / "out")


def test_a_task_has_no_loaders(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgument, match="a task has its own data, loss and metric; got goal, train"
    ):
        kk.compress("digits", train=[1], goal="max", out=tmp_path)


def test_budgets_that_cannot_be_met_lose_nothing(model: torch.nn.Module, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out", max_bytes=100)
    assert result["verdict"] == "missed" and result["binding"] == "bytes"
    assert Path(result["file"]).exists() and result["verified"]
    smallest = min(point["bytes"] for point in result["front"] if point["drop"] <= 0.05)
    assert {"drop": 0.05, "bytes": float(smallest)} in result["nearest_budgets"]


def test_a_budget_on_the_network_removes_units(model: torch.nn.Module, tmp_path: Path) -> None:
    most = 0.6 * sum(p.numel() for p in model.parameters())
    widths = {**SHORT, "rates": (), "widths": (0.5,), "prune_epochs": 3}
    result = run(
        model,
        tmp_path / "out",
        train=loader(300, 0),
        max_parameters=most,
        max_drop=0.2,
        config=widths,
    )
    assert result["parameters_before"] == sum(p.numel() for p in model.parameters())
    assert result["parameters_after"] <= most and result["verdict"] != "missed"
    assert (
        result["candidates"][0]["what"] == "width 0.5"
        and result["macs_after"] < result["macs_before"]
    )
    small = kk.load(result["file"], into=_copy(model))
    assert small[0].out_features <= 24, "half of 40, to a multiple of 8"


def test_milliseconds_are_measured_once(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from karikomi.torch.tasks.runner import TorchRunner

    calls: list[int] = []

    def milliseconds(self: TorchRunner, arrays: Any) -> float:
        calls.append(sum(array.size for array in arrays.values()))
        return calls[-1] / 1000

    monkeypatch.setattr(TorchRunner, "milliseconds", milliseconds)
    result = run(model, tmp_path / "out", max_ms=100.0)
    table = json.loads((tmp_path / "out" / "latency.json").read_text())["rows"]
    assert result["verdict"] == "held" and len(calls) > 0
    assert sorted(row["ms"] for row in table.values()) == sorted({n / 1000 for n in calls})
    rehearsed = len(calls)
    run(model, tmp_path / "out", max_ms=100.0)
    assert len(calls) == rehearsed, "a run that goes on reads the table"


def test_without_a_limit_on_the_drop_the_least_drop_within_the_bytes(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    recipe = {**SHORT, "sparsities": (0.5, 0.8, 0.95), "entries": (16, 3), "rates": (4.0,)}
    more = {"train": loader(300, 0), "config": recipe, "max_drop": None}
    every = run(model, tmp_path / "a", **more, max_bytes=10_000)
    sizes = sorted(row["bytes"] for row in every["candidates"] if row["stage"] == "quantize")
    limit = (sizes[0] + sizes[-1]) / 2
    result = run(model, tmp_path / "b", **more, max_bytes=limit)
    assert result["verdict"] == "held" and result["bytes_packed"] <= limit
    drops = [p["drop"] for p in result["front"] if p["bytes"] <= limit]
    assert result["validation_before"] - result["validation_after"] == pytest.approx(min(drops))
    assert result["objective"] == "drop" and result["certificate"]["status"] == "not run"


class Fixed(torch.nn.Module):
    """A forward with a width as a number: its class does not run with smaller tensors."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.first, self.last = inner[0], inner[2]  # type: ignore[index]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(inputs)).view(-1, 40))


def test_where_units_cannot_be_removed_the_search_goes_on_and_says_so(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    result = run(Fixed(model), tmp_path / "out", train=loader(100, 0), max_parameters=200)
    assert result["verdict"] == "missed" and result["verified"]
    assert any("no units of the network can be removed" in text for text in result["warnings"])
    assert result["candidates"][0]["passed"] is False


class HalfNaN(torch.nn.Module):
    """Outputs of which every second example is NaN."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs) / (torch.arange(len(inputs)) % 2)[:, None] * 0.0


def test_networks_with_nan_and_quantized_ones_are_refused_by_name(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    broken = _copy(model)
    with torch.no_grad():
        broken[2].weight[0, 1] = float("nan")
    with pytest.raises(NonFinite, match=r"2\.weight: the trained network has NaN; got 1 of 120"):
        run(broken, tmp_path / "out")
    with pytest.raises(NonFinite, match="outputs of the trained network are NaN; got 75 of 150"):
        run(HalfNaN(_copy(model)), tmp_path / "out", test=loader(90, 2))
    # A class of torch's, which making one warns of.
    packed = type("Linear", (torch.nn.Linear,), {"__module__": "torch.ao.nn.quantized.dynamic"})
    quantized = torch.nn.Sequential(packed(6, 3))
    with pytest.raises(Unsupported, match="compress: 0: the module is quantized already"):
        run(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class OwnLoss(torch.nn.Module):
    """Outputs as of transformers: a mapping, with the loss first where it is given labels."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        logits = self.inner(inputs)
        if labels is None:
            return {"logits": logits}
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_labels_that_a_network_may_be_given_are_no_inputs_unless_the_loss_is_the_users(
    model: torch.nn.Module,
) -> None:
    from karikomi.tasks import Task
    from karikomi.torch.tasks.losses import place_of_selected
    from karikomi.torch.tasks.trained import examples as read

    inputs, targets = examples(20, 0)
    batches = [{"inputs": inputs, "labels": targets}]
    with_labels, found = read(OwnLoss(model), batches, where="train", own_loss=True)
    assert sorted(with_labels) == ["inputs", "labels"] and np.array_equal(found, targets)
    without, found = read(OwnLoss(model), batches, where="train", own_loss=False)
    assert list(without) == ["inputs"] and np.array_equal(found, targets)
    task = Task(name="net", model=lambda: model, data=lambda: None)
    outputs = OwnLoss(model)(inputs, targets)
    assert place_of_selected(outputs, task) == 1
    assert place_of_selected(OwnLoss(model)(inputs), task) == 0


class Steps(torch.nn.Module):
    """Classes on the last axis: outputs (n, steps, classes)."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs.unflatten(1, (4, 6)))


def test_the_axis_of_the_classes_is_that_which_fits_the_targets(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    inputs, targets = examples(800, 5)
    pairs = [(inputs.reshape(200, 24), targets.reshape(200, 4))]
    result = run(Steps(model), tmp_path / "out", validation=pairs)
    assert result["verified"] and result["metric_before"] > 0.9
    assert result["predictions"] == 4 * result["examples"]["test"]
    # Four targets an example: a mean, and no share of examples.
    assert result["certificate"]["tests"][0]["method"].startswith("Maurer")
