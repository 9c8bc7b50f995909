"""Any choice of units, in networks of real kinds: removing them computes what zeros in their place compute."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import karikomi as kk
from depth import examples
from karikomi.errors import Unsupported
from karikomi.shrink.unit_groups import Group, groups_of, kept_of
from karikomi.torch.exporting.exported import exported
from karikomi.torch.exporting.proof import difference
from karikomi.torch.exporting.rewriting import owner_of, rewritten
from karikomi.torch.labelling.label_run import LabelRun, Propagated
from karikomi.torch.modules.deep_copies import copied


def _norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm


class Residual(nn.Module):
    """Two convolutions, gated by squeeze and excite, beside a shortcut: none, a convolution, or zeros."""

    def __init__(self, inputs: int, width: int, groups: int = 1, padded: bool = False) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.c1, self.n1 = nn.Conv2d(inputs, 12, 3, stride, 1, bias=False), _norm(12)
        self.c2, self.n2 = nn.Conv2d(12, width, 3, 1, 1, groups=groups, bias=False), _norm(width)
        self.squeeze, self.excite = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.padding = (width - inputs) // 2 if padded else 0
        self.shortcut: nn.Module | None = None
        if inputs != width and not padded:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, 2), _norm(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        elif self.shortcut is not None:
            x = self.shortcut(x)
        return F.relu(x + y)


def _resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        _norm(8),
        nn.ReLU(),
        Residual(8, 8),
        Residual(8, 12, groups=3),
        Residual(12, 20, padded=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 5),
    )


class Attending(nn.Module):
    """A layer of a transformer: fused projections, grouped queries, rotated pairs, a gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(24), nn.RMSNorm(24)
        self.qkv, self.out = nn.Linear(24, 4 * 8 + 2 * 16), nn.Linear(32, 24)
        self.up, self.down = nn.Linear(24, 2 * 20), nn.Linear(20, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.n1(x)).split([32, 16, 16], -1)
        q, k = self.turned(q.view(n, t, 4, 8)), self.turned(k.view(n, t, 2, 8))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.view(n, t, 2, 8).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, -1))
        gate, value = self.up(self.n2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1])[:, None] * torch.logspace(0, -2, 4)
        first, other = x.chunk(2, -1)
        sine, cosine = angles.sin()[:, None], angles.cos()[:, None]
        return torch.cat([first * cosine - other * sine, first * sine + other * cosine], -1)


class Transformer(nn.Module):
    """Two layers with learned places and an output that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(17, 24), nn.Parameter(torch.randn(6, 24))
        self.layers = nn.ModuleList([Attending(), Attending()])
        self.norm = nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x) + self.places
        for layer in self.layers:
            h = layer(h)
        return F.linear(self.norm(h), self.tokens.weight)


class Recurrent(nn.Module):
    """Two layers of LSTM, then a GRU in both directions, and what a sum over time makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(17, 10)
        self.l = nn.LSTM(10, 12, 2, batch_first=True)
        self.g = nn.GRU(12, 8, batch_first=True, bidirectional=True)
        self.o = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.g(self.l(self.e(x))[0])[0]).sum(1))


IMAGES, TOKENS = torch.randn(2, 3, 8, 8), torch.arange(12).reshape(2, 6) % 17
KINDS: dict[str, tuple[Any, torch.Tensor]] = {
    "residual": (_resnet, IMAGES),
    "transformer": (Transformer, TOKENS),
    "recurrent": (Recurrent, TOKENS),
}


def _made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, inputs = KINDS[name]
    return make().eval(), inputs


@lru_cache
def analysed(name: str, whole: bool) -> tuple[fx.GraphModule, Propagated, list[Group]]:
    """Return the graph of a network, its labels, and its groups."""
    module, inputs = _made(name)
    graph = exported(module, (inputs,), {})
    found = LabelRun(graph, whole=whole).run()
    return graph, found, [group for group in groups_of(found.classes) if len(group) > 1]


@torch.no_grad()
def zeroed(graph: nn.Module, indices: dict[str, dict[int, torch.Tensor]]) -> nn.Module:
    """Return a copy in which all entries of stored tensors are zero that `indices` lack."""
    twin = copied(graph)
    for name, axes in indices.items():
        owner, leaf = owner_of(twin, name)
        for axis, kept in axes.items():
            tensor = getattr(owner, leaf)
            gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
            gone[kept] = False
            tensor.movedim(axis, 0)[gone] = 0.0
    return twin


CASES = [
    (name, whole) for name in KINDS for whole in (False, True) if name != "recurrent" or not whole
]


@pytest.mark.parametrize(("name", "whole"), CASES)
@settings(max_examples=examples(6, full=150), deadline=None)
@given(data=st.data(), quiet=st.booleans())
def test_any_choice_of_units_computes_what_zeros_would(
    name: str, whole: bool, data: st.DataObject, quiet: bool
) -> None:
    graph, found, groups = analysed(name, whole)
    gone = []
    for group in groups:
        if quiet and found.changed_statistics(kept_of(found.classes, [group.units])):
            continue
        chosen = data.draw(st.integers(0, 2 ** len(group) - 2), label=group.name)
        gone.append(group.units[[bool(chosen >> place & 1) for place in range(len(group))]])
    assume(any(map(len, gone)))
    kept = kept_of(found.classes, gone)
    done = rewritten(graph, found, kept)
    inputs = KINDS[name][1]
    fresh = torch.randn_like(inputs) if inputs.is_floating_point() else inputs.flip(1)
    assert difference(graph, done.graph, found, kept, (fresh,)) <= 1e-5
    if not found.changed_statistics(kept):
        with torch.no_grad():
            expected, got = zeroed(graph, done.indices)(fresh), done.graph(fresh)
        assert float((expected - got).abs().max() / expected.abs().max()) <= 2e-5


def test_units_are_found_of_which_no_statistic_depends() -> None:
    for name, whole in CASES:
        _, found, groups = analysed(name, whole)
        assert any(not found.changed_statistics(kept_of(found.classes, [g.units])) for g in groups)


@pytest.mark.parametrize("name", list(KINDS))
def test_indices_that_are_off_by_one_are_found(name: str) -> None:
    graph, found, groups = analysed(name, False)
    kept = kept_of(found.classes, [group.units[::2] for group in groups])
    inputs = (KINDS[name][1],)
    tried = 0
    for place in rewritten(graph, found, kept).indices:
        done = rewritten(graph, found, kept)
        owner, leaf = owner_of(done.graph, place)
        tensor = getattr(owner, leaf).detach()
        if tensor.dim() < 2 or tensor.shape[1] < 2 or not torch.any(tensor != tensor.roll(1, 1)):
            continue
        tensor.copy_(tensor.roll(1, 1))
        tried += 1
        with pytest.raises(Unsupported, match="would differ from the original"):
            difference(graph, done.graph, found, kept, inputs)
    assert tried >= 5


@settings(max_examples=examples(4, full=60), deadline=None)
@given(
    st.sampled_from(["residual", "recurrent"]),
    st.floats(0.2, 0.9),
    st.integers(0, 9),
    st.sampled_from([1, 2, 4]),
)
def test_what_users_get_computes_what_zeros_would(
    name: str, share: float, seed: int, multiple: int
) -> None:
    module, inputs = _made(name)
    small, report = kk.torch.shrink(
        module, inputs, width=share, score=kk.prune.Random(seed=seed), multiple_of=multiple
    )
    axes = {n: {a: torch.tensor(k) for a, k in own.items()} for n, own in report.kept.items()}
    fresh = torch.randn_like(inputs) if inputs.is_floating_point() else inputs.flip(1)
    with torch.no_grad():
        expected, got = zeroed(module, axes)(fresh), small(fresh)
    assert report.statistics == []
    assert float((expected - got).abs().max() / expected.abs().max()) <= 2e-5
