"""Facts of inputs and outputs: one run of the model per batch serves all that are requested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.keras.facts.inputs import READERS
from karikomi.keras.facts.layer_calls import Batch, run, watched
from karikomi.keras.facts.outputs import OutputMoments, gates
from karikomi.keras.layers.prunable import Oriented
from karikomi.prune.facts import measured_on


class Forward:
    """Collects facts of inputs and outputs; those of one batch from the first alone."""

    def __init__(self, model: Any, wanted: Mapping[str, Oriented], facts: frozenset[str]) -> None:
        self._model, self._facts = model, facts
        self._wanted = {id(item.variable): item for item in wanted.values()}
        self._outputs = OutputMoments(self._wanted, facts & measured_on("outputs"))
        self._readers = {
            fact: reader(self._wanted) for fact, reader in READERS.items() if fact in facts
        }
        self._first = True

    @property
    def norms(self) -> Mapping[str, list[Any]]:
        """Name of a kernel -> the layers that normalise its outputs."""
        return self._outputs.norms

    def see(self, batch: Batch) -> None:
        """Run one batch."""
        once = measured_on("first batch")
        if not self._first and self._facts <= once:
            return
        readers = [
            reader for fact, reader in self._readers.items() if self._first or fact not in once
        ]

        def see(layer: Any, _: Any, args: tuple[Any, ...], __: Any, result: Any) -> None:
            for reader in (self._outputs, *readers):
                reader.see(layer, args, result)

        with watched(self._model, see):
            run(self._model, batch[0])
        self._outputs.end()
        self._first = False

    def result(self) -> dict[str, dict[str, Any]]:
        """Return fact -> name -> values; raises `Unsupported` naming a weight without one."""
        found: dict[str, dict[str, Any]] = dict(self._outputs.result())
        found |= {fact: reader.result() for fact, reader in self._readers.items()}
        if "gate" in self._facts:
            found["gate"] = gates(self._wanted, self.norms)
        return found
