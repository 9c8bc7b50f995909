"""Presets: what the search makes small, and which steps it takes for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from karikomi.errors import UnknownName, suggest
from karikomi.tasks import Task

_WIDTHS = (0.9, 0.8, 0.7, 0.5, 0.35)


@dataclass(frozen=True, slots=True)
class Preset:
    """`objective`: the fact that is made small. `integers`: whether files are run with integer activations.

    `recipe`: values that the recipe has instead of a task's own; `default`: those that it has where the task has
    none. A task may have other values for a preset (``presets`` of `Task`).
    """

    about: str
    objective: str | None
    integers: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    default: Mapping[str, Any] = field(default_factory=dict)
    most_epochs: int | None = None

    def applied(self, task: Task, name: str) -> Task:
        """Return the task with the preset's steps in its recipe."""
        recipe = task.recipe
        changes = {k: value for k, value in self.default.items() if not getattr(recipe, k)}
        changes |= self.recipe
        if self.most_epochs is not None:
            for epochs in ("prune_epochs", "tune_epochs"):
                changes[epochs] = min(getattr(recipe, epochs), self.most_epochs)
        changes |= task.presets.get(name, {})
        return dataclasses.replace(task, recipe=dataclasses.replace(recipe, **changes))


PRESETS = {
    "storage": Preset(
        "the smallest file: each technique, and quantized training",
        "bytes",
        default={"learned": (2.0, 1.4, 1.0)},
    ),
    "cpu": Preset(
        "the fastest network: units are removed, and activations are integers",
        "ms",
        integers=True,
        recipe={"sparsities": (), "learned": ()},
        default={"widths": _WIDTHS},
    ),
    "deep-compression": Preset(
        "quantized training to a small part of a bit per weight, which does what Han et al. 2016 do in three steps",
        "bytes",
        recipe={"sparsities": ()},
        default={"learned": (0.5, 0.25, 0.12)},
    ),
    "quick": Preset(
        "one step of each kind, few epochs",
        None,
        recipe={"sparsities": (0.8,), "entries": (16,), "rates": (3.0,), "learned": ()},
        most_epochs=5,
    ),
}


def narrowing(task: Task) -> Task:
    """Return a task whose search may remove units, by the widths of the preset ``cpu``."""
    return dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, widths=_WIDTHS))


def preset_named(name: str) -> Preset:
    """Return a preset by name; raise `UnknownName` with the nearest."""
    if name not in PRESETS:
        raise UnknownName(
            "unknown preset", where="compress", got=repr(name), hint=suggest(name, PRESETS)
        )
    return PRESETS[name]
