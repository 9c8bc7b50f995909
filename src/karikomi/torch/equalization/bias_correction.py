"""Bias correction: the mean error that rounded weights make is taken off the bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from karikomi.errors import InvalidArgument, NonFinite
from karikomi.torch.equalization.output_scaling import shift_outputs_
from karikomi.torch.facts.measure import check_data
from karikomi.torch.modules.codes import recall
from karikomi.torch.modules.parameters import check_names, unwrapped
from karikomi.torch.tracing.batches import batches_of
from karikomi.torch.tracing.eval_mode import steady
from karikomi.torch.tracing.patches import patches
from karikomi.torch.tracing.weight_reads import Reading, WeightReadHooks

WHERE = "torch.correct_biases_"


class Corrected(NamedTuple):
    """`shifts`: weight -> mean magnitude of what its bias lost; `left_alone`: weight -> why it stays."""

    shifts: dict[str, float]
    left_alone: dict[str, str]


@torch.no_grad()
def correct_biases_(
    module: nn.Module,
    original: nn.Module | Mapping[str, torch.Tensor],
    *,
    data: Iterable[Any],
) -> Corrected:
    """Subtract from biases in place the mean error of their layers' outputs after `quantize_`.

    ``b -= E[(W_q - W) x]``, the mean over the samples and positions of `data`, x the inputs in the quantized network.
    Layers without a bias get one. Codes of weights stay as they are; a bias that had codes loses them.

    `original`: the module before `quantize_`, or name -> weight; `data`: batches, as in `prune_`. Left alone, with
    the reason, are transposed convolutions, weights that are read more than once, and what no linear layer or
    convolution reads. Raises `InvalidArgument` where nothing is quantized, `UnknownName` for a weight that `original`
    has not, `NonFinite` naming a weight.

    >>> import copy, karikomi as kk
    >>> net = nn.Linear(4, 3)
    >>> dense, x = copy.deepcopy(net), torch.rand(64, 4)
    >>> coded = kk.torch.quantize_(net, bits=2)
    >>> list(correct_biases_(net, dense, data=[x]).shifts)
    ['weight']
    >>> bool(torch.allclose(net(x).mean(0), dense(x).mean(0), atol=1e-5))
    True

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2,
    with the mean inputs measured instead of derived from batch norms.
    """
    check_data(data, WHERE)
    module = unwrapped(module)
    coded = recall(module)
    if not coded:
        raise InvalidArgument("nothing here is quantized", where=WHERE, hint="call quantize_ first")
    dense = (
        dict(unwrapped(original).named_parameters(remove_duplicate=False))
        if isinstance(original, nn.Module)
        else dict(original)
    )
    parameters = dict(module.named_parameters())
    weights = {name: parameters[name] for name in coded if name in parameters}
    means = _Means(weights)
    with steady(module, fresh=False), WeightReadHooks(weights, [means.read]):
        for batch in batches_of(data, module, where=f"{WHERE}: data"):
            module(*batch.positional, **batch.named)
            means.end()
    shifts: dict[str, float] = {}
    left_alone = {name: means.reasons.get(name, "no linear layer reads it") for name in weights}
    for name, mean in means.result().items():
        layer = module.get_submodule(name.rpartition(".")[0])
        if name.rpartition(".")[2] != "weight" or not hasattr(layer, "bias"):
            left_alone[name] = "its layer has no place for a bias"
            continue
        check_names([name], dense, where=WHERE)
        shift = _error(weights[name], dense[name].to(weights[name].device), mean)
        if not bool(torch.isfinite(shift).all()):
            raise NonFinite("the mean error is NaN or infinite", where=name)
        shift_outputs_(layer, -shift)
        shifts[name] = float(shift.abs().mean())
        del left_alone[name]
    return Corrected(shifts, left_alone)


def _error(rounded: torch.Tensor, dense: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Return the mean error of each output; `mean`: of the inputs, (groups, width), as `patches` orders them."""
    apart = (rounded.double() - dense.double()).movedim(1, -1)
    groups = len(mean)
    table = apart.reshape(groups, len(rounded) // groups, -1)
    return (table @ mean.double()[:, :, None]).reshape(-1)


class _Means:
    """Means of the inputs of weights."""

    def __init__(self, names: Iterable[str]) -> None:
        self.reasons: dict[str, str] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = dict.fromkeys(names, 0)
        self._seen: dict[str, int] = {}

    def read(self, reading: Reading) -> None:
        """Add the inputs of one reading."""
        name = reading.name
        self._seen[name] = self._seen.get(name, 0) + 1
        if reading.part != (0, 1):
            self.reasons[name] = "its rows read several inputs"
        if reading.window is not None and reading.window.transposed:
            self.reasons[name] = (
                "a transposed convolution"
                if reading.window.over
                else "its weight is (inputs, units)"
            )
        if name in self.reasons:
            return
        for block in patches(reading):
            total = block.sum(1, dtype=torch.float64)
            self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total
            self._counts[name] += block.shape[1]

    def end(self) -> None:
        """Take note of weights that one forward pass reads more than once."""
        for name, times in self._seen.items():
            if times > 1:
                self.reasons.setdefault(name, "it is read more than once")
        self._seen.clear()

    def result(self) -> dict[str, torch.Tensor]:
        """Return weight -> mean inputs, of those without a reason against it."""
        return {
            name: total / self._counts[name]
            for name, total in self._sums.items()
            if name not in self.reasons and self._counts[name]
        }
