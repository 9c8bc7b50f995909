"""Patterns: what is removed as one item. A weight, n of m, a block, a unit, a head, a whole layer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from karikomi import registry
from karikomi.errors import InvalidArgument
from karikomi.registry import register
from karikomi.schedule import is_number, whole

POOLS = ("sum", "mean", "max")
"""What a block is worth by the scores of its weights."""


class Pattern:
    """What patterns share. `coupled`: its items span several tensors, which the framework names.

    `fixed_share`: the pattern determines how much is removed, so no target may be given.
    """

    coupled: ClassVar[bool] = False
    fixed_share: ClassVar[bool] = False


@register(
    "pattern",
    name="unstructured",
    formula="each weight by itself",
    source="Han, Pool, Tran and Dally 2015, Learning both Weights and Connections",
)
@dataclass(frozen=True, slots=True)
class Unstructured(Pattern):
    """Each weight goes or stays by itself."""


@register(
    "pattern",
    name="n:m",
    formula="of every `of` consecutive inputs of a unit, the `keep` best stay",
    source="Mishra et al. 2021, Accelerating Sparse Deep Neural Networks",
)
@dataclass(frozen=True, slots=True, kw_only=True)
class NofM(Pattern):
    """Of every `of` consecutive inputs (at one kernel position) of a unit, `keep` stay.

    `keep`, `of`: whole numbers, 0 < keep < of, else `InvalidArgument`. Papers write *n:m* for both
    "n of m stay" and "n of m go", so of short forms only "2:4" is accepted, which means the same either way.
    A weight whose inputs `of` does not divide is left alone, and reported; with `pad` its last group is filled with
    zeros, which go first, so that of r inputs that are left over ``min(r, keep)`` stay.

    >>> NofM(keep=2, of=4).sparsity
    0.5

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (2 of 4); Zhou et al. 2021,
    "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch".
    """

    fixed_share: ClassVar[bool] = True
    keep: int
    of: int
    pad: bool = False

    def __post_init__(self) -> None:
        keep, of = whole(self.keep), whole(self.of)
        if keep is None or of is None or not 0 < keep < of:
            raise InvalidArgument(
                "of every `of` weights `keep` stay",
                where="NofM",
                got=f"keep={self.keep!r}, of={self.of!r}",
                allowed="whole numbers, 0 < keep < of",
            )

    @property
    def sparsity(self) -> float:
        """The share of weights that go."""
        return 1.0 - self.keep / self.of


@register(
    "pattern",
    name="blocks",
    formula="tiles of units x inputs (at one kernel position)",
    source="Gray, Radford and Kingma 2017, GPU Kernels for Block-Sparse Weights",
)
@dataclass(frozen=True, slots=True)
class Blocks(Pattern):
    """Tiles of `units` x `inputs` weights at one kernel position go as one.

    Tiles at the edges are smaller where the shape is no multiple. `units`, `inputs`: >= 1. `pool`: what a tile is worth
    by the scores of its weights: ``sum`` (what the score says of a group), ``mean``, so that a small tile at an edge is
    worth no less than others, or ``max``. Raises `InvalidArgument`.

    >>> Blocks(4, 4)
    Blocks(units=4, inputs=4, pool='sum')

    Source: Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights"; ``mean`` and ``max`` are the
    AVG and MAX of the TensorFlow Model Optimization Toolkit.
    """

    units: int
    inputs: int
    pool: str = "sum"

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise InvalidArgument(
                "unknown pooling",
                where="Blocks.pool",
                got=repr(self.pool),
                allowed=", ".join(POOLS),
            )
        if (whole(self.units) or 0) < 1 or (whole(self.inputs) or 0) < 1:
            raise InvalidArgument(
                "a block has at least one unit and one input",
                where="Blocks",
                got=f"{self.units!r} x {self.inputs!r}",
                allowed="whole numbers >= 1",
            )


@register(
    "pattern",
    name="units",
    formula="a neuron or channel: all its incoming weights, its bias and what normalises it",
    source="Li et al. 2017, Pruning Filters for Efficient ConvNets",
)
@dataclass(frozen=True, slots=True)
class Units(Pattern):
    """A neuron, or a channel of a convolution, goes with its bias and its scale and shift, if any.

    `axis`: of the weight as its framework stores it, along which slices go instead, of this weight alone and
    whatever they are; a weight without this axis is left alone. `norm`: p of the norm over a unit's or slice's scores
    of weights, ``(sum s^p)^(1/p)``, a number > 0 or ``inf``; without it the score says what a group is worth
    (magnitude: p = 1). Raises `InvalidArgument`.

    >>> Units(axis=1, norm=2)
    Units(axis=1, norm=2)

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets"; slices along any axis by any norm are those
    of ``torch.nn.utils.prune.ln_structured``.
    """

    coupled: ClassVar[bool] = True
    axis: int | None = None
    norm: float | None = None

    def __post_init__(self) -> None:
        if self.axis is not None and whole(self.axis) is None:
            raise InvalidArgument(
                "an axis is a whole number", where="Units.axis", got=repr(self.axis)
            )
        if isinstance(self.norm, str) and self.norm == "inf":
            object.__setattr__(self, "norm", math.inf)
        if self.norm is not None and not (is_number(self.norm) and self.norm > 0.0):
            raise InvalidArgument(
                "the p of a norm is a positive number",
                where="Units.norm",
                got=repr(self.norm),
                allowed="> 0, or infinity",
            )


@register(
    "pattern",
    name="heads",
    formula="an attention head: its queries, keys, values and what reads it",
    source="Michel, Levy and Neubig 2019, Are Sixteen Heads Really Better than One?",
)
@dataclass(frozen=True, slots=True)
class Heads(Pattern):
    """An attention head goes with its queries, keys and values, and the columns that read it.

    Source: Michel, Levy and Neubig 2019, "Are Sixteen Heads Really Better than One?".
    """

    coupled: ClassVar[bool] = True


@register(
    "pattern",
    name="layers",
    formula="a whole weight tensor with its bias",
    source="Fan, Grave and Joulin 2020, Reducing Transformer Depth on Demand with Structured Dropout",
)
@dataclass(frozen=True, slots=True)
class Layers(Pattern):
    """A whole weight goes with its bias: meant for branches beside a shortcut (choose by `only`).

    Source: Fan, Grave and Joulin 2020, "Reducing Transformer Depth on Demand with Structured Dropout".
    """

    coupled: ClassVar[bool] = True


def as_pattern(pattern: str | Pattern) -> Pattern:
    """Return a pattern, given one or its registered name; raises `UnknownName`, or `InvalidArgument` as for "1:4"."""
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise InvalidArgument(
            "not a pattern",
            where="pattern",
            got=repr(pattern)[:80],
            allowed="a registered name, or such as kk.prune.NofM(keep=2, of=4)",
        )
    short = re.fullmatch(r"(\d+):(\d+)", pattern)
    if short or pattern == "n:m":
        n, m = (int(part) for part in short.groups()) if short else (1, 4)
        if short and 2 * n == m:
            return NofM(keep=n, of=m)
        raise InvalidArgument(
            "n:m is written for what stays and for what goes",
            where="pattern",
            got=repr(pattern),
            allowed=f"NofM(keep={n}, of={m}) if {n} of {m} stay, "
            f"NofM(keep={m - n}, of={m}) if {n} of {m} go",
        )
    if pattern == "blocks":
        raise InvalidArgument(
            "blocks have a size", where="pattern", got=repr(pattern), allowed="such as Blocks(4, 4)"
        )
    made: Any = registry.find("pattern", pattern)()
    return made
