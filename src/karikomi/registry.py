"""Registry of rules, scores, patterns, tasks and others by kind and name, each with its formula and source.

A rule is registered where it is defined, so that adding one changes no list. Other packages add
theirs through the entry-point group ``karikomi.rules`` (a module whose import registers them).
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from karikomi.errors import (
    InvalidArgument,
    KarikomiError,
    Unavailable,
    UnknownName,
    install_hint,
    suggest,
)

KINDS = (
    "clip",
    "bound",
    "prune",
    "score",
    "allocation",
    "allocator",
    "pattern",
    "penalty",
    "quantizer",
    "corruption",
    "task",
)
FRAMEWORKS = ("torch", "jax", "keras")
OF_MODELS = ("torch", "keras")
"""The frameworks whose models can be saved and filled so far."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered class or function, found by `kind` and `name`."""

    kind: str
    name: str
    thing: Any
    formula: str
    source: str


_entries: dict[tuple[str, str], Entry] = {}
# Reentrant: a plug-in may look up a name while it is loaded.
_lock = threading.RLock()
_loading = False
_loaded = False
_broken: list[str] = []


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
    """Return the object registered under `name`, or raise `UnknownName` with the nearest names.

    A plug-in that failed to load raises no error of its own; it is named where a name is not found.
    """
    known = {entry.name: entry.thing for entry in _registered(kind)}
    if name not in known:
        hint = "; ".join([suggest(name, known), *_faults()])
        raise UnknownName(f"unknown {kind}", where=kind, got=repr(name), hint=hint)
    return known[name]


def entries(kind: str | None = None) -> list[Entry]:
    """Return all registered entries, of one kind or of all, sorted by kind and name.

    Warns of every plug-in that failed to load.
    """
    found = _registered(kind)
    for fault in _faults():
        warnings.warn(fault, stacklevel=2)
    return found


def name_of(kind: str, thing: object) -> str:
    """Return the name that an object's class was registered under."""
    for entry in _registered(kind):
        if entry.thing is type(thing):
            return entry.name
    hint = "; ".join(_faults())
    raise UnknownName(f"not a registered {kind}", got=type(thing).__name__, hint=hint)


def discover(package: str, path: Iterable[str], kind: str) -> dict[str, Any]:
    """Import every module below a package folder and return what registered under `kind` from there."""
    for module in pkgutil.walk_packages(path, f"{package}."):
        importlib.import_module(module.name)
    return {
        entry.name: entry.thing
        for entry in list(_entries.values())
        if entry.kind == kind and entry.thing.__module__.startswith(f"{package}.")
    }


def framework_of(thing: object) -> Any:
    """Return karikomi's folder for the framework of an object, by the base classes of its type.

    Only modules that are already imported are searched for a framework.
    """
    for ancestor in type(thing).__mro__:
        root = ancestor.__module__.partition(".")[0]
        if root in OF_MODELS and root in sys.modules:
            return framework(root)
    raise InvalidArgument(
        "not a model of a supported framework",
        got=f"{type(thing).__module__}.{type(thing).__name__}",
        allowed=f"a dict of arrays, or a model of {', '.join(OF_MODELS)}",
    )


def framework(name: str) -> Any:
    """Return karikomi's folder for a framework by name; raise `Unavailable` where it is not installed."""
    if name not in FRAMEWORKS:
        raise UnknownName("unknown framework", got=repr(name), hint=suggest(name, FRAMEWORKS))
    try:
        return importlib.import_module(f"karikomi.{name}")
    except KarikomiError:
        raise
    except ImportError as error:
        raise Unavailable(f"{name} is not installed ({error})", hint=install_hint(name)) from error


def _registered(kind: str | None) -> list[Entry]:
    _load()
    # A copy first: another thread may be importing a rule at this moment.
    chosen = [entry for entry in list(_entries.values()) if kind in (None, entry.kind)]
    return sorted(chosen, key=lambda entry: (KINDS.index(entry.kind), entry.name))


def _faults() -> list[str]:
    return [
        f"the plug-in {fault} failed to load, mend or uninstall its package" for fault in _broken
    ]


def _load() -> None:
    global _loaded, _loading
    if _loaded:
        return
    with _lock:
        if _loaded or _loading:
            return
        _loading = True
        try:
            for package in ("clip", "bound", "prune", "quantize", "tasks", "audit.corruptions"):
                importlib.import_module(f"karikomi.{package}")
            faults = [_fault(point) for point in entry_points(group="karikomi.rules")]
            _broken[:] = [fault for fault in faults if fault]
            # Last: until then other threads must wait rather than look.
            _loaded = True
        finally:
            _loading = False


def _fault(point: EntryPoint) -> str | None:
    try:
        point.load()
    except Exception as error:
        text = f"{point.name} = {point.value} ({type(error).__name__}: {error})"
        return " ".join(text.split())
    return None
