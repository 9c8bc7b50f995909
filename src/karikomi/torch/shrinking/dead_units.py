"""Remove the dead units of a copy of a module, and verify that its outputs are unchanged."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.shrink import ShrinkReport, UnitFacts, plan
from karikomi.torch.modules.codes import holds_codes
from karikomi.torch.modules.parameters import check_values
from karikomi.torch.modules.parametrized import computed_from
from karikomi.torch.modules.prunable import CONVOLUTIONS
from karikomi.torch.modules.resizing import set_sizes_
from karikomi.torch.shrinking.chain_graph import ChainGraph, Inputs, Link, read_chain, unit_axis
from karikomi.torch.shrinking.equivalence import difference

Constants = dict[str, np.ndarray]
"""Layer name -> each input of its reader if all weights of the layer were zero."""


@torch.no_grad()
def shrink(
    module: nn.Module, example_inputs: torch.Tensor | Inputs
) -> tuple[nn.Module, ShrinkReport]:
    """Return a copy of a module without its dead units, and the report of the removed ones.

    A unit is dead if all its outgoing weights are zero, or if all its incoming weights are zero (or its
    BatchNorm scale): its constant output is then added to the next layer's bias. A unit is kept
    if that would not be exact (zero padding, no bias), with the reason in ``report.left_alone``. Inputs
    and outputs of the network are kept, and each layer keeps one unit at least.

    The forward must be one chain of Linear, Conv (ungrouped), BatchNorm, element-wise activations,
    pooling, flatten and dropout; any operation may precede the first and follow the last layer.
    `example_inputs`: a tensor, or the tuple of arguments. Training mode, dtype, device and
    ``requires_grad`` of each part are kept. The equality holds in evaluation mode.

    Raises `Unsupported` naming the operation that is not part of a chain, or with the difference if the
    copy's outputs on the example and on random inputs differ by more than 1e-5 of the largest
    output (8 machine epsilons in half precision); `InvalidArgument` for inputs that do not run.

    >>> import torch, karikomi as kk
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> _ = net[0].weight.data[2:].zero_()
    >>> small, report = kk.torch.shrink(net, torch.zeros(1, 4))
    >>> small[0], report.removed, report.widths_after
    (Linear(in_features=4, out_features=2, bias=True), 6, {'0': 2, '2': 2})

    Source: constant propagation as in Bragagnolo and Barbano 2022, "Simplify"; checked by running.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if holds_codes(module):
        raise Unsupported(
            "the weights are quantized, and a shrunk layer has other codes",
            where="torch.shrink",
            hint="shrink before quantize_",
        )
    check_values(dict(module.state_dict(keep_vars=True)), where="torch.shrink")
    original, small = _copy(module).eval(), _copy(module).eval()
    try:
        original(*inputs)
    except Exception as error:
        raise InvalidArgument(
            "the module does not run on the example inputs", where="torch.shrink", got=error
        ) from error
    before = read_chain(small, inputs).widths()
    after, left_alone = _cut_dead_units_(small, inputs)
    largest = difference(original, small, inputs)
    for old, new in zip(module.modules(), small.modules(), strict=True):
        new.training = old.training
    return small, ShrinkReport(
        widths_before=before,
        widths_after=after,
        parameters_before=sum(parameter.numel() for parameter in module.parameters()),
        parameters_after=sum(parameter.numel() for parameter in small.parameters()),
        left_alone={**left_alone, **_computed_layers(module)},
        max_difference=largest,
    )


def _computed_layers(module: nn.Module) -> dict[str, str]:
    """Return layer name -> why it stays as it is: it computes its weight."""
    return {
        re.split(r"(?:^|\.)parametrizations\.", name)[0]: why
        for name, why in computed_from(module).items()
    }


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise Unsupported(
            "the module cannot be copied",
            where="torch.shrink",
            got=error,
            hint="make weights that a hook computes permanent first",
        ) from error


def _cut_dead_units_(module: nn.Module, inputs: Inputs) -> tuple[dict[str, int], dict[str, str]]:
    """Remove units until none is dead; return the widths, and why units were kept."""
    while True:
        chain = read_chain(module, inputs)
        constants = _constants(chain, module, inputs)
        decided = plan({link.name: _units(link, constants[link.name]) for link in chain.links})
        if not decided.removed:
            outputs = {chain.last_name: "its units are the outputs of the network"}
            return chain.widths(), {**decided.left_alone, **outputs}
        for link in chain.links:
            folded = np.isin(link.columns, decided.folded[link.name])
            _fold_(link.reader, folded, constants[link.name])
            _cut_(link, decided.kept[link.name])


def _constants(chain: ChainGraph, module: nn.Module, inputs: Inputs) -> Constants:
    """Run the module with each layer's output replaced by its bias; return the inputs of the readers.

    So all operations between two layers are computed by the module itself. NaN marks an input that is
    not the same at all positions (padding in a pooling layer).
    """
    found: Constants = {}
    hooks = []
    for link in chain.links:
        hooks.append(link.layer.register_forward_hook(_bias_only))
        hooks.append(link.reader.register_forward_pre_hook(_keep(found, link.name)))
    try:
        module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _bias_only(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    if layer.bias is None:
        return torch.zeros_like(output)
    shape = [1] * output.dim()
    shape[unit_axis(layer)] = -1
    return layer.get_parameter("bias").view(shape).expand_as(output).clone()


def _keep(found: Constants, name: str) -> Any:
    def hook(reader: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].movedim(unit_axis(reader), -1).flatten(0, -2)
        same = (rows == rows[0]).all(0)
        values = torch.where(same, rows[0], torch.nan)
        found[name] = values.cpu().double().numpy()

    return hook


def _units(link: Link, constants: np.ndarray) -> UnitFacts:
    """Return the facts of a layer's units that the decision needs."""
    weight = link.layer.get_parameter("weight")
    incoming_zero = _numpy((weight == 0).flatten(1).all(1))
    count = len(incoming_zero)
    for norm, columns in link.norms:
        if norm.weight is not None:
            scaled = _numpy(norm.get_parameter("weight") != 0)
            incoming_zero = incoming_zero | (np.bincount(columns[scaled], minlength=count) == 0)
    read = _numpy((link.reader.get_parameter("weight") != 0).transpose(0, 1).flatten(1).any(1))
    largest = np.zeros(count)
    with np.errstate(invalid="ignore"):  # NaN is propagated on purpose
        np.maximum.at(largest, link.columns, np.abs(constants))
    return UnitFacts(
        incoming_zero=incoming_zero,
        outgoing_zero=np.bincount(link.columns[read], minlength=count) == 0,
        constants=largest,
        obstacle=_obstacle(link),
        fixed=link.fixed,
    )


def _obstacle(link: Link) -> str | None:
    if link.reader.bias is None:
        return f"{link.reader_name} has no bias to take a constant"
    if isinstance(link.reader, CONVOLUTIONS) and _pads_with_zeros(link.reader):
        return f"{link.reader_name} pads with zeros, where a constant would differ"
    return None


def _pads_with_zeros(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return max(layer.kernel_size) > 1 if isinstance(layer.padding, str) else max(layer.padding) > 0


def _fold_(reader: nn.Module, folded: np.ndarray, constants: np.ndarray) -> None:
    """Add the contribution of constant inputs to a layer's bias, in float64."""
    if not folded.any():
        return
    weight = reader.get_parameter("weight").cpu().double()
    weight = weight.reshape(*weight.shape[:2], -1).sum(2)
    chosen = torch.from_numpy(np.flatnonzero(folded))
    bias = reader.get_parameter("bias")
    bias.copy_(bias.cpu().double() + weight[:, chosen] @ torch.from_numpy(constants[folded]))


def _cut_(link: Link, kept: np.ndarray) -> None:
    columns = np.flatnonzero(np.isin(link.columns, kept))
    for leaf in ("weight", "bias"):
        _select_(link.layer, leaf, 0, kept)
    _select_(link.reader, "weight", 1, columns)
    for norm, units in link.norms:
        chosen = np.flatnonzero(np.isin(units, kept))
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            _select_(norm, leaf, 0, chosen)
        set_sizes_(norm)
    set_sizes_(link.layer)
    set_sizes_(link.reader)


def _select_(layer: nn.Module, leaf: str, axis: int, indices: np.ndarray) -> None:
    old = getattr(layer, leaf)
    if old is None or len(indices) == old.shape[axis]:
        return
    new = old.detach().index_select(axis, torch.from_numpy(indices).to(old.device))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(layer, leaf, new)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
