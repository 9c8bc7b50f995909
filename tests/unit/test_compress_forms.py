"""What comes out of a run beside its packed file: the module, other forms, costs, the model card."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import karikomi as kk  # noqa: E402
from karikomi.errors import Unavailable, UnknownName, Unsupported  # noqa: E402
from karikomi.search import forms_written  # noqa: E402
from karikomi.search.measured import paired_times  # noqa: E402
from karikomi.torch.shrinking.costs import peak_bytes  # noqa: E402

RECIPE = {"batch_size": 64, "learning_rate": 1e-2, "prune_epochs": 3, "tune_epochs": 1}
RECIPE |= {"widths": (0.5,), "sparsities": (0.5,), "entries": (8,), "rates": ()}


class Named(torch.nn.Module):
    """Two inputs by name, and outputs by name of which the second is judged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 40), torch.nn.Linear(40, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.first(torch.cat([left, right], 1)))
        return {"sums": left + right, "logits": self.last(hidden)}


def batches(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    inputs = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    labels = (inputs[:, :3] - inputs[:, 3:]).argmax(1)
    return [{"right": inputs[:, 3:], "left": inputs[:, :3], "labels": labels}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Named, Path, Any]:
    """Return the module, the folder and the result of a run with all forms."""
    torch.manual_seed(0)
    net, (batch,) = Named(), batches(600, 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        found = net(batch["left"], batch["right"])["logits"]
        torch.nn.functional.cross_entropy(found, batch["labels"]).backward()
        optimizer.step()
    out = tmp_path_factory.mktemp("run") / "net"
    return net, out, run(net, out, export="safetensors, pt2,onnx,int8")


def run(net: Any, out: Path, **more: Any) -> Any:
    data = {"train": batches(300, 0), "validation": batches(150, 1), "test": batches(400, 2)}
    given = {**data, "config": RECIPE, "max_drop": 0.3, "max_parameters": 250, **more}
    return kk.compress(net, out=out, progress=False, **given)


def test_the_result_has_the_small_network_itself(whole: tuple[Named, Path, Any]) -> None:
    net, folder, result = whole
    small, (batch,) = result.model, batches(400, 2)
    assert type(small) is Named and small.first.out_features < net.first.out_features == 40
    with torch.no_grad():
        right = small(batch["left"], batch["right"])["logits"].argmax(1) == batch["labels"]
    assert (
        result.metric_after == result["metric_after"] == pytest.approx(float(right.float().mean()))
    )
    again = kk.load(kk.save(small, folder.parent / "again.karikomi"))
    assert all(np.array_equal(again[n], a) for n, a in kk.load(result["file"]).items())
    with pytest.raises(AttributeError, match="did you mean 'ratio'"):
        _ = result.ration


def test_a_result_is_plain_data(whole: tuple[Named, Path, Any]) -> None:
    _, folder, result = whole
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    other = pickle.loads(pickle.dumps(result))
    assert other == copy.deepcopy(result) == result
    with pytest.raises(Unsupported, match=r"kk\.load"):
        _ = other.model


def test_each_form_is_that_of_the_network(whole: tuple[Named, Path, Any]) -> None:
    _, folder, result = whole
    rows = {row["form"]: row for row in result["exports"]}
    assert list(rows) == ["safetensors", "pt2", "onnx", "int8"]
    assert all(row["reason"] is None for row in rows.values())
    assert all(rows[name]["difference"] < 1e-5 for name in ("safetensors", "pt2", "onnx"))
    assert 0 < rows["int8"]["difference"] < 0.1
    assert rows["int8"]["macs_float"] == 0 and rows["int8"]["layers"] == 2
    plain = safetensors.numpy.load_file(folder / "model.safetensors")
    assert all(np.array_equal(plain[n], a) for n, a in kk.load(result["file"]).items())
    (batch,) = batches(70, 5)
    module = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        wanted = result.model(batch["left"], batch["right"])["logits"]
        assert torch.allclose(module(left=batch["left"], right=batch["right"])["logits"], wanted)


def test_an_engine_s_metric_is_that_of_the_judged_output(whole: tuple[Named, Path, Any]) -> None:
    _, folder, result = whole
    rows = {row["form"]: row for row in result["exports"]}
    assert rows["onnx"]["metric"] == pytest.approx(result["metric_after"])
    assert abs(rows["int8"]["metric"] - result["metric_after"]) < 0.05
    speed = rows["onnx"]["speed"]
    assert [(row["name"], row["batch"]) for row in speed] == [
        (name, n) for n in (1, 32) for name in ("dense", "small")
    ]
    assert not list(folder.glob(".*.part"))


def test_costs_are_those_of_both_networks(whole: tuple[Named, Path, Any]) -> None:
    net, _, result = whole
    assert result["parameters_before"] == sum(p.numel() for p in net.parameters())
    assert result["parameters_after"] == sum(p.numel() for p in result.model.parameters())
    assert result["memory_before"] > result["memory_after"] > 4 * result["parameters_after"]
    assert [item["examples"] for item in result["timed"]] == [1, 64]
    assert all(item["low"] <= item["faster"] <= item["high"] for item in result["timed"])
    assert result["ms_after"] == result["timed"][-1]["ms_after"]


def test_what_is_written_already_is_not_written_again(
    whole: tuple[Named, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, folder, result = whole
    (folder / "model.pt2").unlink()
    written: list[str] = []
    plain = forms_written._written

    def counted(runner: Any, outcome: Any, form: Any, folder: Any) -> Any:
        written.append(form.name)
        return plain(runner, outcome, form, folder)

    monkeypatch.setattr(forms_written, "_written", counted)
    again = run(net, folder, export=["safetensors", "pt2", "onnx", "int8"])
    assert written == ["pt2"]
    volatile = {"resumed", "seconds"}
    assert {k for k in result if again[k] != result[k]} <= volatile


def test_the_card_has_figures_data_and_the_line(whole: tuple[Named, Path, Any]) -> None:
    _, folder, result = whole
    text = (folder / "README.md").read_text()
    for part in (
        "test: 400 examples",
        f"{result['bytes_packed']:,}",
        "parameters in memory",
        "at 95 %",
        "model.int8.onnx",
        "kk.compress(net, ..., max_drop=0.3, max_parameters=250",
    ):
        assert part in text
    assert "nan" not in text and "None" not in text


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        ("onxx", UnknownName, "did you mean 'onnx'"),
        ("onnx", Unavailable, "onnxscript not installed.*pip install"),
    ],
)
def test_forms_that_cannot_be_are_refused_before_any_work(
    names: str,
    error: type[Exception],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = forms_written.importlib.util.find_spec
    gone = {"onnxscript"}
    monkeypatch.setattr(
        forms_written.importlib.util, "find_spec", lambda n: None if n in gone else find(n)
    )
    with pytest.raises(error, match=said):
        run(Named(), tmp_path / "out", export=names)
    assert not (tmp_path / "out").exists()


class Branching(torch.nn.Module):
    """A forward that depends on the values: no export takes it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = self.inner(left, right)["logits"]
        return found if bool(found.sum() > -1e9) else -found


def test_a_form_that_the_network_does_not_have_is_named(
    whole: tuple[Named, Path, Any], tmp_path: Path
) -> None:
    result = run(Branching(whole[0]), tmp_path / "out", export="pt2,safetensors", training=False)
    rows = {row["form"]: row for row in result["exports"]}
    assert "torch.export does not take the module" in rows["pt2"]["reason"]
    assert rows["pt2"]["file"] is None and rows["safetensors"]["file"] == "model.safetensors"
    assert any("pt2 was not written" in text for text in result["warnings"])
    assert "pt2 was not written" in (tmp_path / "out" / "README.md").read_text()


def test_the_interval_covers_equal_networks_and_tells_twice_as_fast() -> None:
    random = np.random.default_rng(0)
    load = 1 + random.exponential(0.5, 40)  # what both of a pair meet
    noise = random.lognormal(0, 0.02, (40, 2))
    same = paired_times((load[:, None] * noise).tolist())
    assert same["low"] <= 1 <= same["high"] and same["high"] - same["low"] < 0.05
    twice = paired_times((load[:, None] * noise * [2, 1]).tolist())
    assert 1.9 < twice["low"] < twice["faster"] < twice["high"] < 2.1


def test_peak_bytes_counts_what_lives_at_once() -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(5)))
    # Weights, the input, and at most two activations at once, however deep it is.
    assert peak_bytes(net, (torch.zeros(4, 8),), {}) == 4 * (5 * 64 + 3 * 32)
    view = torch.nn.Flatten()
    assert peak_bytes(view, (torch.zeros(4, 8, 2),), {}) == 4 * 64
