"""The verbs as a person or a script meets them: exit codes, error lines, JSON, hostile files."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

from karikomi import __version__, pack, registry
from karikomi.cli.app import VERBS, main
from karikomi.cli.array_files import read_arrays

SOURCE = Path(__file__).parents[2] / "src"
# What `karikomi --help` imports of the package, and how many modules in all: 86 on Python 3.11.
HELP_MODULES = {"karikomi", "karikomi.cli", "karikomi.cli.app", "karikomi.errors"}
HELP_MOST = 130
PROGRAM = "import sys; from karikomi.cli.app import main; main(prog_name='karikomi')"
# A shell starts what runs in its background with SIGINT ignored, and children inherit that.
HEEDS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "

TASK = """
import numpy as np
from torch import nn
from karikomi.tasks import Data, Recipe, Split, Task

def split(size, seed):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 3, size)
    noise = generator.standard_normal((size, 6), dtype=np.float32)
    return Split(np.eye(3, 6, dtype=np.float32)[targets] * 3 + noise, targets)

def network():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

task = Task(
    name="blobs",
    model=network,
    data=lambda: Data(split(200, 0), split(60, 1), split(90, 2)),
    recipe=Recipe(batch_size=20, learning_rate=1e-2),
)
"""


def run(*arguments: object) -> Result:
    """Call the program in this process."""
    return CliRunner().invoke(main, [str(one) for one in arguments], prog_name="karikomi")


def good(*arguments: object) -> dict[str, Any]:
    """Call a verb with --json, and return the one object that stands on stdout."""
    result = run(*arguments, "--json")
    assert (result.exit_code, result.exception) == (0, None), result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def bad(*arguments: object) -> str:
    """Call a verb that must fail, and return the one line on stderr that says why.

    With ``--json`` the same stands on stdout as one object.
    """
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    if "--json" in arguments:
        found = json.loads(result.stdout)
        assert lines == [f"karikomi: error: {found['error']}"]
        assert (sorted(found), found["exit_code"]) == (["error", "exit_code", "kind"], 1)
    else:
        assert result.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("karikomi: error: "), result.stderr
    return lines[0]


def spawn(*arguments: object, program: str = PROGRAM, **options: Any) -> subprocess.Popen[str]:
    """Start the program as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Return arrays of several kinds; the weight is sparse."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(40, 60)).astype(np.float32)
    return {
        "layer.weight": np.where(generator.random((40, 60)) < 0.2, weight, 0).astype(np.float32),
        "layer.bias": generator.normal(size=40).astype(np.float32),
        "wide": generator.normal(size=(3, 5, 7)),
        "steps": np.int64(7),
        "index": generator.integers(0, 9, (4, 4)),
    }


@pytest.fixture
def stored(arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """Return the arrays as a safetensors file."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({name: np.asarray(one) for name, one in arrays.items()}, path)
    return path


@pytest.fixture
def packed(stored: Path, tmp_path: Path) -> Path:
    """Return the arrays as a packed file."""
    good("pack", stored, tmp_path / "model.karikomi", "--entries", 16)
    return tmp_path / "model.karikomi"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Return the file of a tiny task for torch."""
    pytest.importorskip("torch")
    path = tmp_path / "blobs.py"
    path.write_text(TASK)
    return path


# The program


def test_help_names_every_verb_and_imports_little() -> None:
    """What is imported is counted: seconds would be those of the machine."""
    code = (
        "import sys; before = set(sys.modules); from karikomi.cli.app import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sorted(set(sys.modules) - before))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    text, modules = shown.rsplit("\n", 2)[0], set(shown.splitlines()[-1].split())
    assert all(f"  {verb} " in text for verb in VERBS)
    assert {"karikomi.cli.app", "click"} <= modules
    assert {name.partition(".")[0] for name in modules} <= {
        *("karikomi", "click"),
        *sys.stdlib_module_names,
    }
    assert {name for name in modules if name.startswith("karikomi")} <= HELP_MODULES
    assert len(modules) < HELP_MOST


def test_each_verb_has_a_module() -> None:
    group = main
    for verb in VERBS:
        command = group.get_command(None, verb)  # type: ignore[arg-type]
        assert command is not None and command.callback is not None
        assert command.callback.__module__ == f"karikomi.cli.{verb}"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_an_example(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"Example: karikomi {verb} " in result.stdout
    assert "--json" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_version() -> None:
    assert run("--version").stdout == f"karikomi, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pakc"], "did you mean 'pack'"),
        (["inspect"], "Missing argument 'FILE'"),
        (["list", "rules"], "'rules' is not one of 'clip'"),
        (["inspect", "x", "--jsno"], "--json"),
        (["pack", "x", "y", "--entries", "many"], "'many' is not a valid integer"),
        (["pack", "x", "y", "--entries", "4", "--bits", "4"], "exclude one another"),
        (["pack", "x", "y", "--method", "uniform"], "go with --entries or --bits"),
        (["audit", "x", "y"], "Missing option '--task'"),
        (["audit", "x", "y", "--task", "digits", "--seed", "-1"], "--seed"),
        (["sweep", "--limits", "1;2"], "not a list of numbers"),
        (["sweep", "--seeds", "0"], "--seeds"),
        (["sweep", "--epochs", "0"], "--epochs"),
    ],
)
def test_bad_usage_ends_with_2(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["inspect", "--json"], "MissingParameter", "'FILE'"),
        (["inspect", "x", "--json", "--nope"], "NoSuchOption", "--nope"),
        (["pakc", "--json"], "UsageError", "did you mean 'pack'"),
        (["sweep", "--json", "--seeds", "0"], "BadParameter", "0 is not in the range"),
        (["--json", "inspect", "x"], "UsageError", "needs --version"),
        (["--nope", "inspect", "x", "--json"], "NoSuchOption", "--nope"),
    ],
)
def test_bad_usage_is_json_where_json_is_asked_for(
    arguments: list[str], kind: str, said: str
) -> None:
    result = run(*arguments)
    found = json.loads(result.stdout)
    assert (found["kind"], found["exit_code"], result.exit_code) == (kind, 2, 2)
    assert said in found["error"] and "Usage:" in result.stderr
    assert run("inspect", "--", "--json").stdout == "", "a file that is called so"


def test_no_verb_shows_the_help_and_ends_with_2() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Verbs:" in result.output


def test_a_defect_of_ours_keeps_its_traceback(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(pack, "inspect", broken)
    result = run("inspect", packed)
    assert isinstance(result.exception, ZeroDivisionError)
    assert "karikomi: error" not in result.output and result.stdout == ""
    again = run("inspect", packed, "--json")
    assert isinstance(again.exception, ZeroDivisionError)
    kind = {"error": "ZeroDivisionError: ours", "kind": "ZeroDivisionError", "exit_code": 1}
    assert json.loads(again.stdout) == kind


# pack, unpack, inspect


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_lossless_there_and_back(
    suffix: str, arrays: dict[str, np.ndarray], stored: Path, tmp_path: Path
) -> None:
    source = stored
    if suffix == ".npz":
        source = tmp_path / "model.npz"
        np.savez(source, **arrays)
    made = good("pack", source, tmp_path / "new" / "a.karikomi")
    back = tmp_path / "other" / "b.safetensors"
    assert good("unpack", made["file"], back)["file"] == str(back)
    found = safetensors.numpy.load_file(back)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()
    dense = sum(array.nbytes for array in arrays.values())
    size = Path(made["file"]).stat().st_size
    assert (made["bytes_dense"], made["bytes_packed"]) == (dense, size)
    assert made["ratio"] == dense / size


@pytest.mark.parametrize(
    ("option", "value", "quantizer"),
    [("--entries", 4, "codebook 4"), ("--bits", 5, "uniform 5 bits, axis 0")],
)
def test_only_float_matrices_are_quantized(
    option: str, value: int, quantizer: str, arrays: dict[str, np.ndarray], stored: Path
) -> None:
    out = stored.with_name("q.karikomi")
    made = good("pack", stored, out, option, value)
    kinds = {one["name"]: one["quantizer"] for one in made["tensors"]}
    assert kinds == {
        "layer.weight": quantizer,
        "wide": quantizer,
        "layer.bias": "none",
        "steps": "none",
        "index": "none",
    }
    found = pack.load(out)
    assert np.array_equal(found["layer.bias"], arrays["layer.bias"])
    weight = arrays["layer.weight"]
    assert found["layer.weight"].dtype == np.float32
    assert np.all(found["layer.weight"][weight == 0] == 0)
    if option == "--bits":
        step = np.abs(weight).max(axis=1, keepdims=True) / (2**4 - 1)
        assert np.all(np.abs(found["layer.weight"] - weight) <= step / 2 + 1e-6)
    else:
        assert len(np.unique(found["layer.weight"])) <= 5


def test_methods_and_groups_of_packing(stored: Path) -> None:
    out = stored.with_name("q.karikomi")
    made = good("pack", stored, out, "--bits", 5, "--group", 2, "--method", "uniform")
    kinds = {tensor["name"]: tensor["quantizer"] for tensor in made["tensors"]}
    assert kinds["layer.weight"] == "affine 5 bits, axis 0, 2 weights a scale"
    out.unlink()
    assert "needs data" in bad("pack", stored, out, "--bits", 5, "--method", "gptq")
    assert "takes bits" in bad("pack", stored, out, "--entries", 5, "--method", "uniform")
    assert "none of these options" in bad("pack", stored, out, "--entries", 5, "--group", 2)
    assert "did you mean" in bad("pack", stored, out, "--bits", 5, "--method", "unifrom")
    assert not out.exists()


@pytest.mark.parametrize("options", [(), ("--bits", 6)])
def test_a_fine_tuned_file_is_packed_against_its_base(
    options: tuple[object, ...], arrays: dict[str, np.ndarray], stored: Path, tmp_path: Path
) -> None:
    base, tuned, out, back = (
        tmp_path / name for name in ("b.karikomi", "t.npz", "d.karikomi", "d.safetensors")
    )
    good("pack", stored, base, *options)
    changed = dict(arrays)
    weight = arrays["layer.weight"]
    changed["layer.weight"] = np.where(abs(weight) < 1, weight * np.float32(1 + 2**-16), weight)
    changed["steps"] = np.int64(8)
    np.savez(tuned, **changed)
    whole = good("pack", tuned, tmp_path / "w.karikomi", *options)
    made = good("pack", tuned, out, "--base", base, *options)
    assert made["bytes_packed"] < 0.85 * whole["bytes_packed"]
    assert made["bytes_dense"] == whole["bytes_dense"]
    good("unpack", out, back, "--base", base)
    found, wanted = safetensors.numpy.load_file(back), pack.load(tmp_path / "w.karikomi")
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in changed)
    assert "is a delta" in bad("unpack", out, back)
    assert "not the base" in bad("unpack", out, back, "--base", tmp_path / "w.karikomi")
    assert "is the input" in bad("pack", tuned, base, "--base", base)
    assert "is a delta" in bad("unpack", base, back, "--base", out)


def test_inspect_accounts_for_every_byte(packed: Path) -> None:
    found = good("inspect", packed)
    parts = [found[f"bytes_{part}"] for part in ("payload", "tables", "header", "manifest")]
    assert sum(parts) == found["bytes_packed"] == packed.stat().st_size
    assert sum(one["bytes"] for one in found["tensors"]) == parts[0] + parts[1]
    weight = next(one for one in found["tensors"] if one["name"] == "layer.weight")
    assert weight["shape"] == [40, 60]
    assert weight["bits_per_weight"] == 8 * weight["bytes"] / 2400
    lines = run("inspect", packed).stdout.splitlines()
    assert lines[0].split() == ["tensor", "shape", "codec", "quantizer", "bytes", "bits/w", "bound"]
    assert len(lines) == 1 + 5 + 1 + 5 + 1 + 4 + 1 + 1
    assert max(map(len, lines[:-1])) <= 80


def test_a_failed_pack_leaves_what_was_there(stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.karikomi"
    good("pack", stored, out)
    before = out.read_bytes()
    np.savez(tmp_path / "nan.npz", weight=np.full((4, 4), np.nan, np.float32))
    assert "weight: weights are NaN" in bad("pack", tmp_path / "nan.npz", out, "--bits", 8)
    assert out.read_bytes() == before
    good("pack", stored, out, "--entries", 2)
    assert out.read_bytes() != before
    assert {path.suffix for path in tmp_path.iterdir()} <= {".karikomi", ".npz", ".safetensors"}


def test_no_verb_overwrites_what_it_reads(stored: Path) -> None:
    before = stored.read_bytes()
    assert "the output is the input" in bad("pack", stored, stored)
    assert "the output is the input" in bad("unpack", stored, stored)
    assert stored.read_bytes() == before


# Files that are damaged or mean harm


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("verb", ["inspect", "unpack"])
def test_a_file_cut_short(verb: str, share: float, packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    packed.write_bytes(content[: int(share * len(content))])
    out = tmp_path / "out.safetensors"
    assert str(packed) in bad(verb, packed, *([out] if verb == "unpack" else []))
    assert not out.exists()


def test_an_altered_byte_is_found_wherever_it_is(packed: Path) -> None:
    content = packed.read_bytes()
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 0x20
        packed.write_bytes(changed)
        assert str(packed) in bad("inspect", packed, "--json")


class _Pwned:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(Path.cwd() / "pwned"),)


def _pickled(path: Path) -> None:
    np.savez(path, weight=np.array([_Pwned()], dtype=object))


def _bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Pwned()))


def _bomb(path: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<f8", "fortran_order": False, "shape": (2**50,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weight.npy", head.getvalue())


def _no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weight.npy", b"\x93NUMPY\x01\x00")


@pytest.mark.parametrize("write", [_pickled, _bare_pickle, _bomb, _no_array])
def test_a_hostile_npz(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.npz")
    assert "x.npz" in bad("pack", "x.npz", "x.karikomi")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "x.karikomi").exists()


@pytest.mark.parametrize("verb", ["inspect", "unpack"])
@pytest.mark.parametrize(
    "content",
    [b"import os\nprint(1)\n", b"PK\3\4" + b"\0" * 99, b'{"a": 1}' * 9],
    ids=["code", "zip", "json"],
)
def test_a_file_of_another_kind_is_called_that(verb: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    out = [tmp_path / "y.safetensors"] if verb == "unpack" else []
    assert "neither a .karikomi nor a safetensors file" in bad(verb, tmp_path / "x", *out)


@pytest.mark.parametrize(
    ("given", "meant"), [("scores", "score"), ("penalties", "penalty"), ("task s", "task")]
)
def test_a_kind_that_is_nearly_right_is_named(given: str, meant: str) -> None:
    result = run("list", given)
    assert result.exit_code == 2
    assert f"'{given}' is not one of 'clip'" in result.stderr
    assert f"did you mean '{meant}'?" in result.stderr


def test_checkpoints_of_today_are_packed_and_unpacked(tmp_path: Path) -> None:
    # The four numbers 1, 2, -1, 0 of each type, and three groups of one scale.
    bits = {"BF16": "803f0040 80bf0000", "F8_E4M3": "3840b800", "F8_E5M2": "3c40bc00"}
    payloads = {name: bytes.fromhex(text) for name, text in bits.items()} | {"F8_E8M0": b"\x7f" * 4}
    at, directory = 0, {}
    for name, payload in payloads.items():
        span = [at, at := at + len(payload)]
        directory[name] = {"dtype": name, "shape": [2, 2], "data_offsets": span}
    source, packed, back = (
        tmp_path / name for name in ("a.safetensors", "a.karikomi", "b.safetensors")
    )
    source.write_bytes(_header(json.dumps(directory).encode()) + b"".join(payloads.values()))
    good("pack", source, packed)
    good("unpack", packed, back)
    found = read_arrays(back)
    assert {name: found[name].tobytes() for name in payloads} == payloads
    for name in bits:
        assert found[name].astype("f4").tolist() == [[1, 2], [-1, 0]]
    codecs = {
        one["name"]: one["quantizer"]
        for one in good("pack", source, packed, "--bits", 8)["tensors"]
    }
    assert codecs["BF16"].startswith("uniform 8 bits")
    assert {codecs[name] for name in codecs.keys() - {"BF16"}} == {"none"}


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        _header(b"{"),
        _header(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        _header(b'{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}') + b"\0\0\0",
        _header(b'{"\x1b[31mw":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}') + b"\0" * 4,
    ],
)
def test_a_hostile_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    line = bad("pack", tmp_path / "x.safetensors", tmp_path / "x.karikomi")
    assert line.isprintable()


def test_a_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    # Not a colour: click itself strips those where stderr is no terminal.
    assert bad("inspect", tmp_path / "\x07x.karikomi").isprintable()


def test_files_that_are_something_else(packed: Path, tmp_path: Path) -> None:
    packed.rename(tmp_path / "renamed.safetensors")
    assert "packed file" in bad("pack", tmp_path / "renamed.safetensors", tmp_path / "y.karikomi")
    assert "no such file" in bad("pack", tmp_path / "nowhere.npz", tmp_path / "y.karikomi")
    (tmp_path / "x.pt").write_bytes(b"")
    assert ".safetensors, .npz" in bad("pack", tmp_path / "x.pt", tmp_path / "y.karikomi")
    assert "ending in .safetensors" in bad("unpack", tmp_path / "x.pt", tmp_path / "y.bin")


def test_an_output_that_cannot_be_written(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in bad("pack", stored, tmp_path / "file" / "x.karikomi")


# list


def test_list_shows_all_that_is_registered() -> None:
    found = good("list")["entries"]
    assert [(one["kind"], one["name"]) for one in found] == [
        (one.kind, one.name) for one in registry.entries()
    ]
    assert all(one["formula"] and one["source"] for one in found)
    assert {one["kind"] for one in good("list", "bound")["entries"]} == {"bound"}


@pytest.mark.parametrize("columns", [60, 120])
def test_the_list_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("list").stdout.splitlines()
    assert columns - 25 < max(map(len, lines)) <= columns
    words = " ".join(lines).split()
    for entry in registry.entries():
        assert entry.name in words
        assert " ".join(entry.source.split()) in " ".join(words)


# audit and sweep


def _trained(task: Path, folder: Path) -> dict[str, np.ndarray]:
    from karikomi.record import Recorder
    from karikomi.tasks import Phase, load

    chosen = load(str(task))
    runner = registry.framework("torch").runner_for(chosen, chosen.data(), seed=0)
    training = runner.train(runner.fresh(), Phase(stage="train", epochs=5, learning_rate=1e-2))
    with Recorder(folder / "record.jsonl") as recorder:
        for _ in range(5):
            training.run_epoch(recorder)
    return training.arrays()


def test_audit_names_the_damage(task: Path, tmp_path: Path) -> None:
    before = _trained(task, tmp_path)
    after = {name: array.copy() for name, array in before.items()}
    after["2.weight"][1] = 0
    after["2.bias"][1] = -9
    safetensors.numpy.save_file(before, tmp_path / "before.safetensors")
    pack.save(after, tmp_path / "after.karikomi")
    files = (tmp_path / "before.safetensors", tmp_path / "after.karikomi")
    found = good("audit", *files, "--task", task, "--out", tmp_path / "made" / "here")
    lost = re.compile(r"class 1 lost \d+\.\d points, \d+ of 35 examples")
    assert any(map(lost.match, found["warnings"]))
    assert (found["before"], found["after"]) == tuple(map(str, files))
    written = json.loads(Path(found["file"]).read_text())
    assert written == {key: found[key] for key in found.keys() - {"file", "report", "markdown"}}
    assert "class 1 lost" in Path(found["report"]).read_text()
    text = run("audit", *files, "--task", task).stdout
    assert f"warning: {found['warnings'][0][:25]}" in text
    assert good("audit", *files, "--task", task)["report"] is None


def test_audit_says_what_does_not_fit(task: Path, stored: Path, packed: Path) -> None:
    assert "the file and the module are different networks" in bad(
        "audit", stored, packed, "--task", task
    )
    assert "did you mean 'digits'" in bad("audit", stored, packed, "--task", "digit")
    assert "no such file" in bad("audit", stored.with_name("no.npz"), packed, "--task", task)
    assert "takes no data" in bad("audit", stored, packed, "--task", task, "--data", "x")
    task.write_text("1 / 0")
    assert "ZeroDivisionError" in bad("audit", stored, packed, "--task", task)


def test_compress_writes_the_two_files_that_audit_compares(task: Path, tmp_path: Path) -> None:
    config = tmp_path / "short.toml"
    config.write_text(
        "train_epochs = 2\nprune_epochs = 1\ntune_epochs = 1\nsparsities = [0.5]\nentries = [8]\n"
    )
    call = ("compress", task, "--config", config, "--out", tmp_path / "run", "--max-drop", "0.5")
    made = good(*call, "--quiet")
    assert made["dense"] == str(tmp_path / "run" / "dense.safetensors")
    task.write_text(task.read_text() + "print('a task that prints while it is loaded')\n")
    found = good("audit", made["dense"], made["file"], "--task", task)
    assert found["metric_before"] == made["metric_before"]
    assert found["metric_after"] == made["metric_after"]


def test_a_task_whose_data_raise_is_shown_with_its_line(task: Path, tmp_path: Path) -> None:
    lines = task.read_text().replace(
        "data=lambda: Data(", "data=lambda: np.load('none.npy') or Data("
    )
    task.write_text(lines)
    line = 1 + [("none.npy" in text) for text in lines.splitlines()].index(True)
    said = bad("compress", task, "--out", tmp_path / "run", "--json")
    assert (
        f"FileNotFoundError: [Errno 2] No such file or directory: 'none.npy' (blobs.py:{line})"
        in said
    )


def test_sweep_as_json_resumed_and_refused(task: Path, tmp_path: Path) -> None:
    grid = ("--limits", "0.5,inf", "--sparsities", "0, 0.5", "--seeds", 1)
    call = ("sweep", task, *grid, "--out", tmp_path / "sweep")
    first = run(*call, "--epochs", 2, "--json")
    assert first.exit_code == 0, first.output
    assert "8/8" in first.stderr
    found = json.loads(first.stdout)
    assert [point["limit"] for point in found["points"]] == [0.5, 0.5, None, None]
    assert Path(found["report"]).read_text().startswith("<!")
    assert json.loads(Path(found["file"]).read_text())["points"] == found["points"]
    assert good(*call, "--epochs", 2, "--quiet") == found
    table = run(*call, "--epochs", 2, "--quiet")
    assert table.stderr == ""
    assert re.search(r"^none +50 % +1 +\d", table.stdout, re.MULTILINE)
    text = task.read_text()
    task.write_text(text.replace("learning_rate=1e-2", "learning_rate=1e-3"))
    assert "different: recipe" in bad(*call, "--epochs", 2, "--quiet")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--limits", "-1", "the limit must be positive; got -1.0"),
        ("--limits", "nan", "the limit must be positive; got nan"),
        ("--sparsities", "1.2", "got 1.2; allowed: 0 <= sparsity < 1"),
        ("--sparsities", "none", "got inf"),
        ("--data", "x.npz", "takes no data path"),
    ],
)
def test_a_sweep_out_of_range(option: str, value: str, said: str, task: Path) -> None:
    assert said in bad("sweep", task, option, value, "--out", task.with_name("never"))
    assert not task.with_name("never").exists()


def test_ctrl_c_says_that_the_same_command_resumes(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    grid = ("--limits", "1", "--sparsities", "0", "--seeds", 1000, "--epochs", 2)
    with spawn("sweep", task, *grid, "--out", out, "--quiet", program=HEEDS + PROGRAM) as process:
        deadline = time.monotonic() + 120
        while not _runs_of(out):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no run ended in time"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        shown, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert shown == ""
    assert said == "karikomi: interrupted; the same command resumes where it stopped\n"
    assert _runs_of(out) and not (out / "sweep.json").exists()


def _runs_of(out: Path) -> int:
    """Return how many runs of a sweep are in its journal, whose first line is its form."""
    path = out / "journal.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


# The same in processes of their own


def test_exit_codes_of_the_real_program(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "short.karikomi").write_bytes(packed.read_bytes()[:-1])
    calls = {
        0: ("inspect", packed, "--json"),
        1: ("inspect", tmp_path / "short.karikomi", "--json"),
        2: ("inspect", "--nope"),
    }
    for code, call in calls.items():
        with spawn(*call) as process:
            shown, said = process.communicate(timeout=60)
        assert process.returncode == code
        if code == 0:
            assert json.loads(shown)["file"] == str(packed)
            assert said == ""
        else:
            assert (json.loads(shown)["kind"] == "BadFile") if code == 1 else shown == ""
            assert "Traceback" not in said
            assert code == 2 or said.count("\n") == 1
