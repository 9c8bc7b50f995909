"""Operators that multiply and sum: labels along the summed axes are joined pairwise and end."""

from __future__ import annotations

import string
from typing import Any

from karikomi.shrink.label_planes import Labelled, reshaped, varying
from karikomi.torch.labelling.elementwise import on_channels
from karikomi.torch.labelling.label_run import Call, LabelRun, Value, rule, shape_of

LETTERS = string.ascii_letters


@rule("linear")
def linear(run: LabelRun, call: Call) -> Value:
    """``(..., i) x (o, i) -> (..., o)``, and a bias."""
    value, weight = run.value(call["input"]), run.value(call["weight"])
    lead = LETTERS[: len(value.shape) - 1]
    out = run.contract(value, lead + "Y", weight, "ZY", lead + "Z", call.site)
    return with_bias(run, call, out, call["bias"])


def with_bias(run: LabelRun, call: Call, value: Labelled, bias: Any) -> Labelled:
    """Join a bias with the last axis."""
    return value if bias is None else run.meet([value, run.value(bias)], call.site)


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")
def matmul(run: LabelRun, call: Call) -> Value:
    """``(..., m, k) x (..., k, n) -> (..., m, n)``."""
    first, other = (run.value(argument) for argument in call.node.args[:2])
    return product(run, call, first, other)


def product(run: LabelRun, call: Call, first: Labelled, other: Labelled) -> Labelled:
    """Return the labels of a matrix product with broadcasting."""
    rows, columns = len(first.shape) > 1, len(other.shape) > 1
    batch = max(len(first.shape), len(other.shape), 2) - 2
    lead = LETTERS[:batch]

    def letters(value: Labelled, last: str) -> str:
        own = len(value.shape) - len(last)
        return lead[batch - own :] + last if own else last

    left = letters(first, "XK" if rows else "K")
    right = letters(other, "KY" if columns else "K")
    out = lead + ("X" if rows else "") + ("Y" if columns else "")
    return run.contract(first, left, other, right, out, call.site)


@rule("addmm", "baddbmm", "addmv", "addbmm_")
def addmm(run: LabelRun, call: Call) -> Value:
    """A matrix product that is added to a tensor."""
    added, first, other = (run.value(argument) for argument in call.node.args[:3])
    return run.meet([added, product(run, call, first, other)], call.site)


@rule("outer", "ger")
def outer(run: LabelRun, call: Call) -> Value:
    """``i, j -> ij``."""
    first, other = (run.value(argument) for argument in call.node.args[:2])
    return run.contract(first, "i", other, "j", "ij", call.site)


@rule("einsum")
def einsum(run: LabelRun, call: Call) -> Value:
    """As its equation says: what has the same letter is joined, what is summed over ends."""
    values = [run.value(source) for source in call["tensors"]]
    sides, arrow, out = call["equation"].replace(" ", "").partition("->")
    terms = sides.split(",")
    shape = shape_of(call.node.meta["val"])
    if any(len(set(term.replace(".", ""))) < len(term.replace(".", "")) for term in terms):
        return run.refuse(call, "a diagonal has no rule")
    if not arrow:
        letters = sorted(set(sides) - set(",."))
        dots = "..." if "..." in sides else ""
        out = dots + "".join(letter for letter in letters if sides.count(letter) == 1)
    spare = [letter for letter in LETTERS if letter not in call["equation"]]
    terms = [_spelled(term, len(v.shape), spare) for term, v in zip(terms, values, strict=True)]
    return run.contract_all(values, terms, _spelled(out, len(shape), spare), call.site)


def _spelled(term: str, rank: int, spare: list[str]) -> str:
    """Return a term with letters in place of the dots."""
    dots = rank - len(term.replace("...", ""))
    return term.replace("...", "".join(spare[-dots:]) if dots else "")


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def convolution(run: LabelRun, call: Call) -> Value:
    """``(n, g i, x...) x (g o, i, k...) -> (n, g o, x'...)``: contracted over i within each group."""
    if call.arguments.get("transposed"):
        return _transposed(run, call)
    weight = run.value(call["weight"])
    groups = call["groups"]
    outputs, inputs = weight.shape[:2]
    split = _viewed(weight, (groups, outputs // groups, inputs))
    return _convolved(run, call, split, "goi", groups, inputs)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(run: LabelRun, call: Call) -> Value:
    """``(n, g i, x...) x (g i, o, k...) -> (n, g o, x'...)``."""
    return _transposed(run, call)


def _transposed(run: LabelRun, call: Call) -> Value:
    weight = run.value(call["weight"])
    groups = call["groups"]
    inputs, outputs = weight.shape[:2]
    split = _viewed(weight, (groups, inputs // groups, outputs))
    if run.whole and groups > 1:
        # All groups have the same outputs, so that whole groups can go but no output of each.
        split = run.fix(run.current(split, call.site), call.site, [2])
    return _convolved(run, call, split, "gio", groups, inputs // groups)


def _viewed(weight: Labelled, shape: tuple[int, ...]) -> Labelled:
    """Return the first two axes of a weight as three; the positions of the kernel follow."""
    new = (*shape, *weight.shape[2:])
    return Labelled(new, tuple(reshaped(plane, weight.shape, new) for plane in weight.planes))


def _convolved(
    run: LabelRun, call: Call, weight: Labelled, axes: str, groups: int, inputs: int
) -> Labelled:
    value = run.value(call["input"])
    shape = shape_of(call.node.meta["val"])
    places = len(weight.shape) - 3
    batched = len(value.shape) == places + 2
    channel = 1 if batched else 0
    spatial = range(channel + 1, len(value.shape))
    value = run.fix(run.current(value, call.site), call.site, list(spatial))
    weight = run.fix(run.current(weight, call.site), call.site, list(range(3, 3 + places)))
    if groups > 1 and inputs == 1:
        # Depthwise: a channel goes with all outputs that are made of it.
        weight = run.fix(weight, call.site, [axes.index("o")])
    lead = value.shape[:channel]
    flat = Labelled(
        (*lead, value.shape[channel]),
        tuple(plane.reshape(plane.shape[: channel + 1]) for plane in value.planes),
    )
    split = (*lead, groups, inputs)
    flat = Labelled(split, tuple(reshaped(plane, flat.shape, split) for plane in flat.planes))
    kernel = Labelled(weight.shape[:3], tuple(p.reshape(p.shape[:3]) for p in weight.planes))
    n = "n" if batched else ""
    out = run.contract(flat, n + "gi", kernel, axes, n + "go", call.site)
    joined = shape[: channel + 1]
    planes = (reshaped(plane, out.shape, joined) for plane in out.planes)
    ones = (1,) * places
    done = Labelled(shape, tuple(plane.reshape(*plane.shape, *ones) for plane in planes))
    if call["bias"] is None:
        return run.current(done, call.site)
    bias = run.value(call["bias"])
    if batched:
        return run.meet([done, on_channels(bias, len(shape))], call.site)
    return run.meet(
        [
            done,
            Labelled(
                (*bias.shape, *ones),
                tuple(plane.reshape(*plane.shape, *ones) for plane in bias.planes),
            ),
        ],
        call.site,
    )


@rule("bilinear")
def bilinear(run: LabelRun, call: Call) -> Value:
    """``(..., i) x (o, i, j) x (..., j) -> (..., o)``, and a bias."""
    first, other, weight = (run.value(call[name]) for name in ("input1", "input2", "weight"))
    lead = LETTERS[: len(first.shape) - 1]
    half = run.contract(first, lead + "I", weight, "OIJ", lead + "OJ", call.site)
    out = run.contract(half, lead + "OJ", other, lead + "J", lead + "O", call.site)
    return with_bias(run, call, out, call["bias"])


@rule("scaled_dot_product_attention")
def attention(run: LabelRun, call: Call) -> Value:
    """``softmax(query key^T + mask) value``: query and key are contracted over their width, value passes its own."""
    query, key, value = (run.value(call[name]) for name in ("query", "key", "value"))
    lead = LETTERS[: len(query.shape) - 2]
    if call.arguments.get("enable_gqa") and query.shape[-3] != key.shape[-3]:
        key, value = (_repeated(part, query.shape[-3]) for part in (key, value))
    scores = run.contract(query, lead + "TD", key, lead + "SD", lead + "TS", call.site)
    if call["attn_mask"] is not None:
        scores = run.meet([scores, run.value(call["attn_mask"])], call.site)
    scores = run.over_statistics(call, scores, [-1])
    return run.contract(scores, lead + "TS", value, lead + "SV", lead + "TV", call.site)


def _repeated(value: Labelled, heads: int) -> Labelled:
    axis = len(value.shape) - 3
    times = heads // value.shape[axis]
    shape = tuple(heads if place == axis else size for place, size in enumerate(value.shape))
    planes = tuple(
        plane.repeat(times, axis) if axis in varying(plane) else plane for plane in value.planes
    )
    return Labelled(shape, planes)
