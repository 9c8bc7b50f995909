"""Small networks, each with one construct that shrinking has to follow, and what half of the width leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IMAGE, SEQUENCE, TOKENS = (2, 3, 6, 6), (2, 6, 16), (2, 6)


class Forward(nn.Module):
    """Layers and tensors by name, and a forward that is a function of these and the inputs."""

    def __init__(self, forward: Callable[..., Any], /, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.written = forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.written(self, *inputs)


@dataclass(frozen=True, slots=True)
class Network:
    """A network, its parameters at half of the inner width and of whole heads, and the shapes of its inputs.

    `below`: the last input has integers below this. `folded`: what some weights are multiplied by, where the
    forward scales by the width of a head.
    """

    make: Callable[[], nn.Module]
    inner: int
    heads: int = 0
    shapes: tuple[tuple[int, ...], ...] = (IMAGE,)
    below: int = 0
    folded: float = 1.0

    def build(self) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """Return the network in evaluation mode, its parameters all different numbers, and inputs."""
        torch.manual_seed(0)
        module = self.make().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        inputs = [torch.randn(shape) for shape in self.shapes]
        if self.below:
            inputs[-1] = torch.randint(0, self.below, self.shapes[-1])
        return module, tuple(inputs)


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return a random parameter."""
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


class RootMeanSquare(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = parameter(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


def _mixed_channels(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.b(m.a(x))
    return m.c(y.view(2, 4, 8, 6, 6).transpose(1, 2).reshape(2, 32, 6, 6))


def _fused(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.qkv(x).reshape(2, 6, 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = (q @ k.transpose(-1, -2) * 0.35).softmax(-1) @ v
    return m.o(mixed.transpose(1, 2).reshape(2, 6, -1))


def _grouped_queries(m: Any, x: torch.Tensor) -> torch.Tensor:
    q = m.q(x).view(2, 6, 4, 8).transpose(1, 2)
    k, v = (layer(x).view(2, 6, 2, 8).transpose(1, 2) for layer in (m.k, m.v))
    k = k.repeat_interleave(2, 1)
    v = v[:, :, None].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8)
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 6, 32))


def _by_letters(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (layer(x).view(2, 6, 4, 8) for layer in (m.q, m.k, m.v))
    scores = torch.einsum("zuhw,zvhw->zhuv", q, k).mul(0.3).softmax(-1)
    return m.o(torch.einsum("zhuv,zvhw->zuhw", scores, v).flatten(2))


def _without_gradients(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    with torch.no_grad():
        gate = torch.sigmoid(m.g(x))
    return m.b(F.relu(h) * gate)


def _zero_padded_shortcut(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = F.relu(m.c1(x))
    y = m.c3(F.relu(m.c2(h)))
    return m.c4(F.relu(y + F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))))


def _standardized(m: Any) -> torch.Tensor:
    away = (1, 2, 3)
    return (m.w - m.w.mean(away, keepdim=True)) / m.w.std(away, keepdim=True)


def _shifted_in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    out = torch.zeros_like(h)
    out[:, 1:, :8] = h[:, :-1, :8]
    out[:, :, 8:] = h[:, :, 8:]
    return m.b(out)


def _written_into_zeros(m: Any, x: torch.Tensor) -> torch.Tensor:
    h, out = m.a(x), torch.zeros(2, 6, 32)
    out[..., :16] = h[..., :16].relu()
    out[..., 16:] = h[..., 16:]
    return m.b(out)


def _squeezed(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    gate = torch.sigmoid(m.e2(F.relu(m.e1(h.mean((2, 3), keepdim=True)))))
    return m.b(h * gate.expand_as(h))


def _cells(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = c = x.new_zeros(x.shape[0], 24)
    for step in range(3):
        if isinstance(m.cell, nn.LSTMCell):
            h, c = m.cell(x[:, step], (h, c))
        else:
            h = m.cell(x[:, step], h)
    return m.o(h)


def _unet(m: Any, x: torch.Tensor) -> torch.Tensor:
    first = m.d1(x).relu()
    second = m.d2(F.max_pool2d(first, 2)).relu()
    return m.o(m.e(torch.cat([first, m.up(second)], 1)).relu())


def _experts(m: Any, x: torch.Tensor) -> torch.Tensor:
    weights = m.g(x).softmax(-1)
    return m.o(sum(weights[..., i : i + 1] * part(x) for i, part in enumerate(m.experts)))


def _places_by_sines(m: Any, x: torch.Tensor) -> torch.Tensor:
    steps, rates = torch.arange(6)[:, None], torch.exp(torch.arange(0, 32, 2) * -0.3)
    code = torch.zeros(6, 32)
    code[:, 0::2], code[:, 1::2] = torch.sin(steps * rates), torch.cos(steps * rates)
    return m.o((m.a(x) + code).relu())


def _modulated(m: Any, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    gain, shift = m.f(z).chunk(2, 1)
    return m.b((m.a(x) * (1 + gain[..., None, None]) + shift[..., None, None]).relu())


def _extended(m: Any, x: torch.Tensor) -> torch.Tensor:
    parts = list(m.a(x).relu().split((8, 8), 1))
    for layer in m.more:
        parts.append(layer(parts[-1]))
    return m.o(torch.cat(parts, 1))


def _rotated(m: Any, x: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(m.a(x).view(2, 6, 16, 2))
    return m.o(torch.view_as_real(pairs * m.w).flatten(2))


def _at(index: torch.Tensor) -> torch.Tensor:
    return index[..., None].expand(2, 6, 32)


def _wide(forward: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    """Return a network of a layer ``a`` of 32 units, a layer ``o`` that reads them, and `parts`."""
    return lambda: Forward(forward, a=nn.Linear(16, 32), o=nn.Linear(32, 5), **parts)


def _image(forward: Callable[..., Any], **sizes: tuple[Any, ...]) -> Callable[[], nn.Module]:
    """Return a network of convolutions with these arguments."""
    return lambda: Forward(forward, **{name: nn.Conv2d(*size) for name, size in sizes.items()})


def _chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for make in layers))


def _linear(*sizes: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*sizes)


def _conv(*sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*sizes, **options)


def _normed(*sizes: int) -> Callable[[], nn.Module]:
    return lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(*sizes))


WORDS = {"shapes": (SEQUENCE,)}
IDS = {"shapes": (TOKENS,), "below": 20}
PICKED = {"shapes": (SEQUENCE, TOKENS), "below": 6}
# 32 units of 16 inputs that 5 outputs read, at half: 16 x 16 + 16, and 16 x 5 + 5.
HALF = 272 + 85

NETWORKS: dict[str, Network] = {
    "flatten": Network(
        lambda: Forward(
            lambda m, x: m.o(m.c(x).relu().flatten(1)), c=nn.Conv2d(3, 16, 3), o=nn.Linear(256, 5)
        ),
        8 * 28 + 128 * 5 + 5,
    ),
    "a width in the forward": Network(
        lambda: Forward(
            lambda m, x: m.o(m.c(x).view(-1, 256)), c=nn.Conv2d(3, 16, 3), o=nn.Linear(256, 5)
        ),
        8 * 28 + 128 * 5 + 5,
    ),
    "cat and slice": Network(
        _image(
            lambda m, x: m.d(torch.cat([m.a(x), m.b(x)], 1)[:, 4:28]),
            a=(3, 16, 1),
            b=(3, 16, 1),
            d=(24, 5, 1),
        ),
        8 * 4 + 8 * 4 + 12 * 5 + 5,
    ),
    "a layer called twice": Network(
        lambda: Forward(
            lambda m, x: m.o(m.l(m.l(m.i(x)).relu())),
            i=nn.Linear(16, 16),
            l=nn.Linear(16, 16),
            o=nn.Linear(16, 5),
        ),
        8 * 17 + 8 * 9 + 8 * 5 + 5,
        **WORDS,
    ),
    "tied embedding": Network(
        lambda: Forward(
            lambda m, x: F.linear(m.l(m.e(x)).relu() @ m.p, m.e.weight),
            e=nn.Embedding(20, 16),
            l=nn.Linear(16, 32),
            p=parameter(32, 16),
        ),
        20 * 8 + 16 * 9 + 16 * 8,
        **IDS,
    ),
    "softmax over channels": Network(
        _image(lambda m, x: m.b(m.a(x).softmax(1)), a=(3, 16, 1), b=(16, 5, 1)), 8 * 4 + 45
    ),
    "written RMS norm": Network(
        _chain(_linear(16, 32), lambda: RootMeanSquare(32), _linear(32, 5)), 272 + 16 + 85, **WORDS
    ),
    "RMS norm": Network(
        _chain(_linear(16, 32), lambda: nn.RMSNorm(32), _linear(32, 5)), 272 + 16 + 85, **WORDS
    ),
    "group norm": Network(
        _chain(_conv(3, 16, 3), lambda: nn.GroupNorm(4, 16), nn.ReLU, _conv(16, 5, 1)),
        8 * 28 + 16 + 45,
        heads=285,
    ),
    "pixel shuffle": Network(
        _chain(_conv(3, 32, 3), lambda: nn.PixelShuffle(2), nn.ReLU, _conv(8, 5, 1)),
        16 * 28 + 4 * 5 + 5,
    ),
    "batch norm after a pixel shuffle": Network(
        _chain(
            _conv(3, 32, 3), lambda: nn.PixelShuffle(2), lambda: nn.BatchNorm2d(8), _conv(8, 5, 1)
        ),
        16 * 28 + 8 + 4 * 5 + 5,
    ),
    "slopes after a pixel shuffle": Network(
        _chain(_conv(3, 32, 3), lambda: nn.PixelShuffle(2), lambda: nn.PReLU(8), _conv(8, 5, 1)),
        16 * 28 + 4 + 4 * 5 + 5,
    ),
    "max unpool": Network(
        _image(
            lambda m, x: m.o(
                F.max_unpool2d(*F.max_pool2d(m.a(x).relu(), 2, return_indices=True), 2)
            ),
            a=(3, 16, 1),
            o=(16, 5, 1),
        ),
        8 * 4 + 45,
    ),
    "pairwise distance": Network(
        lambda: Forward(
            lambda m, x: F.pairwise_distance(m.a(x), m.b(x), keepdim=True),
            a=nn.Linear(16, 32),
            b=nn.Linear(16, 32),
        ),
        2 * 272,
        **WORDS,
    ),
    "pooled by queries": Network(
        lambda: Forward(
            lambda m, x: m.o(((m.q @ m.p(x).mT).softmax(-1) @ m.p(x)).flatten(1)),
            p=nn.Linear(16, 24),
            q=parameter(4, 24),
            o=nn.Linear(96, 5),
        ),
        12 * 17 + 4 * 12 + 48 * 5 + 5,
        **WORDS,
    ),
    "fused attention": Network(
        lambda: Forward(_fused, qkv=nn.Linear(16, 96), o=nn.Linear(32, 5)),
        48 * 17 + 85,
        heads=48 * 17 + 85,
        **WORDS,
    ),
    "grouped queries": Network(
        lambda: Forward(
            _grouped_queries,
            q=nn.Linear(16, 32),
            k=nn.Linear(16, 16),
            v=nn.Linear(16, 16),
            o=nn.Linear(32, 5),
        ),
        16 * 17 + 2 * 8 * 17 + 85,
        heads=16 * 17 + 2 * 8 * 17 + 85,
        **WORDS,
    ),
    "attention by letters": Network(
        lambda: Forward(
            _by_letters,
            q=nn.Linear(16, 32),
            k=nn.Linear(16, 32),
            v=nn.Linear(16, 32),
            o=nn.Linear(32, 5),
        ),
        3 * 272 + 85,
        heads=3 * 272 + 85,
        **WORDS,
    ),
    "LSTM": Network(
        lambda: Forward(
            lambda m, x: m.o(m.l(x)[0]),
            l=nn.LSTM(16, 32, 2, batch_first=True, bidirectional=True),
            o=nn.Linear(64, 5),
        ),
        2 * 64 * (16 + 16 + 2) + 2 * 64 * (32 + 16 + 2) + 32 * 5 + 5,
        **WORDS,
    ),
    "projected LSTM": Network(
        lambda: Forward(
            lambda m, x: m.o(m.l(x)[0]),
            l=nn.LSTM(16, 32, batch_first=True, proj_size=12),
            o=nn.Linear(12, 5),
        ),
        64 * (16 + 6 + 2) + 6 * 16 + 35,
        **WORDS,
    ),
    "GRU": Network(
        lambda: Forward(
            lambda m, x: m.o(m.l(x)[0][:, -1]),
            l=nn.GRU(16, 32, batch_first=True),
            o=nn.Linear(32, 5),
        ),
        48 * (16 + 16 + 2) + 85,
        **WORDS,
    ),
    "RNN with a state": Network(
        lambda: Forward(
            lambda m, x: m.o(m.l(x, torch.zeros(1, 2, 32))[1][0]),
            l=nn.RNN(16, 32, batch_first=True),
            o=nn.Linear(32, 5),
        ),
        16 * (16 + 16 + 2) + 85,
        **WORDS,
    ),
    "LSTM cells": Network(
        lambda: Forward(_cells, cell=nn.LSTMCell(16, 24), o=nn.Linear(24, 5)),
        48 * (16 + 12 + 2) + 65,
        **WORDS,
    ),
    "GRU cells": Network(
        lambda: Forward(_cells, cell=nn.GRUCell(16, 24), o=nn.Linear(24, 5)),
        36 * (16 + 12 + 2) + 65,
        **WORDS,
    ),
    "depthwise": Network(
        _chain(_conv(3, 16, 1), _conv(16, 32, 3, groups=16), nn.ReLU, _conv(32, 5, 1)),
        8 * 4 + 16 * 10 + 85,
    ),
    "a branch without gradients": Network(
        _image(_without_gradients, a=(3, 16, 1), g=(3, 16, 1), b=(16, 5, 1)), 2 * 32 + 45
    ),
    "a scale in a buffer": Network(
        _wide(lambda m, x: m.o(m.a(x) * m.w), w=torch.rand(32) + 0.5), HALF, **WORDS
    ),
    "a kernel of its own": Network(
        lambda: Forward(
            lambda m, x: m.b(F.conv2d(x, m.w).relu()),
            w=parameter(16, 3, 3, 3),
            b=nn.Conv2d(16, 5, 1),
        ),
        8 * 27 + 45,
    ),
    "einsum": Network(
        lambda: Forward(
            lambda m, x: m.o(torch.einsum("btc,dc->btd", x, m.w)),
            w=parameter(32, 16),
            o=nn.Linear(32, 5),
        ),
        16 * 16 + 85,
        **WORDS,
    ),
    "einsum of three": Network(
        lambda: Forward(
            lambda m, x: m.o(torch.einsum("abc,cd,de", x, m.u, m.v)),
            u=parameter(16, 12),
            v=parameter(12, 20),
            o=nn.Linear(20, 5),
        ),
        16 * 6 + 6 * 10 + 55,
        **WORDS,
    ),
    "channel shuffle": Network(
        lambda: Forward(
            _mixed_channels,
            a=nn.Conv2d(3, 16, 1),
            b=nn.Conv2d(16, 32, 3, padding=1, groups=4),
            c=nn.Conv2d(32, 5, 1),
        ),
        8 * 4 + 16 * (2 * 9 + 1) + 85,
        heads=8 * 4 + 16 * (4 * 9 + 1) + 85,
    ),
    "gated by chunks": Network(
        lambda: Forward(
            lambda m, x: m.o(torch.mul(*m.a(x).chunk(2, -1))),
            a=nn.Linear(16, 64),
            o=nn.Linear(32, 5),
        ),
        32 * 17 + 85,
        **WORDS,
    ),
    "GLU": Network(
        _image(lambda m, x: m.b(F.glu(m.a(x), 1)), a=(3, 64, 1), b=(32, 5, 1)), 32 * 4 + 85
    ),
    "zero padded shortcut": Network(
        _image(
            _zero_padded_shortcut,
            c1=(3, 16, 3, 1, 1),
            c2=(16, 32, 3, 2, 1),
            c3=(32, 32, 3, 1, 1),
            c4=(32, 5, 1),
        ),
        8 * 28 + 16 * 73 + 16 * 145 + 85,
    ),
    "standardized weight": Network(
        lambda: Forward(
            lambda m, x: m.b(F.conv2d(m.a(x), _standardized(m)).relu()),
            a=nn.Conv2d(3, 12, 1),
            w=parameter(16, 12, 3, 3),
            b=nn.Conv2d(16, 5, 1),
        ),
        6 * 4 + 8 * 6 * 9 + 45,
    ),
    "weight norm": Network(
        _chain(_normed(16, 32), nn.ReLU, _normed(32, 5)), 16 * 18 + 5 * 18, **WORDS
    ),
    "low rank sum": Network(
        lambda: Forward(
            lambda m, x: m.o(F.linear(x, m.w + m.b @ m.a).relu()),
            w=parameter(32, 16),
            a=parameter(4, 16),
            b=parameter(32, 4),
            o=nn.Linear(32, 5),
        ),
        16 * 16 + 2 * 16 + 16 * 2 + 85,
        **WORDS,
    ),
    "MultiheadAttention": Network(
        lambda: Forward(
            lambda m, x: (lambda h: m.o(h + m.m(h, h, h)[0]))(m.i(x)),
            i=nn.Linear(16, 32),
            m=nn.MultiheadAttention(32, 4, batch_first=True),
            o=nn.Linear(32, 5),
        ),
        16 * 17 + 48 * 17 + 16 * 17 + 85,
        heads=16 * 17 + 48 * 17 + 16 * 17 + 85,
        folded=0.5**0.5,
        **WORDS,
    ),
    "addmm": Network(
        lambda: Forward(
            lambda m, x: m.o(torch.addmm(m.b, x.reshape(-1, 16), m.w).relu()),
            b=parameter(32),
            w=parameter(16, 32),
            o=nn.Linear(32, 5),
        ),
        16 + 16 * 16 + 85,
        **WORDS,
    ),
    "transposed convolutions": Network(
        _chain(
            _conv(3, 16, 1),
            lambda: nn.ConvTranspose2d(16, 24, 2, stride=2),
            nn.ReLU,
            lambda: nn.ConvTranspose2d(24, 12, 3, groups=4),
            _conv(12, 5, 1),
        ),
        # Half of the 3 outputs of each group is 2.
        8 * 4 + 8 * 12 * 4 + 12 + 12 * 2 * 9 + 8 + 45,
        heads=8 * 4 + 8 * 12 * 4 + 12 + 12 * 3 * 9 + 6 + 35,
    ),
    "writes in place": Network(
        lambda: Forward(_shifted_in_place, a=nn.Linear(16, 32), b=nn.Linear(32, 5)), HALF, **WORDS
    ),
    "written into zeros": Network(
        lambda: Forward(_written_into_zeros, a=nn.Linear(16, 32), b=nn.Linear(32, 5)), HALF, **WORDS
    ),
    "squeeze and excite": Network(
        _image(_squeezed, a=(3, 16, 1), e1=(16, 8, 1), e2=(8, 16, 1), b=(16, 5, 1)),
        8 * 4 + 4 * 9 + 8 * 5 + 45,
    ),
    "spatial gate": Network(
        _image(
            lambda m, x: (lambda h: m.b(h * m.g(h).sigmoid()))(m.a(x)),
            a=(3, 16, 1),
            g=(16, 1, 1),
            b=(16, 5, 1),
        ),
        8 * 4 + 9 + 45,
    ),
    "resampled": Network(
        _chain(
            _conv(3, 16, 1),
            lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
            lambda: nn.InstanceNorm2d(16, affine=True),
            lambda: nn.PReLU(16),
            _conv(16, 5, 1),
        ),
        8 * 4 + 16 + 8 + 45,
    ),
    "bilinear": Network(
        lambda: Forward(lambda m, x: m.o(m.b(x, x)), b=nn.Bilinear(16, 16, 32), o=nn.Linear(32, 5)),
        16 * 256 + 16 + 85,
        **WORDS,
    ),
    "cosine head": Network(
        lambda: Forward(
            lambda m, x: F.normalize(m.a(x), dim=-1) @ F.normalize(m.k, dim=-1).t(),
            a=nn.Linear(16, 32),
            k=parameter(7, 32),
        ),
        272 + 7 * 16,
        **WORDS,
    ),
    "mixed over places": Network(
        lambda: Forward(
            lambda m, x: m.o(m.t(m.i(x).transpose(1, 2)).transpose(1, 2)),
            i=nn.Linear(16, 32),
            t=nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)),
            o=nn.Linear(32, 5),
        ),
        272 + 12 * 7 + 12 * 6 + 6 + 85,
        **WORDS,
    ),
    "two outputs": Network(
        _wide(lambda m, x: (m.o(m.a(x).relu()), {"more": [m.p(m.a(x))]}), p=nn.Linear(32, 3)),
        HALF + 51,
        **WORDS,
    ),
    "a sum with a parameter": Network(
        _wide(lambda m, x: m.o(m.a(x) + m.b(x) + m.c), b=nn.Linear(16, 32), c=parameter(6, 32)),
        HALF + 272 + 96,
        **WORDS,
    ),
    "where": Network(
        _wide(lambda m, x: m.o(torch.where(m.a(x) > 0, m.a(x), m.b(x))), b=nn.Linear(16, 32)),
        HALF + 272,
        **WORDS,
    ),
    "where a stored mask says": Network(
        _wide(
            lambda m, x: m.o(torch.where(m.w, m.a(x), m.p)),
            w=torch.arange(32) % 3 == 0,
            p=parameter(32),
        ),
        HALF + 16,
        **WORDS,
    ),
    "cumsum over places": Network(_wide(lambda m, x: m.o(m.a(x).cumsum(1))), HALF, **WORDS),
    "maxout": Network(
        lambda: Forward(
            lambda m, x: m.o(m.a(x).view(2, 6, 16, 4).amax(-1)),
            a=nn.Linear(16, 64),
            o=nn.Linear(16, 5),
        ),
        32 * 17 + 85,
        heads=32 * 17 + 45,
        **WORDS,
    ),
    "flip": Network(_wide(lambda m, x: m.o(m.a(x).flip(-1))), HALF, **WORDS),
    "stored order": Network(
        _wide(lambda m, x: m.o(m.a(x)[..., m.w]), w=torch.arange(32).flip(0) ^ 1), HALF, **WORDS
    ),
    "every second unit": Network(
        lambda: Forward(
            lambda m, x: m.o(m.a(x)[..., ::2]), a=nn.Linear(16, 32), o=nn.Linear(16, 5)
        ),
        272 + 45,
        **WORDS,
    ),
    "unfold": Network(
        lambda: Forward(
            lambda m, x: m.o(F.unfold(m.a(x), 3).mT), a=nn.Conv2d(3, 16, 1), o=nn.Linear(144, 5)
        ),
        8 * 4 + 72 * 5 + 5,
    ),
    "conv1d": Network(
        lambda: Forward(
            lambda m, x: m.b(m.a(x.mT).relu()).mT, a=nn.Conv1d(16, 32, 3), b=nn.Conv1d(32, 5, 1)
        ),
        16 * 16 * 3 + 16 + 85,
        **WORDS,
    ),
    "embedding bag": Network(
        lambda: Forward(lambda m, x: m.o(m.e(x)), e=nn.EmbeddingBag(20, 16), o=nn.Linear(16, 5)),
        20 * 8 + 45,
        **IDS,
    ),
    "gather": Network(_wide(lambda m, x, i: m.o(m.a(x).gather(1, _at(i)))), HALF, **PICKED),
    "scatter": Network(
        _wide(lambda m, x, i: m.o(torch.zeros(2, 9, 32).scatter_add(1, _at(i), m.a(x)))),
        HALF,
        **PICKED,
    ),
    "index_add": Network(
        _wide(
            lambda m, x: m.o(torch.zeros(3, 32).index_add(0, m.w, m.a(x)[0])),
            w=torch.tensor([0, 2, 1, 1, 0, 2]),
        ),
        HALF,
        **WORDS,
    ),
    "index_put": Network(
        _wide(
            lambda m, x: m.o(m.a(x).index_put((torch.tensor([0]), torch.tensor([1])), m.p)),
            p=parameter(32),
        ),
        HALF + 16,
        **WORDS,
    ),
    "masked index_put": Network(
        _wide(lambda m, x: m.o(m.a(x).index_put((x[..., 0] > 0,), m.p)), p=parameter(32)),
        HALF + 16,
        **WORDS,
    ),
    "transform over places": Network(
        _wide(
            lambda m, x: m.o(torch.fft.irfft(torch.fft.rfft(m.a(x), dim=1) * m.w, n=6, dim=1)),
            w=parameter(4, 32, dtype=torch.cfloat),
        ),
        HALF + 64,
        **WORDS,
    ),
    "complex numbers": Network(
        _wide(_rotated, w=parameter(16, dtype=torch.cfloat)), HALF + 8, **WORDS
    ),
    "sines in the forward": Network(_wide(_places_by_sines), HALF, **WORDS),
    "modulated": Network(
        lambda: Forward(
            _modulated, a=nn.Conv2d(3, 16, 1), f=nn.Linear(7, 32), b=nn.Conv2d(16, 5, 1)
        ),
        8 * 4 + 16 * 8 + 45,
        shapes=(IMAGE, (2, 7)),
    ),
    "a weight that is computed": Network(
        lambda: Forward(
            lambda m, x: m.o(torch.bmm(x, m.h(x.mean(1)).view(2, 16, 12))),
            h=nn.Linear(16, 192),
            o=nn.Linear(12, 5),
        ),
        96 * 17 + 35,
        **WORDS,
    ),
    "U-Net": Network(
        lambda: Forward(
            _unet,
            d1=nn.Conv2d(3, 8, 3, padding=1),
            d2=nn.Conv2d(8, 16, 3, padding=1),
            up=nn.ConvTranspose2d(16, 8, 2, 2),
            e=nn.Conv2d(16, 8, 3, padding=1),
            o=nn.Conv2d(8, 2, 1),
        ),
        4 * 28 + 8 * 37 + 8 * 4 * 4 + 4 + 4 * 73 + 10,
    ),
    "parts added one by one": Network(
        lambda: Forward(
            _extended,
            a=nn.Conv2d(3, 16, 1),
            more=nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)]),
            o=nn.Conv2d(32, 5, 1),
        ),
        8 * 4 + 2 * 20 + 85,
    ),
    "experts": Network(
        lambda: Forward(
            _experts,
            g=nn.Linear(16, 4),
            experts=nn.ModuleList(
                nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(4)
            ),
            o=nn.Linear(16, 5),
        ),
        # A slice of one expert each: the gate keeps its 4.
        4 * 17 + 4 * (12 * 17 + 12 * 8 + 8) + 45,
        **WORDS,
    ),
}
