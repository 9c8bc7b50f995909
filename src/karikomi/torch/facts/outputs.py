"""Facts of the outputs of units: zeros, magnitude and spread, and the scale that multiplies them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from karikomi.errors import Unsupported
from karikomi.torch.numerics.norms import wide
from karikomi.torch.tracing.output_tracing import Path


class OutputMoments:
    """Shares of zeros, mean magnitudes and standard deviations per unit, over samples and positions.

    Batches are merged as exactly as one (Chan, Golub and LeVeque 1979). The deviation divides by the
    number of samples. The outputs of several uses of one weight count alike.
    """

    def __init__(self, facts: frozenset[str]) -> None:
        self._facts = facts
        self._latest: dict[Path, dict[str, torch.Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._sums: dict[str, dict[str, torch.Tensor]] = {}

    def see(self, path: Path, outputs: torch.Tensor) -> None:
        """Store the moments of the outputs of a path, in place of earlier ones of this run."""
        values = outputs.detach().movedim(path.axis, 0).flatten(1)
        self._latest[path] = _moments(values, self._facts)

    def end(self) -> None:
        """Add the latest moments of this run of the network."""
        for path, new in self._latest.items():
            count = int(new.pop("count"))
            if not count:
                continue
            before = self._counts.get(path.name, 0)
            sums = self._sums.get(path.name)
            self._sums[path.name] = _merged(sums, before, new, count) if sums else new
            self._counts[path.name] = before + count
        self._latest.clear()

    def result(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return fact -> weight name -> one number per unit."""
        found: dict[str, dict[str, torch.Tensor]] = {fact: {} for fact in self._facts}
        for name, sums in self._sums.items():
            count = self._counts[name]
            for fact in self._facts:
                found[fact][name] = sums[fact] / count
            if "deviation" in self._facts:
                found["deviation"][name] = found["deviation"][name].sqrt()
        return found


def gates(
    weights: Mapping[str, torch.Tensor],
    units: Mapping[str, int],
    norms: Mapping[str, set[str | None]],
    scales: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return weight name -> the scale of the normalisation that takes its outputs, one per unit.

    `units`: the number of units of a weight. `norms`: of `karikomi.torch.tracing.output_tracing.Trail`. Raises
    `Unsupported` naming a weight that has none, or more than one.
    """
    found = {}
    for name in weights:
        choices = norms.get(name, set())
        scale = next(iter(choices), None)
        if len(choices) != 1 or scale is None or scales[scale].shape != (units.get(name),):
            raise Unsupported(
                "no one normalisation with a scale per unit takes the outputs of this layer",
                where=f"gate: {name}",
                got=", ".join(sorted(str(choice) for choice in choices)) or None,
                hint=f"exclude={name!r}, or another score",
            )
        found[name] = scales[scale].detach().clone()
    return found


def _moments(values: torch.Tensor, facts: frozenset[str]) -> dict[str, torch.Tensor]:
    """Return sums over samples, of shape (units,), of values of shape (units, samples)."""
    kind, count = wide(values.device), values.shape[1]
    found = {"count": torch.tensor(count)}
    if "zeros" in facts:
        found["zeros"] = (values == 0).sum(1, dtype=kind)
    if "output" in facts:
        found["output"] = torch.linalg.vector_norm(values, 1, dim=1, dtype=kind)
    if "deviation" in facts and count:
        variance, found["mean"] = torch.var_mean(values.to(kind), dim=1, correction=0)
        found["deviation"] = variance * count
    return found


def _merged(
    sums: Mapping[str, torch.Tensor], before: int, new: Mapping[str, torch.Tensor], count: int
) -> dict[str, torch.Tensor]:
    """Return the sums over both: squared deviations from the joint mean, and the mean itself."""
    merged = {fact: sums[fact] + new[fact] for fact in new}
    if "mean" in new:
        apart = new["mean"] - sums["mean"]
        share = count / (before + count)
        merged["mean"] = sums["mean"] + apart * share
        merged["deviation"] += apart.square() * (before * share)
    return merged
