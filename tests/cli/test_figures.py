"""What the verbs print, parsed back and compared with figures worked out here; and their exit codes."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

from karikomi import pack, registry, report
from karikomi.cli import array_files
from karikomi.cli.app import main
from karikomi.pack.groups.contest import shannon
from karikomi.pack.stored import describe
from karikomi.quantize import Codebook, Coded, UniformGrid


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], prog_name="karikomi")


def good(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def cells(text: str) -> list[list[str]]:
    """Return the cells of lines whose columns are two spaces or more apart."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def tensors() -> dict[str, Any]:
    generator = np.random.default_rng(5)
    codes = np.minimum(generator.geometric(0.6, (30, 40)) - 1, 3).astype(np.uint8)
    units = generator.integers(-7, 8, (6, 50)).astype(np.int8)
    return {
        "book": Coded(codes, Codebook(np.float32([0, -1, 2, 0.5]))),
        "grid": Coded(units, UniformGrid(np.full(6, 0.5, np.float32), 0, 4)),
        "none": np.zeros((0, 3), np.float32),
        "plain": generator.normal(size=70).astype(np.float64),
    }


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack.save(tensors(), tmp_path / "small.karikomi", notes={"made": "by hand"})


DENSE = {"book": 4 * 1200, "grid": 4 * 300, "none": 0, "plain": 8 * 70}
ELEMENTS = {"book": 1200, "grid": 300, "none": 0, "plain": 70}
GRIDS = {"book": "codebook 3", "grid": "uniform 4 bits, axis 0", "none": "none", "plain": "none"}
SHAPES = {"book": "30x40", "grid": "6x50", "none": "0x3", "plain": "70"}


def index_bytes(path: Path) -> tuple[int, int]:
    """Return where the payload with the manifest begins, and the bytes of manifest and checks in it."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    # A CRC32 of four bytes, and a varint of the size of the rest.
    size, at = content[start + 4] & 127, 5
    while content[start + at - 1] & 128:
        size, at = size | (content[start + at] & 127) << 7 * (at - 4), at + 1
    return start, at + size


def bound(name: str) -> float:
    """Return the order-0 entropy in bytes: of codes, or of each byte plane."""
    tensor = tensors()[name]
    planes = tensor.codes.reshape(-1, 1) if isinstance(tensor, Coded) else None
    if planes is None:
        planes = np.frombuffer(tensor.tobytes(), np.uint8).reshape(-1, tensor.itemsize)
    bits = 0.0
    for plane in planes.T:
        counts = np.unique(plane, return_counts=True)[1]
        bits -= sum(n * np.log2(n / counts.sum()) for n in counts)
    return bits / 8


def test_inspect_has_the_figures_of_each_tensor(packed: Path) -> None:
    found = good("inspect", packed)
    start, manifest = index_bytes(packed)
    sizes = {entry.name: entry.payload + entry.tables for entry in pack.inspect(packed).entries}
    assert sum(sizes.values()) == packed.stat().st_size - start - manifest
    assert found["file"] == str(packed) and found["notes"] == {"made": "by hand"}
    for row in found["tensors"]:
        name, array = row["name"], pack.load(packed)[row["name"]]
        assert (row["shape"], row["dtype"]) == (list(array.shape), f"f{array.itemsize}")
        assert (row["elements"], row["nonzero"]) == (array.size, np.count_nonzero(array))
        assert (row["bytes"], row["bytes_decoded"]) == (sizes[name], DENSE[name])
        bits = 8 * sizes[name] / array.size if array.size else 0.0
        assert row["bits_per_weight"] == pytest.approx(bits)
        assert row["entropy_bound"] == pytest.approx(bound(name))
        assert row["quantizer"] == GRIDS[name]
        kept = pack.inspect(packed).entries
        assert row["codec"] == next(entry.codec for entry in kept if entry.name == name)
    assert sorted(row["name"] for row in found["tensors"]) == sorted(DENSE)


def test_inspect_has_the_figures_of_the_file(packed: Path) -> None:
    found = good("inspect", packed)
    content = packed.read_bytes()
    start, manifest = index_bytes(packed)
    assert found["bytes_packed"] == len(content)
    assert found["bytes_manifest"] == manifest
    assert found["bytes_header"] == start
    assert found["bytes_payload"] + found["bytes_tables"] == len(content) - start - manifest
    assert found["entropy_bound"] == pytest.approx(sum(map(bound, DENSE)))
    seen = {entry.name: entry for entry in pack.inspect(packed).entries}
    assert found["bytes_tables"] == sum(entry.tables for entry in seen.values())
    assert seen["none"].tables == seen["none"].payload == 0
    assert found["bytes_decoded"] == 4800 + 1200 + 560
    assert found["ratio_decoded"] == 6560 / len(content)


def test_inspect_prints_what_it_has_as_json(packed: Path) -> None:
    found, lines = good("inspect", packed), cells(run("inspect", packed).stdout)
    assert lines[0] == ["tensor", "shape", "codec", "quantizer", "bytes", "bits/w", "bound"]
    for line, row in zip(lines[1:5], found["tensors"], strict=True):
        assert line == [
            *(row["name"], SHAPES[row["name"]], row["codec"], GRIDS[row["name"]]),
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.2f}",
            f"{round(row['entropy_bound']):,}",
        ]
    parts = ("payload", "tables", "header", "manifest")
    named = [[part, f"{found[f'bytes_{part}']:,}"] for part in parts]
    assert lines[6:11] == [*named, ["file", f"{found['bytes_packed']:,}"]]
    end = run("inspect", packed).stdout.splitlines()[-1]
    smaller = f"{found['ratio_decoded']:.1f}x"
    assert re.fullmatch(rf".*small\.karikomi: 6\.56 kB -> [\d.]+ k?B \({smaller}\)", end)


def test_the_bound_is_the_entropy_of_wide_integers_and_booleans() -> None:
    values = np.array([5, 5, 5, 5, -(2**40), 0, 0, 9])
    # Shares 1/2, 1/4, 1/8, 1/8: 1.75 bits each.
    assert shannon(describe("x", values)) == pytest.approx(8 * 1.75 / 8)
    assert shannon(describe("x", values > 0)) == pytest.approx(
        8 * -(5 / 8 * np.log2(5 / 8) + 3 / 8 * np.log2(3 / 8)) / 8
    )


@pytest.mark.parametrize(("option", "value"), [("--entries", 3), ("--bits", 4), (None, None)])
def test_pack_and_unpack_print_their_sizes(option: Any, value: Any, tmp_path: Path) -> None:
    arrays = {"w": np.random.default_rng(0).normal(size=(60, 70)).astype(np.float32)}
    arrays["b"] = np.arange(60, dtype=np.float32)
    source, out = tmp_path / "in.safetensors", tmp_path / "out.karikomi"
    safetensors.numpy.save_file(arrays, source)
    options = [option, value] if option else []
    made = good("pack", source, out, *options)
    size = out.stat().st_size
    assert (made["bytes_in"], made["bytes_dense"]) == (source.stat().st_size, 4 * 4260)
    assert (made["bytes_packed"], made["ratio"]) == (size, 4 * 4260 / size)
    assert sum(row["bytes"] for row in made["tensors"]) == size - sum(index_bytes(out))
    assert {row["name"]: row["bytes"] for row in made["tensors"]} == {
        entry.name: entry.payload + entry.tables for entry in pack.inspect(out).entries
    }
    words = report.wording.size(size)
    said = run("pack", source, out, *options).stdout
    assert said == f"{out}: 17.0 kB -> {words} ({4 * 4260 / size:.1f}x), 2 tensors\n"
    back = tmp_path / "back.safetensors"
    unpacked = good("unpack", out, back)
    assert (unpacked["bytes_packed"], unpacked["bytes"]) == (size, back.stat().st_size)
    dense = report.wording.size(back.stat().st_size)
    assert run("unpack", out, back).stdout == f"{back}: {words} -> {dense}\n"
    found = safetensors.numpy.load_file(back)["w"]
    step = np.abs(arrays["w"]).max(axis=1, keepdims=True) / 7
    levels = {None: 4200, "--entries": 3, "--bits": 60 * 15}[option]
    assert np.unique(found).size <= levels
    if option == "--bits":
        assert np.abs(found - arrays["w"]).max() <= step.max() / 2 * 1.001
        assert np.all(np.abs(found - arrays["w"]) <= step / 2 * 1.001)


def _raise(error: BaseException) -> Any:
    def invoke(*_: object, **__: object) -> None:
        raise error

    return invoke


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FULL, 1, "karikomi: error: cannot write the result (No space left on device)\n"),
        (
            OSError(errno.EIO, "Input/output error"),
            1,
            "karikomi: error: cannot write the result (Input/output error)\n",
        ),
        (
            KeyboardInterrupt(),
            130,
            "karikomi: interrupted; no file was left half-written, and the same command starts"
            " again\n",
        ),
    ],
    ids=["full disk", "broken disk", "interrupted"],
)
def test_the_exit_code_says_that_it_failed(
    error: BaseException, code: int, said: str, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "inspect", _raise(error))
    result = run("inspect", packed)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", said)


def test_an_error_of_the_system_that_is_not_of_the_disk_keeps_its_traceback(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "inspect", _raise(OSError(errno.EPERM, "Operation not permitted")))
    assert isinstance(run("inspect", packed).exception, PermissionError)


@pytest.mark.parametrize("verb", ["compress", "sweep"])
def test_a_long_verb_that_is_interrupted_resumes(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group: Any = main
    command = click.Command(verb, callback=_raise(KeyboardInterrupt()))
    monkeypatch.setattr(type(group), "get_command", lambda *_: command)
    result = run(verb)
    assert result.exit_code == 130
    assert result.stderr == "karikomi: interrupted; the same command resumes where it stopped\n"


AUDIT = {
    "metric": "accuracy",
    "metric_before": 0.9,
    "metric_after": 0.85,
    "classes": [{"class": "7", "examples": 10, "before": 0.9, "after": 0.8}],
    "warnings": ["class 7 lost"],
}


def test_audit_passes_its_arguments_on_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("a", 1), ("b", 2)):
        np.savez(tmp_path / f"{name}.npz", w=np.full(3, value, np.float32))
    called: list[Any] = []

    def audit(task: Any, before: Any, after: Any, **more: Any) -> dict[str, Any]:
        called.append((task, before["w"][0], after["w"][0], more))
        return dict(AUDIT, before=more["labels"][0], after=more["labels"][1])

    monkeypatch.setattr("karikomi.audit.audit", audit)
    monkeypatch.setattr("karikomi.tasks.load", lambda name, data: (name, data))
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    call = ("audit", first, second, "--task", "t", "--seed", 5, "--data", "d")
    found = good(*call, "--out", tmp_path / "out")
    labels = (str(first), str(second))
    more = {
        **{"seed": 5, "labels": labels, "notes": [{}, {}], "slices": None, "most": 2_000},
        **{"population": 0, "replicates": [], "originals": []},
        "sizes": (first.stat().st_size, second.stat().st_size),
    }
    assert called == [(("t", Path("d")), 1.0, 2.0, more)]
    assert {key: found[key] for key in AUDIT} == AUDIT
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    command = f"karikomi audit {first} {second} --task t --data d --seed 5 --most 2000"
    ends = {"before": str(first), "after": str(second), "command": command}
    assert written == {**AUDIT, **ends}
    text = run(*call).stdout
    assert cells(text)[-1] == ["7", "10", "90.00 %", "80.00 %", "-10.00 points"]


def test_sweep_and_compress_pass_their_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}
    sweep = {"task": "digits", "metric": "accuracy", "points": [], "warnings": ["seed 1: diverged"]}
    made = {
        **{"task": "inner", "metric": "accuracy", "metric_before": 0.9, "metric_after": 0.8},
        **{"bytes_dense": 2000, "bytes_packed": 500, "file": str(tmp_path / "model.karikomi")},
        "record": str(tmp_path / "record.jsonl"),
    }
    monkeypatch.setattr(
        "karikomi.search.grid.sweep", lambda task, **more: called.update(sweep=more) or sweep
    )
    monkeypatch.setattr(
        "karikomi.search.compress", lambda task, **more: called.update(compress=more) or dict(made)
    )
    monkeypatch.setattr("karikomi.record.read", lambda path: iter([]))
    result = run(
        *("sweep", "digits", "--limits", "0.1,none,inf", "--sparsities", "0, 0.5", "--seeds", 2),
        *("--epochs", 7, "--out", tmp_path / "s", "--quiet"),
    )
    given = {name: value for name, value in called["sweep"].items() if value is not None}
    plain = {"rules": (), "bounds": (None,), "rates": (None,), "bits": (None,), "workers": 1}
    assert given == {
        **{"limits": (0.1, float("inf"), float("inf")), "sparsities": (0.0, 0.5), "seeds": 2},
        **{"epochs": 7, "out": tmp_path / "s", "progress": False},
        **plain,
    }
    more = (
        "--rule",
        "AutoClip(20)",
        "--rule",
        "AGC(0.01)",
        "--bound",
        "MaxNorm(2)",
        "--workers",
        2,
    )
    sizes = ("--rates", "0.1,0.01", "--bits", "none,4", "--target", 0.9)
    run("sweep", "digits", *more, *sizes, "--out", tmp_path / "s", "--quiet")
    given = {name: called["sweep"][name] for name in (*plain, "target")}
    assert given == {
        **{"rules": ("AutoClip(20)", "AGC(0.01)"), "bounds": (None, "MaxNorm(2)"), "target": 0.9},
        **{"rates": (0.1, 0.01), "bits": (None, 4), "workers": 2},
    }
    lines = result.stdout.splitlines()
    assert lines == [
        "digits: no points",
        "warning: seed 1: diverged",
        "",
        str(tmp_path / "s" / "sweep.json"),
        str(tmp_path / "s" / "sweep.html"),
    ]
    call = ("compress", "digits", "--max-drop", 0.02, "--seed", 4, "--out", tmp_path)
    found = good(*call)
    given = {name: value for name, value in called["compress"].items() if value is not None}
    wanted = {"out": tmp_path, "max_drop": 0.02, "seed": 4, "progress": True}
    assert given == {**wanted, "training": True, "workers": 1}
    more = ("--no-training", "--max-bytes", 9, "--max-ms", 2.5, "--preset", "cpu", "--workers", 3)
    good(*call, *more, "--take", 1)
    given = {name: value for name, value in called["compress"].items() if value is not None}
    options = {"max_bytes": 9, "max_ms": 2.5, "preset": "cpu", "workers": 3, "take": 1}
    assert given == {**wanted, "training": False, **options}
    assert (found["task"], found["report"]) == ("digits", str(tmp_path / "report.html"))
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert cells(run(*call).stdout)[2] == ["accuracy (test)", "90.00 %", "80.00 %", "-10.00 points"]


def test_a_result_names_the_files_that_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        **{"metric": "accuracy", "metric_before": 0.9, "metric_after": 0.8, "bytes_dense": 2000},
        **{"bytes_packed": 500, "file": str(tmp_path / "model.karikomi"), "record": "record.jsonl"},
    }
    monkeypatch.setattr("karikomi.search.compress", lambda task, **more: dict(made))
    monkeypatch.setattr("karikomi.record.read", lambda path: iter([]))
    data, config = tmp_path / "mnist.npz", tmp_path / "mine.toml"
    data.touch()
    config.write_text("train_epochs = 2")
    found = good("compress", "mnist-lenet300", "--data", data, "--config", config)
    assert (found["data"], found["config"]) == (str(data), str(config))
    assert not {"data", "config"} & good("compress", "digits").keys()


def test_the_defaults_are_those_that_the_help_states() -> None:
    def shown(verb: str) -> str:
        return " ".join(run(verb, "--help").stdout.split())

    assert "[default: 0.005]" in shown("compress") and "[default: 0]" in shown("compress")
    for default in ("0.1,1,10,inf", "0,0.9", "3"):
        assert f"[default: {default}" in shown("sweep")


def test_the_list_has_each_formula_and_source_in_its_place() -> None:
    found = {(row["kind"], row["name"]): row for row in good("list")["entries"]}
    for entry in registry.entries():
        row = found[entry.kind, entry.name]
        assert (row["formula"], row["source"]) == (entry.formula, entry.source)
    digits = found["task", "digits"]
    assert digits["formula"].startswith("1,797 images") and "Alpaydin" in digits["source"]


@pytest.mark.parametrize(("most", "code"), [(399, 1), (1_000, 0)])
def test_an_archive_above_the_budget_is_refused(
    most: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "x.npz", w=np.ones(100, np.float32))
    monkeypatch.setattr(array_files.pack, "Budget", lambda: SimpleNamespace(decoded=most))
    result = run("pack", tmp_path / "x.npz", tmp_path / "x.karikomi")
    assert result.exit_code == code
    assert ("too large" in result.stderr) is (code == 1)
