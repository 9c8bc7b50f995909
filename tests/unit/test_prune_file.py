"""Pruning a safetensors file in blocks: the weights that `prune` takes, exactly, whatever is in the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

safetensors = pytest.importorskip("safetensors")

from safetensors.numpy import load_file, save_file  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi.errors import BadFile, InvalidArgument, NonFinite, UnknownName, Unsupported  # noqa: E402
from karikomi.numpy import safetensors_pruning  # noqa: E402
from karikomi.prune import unpack_mask  # noqa: E402


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a chunk be 16 entries, so that small tensors have many."""
    monkeypatch.setattr(safetensors_pruning, "CHUNK", 16)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "a.weight": generator.normal(size=(7, 11)).astype(np.float32),
        "b.weight": generator.normal(size=(5, 3, 2)).astype(np.float16),
        "c.weight": generator.normal(size=40),
        "d.empty": np.zeros((0, 3), np.float32),
        "e.steps": np.arange(5),
    }


def in_file_order(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays in the order in which they lie in a file."""
    with path.open("rb") as file:
        whole = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    whole.pop("__metadata__", None)
    found = load_file(path)
    return {name: found[name] for name in sorted(whole, key=lambda n: whole[n]["data_offsets"])}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77])
def test_the_same_weights_go_as_in_memory(allocation: str, sparsity: float, tmp_path: Path) -> None:
    source, target = tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors"
    save_file(arrays(), source, metadata={"format": "np"})
    report = kk.numpy.prune_file(
        source, target, sparsity=sparsity, allocation=allocation, only="*.weight"
    )
    dense = in_file_order(source)
    chosen = {name: one for name, one in dense.items() if name.endswith("weight")}
    expected, masks = kk.numpy.prune(chosen, sparsity=sparsity, allocation=allocation)
    found = load_file(target)
    for name, array in (dense | expected).items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name
    assert report.counts == {n: (int((~m).sum()), m.size) for n, m in masks.items()}
    assert sum(gone for gone, _ in report.counts.values()) == round(sparsity * 147)
    assert report.left_alone == {"d.empty": "not selected", "e.steps": "not selected"}
    with safetensors.safe_open(target, "np") as file:
        assert file.metadata() == {"format": "np"}


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0]), min_size=1, max_size=90),
    cut=st.integers(0, 89),
    sparsity=st.floats(0.0, 0.99),
)
def test_ties_go_by_the_order_of_the_file(
    values: list[float], cut: int, sparsity: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ties")
    whole = np.array(values, np.float32)
    save_file({"x": whole[:cut], "y": whole[cut:]}, folder / "dense.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_pruning, "CHUNK", 8)
        report = kk.numpy.prune_file(
            folder / "dense.safetensors", folder / "out.safetensors", sparsity=sparsity
        )
    expected, _ = kk.numpy.prune(in_file_order(folder / "dense.safetensors"), sparsity=sparsity)
    found = load_file(folder / "out.safetensors")
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
    assert sum(gone for gone, _ in report.counts.values()) == round(sparsity * len(values))


@pytest.mark.usefixtures("small_chunks")
def test_bfloat16_and_masks_in_a_file_of_their_own(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_tensors
    from safetensors.torch import save_file as save_tensors

    source, target, bits = (tmp_path / f"{n}.safetensors" for n in ("dense", "pruned", "masks"))
    weight = torch.randn(9, 13, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_tensors({"w": weight, "v": torch.full((3,), -1e-3), "n": torch.arange(3)}, source)
    report = kk.numpy.prune_file(source, target, sparsity=0.6, masks=bits)
    assert report.left_alone == {"n": "its dtype is I64"} and report.sparsity == 0.6
    found = load_tensors(target)
    assert found["w"].dtype is torch.bfloat16 and found["n"].tolist() == [0, 1, 2]
    with safetensors.safe_open(bits, "np") as file:
        shapes = json.loads(file.metadata()["shapes"])
        masks = {n: unpack_mask(file.get_tensor(n), shapes[n]) for n in file.keys()}  # noqa: SIM118
    assert {n: m.shape for n, m in masks.items()} == {"w": (9, 13), "v": (3,)}
    assert report.counts == {n: (int((~m).sum()), m.size) for n, m in masks.items()}
    kept = torch.from_numpy(masks["w"])
    assert torch.equal(found["w"], torch.where(kept, weight, 0.0))
    assert weight[~kept].abs().max() <= weight[kept].abs().min()


def test_a_file_onto_itself_and_progress(tmp_path: Path) -> None:
    path, seen = tmp_path / "w.safetensors", []
    save_file({"w": np.arange(1.0, 1001.0)}, path)
    before = path.stat().st_size
    kk.numpy.prune_file(path, path, sparsity=0.9, progress=lambda done, of: seen.append((done, of)))
    assert np.flatnonzero(load_file(path)["w"]).tolist() == list(range(900, 1000))
    assert seen == [(before, before)] and path.stat().st_size == before


@pytest.mark.parametrize("with_masks", [False, True])
def test_an_interrupt_leaves_nothing(with_masks: bool, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    source = tmp_path / "w.safetensors"
    save_file({"w": np.ones(10)}, source)
    bits = tmp_path / "bits.safetensors" if with_masks else None
    with pytest.raises(KeyboardInterrupt):
        kk.numpy.prune_file(
            source, tmp_path / "out.safetensors", sparsity=0.5, masks=bits, progress=interrupt
        )
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_not_finite_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    source = tmp_path / "w.safetensors"
    for bad in (np.nan, np.inf, 1e300):
        save_file({"fine": np.ones(5), "bad": np.array([1.0, bad])}, source)
        with pytest.raises(NonFinite, match="bad: a weight"):
            kk.numpy.prune_file(source, tmp_path / "out.safetensors", sparsity=0.5)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sparsity": 1.0}, InvalidArgument, "0 <= sparsity < 1"),
        ({"score": "wanda"}, Unsupported, "single weights alone"),
        ({"score": "taylor"}, Unsupported, "single weights alone"),
        ({"score": "lamp"}, Unsupported, "single weights alone"),
        ({"allocation": "lamp"}, InvalidArgument, "scores"),
        ({"allocation": "globl"}, UnknownName, "global"),
        ({"only": "x*"}, UnknownName, "x*"),
        ({"only": "e.*"}, Unsupported, "I64"),
        ({"masks": "out.safetensors"}, Unsupported, "two files"),
    ],
)
def test_what_means_nothing_is_refused(
    options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    save_file(arrays(), tmp_path / "w.safetensors")
    if "masks" in options:
        options = {"masks": tmp_path / options["masks"]}
    with pytest.raises(error) as raised:
        kk.numpy.prune_file(
            tmp_path / "w.safetensors", tmp_path / "out.safetensors", **{"sparsity": 0.5, **options}
        )
    assert said in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def packed(entry: dict[str, Any], payload: int = 8, **others: Any) -> bytes:
    text = json.dumps({"w": entry, **others}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(payload)


FINE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cut short"),
        (b"\xff" * 8, "neither a .karikomi nor a safetensors file"),
        (b"\x02" + bytes(7) + b"[]", "nor a safetensors file"),
        (packed(FINE, 7), "beyond the file"),
        (packed(FINE, 9), "bytes follow"),
        (packed(FINE | {"shape": [3]}), "does not fit its shape"),
        (packed(FINE | {"shape": [-2]}), "malformed type or shape"),
        (packed(FINE | {"shape": [True, 2]}), "malformed type or shape"),
        (packed(FINE | {"dtype": 3}), "malformed type or shape"),
        (packed(FINE | {"more": 1}), "malformed directory"),
        (packed(FINE, v=FINE), "overlap"),
        (packed(FINE, __metadata__={"a": 1}), "metadata"),
        (packed(FINE, __metadata__={"karikomi": "1.0"}), "packed file"),
        (packed(FINE).replace(b'{"w"', b'{"w":1,"w"'), "cut|twice|malformed"),
    ],
)
def test_a_damaged_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    source = tmp_path / "w.safetensors"
    source.write_bytes(content)
    with pytest.raises(BadFile, match=said):
        kk.numpy.prune_file(source, tmp_path / "out.safetensors", sparsity=0.5)
    with pytest.raises(BadFile, match="regular|cannot be read"):
        kk.numpy.prune_file(tmp_path, tmp_path / "out.safetensors", sparsity=0.5)
    with pytest.raises(BadFile, match="cannot be read"):
        kk.numpy.prune_file(tmp_path / "none", tmp_path / "out.safetensors", sparsity=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


SCRIPT = """
import resource, sys
import numpy as np, karikomi as kk
kk.numpy.prune_file  # loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = kk.numpy.prune_file(sys.argv[1], sys.argv[1] + ".out", sparsity=0.5)
print(report.counts["w"][0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("equal", [False, True])
def test_memory_stays_the_same_however_large_a_tensor_is(equal: bool, tmp_path: Path) -> None:
    weights = 30_000_000  # 120 MB
    generator = np.random.default_rng(0)
    values = (
        np.ones(weights, np.float32) if equal else generator.standard_normal(weights, np.float32)
    )
    save_file({"w": values}, tmp_path / "w.safetensors")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "w.safetensors")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    removed, extra = map(int, done.stdout.split())
    assert removed == weights // 2
    assert extra < 40 * 1024


@pytest.mark.parametrize("before", [b" ", b"\n\t\r  "])
def test_a_header_may_begin_with_white_space(tmp_path: Path, before: bytes) -> None:
    content = directory([4])
    source = write(tmp_path, before + content)
    assert kk.numpy.prune_file(source, tmp_path / "o", sparsity=0.5).counts == {"w": (2, 4)}
    assert load_file(tmp_path / "o")["w"].tolist() == [0, 0, 2, 3]
    assert (tmp_path / "o").read_bytes()[8 : 8 + len(before)] == before


@pytest.mark.parametrize("allocation", ["global", "erk"])
def test_tensors_may_have_more_axes_than_arrays(tmp_path: Path, allocation: str) -> None:
    source = write(tmp_path, directory([1] * 70 + [4]))
    report = kk.numpy.prune_file(source, tmp_path / "o", sparsity=0.5, allocation=allocation)
    assert report.counts == {"w": (2, 4)}
    assert np.frombuffer((tmp_path / "o").read_bytes()[-16:], "f4").tolist() == [0, 0, 2, 3]


def directory(shape: list[int]) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}).encode()


def write(folder: Path, header: bytes) -> Path:
    path = folder / "s.safetensors"
    body = np.arange(4, dtype="f4").tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return path
