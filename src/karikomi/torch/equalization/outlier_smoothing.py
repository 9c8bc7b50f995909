"""SmoothQuant: large activations of a channel go over into the weights that read it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from karikomi.errors import check
from karikomi.torch.equalization.adjacent_layers import AdjacentLayers, argument
from karikomi.torch.equalization.layer_pairs import input_ranges, scale_inputs_, why_fixed
from karikomi.torch.facts.measure import check_data
from karikomi.torch.labelling.label_run import name_of
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.tracing.batches import batches_of
from karikomi.torch.tracing.eval_mode import steady
from karikomi.torch.tracing.weight_reads import Reading, WeightReadHooks

WHERE = "torch.smooth_"
NORMS = ("layer_norm", "rms_norm", "_fused_rms_norm")


class Smoothed(NamedTuple):
    """`norms`: scale of a norm -> weights that read it; `left_alone`: scale of a norm -> why it stays."""

    norms: dict[str, list[str]]
    left_alone: dict[str, str]


@torch.no_grad()
def smooth_(module: nn.Module, inputs: Any, *, data: Iterable[Any], alpha: float = 0.5) -> Smoothed:
    """Divide the output channels of norms by factors, and multiply the weights that read them, in place.

    ``s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)`` per channel j, over all linear layers that read the norm together;
    the scale and shift of the norm are divided by s, the columns of the weights multiplied: the network computes the
    same. `alpha` in [0, 1]: how much of the difficulty goes from activations to weights. Channels that are zero
    throughout stay.

    `inputs`: example inputs; `data`: batches, as in `prune_`. A norm stays, with the reason in ``left_alone``, where
    anything but linear layers reads it (the residual stream of networks that normalise after the addition), and
    where a weight is shared, computed or quantized. Raises `InvalidArgument` for an `alpha` out of range,
    `Unsupported` where `torch.export` does not take the module.

    >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    >>> x = torch.randn(8, 4)
    >>> before = net(x)
    >>> smooth_(net, x, data=[x]).norms, bool(torch.allclose(net(x), before, atol=1e-5))
    ({'0.weight': ['1.weight']}, True)

    Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
    Models", equation 4 and figure 5.
    """
    good = isinstance(alpha, int | float) and 0 <= alpha <= 1
    check(WHERE, (good, "alpha out of range", alpha, "0..1"))
    check_data(data, WHERE)
    module = unwrapped(module)
    layers = AdjacentLayers(module, inputs, where=WHERE)
    norms: dict[str, list[str]] = {}
    left_alone: dict[str, str] = {}
    for node in layers.calls(*NORMS):
        name = layers.parameter(node, "weight")
        found = _readers(layers, node)
        if isinstance(found, str):
            left_alone[name or node.name] = found
        elif name is not None:
            norms[name] = found
    peaks = _peaks(module, data, [name for names in norms.values() for name in names])
    for norm, weights in norms.items():
        _smooth_(layers, norm, weights, peaks, float(alpha))
    return Smoothed(norms, left_alone)


def _readers(layers: AdjacentLayers, norm: fx.Node) -> list[str] | str:
    reason = why_fixed(layers, norm)
    if reason:
        return f"the norm is fixed: {reason}"
    users = [user for user in norm.users if user.op == "call_function"]
    if len(users) != len(norm.users) or any(name_of(user) != "linear" for user in users):
        return "not only linear layers read it"
    names = []
    for user in users:
        name, reason = layers.parameter(user, "weight"), why_fixed(layers, user)
        if name is None or reason or argument(user, "input") is not norm:
            return f"a layer that reads it is fixed: {reason or 'its weight is computed'}"
        names.append(name)
    shape = argument(norm, "normalized_shape")
    return names if len(shape) == 1 else "it normalises over several axes"


def _peaks(module: nn.Module, data: Iterable[Any], names: list[str]) -> dict[str, torch.Tensor]:
    """Return weight -> the largest magnitude of each of its inputs."""
    peaks: dict[str, torch.Tensor] = {}

    def read(reading: Reading) -> None:
        largest = (
            reading.inputs.detach().double().abs().reshape(-1, reading.inputs.shape[-1]).amax(0)
        )
        known = peaks.get(reading.name)
        peaks[reading.name] = largest if known is None else torch.maximum(known, largest)

    parameters = dict(module.named_parameters(remove_duplicate=False))
    with steady(module, fresh=False), WeightReadHooks({n: parameters[n] for n in names}, [read]):
        for batch in batches_of(data, module, where=f"{WHERE}: data"):
            module(*batch.positional, **batch.named)
    return peaks


def _smooth_(
    layers: AdjacentLayers,
    norm: str,
    weights: list[str],
    peaks: dict[str, torch.Tensor],
    alpha: float,
) -> None:
    owners = [layers.owner(name) for name in weights]
    inputs = torch.stack([peaks[name] for name in weights]).amax(0)
    ranges = torch.stack([input_ranges(owner) for owner in owners]).amax(0)
    factors = inputs**alpha / ranges ** (1 - alpha)
    usable = (inputs > 0) & (ranges > 0) & torch.isfinite(factors) & (factors > 0)
    factors = torch.where(usable, factors, 1.0)
    source: Any = layers.owner(norm)
    source.weight.copy_(source.weight.double() / factors)
    if getattr(source, "bias", None) is not None:
        source.bias.copy_(source.bias.double() / factors)
    for owner in owners:
        scale_inputs_(owner, factors)
