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
FRONT_MODULES, FRONT_MOST = 3, 60  # modules that `import karikomi` loads: its own, and in all
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


def test_the_front_door_imports_next_to_nothing() -> None:
    """Counted, as seconds would be those of the machine: itself and the standard library."""
    code = "import sys; before = {*sys.modules}; import karikomi; print(*{*sys.modules} - before)"
    loaded = set(_fresh(code).split())
    assert set(FRAMEWORKS) & loaded == set()
    assert {name.partition(".")[0] for name in loaded} <= {"karikomi", *sys.stdlib_module_names}
    assert len([name for name in loaded if name.startswith("karikomi")]) <= FRONT_MODULES
    assert len(loaded) <= FRONT_MOST


def test_every_public_name_is_reached_from_a_fresh_front_door() -> None:
    names = "registry spec select rule errors clip pack KarikomiError save".split()
    code = (
        "import sys\n"
        "for name in sys.argv[1:]:\n"
        "    import karikomi\n"
        "    print(name, getattr(karikomi, name) is not None)\n"
        "    for loaded in [n for n in sys.modules if n.partition('.')[0] == 'karikomi']:\n"
        "        del sys.modules[loaded]\n"
        "import karikomi; print(*dir(karikomi))"
    )
    *reached, listed = _fresh(code, *names).splitlines()
    assert reached == [f"{name} True" for name in names]
    assert set(names) <= set(listed.split())


def test_the_front_door_says_the_same_to_type_checkers() -> None:
    """The mirror under TYPE_CHECKING names what the front door hands out, no more and no less."""
    body = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    mirrored = set(re.findall(r"^    from karikomi\S* import \w+ as (\w+)$", body, re.MULTILINE))
    assert mirrored == set(importlib.import_module("karikomi").__all__) - {"__version__"}


@pytest.mark.skipif(
    not (PACKAGE / "cli" / "app.py").exists(), reason="there is no command line yet"
)
def test_the_command_line_explains_itself() -> None:
    assert "Usage:" in _fresh("from karikomi.cli.app import main; main()", "--help")
