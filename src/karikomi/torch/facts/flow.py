"""SynFlow's gradient: the derivative of the network's output by the magnitude of each weight.

No loss and no targets are needed, only the shape of an input. Parameters are
replaced by their magnitudes, in double precision, since products along deep networks overflow float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call

from karikomi.errors import Unsupported
from karikomi.torch.numerics.norms import wide
from karikomi.torch.tracing.batches import Batch, leaves
from karikomi.torch.tracing.eval_mode import steady


def flows(
    module: nn.Module, weights: Mapping[str, torch.Tensor], batch: Batch
) -> dict[str, torch.Tensor]:
    """Return weight name -> ``dR/d|w|`` for R the sum of the outputs for one input of ones.

    All are divided by the largest, which changes no order: in deep networks they would overflow float32.
    All parameters and buffers are replaced by their magnitudes (biases and running statistics too, as in
    the authors' code); batch norms are in eval mode, dropout is off. The module itself is not written
    to. `batch`: gives the shapes; tensors of whole numbers or truth values (masks) keep their first
    example. Raises `Unsupported` where no input has fractions: token ids cannot be ones.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[-4.0, 2.0]]))
    >>> flows(net, {"0.weight": net[0].weight}, Batch((torch.zeros(5, 2),)))["0.weight"].tolist()
    [[1.0, 1.0], [0.5, 0.5]]

    Source: Tanaka, Kunin, Yamins and Ganguli 2020, "Pruning neural networks without any data by
    iteratively conserving synaptic flow".
    """
    if not any(tensor.is_floating_point() for tensor in batch.tensors()):
        raise Unsupported(
            "an input of ones cannot replace whole numbers",
            where="flow",
            hint="score the part of the network behind its embedding",
        )
    magnitudes: dict[str, torch.Tensor] = {}
    by_identity: dict[int, torch.Tensor] = {}
    for name, parameter in (*module.named_parameters(), *module.named_buffers()):
        if parameter.is_floating_point():
            magnitude = parameter.detach().to(wide(parameter.device)).abs()
            magnitudes[name] = by_identity[id(parameter)] = magnitude
    chosen = [by_identity[id(weight)].requires_grad_() for weight in weights.values()]
    ones = batch.inputs(_ones)
    with steady(module, fresh=False), torch.enable_grad():
        outputs = functional_call(module, magnitudes, ones.positional, dict(ones.named))
        sums = [leaf.sum() for leaf in leaves(outputs) if leaf.is_floating_point()]
        total = torch.stack(sums).sum()
        found = torch.autograd.grad(total, chosen, allow_unused=True, materialize_grads=True)
    largest = torch.stack([gradient.max() for gradient in found if gradient.numel()]).max()
    scale = torch.where(largest > 0, largest, 1.0)
    return {name: gradient / scale for name, gradient in zip(weights, found, strict=True)}


def _ones(tensor: torch.Tensor) -> torch.Tensor:
    first = tensor[:1] if tensor.dim() else tensor
    return torch.ones_like(first, dtype=wide(first.device)) if first.is_floating_point() else first
