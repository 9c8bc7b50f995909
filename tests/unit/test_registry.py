"""The registry: names, suggestions, doubles, plug-ins and frameworks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import karikomi as kk
from karikomi import registry
from karikomi.errors import InvalidArgument, Unavailable, UnknownName


def test_names_lead_to_things_and_back() -> None:
    assert registry.find("clip", "ByNorm") is kk.clip.ByNorm
    assert registry.name_of("clip", kk.clip.ByNorm(1.0)) == "ByNorm"
    with pytest.raises(
        UnknownName, match="clip: unknown clip; got 'ByNrom'; did you mean 'ByNorm'"
    ):
        registry.find("clip", "ByNrom")
    with pytest.raises(UnknownName, match="not a registered bound; got ByNorm"):
        registry.name_of("bound", kk.clip.ByNorm(1.0))


def test_entries_are_sorted_and_explain_themselves() -> None:
    entries = registry.entries()
    keys = [(registry.KINDS.index(entry.kind), entry.name) for entry in entries]
    assert keys == sorted(set(keys))
    assert all(entry.formula and entry.source for entry in entries)
    assert {"clip", "bound"} <= {entry.kind for entry in entries}


def test_folders_offer_what_is_registered_in_them() -> None:
    for kind, folder in (("clip", kk.clip), ("bound", kk.bound)):
        own = {e.name for e in registry.entries(kind) if e.thing.__module__.startswith("karikomi.")}
        assert own == set(folder.__all__)
    with pytest.raises(AttributeError, match="no rule 'ByNrm'; did you mean 'ByNorm'"):
        _ = kk.clip.ByNrm
    with pytest.raises(AttributeError, match="karikomi has no 'clp'; did you mean 'clip'"):
        _ = kk.clp


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Return the registry's own table, put back as it was afterwards."""
    copy = dict(registry._entries)
    monkeypatch.setattr(registry, "_entries", copy)
    return copy


def test_one_name_belongs_to_one_thing(entries: dict[Any, Any]) -> None:
    again = registry.register("clip", formula="f", source="s")
    assert again(kk.clip.ByNorm) is kk.clip.ByNorm
    other = type("ByNorm", (), {"__module__": "elsewhere"})
    with pytest.raises(InvalidArgument, match=r"elsewhere: .*twice; got also in karikomi\.clip"):
        again(other)
    with pytest.raises(InvalidArgument, match="unknown kind; got clup"):
        registry.register("clup", formula="f", source="s")


def _install(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    points = [EntryPoint("mine", value, "karikomi.rules") for value in values]
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "_broken", [])
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points)


def test_other_packages_add_their_rules(
    entries: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> ModuleType:
        registry.register("clip", name="Mine", formula="f", source="s")(object)
        return ModuleType(name)

    monkeypatch.setitem(sys.modules, "plug_in", ModuleType("plug_in"))
    _install(monkeypatch, "plug_in")
    monkeypatch.setattr(EntryPoint, "load", lambda self: load(self.value))
    assert registry.find("clip", "Mine") is object


def test_a_plug_in_that_fails_takes_nothing_else_with_it(
    entries: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(point: EntryPoint) -> None:
        if point.value != "good":
            raise ModuleNotFoundError(f"No module named {point.value!r}")
        registry.register("clip", name="Mine", formula="f", source="s")(object)

    monkeypatch.setattr(EntryPoint, "load", load)
    _install(monkeypatch, "broken", "good")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.find("clip", "ByNorm") is kk.clip.ByNorm
        assert registry.find("clip", "Mine") is object
        assert registry.name_of("clip", kk.clip.ByNorm(1.0)) == "ByNorm"


def test_a_plug_in_that_fails_is_named_where_it_may_be_missed(
    entries: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, "no_such_plug_in")
    named = "mine = no_such_plug_in .*ModuleNotFoundError: No module named 'no_such_plug_in'"
    for _ in range(2):
        with pytest.raises(UnknownName, match=f"unknown clip; got 'Mine'; .*{named}"):
            registry.find("clip", "Mine")
        with pytest.raises(UnknownName, match=f"not a registered clip; got dict; .*{named}"):
            registry.name_of("clip", {})
        with pytest.warns(UserWarning, match=named) as said:
            assert "ByNorm" in {entry.name for entry in registry.entries("clip")}
        assert [one.filename for one in said] == [__file__]


def test_a_plug_in_may_look_things_up_while_it_is_loaded(
    entries: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(point: EntryPoint) -> None:
        rule = registry.find("clip", "ByNorm")
        registry.register("clip", name="Mine", formula="f", source="s")(rule)

    monkeypatch.setattr(EntryPoint, "load", load)
    _install(monkeypatch, "mine")
    assert registry.find("clip", "Mine") is kk.clip.ByNorm


def test_what_fails_in_karikomi_itself_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(registry.importlib, "import_module", lambda name: exec("1 / 0"))
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                registry.find("clip", "ByNorm")
    assert registry.find("clip", "ByNorm") is kk.clip.ByNorm


def test_threads_that_come_while_rules_are_loaded_wait(
    entries: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def load(point: EntryPoint) -> None:
        inside.set()
        go_on.wait(10)
        registry.register("clip", name="Mine", formula="f", source="s")(object)

    monkeypatch.setattr(EntryPoint, "load", load)
    _install(monkeypatch, "mine")
    found: list[Any] = []

    def look() -> None:
        try:
            found.append(registry.find("clip", "Mine"))
        except UnknownName as error:
            found.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    threads[0].start()
    assert inside.wait(10)
    for thread in threads[1:]:
        thread.start()
    threads[1].join(0.05)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == [object] * 4


RACE = """
import threading
from karikomi import registry
barrier, found = threading.Barrier(4), []

def look():
    barrier.wait()
    found.append(registry.find("clip", "ByNorm").__name__)

threads = [threading.Thread(target=look) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert found == ["ByNorm"] * 4, found
"""


def test_threads_of_a_fresh_process_find_the_rules() -> None:
    source = str(Path(registry.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", RACE],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_framework_of_a_model_is_found_by_its_class() -> None:
    class Own(torch.nn.Linear):
        pass

    assert registry.framework_of(Own(1, 1)) is kk.torch
    with pytest.raises(
        InvalidArgument, match=r"not a model of a supported framework.*got numpy\.ndarray"
    ):
        registry.framework_of(np.ones(1))


def test_a_framework_that_is_missing_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UnknownName, match="unknown framework; got 'torhc'; did you mean 'torch'"):
        registry.framework("torhc")

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(registry.importlib, "import_module", missing)
    with pytest.raises(Unavailable, match=r"torch is not installed.*pip install '\.\[torch\]'"):
        registry.framework("torch")
