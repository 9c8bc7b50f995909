"""Patterns: what is removed as one item. A weight, n of m, a block, a unit, a head, a whole layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from karikomi import registry
from karikomi.errors import InvalidArgument
from karikomi.registry import register
from karikomi.schedule import whole


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
    A weight whose inputs `of` does not divide is left alone, and reported.

    >>> NofM(keep=2, of=4).sparsity
    0.5

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (2 of 4); Zhou et al. 2021,
    "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch".
    """

    fixed_share: ClassVar[bool] = True
    keep: int
    of: int

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

    Tiles at the edges are smaller where the shape is no multiple. `units`, `inputs`: >= 1, else
    `InvalidArgument`.

    >>> Blocks(4, 4)
    Blocks(units=4, inputs=4)

    Source: Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """

    units: int
    inputs: int

    def __post_init__(self) -> None:
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

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets".
    """

    coupled: ClassVar[bool] = True


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
