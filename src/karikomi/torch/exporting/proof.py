"""Proof of a shrink: the smaller network equals the original in which what went is zero.

Zero are the rows and columns of all weights that went. Where a norm, a softmax or a mean is taken over
entries of which some went, its statistics change: there both networks of the proof use the affine part of
the operator, so that everything else is still compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_aggregate

from karikomi.errors import Unsupported
from karikomi.shrink.label_planes import Labelled, keeps
from karikomi.torch.labelling.label_run import Propagated, call_of, name_of
from karikomi.torch.modules.deep_copies import copied, undisturbed
from karikomi.torch.tracing.batches import leaves

TOLERANCE = 1e-5
"""Of the largest magnitude of an output; 8 machine epsilons where that is more (half precision)."""

CONTRACTIONS = frozenset(
    """
    linear matmul mm bmm mv dot vdot inner bilinear addmm baddbmm einsum outer conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention sum lstm gru rnn_tanh
    rnn_relu
    """.split()
)


@torch.no_grad()
def difference(
    original: fx.GraphModule,
    small: fx.GraphModule,
    found: Propagated,
    kept: np.ndarray,
    inputs: tuple[Any, ...],
) -> float:
    """Return the largest difference on `inputs`, relative to the largest output; `Unsupported` if above the tolerance.

    In float64 where float32 is not enough to decide, and with random weights where the output does not depend on
    the inputs, so that nothing would be compared (a head that is still zero).
    """
    worst = _worst(original, small, found, kept, inputs)
    if not math.isfinite(worst):
        # Without their statistics, networks that multiply signals diverge: bounded, they do not.
        worst = _worst(original, small, found, kept, inputs, bounded=True)
    if worst > TOLERANCE and _all_single(original):
        wide, narrow = (_in_double(graph) for graph in (original, small))
        worst = _worst(wide, narrow, found, kept, tuple(map(_double, inputs)))
    if not worst <= _allowed(original):
        raise Unsupported(
            "the smaller network would differ from the original in which what went is zero",
            where="torch.shrink",
            got=f"a relative difference of {worst:.3g}",
            allowed=f"{_allowed(original):.3g}",
            hint="please report the network: a rule of an operator is wrong",
        )
    return worst


def _worst(
    original: fx.GraphModule,
    small: fx.GraphModule,
    found: Propagated,
    kept: np.ndarray,
    inputs: tuple[Any, ...],
    *,
    bounded: bool = False,
) -> float:
    statistics = found.changed_statistics(kept)
    with undisturbed(original, small):
        expected = leaves(_Masked(original, found, kept, statistics, bounded).run(*inputs))
        got = leaves(_Affine(small, statistics, bounded).run(*inputs))
    return max(
        (apart(first, other) for first, other in zip(expected, got, strict=True)), default=0.0
    )


def _allowed(module: fx.GraphModule) -> float:
    precise = [torch.finfo(p.dtype).eps for p in module.parameters() if p.is_floating_point()]
    return max(TOLERANCE, 8 * max(precise, default=0.0))


def _all_single(module: fx.GraphModule) -> bool:
    return all(p.dtype is torch.float32 for p in module.parameters() if p.is_floating_point())


def _in_double(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in float64; tensors that the forward makes (zeros as a first state) are of that type too."""
    twin = copied(graph).double()
    for node in twin.graph.nodes:
        for place in ("args", "kwargs"):
            given = getattr(node, place)
            setattr(node, place, map_aggregate(given, _double_type))
    twin.recompile()
    return twin


def _double_type(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _double(value: Any) -> Any:
    single = isinstance(value, torch.Tensor) and value.dtype is torch.float32
    return value.double() if single else value


def random_like(value: Any, generator: torch.Generator) -> Any:
    """Return a random tensor like an input: normal for floats, else its entries shuffled."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value)
    order = torch.randperm(value.numel(), generator=generator).to(value.device)
    return value.reshape(-1)[order].reshape(value.shape)


@torch.no_grad()
def samples_of(module: fx.GraphModule, inputs: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Return the example inputs, and random ones like them; integers stay if the module refuses shuffled ones."""
    generator = torch.Generator().manual_seed(0)
    drawn = tuple(random_like(value, generator) for value in inputs)
    steady = tuple(new if _is_float(new) else old for old, new in zip(inputs, drawn, strict=True))
    for sample in (drawn, steady):
        try:
            with undisturbed(module):
                fx.Interpreter(module).run(*sample)
        except Exception:  # noqa: S112  (offsets and lengths cannot be shuffled, and no error says that)
            continue
        return [inputs, sample]
    return [inputs]


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@torch.no_grad()
def is_blind(module: fx.GraphModule, samples: list[tuple[Any, ...]]) -> bool:
    """Return whether the outputs hardly depend on the inputs, so that comparing them would show nothing."""
    found = []
    for given in samples:
        with undisturbed(module):
            found.append(leaves(fx.Interpreter(module).run(*given)))
    first, *others = found
    other = others[0] if others else first
    pairs = zip(first, other, strict=True)
    return max((apart(before, after) for before, after in pairs), default=0.0) < 1e-3


@torch.no_grad()
def randomized(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy with random weights, at which signals neither vanish nor grow much."""
    generator = torch.Generator().manual_seed(2)
    twin = copied(module)
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        if tensor.dim() > 1:
            tensor.copy_(noise * (2.0 / max(tensor[0].numel(), 1)) ** 0.5)
        elif isinstance(tensor, torch.nn.Parameter) and name.endswith("bias"):
            tensor.copy_(noise * 0.1)
        else:
            tensor.copy_(noise.abs() * 0.25 + 0.75)
    return twin


def apart(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Return the largest difference of two outputs, relative to the largest entry of the first."""
    if expected.shape != got.shape:
        raise Unsupported(
            "the shape of an output would change", where="torch.shrink", got=got.shape
        )
    if expected.numel() == 0:
        return 0.0
    scale = float(expected.double().abs().max()) or 1.0
    difference = float((expected.double() - got.double()).abs().max()) / scale
    # A NaN would be lost among the differences of other outputs.
    return math.inf if math.isnan(difference) else difference


class _Affine(fx.Interpreter):
    """Runs a graph with the affine part of the named operators."""

    def __init__(self, module: fx.GraphModule, names: Collection[str], bounded: bool) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._names = frozenset(names)
        self._first = torch.tanh if bounded else torch.clone

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self._names:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = dict(zip(call_of(n).arguments, args, strict=False)) | kwargs
        return affine(n, given, super().run_node, self._first)


def affine(node: fx.Node, given: dict[str, Any], run: Any, first: Any) -> Any:
    """Return an operator without its statistics: gain and bias only, or ones for a statistic itself."""
    call = call_of(node)
    given = {**call.arguments, **given}
    name = call.name
    if "softmax" in name:
        return first(given["self"] if "self" in given else given["input"])
    if name == "scaled_dot_product_attention":
        return _linear_attention(given, first)
    if name == "_weight_norm":
        return first(given["v"]) * given["g"]
    if "norm" in name and "input" in given:
        value = first(given["input"])
        channels = name not in ("layer_norm", "rms_norm", "_fused_rms_norm")
        for leaf, combine in (("weight", torch.mul), ("bias", torch.add)):
            part = given.get(leaf)
            if part is not None:
                shape = [1, -1] + [1] * (value.dim() - 2) if channels else part.shape
                value = combine(value, part.reshape(shape))
        return value
    found: Any = run(node)
    if isinstance(found, tuple):
        return tuple(torch.ones_like(part) for part in found)
    return torch.ones_like(found)


def _linear_attention(given: dict[str, Any], first: Any) -> torch.Tensor:
    query, key, value = given["query"], given["key"], given["value"]
    if given.get("enable_gqa"):
        times = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(times, -3) for part in (key, value))
    scale = given["scale"] if given.get("scale") is not None else query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scale
    return first(scores) @ value


class _Masked(_Affine):
    """Runs the original with zeros for all entries of weights that went, and of operands that are summed over."""

    def __init__(
        self,
        module: fx.GraphModule,
        found: Propagated,
        kept: np.ndarray,
        names: Collection[str],
        bounded: bool,
    ) -> None:
        super().__init__(module, names, bounded)
        self._values = found.values
        self._kept = kept

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "get_attr":
            return self._zeroed(n, result)
        if name_of(n) == "sum" or any(
            name_of(user) in CONTRACTIONS and _derived(user) for user in n.users
        ):
            return self._zeroed(n, result)
        return result

    def _zeroed(self, node: fx.Node, result: Any) -> Any:
        value = self._values[node.name]
        if not isinstance(value, Labelled) or not isinstance(result, torch.Tensor):
            return result
        for plane in value.planes:
            mask = torch.from_numpy(keeps(plane, self._kept)).to(result.device)
            if not bool(mask.all()):
                result = torch.where(mask, result, torch.zeros((), dtype=result.dtype))
        return result


def _derived(node: fx.Node) -> bool:
    """Return whether no operand of a product is a stored tensor, whose own zeros would do."""
    call = call_of(node)
    added = call.arguments.get("self" if call.name in ("addmm", "baddbmm") else "bias")
    return not any(s.op == "get_attr" and s is not added for s in node.all_input_nodes)
