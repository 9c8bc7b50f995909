"""What a network costs, before and after: parameters, multiply-accumulates and milliseconds."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import fx, nn

from karikomi.torch.exporting.rewriting import Kept
from karikomi.torch.internals import dispatch_mode
from karikomi.torch.labelling.label_run import Call, call_of, name_of
from karikomi.torch.modules.deep_copies import undisturbed
from karikomi.torch.tracing.batches import leaves

Sizes = Callable[[Any], tuple[int, ...]]


def macs_of(graph: fx.GraphModule, kept: Kept) -> int:
    """Return the multiply-accumulates of one run on the example inputs, with what stays."""

    def sizes(node: Any) -> tuple[int, ...]:
        return kept.sizes(kept.of(node))

    total = 0
    for node in graph.graph.nodes:
        if node.op == "call_function" and name_of(node) in _COUNTED:
            total += _COUNTED[name_of(node)](call_of(node), sizes, kept)
    return total


def _linear(call: Call, sizes: Sizes, kept: Kept) -> int:
    return math.prod(sizes(call.node)) * sizes(call["weight"])[1]


def _convolution(call: Call, sizes: Sizes, kept: Kept) -> int:
    return math.prod(sizes(call.node)) * math.prod(sizes(call["weight"])[1:])


def _transposed(call: Call, sizes: Sizes, kept: Kept) -> int:
    return math.prod(sizes(call["input"])) * math.prod(sizes(call["weight"])[1:])


def _product(call: Call, sizes: Sizes, kept: Kept) -> int:
    left = call.node.args[-2] if call.name in ("addmm", "baddbmm") else call.node.args[0]
    return math.prod(sizes(call.node)) * sizes(left)[-1]


def _attention(call: Call, sizes: Sizes, kept: Kept) -> int:
    query, key = sizes(call["query"]), sizes(call["key"])
    return math.prod(query) * key[-2] + math.prod(sizes(call.node)) * key[-2]


def _einsum(call: Call, sizes: Sizes, kept: Kept) -> int:
    terms = call["equation"].replace(" ", "").partition("->")[0].split(",")
    letters: dict[str, int] = {}
    extra = 1
    for term, source in zip(terms, call["tensors"], strict=True):
        shape = sizes(source)
        named = term.replace("...", "")
        if "..." in term:
            start = term.index("...")
            dots = len(shape) - len(named)
            extra = max(extra, math.prod(shape[start : start + dots]))
            shape = shape[:start] + shape[start + dots :]
        letters |= dict(zip(named, shape, strict=True))
    return math.prod(letters.values()) * extra if len(terms) > 1 else 0


def _recurrent(call: Call, sizes: Sizes, kept: Kept) -> int:
    steps = math.prod(sizes(call["input"])[:-1])
    weights = [sizes(argument) for argument in call["params"]]
    return steps * sum(math.prod(shape) for shape in weights if len(shape) == 2)


_COUNTED: dict[str, Callable[[Call, Sizes, Kept], int]] = {
    "linear": _linear,
    **{f"conv{axes}d": _convolution for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": _transposed for axes in (1, 2, 3)},
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm"), _product),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}


def parameters_of(module: nn.Module) -> int:
    """Return the number of parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def milliseconds(
    module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], *, runs: int = 15
) -> float:
    """Return the median time of a forward pass on the example inputs, after three that are not counted."""
    with undisturbed(module):
        return median([_once(module, inputs, options) for _ in range(runs + 3)][3:])


def in_turn(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    *,
    most: int = 15,
    least: int = 3,
    seconds: float = 1.0,
) -> tuple[float, float]:
    """Return the median milliseconds of a forward pass of two networks, of the pairs of `pairs_in_turn`."""
    pairs = pairs_in_turn(before, after, inputs, options, most=most, least=least, seconds=seconds)
    first, second = zip(*pairs, strict=True)
    return median(first), median(second)


@torch.no_grad()
def pairs_in_turn(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    *,
    most: int = 15,
    least: int = 3,
    seconds: float = 1.0,
) -> list[tuple[float, float]]:
    """Return milliseconds of forward passes of two networks, measured in turn, in evaluation mode.

    After one pass each that is not counted; until there are `most`, or after some `seconds`, at least `least`.
    """
    taken: list[tuple[float, float]] = []
    modes = [(part, part.training) for part in [*before.modules(), *after.modules()]]
    with undisturbed(before, after):
        for part, _ in modes:
            part.training = False
        start = time.perf_counter()
        while len(taken) <= most and (len(taken) <= least or time.perf_counter() - start < seconds):
            taken.append((_once(before, inputs, options), _once(after, inputs, options)))
    for part, training in modes:
        part.training = training
    return taken[1:]


@torch.no_grad()
def peak_bytes(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Return the most bytes of tensors that a forward pass has at once: weights, inputs, and what it computes.

    Tensors that share memory count once. What kernels take for themselves while they run is not seen.

    >>> net = nn.Linear(10, 10, bias=False)
    >>> peak_bytes(net, (torch.zeros(5, 10),), {}) == 4 * (100 + 50 + 50)
    True
    """
    live = _LiveBytes()
    for tensor in [*module.parameters(), *module.buffers(), *leaves((inputs, options))]:
        live.add(tensor)

    class Mode(dispatch_mode()):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in leaves(made):
                live.add(tensor)
            return made

    with undisturbed(module), Mode():
        module(*inputs, **options)
    return live.peak


class _LiveBytes:
    """Bytes of the storages of tensors that are alive, and the most so far."""

    def __init__(self) -> None:
        self.peak, self._now = 0, 0
        self._users: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided:
            return  # no storage of its own
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        self._users[place] = self._users.get(place, 0) + 1
        if self._users[place] == 1:
            self._now += size
            self.peak = max(self.peak, self._now)
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self._now -= size


def _once(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> float:
    on_gpu = any(p.is_cuda for p in module.parameters())
    start = time.perf_counter()
    module(*inputs, **options)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
