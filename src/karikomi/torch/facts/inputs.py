"""Facts of the inputs that weights multiply: norms, products, and the number of multiplications."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from karikomi.errors import Unsupported
from karikomi.torch.numerics.norms import wide
from karikomi.torch.tracing.weight_reads import Reading

# Entries of the unfolded inputs of a convolution in memory at a time.
_BLOCK = 1 << 22


class InputNorms:
    """The L2 norm over samples and positions of the input that each weight multiplies.

    Linear: ``sqrt(sum x_j^2)`` per input j. Convolutions: per input channel and kernel position, the
    zeros of the padding counted as inputs. Uses of one weight, batches and (in half precision)
    squares are summed in float64.
    """

    def __init__(self) -> None:
        self._squares: dict[str, torch.Tensor] = {}
        self._rows: dict[str, int] = {}

    def read(self, reading: Reading) -> None:
        """Add the inputs of one reading."""
        part, parts = reading.part
        squares = _squares(reading)
        blocks = len(squares)
        if reading.name not in self._squares:
            transposed = reading.window is not None and reading.window.transposed
            self._rows[reading.name] = 1 if transposed else len(reading.weight) // (parts * blocks)
            self._squares[reading.name] = squares.new_zeros((parts * blocks, *squares.shape[1:]))
        self._squares[reading.name][part * blocks : (part + 1) * blocks] += squares

    def result(self) -> dict[str, torch.Tensor]:
        """Return weight name -> norms, of a shape that broadcasts to the weight's."""
        norms = {name: squares.sqrt() for name, squares in self._squares.items()}
        return {
            name: norm if len(norm) == 1 else norm.repeat_interleave(self._rows[name], dim=0)
            for name, norm in norms.items()
        }


class Grams:
    """The mean over samples and positions of the products of inputs, ``X^T X / N``.

    Shape (groups, d, d) with d the weights of one unit in index order (inputs, kernel positions); one
    group but for grouped convolutions, and for stacked projections of attention. Products are taken
    in float32 (float64 for a float64 network), and summed in float64.
    """

    def __init__(self) -> None:
        self._products: dict[str, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}

    def read(self, reading: Reading) -> None:
        """Add the inputs of one reading; raises `Unsupported` for a transposed convolution."""
        if reading.window is not None and reading.window.over:
            raise Unsupported(
                "products of inputs are not defined for a transposed convolution",
                where=f"gram: {reading.name}",
                hint=f"exclude={reading.name!r}",
            )
        part, parts = reading.part
        for block in _unfolded(reading):
            groups, width, rows = block.shape
            if reading.name not in self._products:
                kind, shape = wide(block.device), (parts * groups, width, width)
                self._products[reading.name] = block.new_zeros(shape, dtype=kind)
                self._rows[reading.name] = block.new_zeros((parts * groups, 1, 1), dtype=kind)
            at = slice(part * groups, (part + 1) * groups)
            self._products[reading.name][at] += block @ block.mT
            self._rows[reading.name][at] += rows

    def result(self) -> dict[str, torch.Tensor]:
        """Return weight name -> mean products."""
        return {name: sums / self._rows[name].clamp(min=1) for name, sums in self._products.items()}


class Macs:
    """The multiply-accumulates of each weight in one run of the network.

    A linear map counts each position that it is applied to, a convolution each output position, a
    transposed one each input position; uses of one weight add up.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def read(self, reading: Reading) -> None:
        """Add one reading."""
        weight, window = reading.weight, reading.window
        if window is None:
            positions = reading.inputs.numel() // max(weight.shape[1], 1)
        elif window.transposed:
            positions = reading.inputs.numel() // max(len(weight), 1)
        else:
            positions = reading.outputs.numel() // max(len(weight), 1)  # type: ignore[union-attr]
        macs = positions * weight.numel() // reading.part[1]
        self.counts[reading.name] = self.counts.get(reading.name, 0) + macs


READERS = {"input_norm": InputNorms, "gram": Grams, "macs": Macs}
"""Fact -> class that measures it from the inputs of layers."""


def _squares(reading: Reading) -> torch.Tensor:
    """Return the sums of squares of one reading, of shape (blocks of rows, inputs ...)."""
    inputs, window = reading.inputs, reading.window
    if window is None:
        return _lengths(inputs.reshape(-1, inputs.shape[-1])).square()[None]
    inputs = _batched(inputs, len(window.kernel))
    # Summed over samples before the kernel slides, which is then cheap.
    squares = _lengths(inputs).square()
    taps = [tap.reshape(len(tap), -1).sum(1) for tap in window.taps(squares)]
    found = torch.stack(taps, dim=1).reshape(-1, *window.kernel)
    return found[:, None] if window.transposed else found.unflatten(0, (window.groups, -1))


def _lengths(inputs: torch.Tensor) -> torch.Tensor:
    """Return the norms along the first axis, converted as they are summed."""
    return torch.linalg.vector_norm(inputs, dim=0, dtype=wide(inputs.device))


def _unfolded(reading: Reading) -> Iterator[torch.Tensor]:
    """Yield the inputs as matrices of shape (groups, weights of a unit, rows), a block at a time."""
    inputs, window = reading.inputs, reading.window
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    if window is None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        yield from (block.mT[None] for block in rows.split(max(_BLOCK // max(rows.shape[1], 1), 1)))
        return
    inputs = _batched(inputs, len(window.kernel))
    entries = inputs.shape[1] * math.prod(window.kernel) * math.prod(window.outputs)
    for block in inputs.split(max(_BLOCK // max(entries, 1), 1)):
        # Examples beside positions: the long stretches that a product reads fastest.
        taps = [tap.flatten(1) for tap in window.taps(block.transpose(0, 1))]
        yield torch.stack(taps, dim=1).flatten(0, 1).unflatten(0, (window.groups, -1))


def _batched(inputs: torch.Tensor, axes: int) -> torch.Tensor:
    """Return inputs with a leading axis of examples, which convolutions may lack."""
    return inputs[None] if inputs.dim() == axes + 1 else inputs
