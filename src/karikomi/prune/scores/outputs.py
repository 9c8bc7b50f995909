"""Scores of units by what they put out, or by the scale on it: for patterns that remove units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.rule import Array, Namespace


@register(
    "score",
    name="bn_scale",
    formula="a unit: |gamma| of the normalisation that follows it",
    source="Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming",
)
@dataclass(frozen=True, slots=True)
class BNScale(Score):
    """The scale of a normalisation on a unit's output: the smallest scales are removed first.

    ``|gamma|`` (the fact ``gate``). Meant for networks trained with a penalty on the scales.

    >>> import numpy as np
    >>> BNScale().of_groups(np.ones((2, 3)), {"gate": np.array([-0.5, 0.1])}, xp=np).tolist()
    [0.5, 0.1]

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming",
    where one threshold holds for all layers.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    of_units_only: ClassVar[bool] = True

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``|gamma|``."""
        return xp.abs(facts["gate"])


@register(
    "score",
    name="apoz",
    formula="a unit: 1 - the share of zeros among its outputs (APoZ)",
    source="Hu et al. 2016, Network Trimming",
)
@dataclass(frozen=True, slots=True)
class APoZ(Score):
    """How often a unit puts out something: the one with the highest average percentage of zeros goes first.

    ``1 - zeros``, over samples and positions, after the activation: units differ only where that
    gives exact zeros, as ReLU does.

    >>> import numpy as np
    >>> APoZ().of_groups(np.ones((2, 3)), {"zeros": np.array([0.25, 1.0])}, xp=np).tolist()
    [0.75, 0.0]

    Source: Hu, Peng, Tai and Tang 2016, "Network Trimming: A Data-Driven Neuron Pruning Approach
    towards Efficient Deep Architectures", eq. 1; one minus it, since the lowest scores go.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"zeros"})
    of_units_only: ClassVar[bool] = True

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``1 - zeros``."""
        return 1.0 - facts["zeros"]


@register(
    "score",
    name="activation",
    formula="a unit: the mean of |a| over its outputs a",
    source="Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference",
)
@dataclass(frozen=True, slots=True)
class Activation(Score):
    """The mean magnitude of a unit's outputs: the quietest goes first.

    ``E|a|``, over samples and positions (the fact ``output``). A loud unit that never changes scores
    high: see `Deviation`.

    >>> import numpy as np
    >>> Activation().of_groups(np.ones((2, 3)), {"output": np.array([2.0, 0.5])}, xp=np).tolist()
    [2.0, 0.5]

    Source: Molchanov, Tyree, Karras, Aila and Kautz 2017, "Pruning Convolutional Neural Networks for
    Resource Efficient Inference", section 2.2, there of post-ReLU outputs.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"output"})
    of_units_only: ClassVar[bool] = True

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``E|a|``."""
        return facts["output"]


@register(
    "score",
    name="deviation",
    formula="a unit: the standard deviation of its outputs",
    source="Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference",
)
@dataclass(frozen=True, slots=True)
class Deviation(Score):
    """How much a unit's outputs vary: a unit with the same output for every input is removed first.

    ``sqrt(E (a - E a)^2)``, over samples and positions, in the order of the variance. What a constant
    unit gave the next layer is a bias there.

    >>> import numpy as np
    >>> Deviation().of_groups(np.ones((2, 3)), {"deviation": np.array([0.0, 1.5])}, xp=np).tolist()
    [0.0, 1.5]

    Source: Polyak and Wolf 2015, "Channel-Level Acceleration of Deep Face Representations" (inbound
    pruning by variance); Molchanov et al. 2017, section 2.2.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"deviation"})
    of_units_only: ClassVar[bool] = True

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return the standard deviation."""
        return facts["deviation"]
