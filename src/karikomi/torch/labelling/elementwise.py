"""Operators that combine tensors place by place: what meets is joined."""

from __future__ import annotations

from karikomi.shrink.label_planes import Labelled, fix_axes, part_of, varying
from karikomi.torch.labelling.label_run import Call, LabelRun, Value, rule

ELEMENTWISE = """
    abs acos acosh add addcdiv addcmul alias alpha_dropout asin asinh atan atan2 atanh bitwise_and bitwise_not
    bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clone complex contiguous copy cos cosh
    detach detach_ div divide dropout elu eq erf erfc exp exp2 expm1 feature_dropout float_power floor floor_divide
    fmax fmin fmod ge gelu greater gt hardshrink hardsigmoid hardswish hardtanh heaviside isfinite isinf isnan
    le leaky_relu lerp less lgamma lift_fresh_copy log log10 log1p log2 log_sigmoid logaddexp logical_and
    logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg
    negative polar positive pow rad2deg real reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid
    sign silu sin sinh softplus softshrink special_erf sqrt square sub subtract tan tanh tanhshrink threshold to
    true_divide trunc type_as view_as_real_copy where xlogy zero _to_copy __and__ __or__ __xor__ expand_copy
    empty_like full_like ones_like zeros_like rand_like randn_like fill conj _conj resolve_conj resolve_neg imag
""".split()

# Whose other tensors say a dtype or a shape only.
_OF_THE_FIRST = {"type_as", "to", "fill"}


@rule(*ELEMENTWISE)
def elementwise(run: LabelRun, call: Call) -> Value:
    """Join all operands place by place."""
    sources = call.node.all_input_nodes
    if call.name in _OF_THE_FIRST:
        sources = sources[:1]
    values = [run.value(source) for source in sources]
    return run.meet(values, call.site) if values else Labelled(())


@rule("prelu")
def prelu(run: LabelRun, call: Call) -> Value:
    """Join a slope per channel with axis 1."""
    return with_channels(run, call, run.value(call["self"]), [run.value(call["weight"])])


@rule("glu")
def glu(run: LabelRun, call: Call) -> Value:
    """Join the two halves of an axis."""
    value = run.current(run.value(call["self"]), call.site)
    axis = call["dim"] % len(value.shape)
    half = value.shape[axis] // 2
    shape = tuple(half if place == axis else size for place, size in enumerate(value.shape))

    def part(start: int) -> Labelled:
        planes = (
            plane if plane.shape[axis] == 1 else part_of(plane, axis, start, half)
            for plane in value.planes
        )
        return Labelled(shape, tuple(planes))

    return run.meet([part(0), part(half)], call.site)


def with_channels(run: LabelRun, call: Call, value: Labelled, stored: list[Labelled]) -> Labelled:
    """Return a value whose axis 1 is joined with tensors of one number per channel.

    A unit that is found at some places of a channel alone (before a pixel shuffle it was a channel of its own) goes
    with all others of that channel.
    """
    rank = len(value.shape)
    places = [axis for axis in range(rank) if axis != 1]
    planes = []
    for plane in run.current(value, call.site).planes:
        if any(part.planes for part in stored) and 1 in varying(plane):
            plane = fix_axes(run.labels, plane, places, call.site)
        planes += [] if plane is None else [plane]
    met = Labelled(value.shape, tuple(planes))
    return run.meet([met, *(on_channels(part, rank) for part in stored)], call.site)


def on_channels(value: Labelled, rank: int) -> Labelled:
    """Return a value of one axis as one of `rank`, along axis 1."""
    if not value.shape:
        return value

    def placed(size: int) -> tuple[int, ...]:
        return tuple(size if axis == min(1, rank - 1) else 1 for axis in range(rank))

    planes = tuple(plane.reshape(placed(plane.shape[0])) for plane in value.planes)
    return Labelled(placed(value.shape[0]), planes)
