"""Recurrent layers re-fitted: the sums in front of their gates, on what is left of inputs and last states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from karikomi.prune.account import error_ratio
from karikomi.shrink.account import Refit
from karikomi.torch.compensation.refits import Sums
from karikomi.torch.compensation.side_by_side import Lane
from karikomi.torch.labelling.label_run import Call
from karikomi.torch.tracing.weight_reads import Reading

ROUNDS = 2
"""The last states are those of the dense network in the first round, then those of the re-fitted layer."""
BLOCKS = {"gru": ((0,), (1,))}
"""Which of the weights of inputs (0) and of states (1) are summed before anything else happens to the products."""

Tensors = list[torch.Tensor]


@dataclass(slots=True)
class _Layer:
    """One layer over all lanes: weights of both networks, inputs and first states, and which rows and units stay."""

    call: Call
    lanes: Sequence[Lane]
    dense: Tensors
    small: Tensors
    inputs: list[tuple[torch.Tensor, torch.Tensor]]
    first: list[tuple[Tensors, Tensors]]
    rows: torch.Tensor
    units: torch.Tensor

    def run(self, weights: Tensors, side: int) -> Tensors:
        """Return the outputs of each lane."""
        function: Callable[..., Any] = getattr(torch, self.call.name)
        found = []
        for (inputs, first), _ in zip(self._of(side), self.lanes, strict=True):
            states = tuple(first) if self.call.name == "lstm" else first[0]
            found.append(
                function(
                    inputs, states, weights, len(weights) > 2, 1, 0.0, False, False, self._batched
                )[0]
            )
        return found

    def _of(self, side: int) -> list[tuple[torch.Tensor, Tensors]]:
        return [(i[side], f[side]) for i, f in zip(self.inputs, self.first, strict=True)]

    @property
    def _batched(self) -> bool:
        return bool(self.call["batch_first"])

    def before(self, outputs: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Return the state before each step."""
        axis = 1 if self._batched else 0
        start = first[0].unsqueeze(axis)
        return torch.cat([start, outputs.narrow(axis, 0, outputs.shape[axis] - 1)], axis)

    def solved(self, weights: Tensors, dense: Tensors, states: Tensors) -> Tensors:
        """Return re-fitted weights and biases; `states`: what the weights of states read, of the smaller network."""
        new = list(weights)
        for block in BLOCKS.get(self.call.name, ((0, 1),)):
            sums = Sums()
            for number, lane in enumerate(self.lanes):
                if lane.held:
                    continue
                full = (
                    self.inputs[number][0],
                    self.before(dense[number], self.first[number][0][0]),
                )
                left = (self.inputs[number][1], states[number])
                targets = torch.stack([self._product(full[side], side) for side in block]).sum(0)
                joint = torch.cat([left[side] for side in block], -1)
                name = self.call.site
                sums.read(
                    Reading(name=name, weight=weights[0], inputs=joint, outputs=None), targets
                )
            self._solve_(new, sums, block)
        return new

    def _product(self, value: torch.Tensor, side: int) -> torch.Tensor:
        bias = self.dense[side + 2][self.rows] if len(self.dense) > 2 else None
        return F.linear(value, self.dense[side][self.rows], bias)

    def _solve_(self, new: Tensors, sums: Sums, block: tuple[int, ...]) -> None:
        wide = torch.cat([new[side] for side in block], 1).double().cpu().numpy()
        has = len(new) > 2
        found, shifts = sums.solved(wide, free=has, where=self.call.site)
        sizes = [new[side].shape[1] for side in block]
        for side, part in zip(block, torch.from_numpy(found).split(sizes, 1), strict=True):
            new[side] = part.to(new[side]).contiguous()
        if has:
            own, *others = (side + 2 for side in block)
            rest = sum(new[other].double() for other in others)
            new[own] = (torch.from_numpy(shifts).to(new[own].device) - rest).to(new[own])

    def error(self, dense: Tensors, outputs: Tensors) -> float:
        """Return the relative error of the outputs on the held-out lanes."""
        lost = energy = 0.0
        for lane, full, got in zip(self.lanes, dense, outputs, strict=True):
            if lane.held:
                expected = full[..., self.units].double()
                lost += float((expected - got.double()).square().sum())
                energy += float(expected.square().sum())
        return error_ratio(lost, energy)


def refit_recurrent_(call: Call, lanes: Sequence[Lane]) -> dict[str, Refit]:
    """Re-fit the layers of a recurrent operator, in place; return name of the weight of inputs -> outcome."""
    params = call["params"]
    each = 4 if call["has_biases"] else 2
    first = lanes[0]
    states = call["hx"] if call.name == "lstm" else [call["hx"]]
    name = str(params[0].target)
    if call["bidirectional"] or len(params) != each * call["num_layers"]:
        return {
            name: Refit(
                why="recurrent layers in two directions or with projections are not re-fitted"
            )
        }
    if any(node.op != "get_attr" for node in params) or first.dense[call["input"].name].dim() != 3:
        return {name: Refit(why="its weights are computed, or its inputs have no batch")}
    inputs = [(lane.dense[call["input"].name], lane.small[call["input"].name]) for lane in lanes]
    found = {}
    for number in range(call["num_layers"]):
        nodes = params[number * each : (number + 1) * each]
        layer = _Layer(
            call,
            lanes,
            [first.dense[node.name].detach() for node in nodes],
            [first.small[node.name].detach() for node in nodes],
            inputs,
            [
                tuple(
                    [values[state.name][number : number + 1] for state in states]
                    for values in (lane.dense, lane.small)
                )  # type: ignore[misc]
                for lane in lanes
            ],
            first.pair.stays.along(first.pair.stays.of(nodes[1]), 0),
            first.pair.stays.along(first.pair.stays.of(nodes[1]), 1),
        )
        refit, outputs = _refit_(layer)
        found[str(nodes[0].target)] = refit
        inputs = outputs
    return found


def _refit_(layer: _Layer) -> tuple[Refit, list[tuple[torch.Tensor, torch.Tensor]]]:
    dense = layer.run(layer.dense, 0)
    outputs = layer.run(layer.small, 1)
    start = best = layer.error(dense, outputs)
    weights, kept = layer.small, False
    pairs = zip(dense, layer.first, strict=True)
    states = [layer.before(full, first[0][0])[..., layer.units] for full, first in pairs]
    for _ in range(ROUNDS):
        new = layer.solved(weights, dense, states)
        tried = layer.run(new, 1)
        error = layer.error(dense, tried)
        if not error < best:
            break
        best, weights, outputs, kept = error, new, tried, True
        pairs = zip(outputs, layer.first, strict=True)
        states = [layer.before(own, first[1][0]) for own, first in pairs]
    if kept:
        for own, other in zip(layer.small, weights, strict=True):
            own.copy_(other)
    return Refit(start, best, kept), list(zip(dense, outputs, strict=True))
