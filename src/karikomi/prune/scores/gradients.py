"""Scores of weights by gradients: what the loss, or its gradient, would do without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.rule import Array, Namespace
from karikomi.schedule import whole_from


@register(
    "score",
    name="snip",
    formula="|w g|; a group: the sum",
    source="Lee, Ajanthan and Torr 2019, SNIP",
)
@dataclass(frozen=True, slots=True)
class SNIP(Score):
    """By how much the loss changes with the connection, to first order, up or down.

    ``|w g|``, g the mean gradient over batches; a group: the sum of it. Meant for networks before
    training, one batch being enough.

    >>> import numpy as np
    >>> SNIP().of_weights(np.array([2.0, -3.0]), {"gradient": np.array([0.5, 0.1])}, xp=np).round(6).tolist()
    [1.0, 0.3]

    Source: Lee, Ajanthan and Torr 2019, "SNIP: Single-shot Network Pruning based on Connection
    Sensitivity", eq. 5 and 6, without the division by the sum over all, which changes no order.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``|w g|``."""
        return xp.abs(weights * facts["gradient"])


@register(
    "score",
    name="grasp",
    formula="w (H g), signed: what slows training down, or helps it least, goes first",
    source="Wang, Zhang and Grosse 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow",
)
@dataclass(frozen=True, slots=True)
class GraSP(Score):
    """What the squared gradient norm would lose with the weight: what reduces the flow is removed first.

    Removing weight w is a step d = -w. By it the squared gradient norm changes by
    ``|g(w + d)|^2 - |g(w)|^2 = 2 d (H g) = -2 w (H g)``, to first order. The paper calls
    ``-w (H g)`` the score and removes the *largest*, whose removal raises the norm most; here the
    lowest go, so the score is ``w (H g)``, of either sign. A group: the sum.

    >>> import numpy as np
    >>> flow = {"hessian_gradient": np.array([2.0, 2.0])}
    >>> GraSP().of_weights(np.array([-1.0, 0.5]), flow, xp=np).tolist()
    [-2.0, 1.0]

    Source: Wang, Zhang and Grosse 2020, "Picking Winning Tickets Before Training by Preserving
    Gradient Flow", eq. 7 to 9. The paper softens the outputs by a temperature of 200: have the loss
    divide them by it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian_gradient"})

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``w (H g)``."""
        return weights * facts["hessian_gradient"]


@register(
    "score",
    name="synflow",
    formula="|w| |dR/d|w||, R the sum of outputs for ones with |weights|; in 100 rounds",
    source="Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving synaptic flow",
)
@dataclass(frozen=True, slots=True)
class SynFlow(Score):
    """The flow through a weight when all weights are positive and the input is ones: needs no data.

    ``|w| * |dR/d|w||`` (the fact ``flow``), measured anew in each round: after round k of n
    ``(1 - sparsity)^(k / n)`` is left, which keeps whole layers from collapsing. A group: the sum.

    `rounds`: a whole number >= 1, else `InvalidArgument`.

    >>> import numpy as np
    >>> SynFlow().of_weights(np.array([-2.0, 0.5]), {"flow": np.array([3.0, 4.0])}, xp=np).tolist()
    [6.0, 2.0]
    >>> SynFlow().rounds
    100

    Source: Tanaka, Kunin, Yamins and Ganguli 2020, "Pruning neural networks without any data by
    iteratively conserving synaptic flow", eq. 2 and algorithm 1, n = 100.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"flow"})
    rounds: int = 100

    def __post_init__(self) -> None:
        whole_from(1, self.rounds, "it takes at least one round", where="SynFlow.rounds")

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``|w| * |flow|``."""
        return xp.abs(weights) * xp.abs(facts["flow"])


@register(
    "score",
    name="taylor",
    formula="(w g)^2; a group: (sum w g)^2",
    source="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning",
)
@dataclass(frozen=True, slots=True)
class Taylor(Score):
    """The square of what the loss changes by without the weight or the group, to first order.

    ``(w g)^2``; a group: ``(sum of w g)^2``, in which opposite changes cancel (`SNIP` has the sum of
    magnitudes). g is the mean gradient over batches. Of single weights it has the order of `SNIP`,
    whose numbers do not vanish in float32 when ``|w g|`` is below 1e-23.

    >>> import numpy as np
    >>> facts = {"gradient": np.array([[0.5, 1.0], [0.5, -0.5]])}
    >>> Taylor().of_weights(np.array([[2.0, 3.0], [2.0, 2.0]]), facts, xp=np).tolist()
    [[1.0, 9.0], [1.0, 1.0]]
    >>> Taylor().of_groups(np.array([[2.0, 3.0], [2.0, 2.0]]), facts, xp=np).tolist()
    [16.0, 0.0]

    Source: Molchanov, Mallya, Tyree, Frosio and Kautz 2019, "Importance Estimation for Neural Network
    Pruning", eq. 7 and 8. The paper averages the squares of single batches; here the mean gradient is
    squared, which needs one number per weight and not one per unit and batch.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``(w g)^2``."""
        change = weights * facts["gradient"]
        return change * change

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``(sum w g)^2``."""
        change = xp.sum(weights * facts["gradient"], axis=1)
        return change * change


@register(
    "score",
    name="movement",
    formula="the sum over training steps of -(learning rate) w g, signed",
    source="Sanh, Wolf and Rush 2020, Movement Pruning",
)
@dataclass(frozen=True, slots=True)
class Movement(Score):
    """How far training has moved a weight away from zero: what moves towards zero goes first.

    ``-sum over steps of lr * w * g`` (the fact ``moved``), of either sign. A group: the sum. It is
    gathered over fine-tuning and not defined for a network that is not trained.

    >>> import numpy as np
    >>> Movement().of_weights(np.array([2.0, 0.1]), {"moved": np.array([-0.5, 0.2])}, xp=np).tolist()
    [-0.5, 0.2]

    Source: Sanh, Wolf and Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", eq. 4 to 6,
    "hard" movement. The paper learns scores by a straight-through estimate, where masked weights go on
    being scored; so they are here as long as dense gradients are gathered.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"moved"})

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return what was gathered."""
        return facts["moved"]


@register(
    "score",
    name="fisher",
    formula="w^2 E[g^2] / 2; a group: the sum",
    source="LeCun, Denker and Solla 1990, Optimal Brain Damage; Theis et al. 2018",
)
@dataclass(frozen=True, slots=True)
class Fisher(Score):
    """What the loss rises by without the weight, to second order, the Hessian being a Fisher diagonal.

    ``w^2 h / 2`` with ``h = E[g^2]`` (the fact ``squared_gradient``; of single examples it is the
    empirical Fisher diagonal). A group: the sum, as if the weights were independent.

    >>> import numpy as np
    >>> Fisher().of_weights(np.array([2.0, 3.0]), {"squared_gradient": np.array([1.0, 4.0])}, xp=np).tolist()
    [2.0, 18.0]

    Source: LeCun, Denker and Solla 1990, "Optimal Brain Damage", eq. 7; the Fisher diagonal for the
    Hessian's: Theis, Korshunova, Tejani and Huszar 2018, "Faster gaze prediction with dense networks
    and Fisher pruning".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"squared_gradient"})

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``w^2 h / 2``."""
        return 0.5 * weights * weights * facts["squared_gradient"]
