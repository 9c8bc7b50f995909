"""The result of `compress`: plain values by name, and the network itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.errors import Unsupported, suggest
from karikomi.pack.reader import load_with_notes
from karikomi.tasks import Runner


class Compressed(dict[str, Any]):
    """A dictionary of plain values, which ``result.json`` holds too; each is also an attribute of its name.

    `model`: the network of ``model.karikomi``, of the class that was given, with its layers as small as they
    became, in evaluation mode; it has the codes, so that `kk.save` writes the same file again.

    >>> Compressed({"ratio": 12.5, "verified": True}).ratio
    12.5
    """

    def __init__(self, values: Mapping[str, Any], runner: Runner | None = None) -> None:
        super().__init__(values)
        self._runner = runner

    @property
    def model(self) -> Any:
        """The small network, made anew from the file with each access."""
        if self._runner is None:
            raise Unsupported(
                "a copy of a result has no network",
                where="compress",
                hint="kk.load(file, into=model)",
            )
        tensors, notes = load_with_notes(self["file"])
        self._runner.adopt(notes)
        return self._runner.network(tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        # The network is in the file; a copy and a pickle have the values alone.
        return type(self), (dict(self),)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the result has no {name!r}; {suggest(name, self)}") from None
