"""Measure what a score needs to know of a Keras model: the one way to all facts on every backend.

The model is run on the user's data in inference mode; memory does not grow with the number of batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.keras.facts.gradients import Gradients, Loss
from karikomi.keras.facts.inputs import InputNorms, Macs
from karikomi.keras.facts.layer_calls import batches, run, steady, watched
from karikomi.keras.facts.outputs import Outputs, gates
from karikomi.keras.layers.prunable import Oriented

OF_GRADIENTS = frozenset({"gradient", "squared_gradient"})
OF_OUTPUTS = frozenset({"zeros", "output", "deviation"})
MEASURED = OF_GRADIENTS | OF_OUTPUTS | {"input_norm", "gate", "macs"}
"""The names of the facts that can be measured on data."""

Facts = dict[str, dict[str, Any]]


def measure(
    model: Any,
    needs: frozenset[str],
    wanted: Mapping[str, Oriented],
    *,
    data: Iterable[Any] | None,
    loss: Loss | None,
    where: str,
) -> Facts:
    """Return fact -> name -> numbers in the variable's own shape, or one per unit, for these variables.

    Raises `InvalidArgument` for what is missing, `Unsupported` for a fact that cannot be had, `NonFinite`.
    """
    check(needs, data, loss, where=where)
    by_identity = {id(item.variable): item for item in wanted.values()}
    outputs = Outputs(by_identity, needs & OF_OUTPUTS)
    inputs = InputNorms(by_identity) if "input_norm" in needs else None
    macs = Macs(by_identity)
    gradients = (
        Gradients(model, list(wanted.values()), loss) if needs & OF_GRADIENTS and loss else None
    )

    def see(layer: Any, _: Any, args: tuple[Any, ...], __: Any, result: Any) -> None:
        outputs.see(layer, args, result)
        if inputs is not None:
            inputs.see(layer, args, result)
        if number == 0 and "macs" in needs:
            macs.see(layer, args, result)

    with steady(model):
        for number, (given, targets) in enumerate(batches(data, where=where)):
            if needs - OF_GRADIENTS and (number == 0 or needs - OF_GRADIENTS - {"gate", "macs"}):
                with watched(model, see):
                    run(model, given)
                outputs.end()
            if gradients is not None:
                gradients.see(given, targets)
    found: Facts = {fact: dict(ones) for fact, ones in outputs.result().items()}
    found |= {} if inputs is None else {"input_norm": inputs.result()}
    found |= {"macs": macs.counts} if "macs" in needs else {}
    found |= {"gate": gates(by_identity, outputs.norms)} if "gate" in needs else {}
    found |= (
        {} if gradients is None else {f: dict(gradients.result()[f]) for f in needs & OF_GRADIENTS}
    )
    _check_found(found, needs, wanted)
    return found


def following(
    model: Any, wanted: Mapping[str, Oriented], data: Iterable[Any], *, where: str
) -> dict[str, Any]:
    """Return name of a kernel -> the one layer that normalises its outputs, by the first batch."""
    outputs = Outputs({id(item.variable): item for item in wanted.values()}, frozenset())
    given, _ = next(batches(data, where=where))
    with watched(model, lambda layer, _, args, __, result: outputs.see(layer, args, result)):
        run(model, given)
    return {name: found[0] for name, found in outputs.norms.items() if len(found) == 1}


def check(needs: frozenset[str], data: Any, loss: Any, *, where: str) -> None:
    """Refuse facts that are not measured here, and what is missing to measure the others."""
    strangers = sorted(needs - MEASURED)
    if strangers:
        raise Unsupported(
            f"the fact {strangers[0]!r} is not measured in Keras",
            where=where,
            allowed=", ".join(sorted(MEASURED)),
            hint="measure it yourself, and pass facts={fact: {path: array}}",
        )
    if data is None:
        raise InvalidArgument(
            f"the score needs {' and '.join(sorted(needs))}, measured on data",
            where=where,
            hint="pass data=, an iterable of batches (inputs, targets)",
        )
    if needs & OF_GRADIENTS and not callable(loss):
        raise InvalidArgument(
            "the score needs the gradient of a loss",
            where=where,
            got=None if loss is None else repr(loss)[:80],
            hint="pass loss=, such as keras.losses.SparseCategoricalCrossentropy(from_logits=True)",
        )


def _check_found(found: Facts, needs: frozenset[str], wanted: Mapping[str, Oriented]) -> None:
    for fact in sorted(needs):
        missing = sorted(set(wanted) - set(found[fact]))
        if missing:
            raise Unsupported(
                f"the fact {fact!r} cannot be seen for this weight",
                where=missing[0],
                hint=f"exclude={missing[0]!r}",
            )
        for name, item in found[fact].items():
            if not np.isfinite(item).all():
                raise NonFinite(f"the measured {fact} is NaN or infinite", where=name)
