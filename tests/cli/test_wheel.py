"""The wheel, installed in a fresh environment: the program runs without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from karikomi import __version__

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax")


def run(*command: object, folder: Path) -> str:
    """Run a command outside of the checkout, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that was built from a copy of the tree; the checkout stays as it is."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", tree / "src", ignore=ignored)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tree / "dist", folder=tree)
    [built] = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the scripts folder of a fresh environment with the wheel.

    The dependencies are those of the environment of the tests. A path in a .pth file brings neither its
    own .pth files nor, with them, the checkout.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, folder=folder)
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder
    )
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    assert sysconfig.get_path("purelib") in paths
    (Path(purelib.strip()) / "dependencies.pth").write_text("\n".join(paths), encoding="utf-8")
    return scripts


@pytest.fixture(scope="module")
def python(scripts: Path) -> Path:
    """Return the interpreter of the fresh environment."""
    return scripts / Path(sys.executable).name


def test_the_wheel_has_templates_and_types_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.name == f"karikomi-{__version__}-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {
        "karikomi",
        f"karikomi-{__version__}.dist-info",
    }
    files = [name.rpartition("/") for name in names]
    assert [file for *_, file in files if file.startswith(("test_", "conftest"))] == []
    assert [folder for folder, *_ in files if "tests" in folder.split("/")] == []
    assert "karikomi/py.typed" in names
    templates = {path.name for path in (ROOT / "src/karikomi/report/templates").iterdir()}
    assert templates == {
        name.rpartition("/")[2] for name in names if name.startswith("karikomi/report/templates/")
    }


def test_what_is_imported_is_the_wheel_and_no_framework(python: Path, tmp_path: Path) -> None:
    code = "import sys, karikomi; print(karikomi.__file__, *sys.modules, sep='\\n')"
    file, *modules = run(python, "-c", code, folder=tmp_path).splitlines()
    assert Path(file).resolve().is_relative_to(python.parents[1].resolve())
    assert not Path(file).resolve().is_relative_to(ROOT)
    assert set(FRAMEWORKS) & set(modules) == set()


def test_the_script_and_the_module_print_the_version(scripts: Path, python: Path) -> None:
    expected = f"karikomi, version {__version__}\n"
    assert run(scripts / "karikomi", "--version", folder=scripts) == expected
    assert run(python, "-m", "karikomi", "--version", folder=scripts) == expected
    facts = json.loads(run(scripts / "karikomi", "--version", "--json", folder=scripts))
    assert facts["karikomi"] == __version__


def test_the_rules_are_listed(scripts: Path, tmp_path: Path) -> None:
    listed = run(scripts / "karikomi", "list", folder=tmp_path)
    assert "ByGlobalNorm" in listed and "MaxNorm" in listed and "magnitude" in listed


def test_a_file_is_packed_inspected_and_unpacked(scripts: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {"weight": generator.normal(size=(60, 40)).astype("f4"), "index": np.arange(9)}
    np.savez(tmp_path / "model.npz", **arrays)  # type: ignore[arg-type]
    program = scripts / "karikomi"
    run(program, "pack", "model.npz", "model.karikomi", folder=tmp_path)
    seen = json.loads(run(program, "inspect", "model.karikomi", "--json", folder=tmp_path))
    assert {tensor["name"] for tensor in seen["tensors"]} == set(arrays)
    assert seen["bytes_packed"] == (tmp_path / "model.karikomi").stat().st_size
    run(program, "unpack", "model.karikomi", "back.safetensors", folder=tmp_path)
    code = (
        "import numpy as np, safetensors.numpy as s\n"
        "back, first = s.load_file('back.safetensors'), np.load('model.npz')\n"
        "assert set(back) == set(first)\n"
        "assert all(np.array_equal(back[name], first[name]) for name in first)"
    )
    run(scripts / Path(sys.executable).name, "-c", code, folder=tmp_path)
