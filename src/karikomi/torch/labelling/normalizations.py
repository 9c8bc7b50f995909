"""Normalisations and softmax: labels pass, and what is measured over entries that can go is noted as a statistic."""

from __future__ import annotations

from karikomi.shrink.label_planes import Labelled, reshaped
from karikomi.torch.labelling.elementwise import with_channels
from karikomi.torch.labelling.label_run import Call, LabelRun, Value, rule


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin")
def softmax(run: LabelRun, call: Call) -> Value:
    """Pass all labels."""
    value = run.current(run.value(call.node.args[0]), call.site)
    return run.over_statistics(call, value, [call["dim"]])


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(run: LabelRun, call: Call) -> Value:
    """Join gain and bias with the last axes."""
    parts = [run.value(call["input"])]
    parts += [run.value(call[n]) for n in ("weight", "bias") if call.arguments.get(n) is not None]
    met = run.meet(parts, call.site)
    last = [-1 - place for place in range(len(call["normalized_shape"]))]
    return run.over_statistics(call, met, last)


@rule("batch_norm", "instance_norm", "cudnn_batch_norm", "native_batch_norm")
def batch_norm(run: LabelRun, call: Call) -> Value:
    """Join gain, bias and running statistics with axis 1."""
    names = ("weight", "bias", "running_mean", "running_var")
    stored = [run.value(call[name]) for name in names if call.arguments.get(name) is not None]
    met = with_channels(run, call, run.value(call["input"]), stored)
    return run.over_statistics(call, met, [axis for axis in range(len(met.shape)) if axis != 1])


@rule("group_norm")
def group_norm(run: LabelRun, call: Call) -> Value:
    """Join gain and bias with axis 1; the groups stay equally large."""
    stored = [run.value(call[n]) for n in ("weight", "bias") if call.arguments.get(n) is not None]
    met = with_channels(run, call, run.value(call["input"]), stored)
    rank = len(met.shape)
    groups = call["num_groups"]
    split = (met.shape[0], groups, met.shape[1] // groups, *met.shape[2:])
    grouped = Labelled(split, tuple(reshaped(plane, met.shape, split) for plane in met.planes))
    left = run.by_one_axis(grouped, call.site)
    run.over_statistics(call, left, list(range(2, rank + 1)))
    return run.current(met, call.site)


@rule("_weight_norm")
def weight_norm(run: LabelRun, call: Call) -> Value:
    """Join a direction with its length; the length of a row is measured over its entries."""
    met = run.meet([run.value(call["v"]), run.value(call["g"])], call.site)
    others = [axis for axis in range(len(met.shape)) if axis != call["dim"]]
    return run.over_statistics(call, met, others)
