"""Re-fit what is left of a smaller graph to the dense one, layer by layer in the order of the forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from karikomi.prune.account import error_ratio
from karikomi.shrink.account import Refit
from karikomi.shrink.refit_outcome import WHOLE, is_kept, outcome, too_wide
from karikomi.torch.compensation.consumers import Place, consumers_of, place_of
from karikomi.torch.compensation.recurrent_layers import refit_recurrent_
from karikomi.torch.compensation.refits import Sums
from karikomi.torch.compensation.side_by_side import Lane, SideBySide
from karikomi.torch.exporting.proof import TOLERANCE, apart
from karikomi.torch.exporting.rewriting import owner_of
from karikomi.torch.labelling.label_run import Call, call_of, name_of, shape_of
from karikomi.torch.labelling.recurrent import GATES
from karikomi.torch.tracing.batches import MISSING, leaves

STATISTICS = ("running_mean", "running_var")


@torch.no_grad()
def compensate_(lanes: Sequence[Lane], loss: Callable[..., Any] | None = None) -> dict[str, Refit]:
    """Re-fit the layers of the smaller graph, in place; return layer -> its error on held-out data before and after.

    ``min |Y - W X - c|^2 + damping mean(diag(X X^T)) |W - W_0|^2`` over W and c, for each product with a stored
    weight: Y are its dense outputs (and what another summand of the same sum lacks by now), X its inputs in the
    smaller network, re-fitted up to there. c goes to the bias, or to the mean of the batch norm that follows. A
    batch norm that follows no such layer is re-estimated. What is not better on the held-out lanes is not kept;
    nothing is, if the loss of the whole network (or, without one, the distance of its outputs to the dense ones) is
    no better in the end; this has the name "".
    """
    refitting = _Refitting(lanes)
    stored = refitting.tensors()
    before = {name: tensor.clone() for name, tensor in stored.items()}
    then = _judged(lanes, loss)
    layers = refitting.run_()
    found = outcome(then, _judged(lanes, loss), layers)
    kept = found[WHOLE].kept
    for name, tensor in stored.items():
        # A buffer that the forward writes has seen the calibration.
        if not kept or name not in refitting.written:
            tensor.copy_(before[name])
    return found


def _judged(lanes: Sequence[Lane], loss: Callable[..., Any] | None) -> float:
    """Return the mean loss of the smaller network on the held-out lanes, or the relative distance of its outputs."""
    held = [lane for lane in lanes if lane.held]
    outputs = [lane.pair.small(*lane.batch.positional, **lane.batch.named) for lane in held]
    if loss is not None and all(lane.batch.targets is not MISSING for lane in held):
        sizes = [lane.batch.examples for lane in held]
        losses = [float(loss(o, lane.batch.targets)) for o, lane in zip(outputs, held, strict=True)]
        return float(np.average(losses, weights=sizes))
    lost = energy = 0.0
    for lane, got in zip(held, outputs, strict=True):
        dense = lane.pair.dense(*lane.batch.positional, **lane.batch.named)
        for expected, found in zip(leaves(dense), leaves(got), strict=True):
            lost += float((expected.double() - found.double()).square().sum())
            energy += float(expected.double().square().sum())
    return error_ratio(lost, energy)


class _Refitting:
    """One pass over the nodes of the lanes, which changes the tensors of the smaller graph."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes
        self.found: dict[str, Refit] = {}
        self.written: set[str] = set()
        dense = lanes[0].pair.dense
        self._consumers = consumers_of(dense)
        reads = [
            (str(source.target), id(self._raw(str(source.target))))
            for node in dense.graph.nodes
            for source in node.all_input_nodes
            if source.op == "get_attr"
        ]
        # By tensor: a tied one has several names.
        times = Counter(tensor for _, tensor in reads)
        self._readers = {name: times[tensor] for name, tensor in reads}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the smaller graph that can change."""
        return {
            name: self._stored(name)
            for name in self._readers
            if isinstance(self._raw(name), torch.Tensor)
        }

    def run_(self) -> dict[str, Refit]:
        """Re-fit; return layer -> outcome."""
        known: set[str] = set()
        settled: set[str] = set()
        for node in SideBySide(self.lanes).run():
            product = self._consumers.get(node.name)
            if product is not None:
                place = place_of(product, known, self._readers)
                self._refit_(product.layer, place)
                if isinstance(place, Place) and place.norm and self._kept(product.layer):
                    settled.add(place.norm.name)
            elif name_of(node) in GATES:
                call = call_of(node)
                self.found |= refit_recurrent_(call, self.lanes)
                self.written |= {str(stored.target) for stored in call["params"]}
            elif name_of(node) == "batch_norm" and node.name not in settled:
                self._renorm_(node)
            known.add(node.name)
        return self.found

    def _kept(self, layer: str) -> bool:
        return layer in self.found and self.found[layer].kept

    def _refit_(self, layer: str, place: Place | str) -> None:
        if isinstance(place, str):
            self.found[layer] = Refit(why=place)
            return
        inputs = place.product.inputs.name
        if not self._changed(inputs) and not (place.added and self._changed(place.added)):
            return
        weight = self._stored(place.weight)
        bias = self._stored(place.bias) if place.bias else None
        view = place.product.rows(weight)
        rows = view.flatten(1).double().cpu().numpy()
        if why := too_wide(rows.shape[1]):
            self.found[layer] = Refit(why=why)
            return
        fit, held = self._sums(place, weight)
        constants = np.zeros(len(rows)) if bias is None else bias.double().cpu().numpy()
        new, shifts = fit.solved(rows, free=bool(place.bias or place.mean), where=layer)
        before, after = held.error(rows, constants), held.error(new, shifts)
        kept = is_kept(before, after)
        self.found[layer] = Refit(before, after, kept)
        if not kept:
            return
        self.written |= {name for name in (place.weight, place.bias, place.mean) if name}
        view.copy_(torch.from_numpy(new).reshape(view.shape))
        if bias is not None:
            bias.copy_(torch.from_numpy(shifts))
        elif place.mean:
            mean = self._stored(place.mean)
            mean.sub_(torch.from_numpy(shifts).to(mean))

    def _sums(self, place: Place, weight: torch.Tensor) -> tuple[Sums, Sums]:
        """Return the sums of the lanes that are fitted, and of those that are held out."""
        scale = None if place.norm is None else self._scale(place.norm)
        fit, held = Sums(), Sums()
        for lane in self.lanes:
            sums = held if lane.held else fit
            sums.read(place.reading(lane, weight), place.target(lane, scale))
        return fit, held

    def _scale(self, norm: fx.Node) -> torch.Tensor:
        """Return the factor from a difference behind a batch norm to the one before it, 0 where none makes it."""
        call = call_of(norm)
        scale = (self._stored(str(call["running_var"].target)) + call["eps"]).sqrt()
        if call["weight"] is not None:
            gain = self._stored(str(call["weight"].target))
            scale = torch.where(gain == 0, torch.zeros_like(gain), scale / gain)
        rank = len(shape_of(norm.meta["val"]))
        return scale.reshape([1, -1] + [1] * (rank - 2))

    def _renorm_(self, node: fx.Node) -> None:
        """Re-estimate the statistics of a batch norm whose input has changed."""
        call = call_of(node)
        names = [str(call[leaf].target) for leaf in STATISTICS if call[leaf] is not None]
        source = call["input"].name
        single = all(self._readers[name] == 1 for name in names)
        if not names or call["training"] or not single or not self._changed(source):
            return
        layer = names[0].removesuffix(f".{STATISTICS[0]}")
        old = [self._stored(name) for name in names]
        new = moments([lane.small[source] for lane in self.lanes if not lane.held])
        before, after = (self._norm_error(call, pair) for pair in (old, new))
        kept = after < before
        self.found[layer] = Refit(before, after, kept)
        if kept:
            self.written |= set(names)
            for own, other in zip(old, new, strict=True):
                own.copy_(other)

    def _norm_error(self, call: Call, statistics: Sequence[torch.Tensor]) -> float:
        lost = energy = 0.0
        gain, bias = (
            None if call[leaf] is None else self._stored(str(call[leaf].target))
            for leaf in ("weight", "bias")
        )
        mean, variance = statistics
        for lane in self.lanes:
            if lane.held:
                given = lane.small[call["input"].name]
                got = F.batch_norm(given, mean, variance, gain, bias, eps=call["eps"])
                expected = lane.kept(call.node.name)
                lost += float((expected - got).double().square().sum())
                energy += float(expected.double().square().sum())
        return error_ratio(lost, energy)

    def _changed(self, name: str) -> bool:
        """Return whether a value lacks entries in the smaller network, or has others."""
        return any(
            lane.dense[name].shape != lane.small[name].shape
            or apart(lane.dense[name], lane.small[name]) > TOLERANCE
            for lane in self.lanes
        )

    def _stored(self, name: str) -> torch.Tensor:
        return self._raw(name).detach()

    def _raw(self, name: str) -> Any:
        owner, leaf = owner_of(self.lanes[0].pair.small, name)
        return getattr(owner, leaf)


def moments(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the mean and the unbiased variance of each channel (axis 1) over all other axes of all parts."""
    wide = [part.double().movedim(1, 0).flatten(1) for part in parts]
    count = sum(part.shape[1] for part in wide)
    mean = torch.stack([part.sum(1) for part in wide]).sum(0) / count
    squares = torch.stack([(part - mean[:, None]).square().sum(1) for part in wide]).sum(0)
    kind = parts[0].dtype
    return [mean.to(kind), (squares / max(count - 1, 1)).to(kind)]
