"""Prune Keras models in place, without wrapping a layer: measure, select, mask, report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from karikomi.keras.pruning.masks import Masks
from karikomi.keras.pruning.request import ModelRequest
from karikomi.prune import Allocation, Pattern, Score
from karikomi.prune.facts import Facts
from karikomi.selection.request import request_of

WHERE = "keras.prune_"


def prune_(
    model: Any,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    count: int | Mapping[str, int] | None = None,
    width: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    score: str | Score = "magnitude",
    allocation: Allocation | None = None,
    pattern: str | Pattern = "unstructured",
    rounding: str = "up",
    importance: Mapping[str, Any] | None = None,
    data: Iterable[Any] | None = None,
    loss: Any = None,
    facts: Facts | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    protect: Collection[str] | None = None,
    masks: Masks | None = None,
) -> Masks:
    """Set the least important weights of a built model to zero, in place, and return the masks.

    Any model on any backend: functional, subclassed, nested, with shared or unknown layers. The kernels of
    Dense, EinsumDense, convolutions (transposed, depthwise and separable ones too), recurrent layers and cells, and
    what custom layers declare (`declare_prunable`, or a method ``get_prunable_weights``), are scored in float32; of
    each pool of the allocation exactly the asked number goes, ties by the order of the model, then in the order
    units, inputs, kernel positions: the same masks as in torch for the same weights. What else there is (biases,
    normalisations, embeddings, unknown layers) is left alone: ``masks.left_alone`` has the reasons. Variables that
    lost every weight are in ``masks.emptied``; ``masks.account`` has the share of all weights that is zero and, per
    variable, what was removed and why, and, with `data`, the effect on the output.

    One target, unless the pattern determines how much is removed: `sparsity`, the share of all selected weights that
    is zero afterwards, in [0, 1), or globs over paths -> such a share, each layer by hand, and of units or
    blocks as many go as make it at least that share, or with ``rounding="nearest"`` nearest to it; `count`, how many
    weights (units, heads, layers, blocks) are zero afterwards, or globs -> such numbers; `width`, the share of units
    (heads, layers, blocks) that stays, in (0, 1]; or a budget for what stays of the whole model, as a share or a
    whole number: `parameters`, `macs` (of one example; needs `data`), `bytes`. `score`, `allocation`, `pattern`:
    registered names (``karikomi list``) or objects of `karikomi.prune`; without an `allocation` it is ``uniform`` for
    units, blocks and scores that compare within rows (``wanda``), else ``global``. `data`: batches ``(inputs,
    targets)`` or inputs, that can be read again. `loss`: a loss of Keras, or ``loss(outputs, targets)``, one number.
    `facts`: measured facts, fact -> path -> array of the variable's shape (`karikomi.prune.FACTS`). `importance`:
    path -> array of the variable's shape, a score of your own instead of `score`; what has none is left alone.
    `only`, `exclude`: globs over paths; one that spells a bias or another variable out selects it too
    (`karikomi.select.outright`). `protect`: what is left alone, of ``first``, ``last``, ``norms``, ``embeddings``,
    ``recurrent``; by default norms and embeddings, and for units and layers also recurrent kernels and the last
    layer. `masks`: earlier masks; what they removed stays removed and counts.

    Units take their bias with them, and, with `data`, the scale and shift of the normalisation that
    follows them. Everything is measured in inference mode.

    Raises `InvalidArgument` for a model that is not built, a target that is missing or can be read in two
    ways, `UnknownName` for a name or a glob, `Unsupported` when nothing can be pruned, for scores that
    reconstruct, and for facts that Keras cannot give, `NonFinite` naming a variable.

    >>> import keras, karikomi as kk
    >>> head = keras.layers.Dense(1, name="head")
    >>> model = keras.Sequential([keras.Input((4,)), head], name="net")
    >>> head.kernel.assign([[3.0], [-1.0], [2.0], [-4.0]]) is None or True
    True
    >>> masks = kk.keras.prune_(model, sparsity=0.5)
    >>> keras.ops.convert_to_numpy(head.kernel).ravel().tolist(), masks.counts(), masks.left_alone
    ([3.0, 0.0, 0.0, -4.0], {'net/head/kernel': (2, 4)}, {'net/head/bias': 'a bias'})

    Source: Han et al. 2015 (magnitude); Frankle and Carbin 2019 (global).
    """
    request = request_of(
        WHERE,
        sparsity=sparsity,
        count=count,
        width=width,
        parameters=parameters,
        macs=macs,
        bytes=bytes,
        score=score,
        allocation=allocation,
        pattern=pattern,
        rounding=rounding,
        importance=importance,
        facts=facts,
        only=only,
        exclude=exclude,
        protect=protect,
    )
    masks = masks or Masks()
    for part in request.rounds():
        # Each round is measured with what the ones before it have left.
        masks = ModelRequest(model=model, request=part, data=data, loss=loss).find(masks)
        masks.apply_(model)
    return masks
