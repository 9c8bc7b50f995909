"""Workflow, hooks and issue templates: they parse, and name commands and files that exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from typing import Any

import pytest
import yaml

from layout.source import ROOT

GITHUB = ROOT / ".github"
YAML = [
    *sorted(GITHUB.rglob("*.yml")),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "mkdocs.yml",
]
WORKFLOW = GITHUB / "workflows" / "ci.yml"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))


def load(path: Any) -> Any:
    """Return the content of a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands() -> list[str]:
    """Return every command of the workflow."""
    return [
        step["run"]
        for job in load(WORKFLOW)["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]


def make_targets() -> set[str]:
    """Return the targets that `make help` lists."""
    return set(
        re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    )


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_it_parses(path: Any) -> None:
    assert isinstance(load(path), dict)


def test_the_workflow_covers_every_python_that_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {name.split(" :: ")[-1] for name in project["classifiers"] if " :: 3." in name}
    jobs = load(WORKFLOW)["jobs"]
    base = jobs["base"]["strategy"]["matrix"]
    assert set(base["python"]) == declared
    assert {name.partition("-")[0] for name in base["os"]} == {"ubuntu", "macos", "windows"}
    lanes = jobs["framework"]["strategy"]["matrix"]
    assert set(lanes["python"]) == declared
    assert set(lanes["lane"]) == {"torch", "keras", "jax"} <= set(project["optional-dependencies"])
    assert {"suite", "wheel", "docs"} <= set(jobs)


def test_every_file_and_target_in_the_workflow_exists() -> None:
    words = [word for command in commands() for word in shlex.split(command)]
    files = [word for word in words if word.startswith(("tests/", ".ci/"))]
    assert len(files) > 10
    assert [name for name in files if not (ROOT / name).exists()] == []
    targets = [after for word, after in zip(words, words[1:], strict=False) if word == "make"]
    assert set(targets) <= make_targets() and {"check", "docs"} <= set(targets)


def test_the_documentation_is_built_strictly() -> None:
    """The option --quiet of mkdocs hides warnings from --strict too."""
    build = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text("utf-8"))
    assert build == ["mkdocs build --strict"]
    config = load(ROOT / "mkdocs.yml")
    assert config["strict"] is True
    assert set(config["validation"].values()) == {"warn"}


def test_every_target_of_the_release_checklist_exists() -> None:
    text = (ROOT / "RELEASING.md").read_text("utf-8")
    assert set(re.findall(r"\bmake ([a-z]+)", text)) == {"clean", "test", "check", "docs", "dist"}
    assert {"clean", "test", "check", "docs", "dist"} <= make_targets()


def test_the_hooks_use_the_environment_of_make() -> None:
    [repository] = load(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert set(hooks) == {"ruff", "ruff-format", "layout"}
    assert all(hook["entry"].startswith(".venv/bin/python -m ") for hook in hooks.values())
    assert hooks["layout"]["entry"].endswith("pytest -q tests/layout")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_what_a_forge_asks_for(path: Any) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= set(form)
    identities = [field["id"] for field in form["body"]]
    assert len(set(identities)) == len(identities)
    for field in form["body"]:
        assert field["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]


def test_a_bug_report_asks_for_the_installation() -> None:
    [field] = [
        field
        for field in load(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]
        if field["id"] == "installation"
    ]
    assert "karikomi --version --json" in field["attributes"]["label"]
    assert field["validations"]["required"] is True


def test_the_navigation_names_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = set(re.findall(r": (\S+\.md)$", text, re.MULTILINE))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert listed == pages | {"CONTRIBUTING.md", "CHANGELOG.md", "RELEASING.md", "SECURITY.md"}
