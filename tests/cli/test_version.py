"""``karikomi --version``, with and without ``--json``, and ``python -m karikomi``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from karikomi import __version__
from karikomi.cli.app import main

SOURCE = Path(__file__).parents[2] / "src"
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "optax"}


def run(*arguments: str) -> Result:
    """Call the program in this process."""
    return CliRunner().invoke(main, arguments, prog_name="karikomi")


def fresh(*arguments: str) -> str:
    """Return what a fresh interpreter prints, with the source tree on its path."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_dash_m_is_the_program() -> None:
    assert fresh("-m", "karikomi", "--version") == f"karikomi, version {__version__}\n"
    assert "Usage: karikomi [OPTIONS] VERB" in fresh("-m", "karikomi", "--help")


@pytest.mark.parametrize("arguments", [("--version", "--json"), ("--json", "--version")])
def test_the_json_has_versions_processor_and_threads(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    result = run(*arguments)
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["karikomi"] == __version__
    assert facts["python"] == platform.python_version()
    assert facts["machine"] == platform.machine() and platform.machine() in facts["platform"]
    assert isinstance(facts["processor"], str)
    assert facts["cores"] == os.cpu_count()
    assert facts["threads"] == 3
    assert facts["thread_variables"]["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in facts["thread_variables"]


def test_the_versions_are_those_of_the_installed_packages() -> None:
    packages = json.loads(run("--version", "--json").stdout)["packages"]
    assert {*FRAMEWORKS, "numpy"} <= set(packages)
    installed = {name: number for name, number in packages.items() if number is not None}
    assert installed == {name: version(name) for name in installed}
    assert "numpy" in installed


def test_a_package_that_is_missing_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karikomi.cli.versions.PACKAGES", ("numpy", "surely-not-installed"))
    packages = json.loads(run("--version", "--json").stdout)["packages"]
    assert packages == {"numpy": version("numpy"), "surely-not-installed": None}


def test_no_framework_is_imported_for_the_versions() -> None:
    code = (
        "import sys; from karikomi.cli.app import main\n"
        "try: main(['--version', '--json'])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["karikomi"] == __version__
    assert FRAMEWORKS & set(done.stderr.split()) == set()


@pytest.mark.parametrize("arguments", [("--json", "list"), ("--json",)])
def test_json_before_a_verb_is_bad_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
