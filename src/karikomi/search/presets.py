"""Presets: what the search makes small, and which steps it takes for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from karikomi.errors import UnknownName, suggest
from karikomi.tasks import Task

_WIDTHS = (0.75, 0.5, 0.35, 0.25)


@dataclass(frozen=True, slots=True)
class Preset:
    """`objective`: the fact that is made small. `widths`: whether units are really removed, and not only weights."""

    about: str
    objective: str | None
    widths: tuple[float, ...] = ()
    sparsities: tuple[float, ...] | None = None
    entries: tuple[int, ...] | None = None
    most_epochs: int | None = None

    def applied(self, task: Task) -> Task:
        """Return the task with the preset's steps in its recipe."""
        recipe = task.recipe
        changes = {"widths": recipe.widths or self.widths}
        if self.sparsities is not None:
            changes["sparsities"] = self.sparsities
        if self.entries is not None:
            changes["entries"] = self.entries  # type: ignore[assignment]
        if self.most_epochs is not None:
            for name in ("prune_epochs", "tune_epochs"):
                changes[name] = min(getattr(recipe, name), self.most_epochs)  # type: ignore[assignment]
        return dataclasses.replace(task, recipe=dataclasses.replace(recipe, **changes))


PRESETS = {
    "storage": Preset("the smallest file", "bytes"),
    "cpu": Preset("the fastest network: units are removed first", "ms", _WIDTHS),
    "deep-compression": Preset(
        "a high sparsity, then codebooks, as Han et al. 2016",
        "bytes",
        sparsities=(0.8, 0.9, 0.95, 0.98),
        entries=(32, 16, 8, 5),
    ),
    "quick": Preset(
        "one step of each kind, few epochs", None, sparsities=(0.8,), entries=(16,), most_epochs=5
    ),
}


def preset_named(name: str) -> Preset:
    """Return a preset by name; raise `UnknownName` with the nearest."""
    if name not in PRESETS:
        raise UnknownName(
            "unknown preset", where="compress", got=repr(name), hint=suggest(name, PRESETS)
        )
    return PRESETS[name]
