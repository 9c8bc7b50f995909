"""The public face: exported names resolve and are explained, and the front door costs nothing."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys

import pytest

from layout.source import PACKAGE, SOURCE, modules

PACKAGES = [name for name, path in modules().items() if path.name == "__init__.py"]
RULE_PACKAGES = [name for name in ("karikomi.clip", "karikomi.bound") if name in PACKAGES]
FRAMEWORKS = (
    "torch",
    "tensorflow",
    "keras",
    "jax",
    "optax",
    "sklearn",
    "lightning",
    "transformers",
)
IMPORT_MS = 100
SOURCE_LINE = re.compile(r"Source:|\b(19|20)\d\d\b")


def unexplained(package: str) -> dict[str, str]:
    """Return exported name -> complaint: it cannot be loaded, or has no docstring of its own."""
    found = {}
    for name in getattr(importlib.import_module(package), "__all__", ()):
        try:
            thing = getattr(importlib.import_module(package), name)
        except (AttributeError, ImportError) as error:
            found[name] = repr(error)
            continue
        documented = inspect.isroutine(thing) or inspect.isclass(thing) or inspect.ismodule(thing)
        if documented and not (thing.__doc__ or "").strip():
            found[name] = "no docstring"
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_exported_names_resolve_and_are_explained(package: str) -> None:
    assert unexplained(package) == {}


@pytest.mark.parametrize("package", RULE_PACKAGES)
def test_rules_show_an_example_and_name_their_source(package: str) -> None:
    module = importlib.import_module(package)
    texts = {name: getattr(module, name).__doc__ or "" for name in module.__all__}
    assert texts, f"{package} exports nothing"
    assert [name for name, text in texts.items() if ">>>" not in text] == []
    assert [name for name, text in texts.items() if not SOURCE_LINE.search(text)] == []


def _fresh(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_front_door_imports_no_framework() -> None:
    loaded = _fresh("import sys, karikomi; print(*sys.modules)").split()
    assert set(FRAMEWORKS) & set(loaded) == set()


def test_every_public_name_is_reached_from_a_fresh_front_door() -> None:
    names = "registry spec select rule errors clip pack KarikomiError save".split()
    for name in names:
        assert _fresh(f"import karikomi; print(karikomi.{name} is not None)") == "True\n"
    assert set(names) <= set(_fresh("import karikomi; print(*dir(karikomi))").split())


def test_the_front_door_says_the_same_to_type_checkers() -> None:
    """The mirror under TYPE_CHECKING names what the front door hands out, no more and no less."""
    body = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    mirrored = set(re.findall(r"^    from karikomi\S* import \w+ as (\w+)$", body, re.MULTILINE))
    assert mirrored == set(importlib.import_module("karikomi").__all__) - {"__version__"}


def test_the_front_door_is_cheap() -> None:
    """The fastest of several fresh interpreters, so that a busy machine does not fail the test."""
    code = (
        "import numpy, time; start = time.perf_counter(); import karikomi; "
        "print(1e3 * (time.perf_counter() - start))"
    )
    assert min(float(_fresh(code)) for _ in range(5)) < IMPORT_MS


@pytest.mark.skipif(
    not (PACKAGE / "cli" / "app.py").exists(), reason="there is no command line yet"
)
def test_the_command_line_explains_itself() -> None:
    assert "Usage:" in _fresh("from karikomi.cli.app import main; main()", "--help")
