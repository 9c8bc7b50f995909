"""Names for the things users choose by name, with the formula and the paper of each.

A rule registers itself where it is defined, so that adding one touches no list. Other packages add
theirs through the entry-point group ``niwaki.rules`` (a module whose import registers them).
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from niwaki.errors import InvalidArgument, NiwakiError, Unavailable, UnknownName, suggest

KINDS = ("clip", "bound", "prune", "score", "allocation", "task")
FRAMEWORKS = ("torch",)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered thing: `kind` and `name` find it, the rest explains it."""

    kind: str
    name: str
    thing: Any
    formula: str
    source: str


_entries: dict[tuple[str, str], Entry] = {}
_loaded_entry_points = False


def register(kind: str, *, name: str | None = None, formula: str, source: str) -> Callable[[T], T]:
    """Return a decorator that registers a class or function under its own name, or `name`."""
    if kind not in KINDS:
        raise InvalidArgument("unknown kind", where="register", got=kind, allowed=KINDS)

    def keep(thing: T) -> T:
        key = (kind, name or getattr(thing, "__name__", repr(thing)))
        known = _entries.get(key)
        if known is not None and known.thing.__module__ != getattr(thing, "__module__", None):
            raise InvalidArgument(
                f"the {kind} {key[1]!r} is registered twice",
                where=f"{getattr(thing, '__module__', thing)}",
                got=f"also in {known.thing.__module__}",
            )
        _entries[key] = Entry(*key, thing, formula, source)
        return thing

    return keep


def find(kind: str, name: str) -> Any:
    """Return the thing registered under `name`, or raise `UnknownName` with the nearest names."""
    known = {entry.name: entry.thing for entry in entries(kind)}
    if name not in known:
        raise UnknownName(f"unknown {kind}", where=kind, got=repr(name), hint=suggest(name, known))
    return known[name]


def entries(kind: str | None = None) -> list[Entry]:
    """Return all registered entries, of one kind or of all, sorted by kind and name."""
    _load_entry_points()
    chosen = [entry for entry in _entries.values() if kind in (None, entry.kind)]
    return sorted(chosen, key=lambda entry: (KINDS.index(entry.kind), entry.name))


def name_of(kind: str, thing: object) -> str:
    """Return the name that an object's class was registered under."""
    for entry in entries(kind):
        if entry.thing is type(thing):
            return entry.name
    raise UnknownName(f"this is no registered {kind}", got=type(thing).__name__)


def discover(package: str, path: Iterable[str], kind: str) -> dict[str, Any]:
    """Import every module of a package folder and return what registered under `kind` from there."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
    return {
        entry.name: entry.thing
        for entry in _entries.values()
        if entry.kind == kind and entry.thing.__module__.startswith(f"{package}.")
    }


def framework_of(thing: object) -> Any:
    """Return niwaki's folder for the framework that `thing` belongs to, by its class's ancestry.

    A framework is only ever looked for among the modules that the user's process has imported.
    """
    for ancestor in type(thing).__mro__:
        root = ancestor.__module__.partition(".")[0]
        if root in FRAMEWORKS and root in sys.modules:
            return framework(root)
    raise InvalidArgument(
        "this is no model of a framework that niwaki serves",
        got=f"{type(thing).__module__}.{type(thing).__name__}",
        allowed=f"a dict of arrays, or a model of {', '.join(FRAMEWORKS)}",
    )


def framework(name: str) -> Any:
    """Return niwaki's folder for a framework by name, or say how to install the framework."""
    if name not in FRAMEWORKS:
        raise UnknownName("unknown framework", got=repr(name), hint=suggest(name, FRAMEWORKS))
    try:
        return importlib.import_module(f"niwaki.{name}")
    except NiwakiError:
        raise
    except ImportError as error:
        raise Unavailable(
            f"{name} is not installed ({error})", hint=f"pip install 'niwaki[{name}]'"
        ) from error


def _load_entry_points() -> None:
    global _loaded_entry_points
    if _loaded_entry_points:
        return
    _loaded_entry_points = True
    for package in ("niwaki.clip", "niwaki.bound", "niwaki.prune", "niwaki.tasks"):
        importlib.import_module(package)
    for point in entry_points(group="niwaki.rules"):
        try:
            point.load()
        except Exception as error:
            # Said again at every look-up, never only once.
            _loaded_entry_points = False
            raise NiwakiError(
                "a plug-in failed to load",
                where=f"entry point {point.name!r} = {point.value}",
                got=f"{type(error).__name__}: {error}",
                hint="mend or uninstall that package",
            ) from error
