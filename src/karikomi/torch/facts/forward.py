"""Facts of inputs and outputs: one forward pass per batch serves all that are requested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.prune.facts import measured_on
from karikomi.torch.facts.inputs import READERS
from karikomi.torch.facts.outputs import OutputMoments, gates
from karikomi.torch.tracing.batches import Batch
from karikomi.torch.tracing.output_tracing import Trail, scales_of
from karikomi.torch.tracing.weight_reads import WeightReadHooks


class Forward:
    """Collects facts of inputs and outputs; ``macs`` and ``gate`` from the first batch alone."""

    passes = 1

    def __init__(
        self, module: nn.Module, weights: Mapping[str, torch.Tensor], facts: frozenset[str]
    ) -> None:
        self._module, self._weights, self._facts = module, weights, facts
        self._readers: dict[str, Any] = {f: make() for f, make in READERS.items() if f in facts}
        outputs = facts & measured_on("outputs")
        self._moments = OutputMoments(outputs)
        see = self._moments.see if outputs else None
        self._trail = Trail(scales_of(module), see) if see or "gate" in facts else None
        on_read = [reader.read for reader in self._readers.values()]
        self._watch = WeightReadHooks(weights, on_read, self._trail, recurrent=bool(on_read))
        self._macs: dict[str, float] = {}

    def see(self, batch: Batch, number: int) -> None:
        """Run one batch; there is only one pass, of the number 0."""
        with torch.no_grad(), self._watch:
            self._module(*batch.positional, **batch.named)
        self._moments.end()
        if self._trail:
            self._trail.end()
        if "macs" in self._facts and not self._macs:
            examples = max(batch.examples, 1)
            counts = self._readers["macs"].counts
            self._macs = {name: counts.get(name, 0) / examples for name in self._weights}

    def result(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return fact -> weight name -> values; raises `Unsupported` for a weight that no layer read."""
        found = {f: reader.result() for f, reader in self._readers.items() if f != "macs"}
        found |= self._moments.result()
        for fact, values in found.items():
            self._check_seen(fact, values)
        if self._trail and "gate" in self._facts:
            scales = dict(self._module.named_parameters())
            found["gate"] = gates(self._weights, self._trail.units, self._trail.norms, scales)
        if "macs" in self._facts:
            # Looking a row up multiplies nothing.
            strays = {n for n, reader in self._watch.strays.items() if reader != "embedding"}
            self._check_seen("macs", {n for n, mac in self._macs.items() if mac or n not in strays})
            found["macs"] = {
                n: torch.tensor(mac, dtype=torch.float64) for n, mac in self._macs.items()
            }
        return found

    def _check_seen(self, fact: str, found: Container[str]) -> None:
        for name in self._weights:
            if name not in found:
                stray = self._watch.strays.get(name)
                raise Unsupported(
                    "no linear layer or convolution whose inputs and outputs can be seen reads this "
                    "weight in the data",
                    where=f"{fact}: {name}",
                    got=f"read by {stray}" if stray else None,
                    hint=f"exclude={name!r}, or a score without this fact",
                )


def following(module: nn.Module, batch: Batch) -> dict[str, str]:
    """Return layer name -> name of the normalisation that takes its output, where there is one.

    Only norms with a scale per unit of the layer that follow no other layer count, and layers whose every
    use is followed by the same norm, in a run of this batch. The module must be in eval mode.
    """
    scales = dict(module.named_parameters())
    weights = {name: parameter for name, parameter in scales.items() if parameter.dim() > 1}
    trail = Trail(scales_of(module))
    with torch.no_grad(), WeightReadHooks(weights, (), trail):
        module(*batch.positional, **batch.named)
    found = {}
    for name, norms in trail.norms.items():
        scale = next(iter(norms))
        if len(norms) == 1 and scale and scales[scale].shape == (trail.units[name],):
            found[name.rpartition(".")[0]] = scale.rpartition(".")[0]
    # A norm that follows several layers is removed with none of them.
    read = [scale for norms in trail.norms.values() for scale in norms if scale]
    shared = Counter(scale.rpartition(".")[0] for scale in read)
    return {layer: norm for layer, norm in found.items() if shared[norm] == 1}
