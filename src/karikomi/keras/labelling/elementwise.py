"""Layers and operations that combine tensors place by place: what meets is joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from karikomi.keras.labelling.label_run import Call, LabelRun, Value, kind_of, placed, rule
from karikomi.shrink.label_planes import Labelled, aligned

LAYERS = """
    Activation ActivityRegularization AlphaDropout CustomScaleLayer Dropout ELU GaussianDropout GaussianNoise Identity
    LeakyReLU ReLU SpatialDropout1D SpatialDropout2D SpatialDropout3D StochasticDepth
""".split()

OPERATIONS = """
    Abs Absolute Add Arccos Arccosh Arcsin Arcsinh Arctan Arctan2 Arctanh BitwiseAnd BitwiseNot BitwiseOr
    BitwiseXor Cast Cbrt Ceil Celu Clip Copy Cos Cosh Deg2rad Divide DivideNoNan Elu Equal Erf Erfinv Exp Exp2
    Expm1 Fabs Floor FloorDivide Fmax Fmin Gelu Greater GreaterEqual HardShrink HardSigmoid HardSilu HardTanh
    Heaviside Hypot Isfinite Isinf Isnan LeakyRelu Less LessEqual Log Log10 Log1p Log2 LogSigmoid Logaddexp
    LogicalAnd LogicalNot LogicalOr LogicalXor Maximum Minimum Mod Multiply NanToNum Negative NotEqual OnesLike
    Power Reciprocal Relu Relu6 Round Rsqrt Selu Sigmoid Sign Silu Sin Sinh SoftShrink Softplus Softsign
    SparsePlus Sqrt Square Squareplus Subtract Tan Tanh TanhShrink Threshold TrueDivide Trunc Where ZerosLike
""".split()

PLACE_BY_PLACE = frozenset(
    """
    celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid mish relu relu6
    selu sigmoid silu soft_shrink softplus softsign sparse_plus sparse_sigmoid squareplus tanh tanh_shrink threshold
    """.split()
)
ALONG_THE_LAST = frozenset(("softmax", "log_softmax", "sparsemax"))


@rule(*(f"layers.{name}" for name in LAYERS))
def elementwise(run: LabelRun, call: Call) -> Value:
    """Join all inputs place by place; an activation is one of Keras' own, or the units stay."""
    activation = getattr(call.operation, "activation", None)
    return activated(run, call, run.meet(call.values, call.site), activation)


@rule(*(f"ops.{name}" for name in OPERATIONS))
def operation(run: LabelRun, call: Call) -> Value:
    """Join all operands place by place; an array that stands in the code stays as it is."""
    return run.meet(operands(call), call.site)


def operands(call: Call) -> list[Labelled]:
    """Return the tensors of a call, and the arrays without labels."""
    leaves = keras.tree.flatten((call.args, call.kwargs))
    found = [leaf for leaf in leaves if isinstance(leaf, Labelled)]
    found += [
        Labelled(tuple(np.shape(leaf)))
        for leaf in leaves
        if not isinstance(leaf, Labelled) and hasattr(leaf, "shape")
    ]
    return found


@rule(
    *(f"layers.{name}" for name in ("Add", "Average", "Maximum", "Minimum", "Multiply", "Subtract"))
)
def merged(run: LabelRun, call: Call) -> Value:
    """Join all inputs; one of fewer axes gets these after the first."""
    rank = max(len(value.shape) for value in call.values)
    return run.meet([_raised(value, rank) for value in call.values], call.site)


def _raised(value: Labelled, rank: int) -> Labelled:
    def raised(shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:1], *(1,) * (rank - len(shape)), *shape[1:])

    return Labelled(
        raised(value.shape), tuple(plane.reshape(raised(plane.shape)) for plane in value.planes)
    )


@rule("layers.PReLU")
def prelu(run: LabelRun, call: Call) -> Value:
    """Join the slopes, which have all axes but the first."""
    slope = run.variable(call.operation.alpha)
    return run.meet([call.values[0], slope], call.site)


@rule("layers.LayerScale")
def layer_scale(run: LabelRun, call: Call) -> Value:
    """Join the scale with the last axis."""
    value = call.values[0]
    scale = placed(run.variable(call.operation.gamma), value.shape[-1:], -1)
    return run.meet([value, scale], call.site)


@rule("layers.Rescaling")
def rescaling(run: LabelRun, call: Call) -> Value:
    """Pass the labels; numbers per channel stand in the configuration and stay."""
    layer = call.operation
    numbers = [Labelled(tuple(np.shape(number))) for number in (layer.scale, layer.offset)]
    return run.meet([call.values[0], *numbers], call.site)


@rule("layers.Softmax", "ops.Softmax", "ops.LogSoftmax", "ops.Sparsemax")
def softmax(run: LabelRun, call: Call) -> Value:
    """Pass all labels."""
    axes: Any = call.operation.axis
    value = call.values[0]
    axes = range(len(value.shape)) if axes is None else axes
    axes = axes if isinstance(axes, Sequence | range) else [axes]
    return run.over_statistics(call, run.current(value, call.site), axes)


def activated(run: LabelRun, call: Call, value: Labelled, activation: Any) -> Labelled:
    """Return what an activation makes of a value."""
    if activation is None:
        return value
    name = getattr(activation, "__name__", "")
    if getattr(keras.activations, name, None) is activation:
        if name in PLACE_BY_PLACE:
            return value
        if name in ALONG_THE_LAST:
            return run.over_statistics(call, run.current(value, call.site), [-1])
    elif kind_of(activation) in ("layers.ReLU", "layers.LeakyReLU", "layers.ELU"):
        return value
    return run.fix(run.current(value, call.site), f"no rule for the activation of {call.site}")


def biased(run: LabelRun, call: Call, value: Labelled, bias: Any) -> Labelled:
    """Return a value with a bias that is added along its last axes."""
    if bias is None:
        return value
    own = run.variable(bias)
    planes = tuple(aligned(plane, len(value.shape)) for plane in own.planes)
    shape = (1,) * (len(value.shape) - len(own.shape)) + own.shape
    return run.meet([value, Labelled(shape, planes)], call.site)
