"""Find a task: a built-in name, ``module:attribute``, or a Python file of the user's own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from karikomi import registry, spec
from karikomi.errors import InvalidArgument, UnknownName, check, suggest
from karikomi.tasks.task import Recipe, Task
from karikomi.tasks.user_code import called

_RAISED = "the task's own code raised"


def load(name: str, *, data: str | os.PathLike[str] | None = None) -> Task:
    """Return the task called `name`.

    `name`: a built-in (``digits``), ``package.module:attribute``, ``path/to/file.py`` (its attribute
    ``task``) or ``path/to/file.py:attribute``. The attribute is a `Task`, or a function that
    returns one; a function that takes an argument gets `data`, the path given by ``--data``.

    Loading a file or module runs its code: load only what you would run.

    Raises `UnknownName` with the nearest names, and `KarikomiError` when the task's own code raises.

    >>> load("digits").name
    'digits'
    """
    where = f"task {name}"
    if name.partition(":")[0].endswith(".py"):
        path, _, attribute = name.partition(":")
        thing = _attribute(_run_file(Path(path)), attribute or "task", where)
    elif ":" in name:
        module, _, attribute = name.partition(":")
        with _importing_from(""):  # as `python -m` does: modules beside the user's shell
            imported = called(lambda: importlib.import_module(module), _RAISED, where=where)
        thing = _attribute(imported, attribute, where)
    else:
        known = [entry.name for entry in registry.entries("task")]
        if name not in known:
            raise UnknownName(
                "unknown task",
                got=repr(name),
                hint=f"{suggest(name, known)}; or module:attribute, or a .py file",
            )
        thing = registry.find("task", name)
    return _made(thing, data, where)


def resolved(task: Task | str, data: str | os.PathLike[str] | None, *, where: str) -> Task:
    """Return a task as it is, or the task of that name; refuse a data path for a `Task`, which has its own data."""
    if isinstance(task, str):
        return load(task, data=data)
    known = isinstance(task, Task)
    check(where, (known, "not a task", repr(task), "kk.tasks.Task, or a name"))
    if data is not None:
        raise InvalidArgument(
            "a Task has its own data", where=where, got=data, hint="give data with a task's name"
        )
    return task


def configured(task: Task, config: str | os.PathLike[str] | Mapping[str, Any]) -> Task:
    """Return a task whose recipe has the values of a TOML file, or of a mapping with the same keys.

    The keys are the fields of `Recipe`; ``clip`` is a table with the name and the fields of a rule, or a
    rule. Raises `UnknownName` for another key, and `InvalidArgument` for a value of another type.

    >>> configured(load("digits"), {"train_epochs": 5}).recipe.train_epochs
    5
    """
    given = config if isinstance(config, Mapping) else spec.read_toml(os.fspath(config))
    values = dict(given)
    if isinstance(values.get("clip"), Mapping):
        values["clip"] = spec.from_dict(values["clip"])
    where = "config" if isinstance(config, Mapping) else str(config)
    checked = spec.validated(Recipe, values, where=where)
    changes = {key: getattr(checked, key) for key in values}
    return dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, **changes))


def check_seed(seed: object, *, where: str) -> None:
    """Refuse a seed that is not an integer in 0..2**63 - 1."""
    good = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
    check(where, (good, "a seed must be an integer", repr(seed), "0..2**63 - 1"))


def _made(thing: Any, data: str | os.PathLike[str] | None, where: str) -> Task:
    factory = None if isinstance(thing, Task) or not callable(thing) else thing
    takes_data = factory is not None and bool(inspect.signature(factory).parameters)
    check(where, (data is None or takes_data, "this task takes no data path", data, None))
    if factory is not None:
        thing = called(lambda: factory(data) if takes_data else factory(), _RAISED, where=where)
    if not isinstance(thing, Task):
        raise InvalidArgument(
            "not a task", where=where, got=type(thing).__name__, allowed="kk.tasks.Task"
        )
    return thing


class _AsItIs(SourceFileLoader):
    """Compiles a file anew: code that is cached hides an edit within the same second to the same length."""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UnknownName("there is no such file", where=f"task {path}", got=str(path.absolute()))
    name = f"karikomi_task_{path.stem}"
    source = _AsItIs(name, str(path)) if path.suffix == ".py" else None
    spec = importlib.util.spec_from_file_location(name, path, loader=source)
    loader = None if spec is None else spec.loader
    if spec is None or loader is None:
        raise InvalidArgument("not a Python file", where=f"task {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _importing_from(str(path.parent)):
        called(lambda: loader.exec_module(module), _RAISED, where=f"task {path}")
    return module


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _attribute(module: ModuleType, attribute: str, where: str) -> Any:
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UnknownName(
            "there is no such attribute",
            where=where,
            got=repr(attribute),
            hint=suggest(attribute, public),
        )
    return getattr(module, attribute)
