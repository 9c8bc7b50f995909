"""Layers that multiply and sum: labels along the summed axes are joined pairwise and end."""

from __future__ import annotations

import string
from typing import Any

from karikomi.keras.internals import kernel_of
from karikomi.keras.labelling.elementwise import activated, biased, operands
from karikomi.keras.labelling.label_run import Call, LabelRun, Value, placed, rule
from karikomi.shrink.label_planes import Labelled, reshaped

LETTERS = string.ascii_letters
Shape = tuple[int, ...]


@rule("layers.Dense")
def dense(run: LabelRun, call: Call) -> Value:
    """``(..., i) x (i, o) -> (..., o)``, a bias and an activation."""
    layer, value = call.operation, call.values[0]
    lead = LETTERS[: len(value.shape) - 1]
    kernel = run.variable(kernel_of(layer))
    out = run.contract(value, lead + "Y", kernel, "YZ", lead + "Z", call.site)
    return activated(run, call, biased(run, call, out, layer.bias), layer.activation)


@rule("layers.EinsumDense")
def einsum_dense(run: LabelRun, call: Call) -> Value:
    """As its equation says, a bias and an activation; of several output axes one gets shorter."""
    layer, value = call.operation, call.values[0]
    out = projected(run, call, value, layer, layer.equation)
    return activated(run, call, out, layer.activation)


def projected(run: LabelRun, call: Call, value: Labelled, layer: Any, equation: str) -> Labelled:
    """Return what the kernel of an `EinsumDense` and its bias make of a value.

    Of several axes that the kernel makes, such as heads and their width, the last gets shorter, or the first if
    whole heads go.
    """
    kernel = run.variable(kernel_of(layer))
    sides, _, out = equation.replace(" ", "").partition("->")
    first, _, second = sides.partition(",")
    spare = "".join(letter for letter in LETTERS if letter not in equation)
    dots = spare[: len(value.shape) - len(first.replace(".", ""))]
    first, second, out = (term.replace("...", dots) for term in (first, second, out))
    made = [letter for letter in second if letter in out]
    stay = made[1:] if run.whole else made[:-1]
    kernel = run.fix(kernel, call.site, [second.index(letter) for letter in stay])
    found = run.contract(value, first, kernel, second, out, call.site)
    return biased(run, call, found, layer.bias)


@rule("layers.Conv1D", "layers.Conv2D", "layers.Conv3D")
def convolution(run: LabelRun, call: Call) -> Value:
    """``(n, x..., g i) x (k..., i, g o) -> (n, x'..., g o)``: contracted over i within each group."""
    layer = call.operation
    kernel = _without_places(run, call, kernel_of(layer))
    inputs, outputs = kernel.shape
    split = _viewed(kernel, (inputs, layer.groups, outputs // layer.groups))
    axis = channel_axis(layer)
    out = _convolved(run, call, run.vector(call.values[0], axis, call.site), split, "igo")
    return _finished(run, call, out, layer.bias, axis)


@rule("layers.DepthwiseConv1D", "layers.DepthwiseConv2D")
def depthwise(run: LabelRun, call: Call) -> Value:
    """``(n, x..., c) x (k..., c, m) -> (n, x'..., c m)``."""
    layer = call.operation
    axis = channel_axis(layer)
    out = _depthwise(run, call, run.vector(call.values[0], axis, call.site), kernel_of(layer))
    return _finished(run, call, out, layer.bias, axis)


@rule("layers.SeparableConv1D", "layers.SeparableConv2D")
def separable(run: LabelRun, call: Call) -> Value:
    """A depthwise convolution, then one of single positions."""
    layer = call.operation
    axis = channel_axis(layer)
    value = run.vector(call.values[0], axis, call.site)
    middle = _depthwise(run, call, value, layer.depthwise_kernel)
    kernel = _without_places(run, call, layer.pointwise_kernel)
    out = run.contract(middle, "i", kernel, "io", "o", call.site)
    return _finished(run, call, out, layer.bias, axis)


@rule("layers.Conv1DTranspose", "layers.Conv2DTranspose", "layers.Conv3DTranspose")
def transposed(run: LabelRun, call: Call) -> Value:
    """``(n, x..., i) x (k..., o, i) -> (n, x'..., o)``."""
    layer = call.operation
    axis = channel_axis(layer)
    kernel = _without_places(run, call, kernel_of(layer))
    value = run.vector(call.values[0], axis, call.site)
    out = run.contract(value, "i", kernel, "oi", "o", call.site)
    return _finished(run, call, out, layer.bias, axis)


def channel_axis(layer: Any) -> int:
    """Return the axis of channels of a layer's input and output."""
    return 1 if layer.data_format == "channels_first" else -1


def _without_places(run: LabelRun, call: Call, variable: Any) -> Labelled:
    """Return the last two axes of a kernel; its positions stay."""
    kernel = run.variable(variable)
    left = run.fix(kernel, call.site, range(len(kernel.shape) - 2))
    return Labelled(
        kernel.shape[-2:], tuple(plane.reshape(plane.shape[-2:]) for plane in left.planes)
    )


def _viewed(value: Labelled, shape: Shape) -> Labelled:
    return Labelled(shape, tuple(reshaped(plane, value.shape, shape) for plane in value.planes))


def _convolved(run: LabelRun, call: Call, value: Labelled, kernel: Labelled, axes: str) -> Labelled:
    sizes = dict(zip(axes, kernel.shape, strict=True))
    if sizes["g"] > 1 and sizes["i"] == 1:
        # Depthwise: a channel goes with all outputs that are made of it.
        kernel = run.fix(kernel, call.site, [axes.index("o")])
    split = _viewed(value, (sizes["g"], sizes["i"]))
    out = run.contract(split, "gi", kernel, axes, "go", call.site)
    return _viewed(out, (sizes["g"] * sizes["o"],))


def _depthwise(run: LabelRun, call: Call, value: Labelled, variable: Any) -> Labelled:
    kernel = _without_places(run, call, variable)
    return _convolved(run, call, value, _viewed(kernel, (1, *kernel.shape)), "igo")


def _finished(run: LabelRun, call: Call, value: Labelled, bias: Any, axis: int) -> Labelled:
    out = placed(biased(run, call, run.current(value, call.site), bias), call.shape, axis)
    return activated(run, call, out, call.operation.activation)


@rule("ops.Matmul")
def matmul(run: LabelRun, call: Call) -> Value:
    """``(..., m, k) x (..., k, n) -> (..., m, n)``."""
    value, other = operands(call) if len(call.values) == 2 else [None, None]
    if value is None or other is None or min(len(value.shape), len(other.shape)) < 2:
        return run.refuse(call, "a product with a vector or an array has no rule")
    lead = LETTERS[: len(call.shape) - 2]
    terms = (
        lead[len(lead) - (len(operand.shape) - 2) :] + last
        for operand, last in ((value, "XK"), (other, "KY"))
    )
    left, right = terms
    return run.contract(value, left, other, right, lead + "XY", call.site)


@rule("ops.Einsum")
def einsum(run: LabelRun, call: Call) -> Value:
    """As the equation says, for two tensors."""
    sides, arrow, out = call.operation.subscripts.replace(" ", "").partition("->")
    terms = sides.split(",")
    plain = arrow and "." not in sides and all(len(set(term)) == len(term) for term in terms)
    if not plain or len(terms) != 2 or len(call.values) != 2:
        return run.refuse(call)
    value, other = call.values
    return run.contract(value, terms[0], other, terms[1], out, call.site)


@rule("layers.Dot")
def dot(run: LabelRun, call: Call) -> Value:
    """A product of two tensors that is summed over one axis of each, batch by batch."""
    value, other = call.values
    axes = call.operation.axes
    axes = [axes, axes] if isinstance(axes, int) else axes
    first, second = (axis % len(v.shape) for axis, v in zip(axes, (value, other), strict=True))
    if call.operation.normalize:
        value, other = (
            run.over_statistics(call, operand, [axis])
            for operand, axis in ((value, first), (other, second))
        )
    left = ["A", *LETTERS[: len(value.shape) - 1]]
    right = ["A", *LETTERS[len(left) : len(left) + len(other.shape) - 1]]
    left[first] = right[second] = "K"
    out = "".join(letter for letter in (*left, *right[1:]) if letter != "K")
    return run.contract(value, "".join(left), other, "".join(right), out, call.site)
