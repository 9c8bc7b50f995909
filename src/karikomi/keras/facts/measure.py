"""Measure the facts that a score needs of a Keras model, on every backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.keras.facts.forward import Forward
from karikomi.keras.facts.gradients import Gradients, Loss
from karikomi.keras.facts.layer_calls import batches, steady
from karikomi.keras.layers.prunable import Oriented
from karikomi.prune.facts import measured_on

OF_GRADIENTS = measured_on("gradients") - {"hessian_gradient"}
OF_ONE_BATCH = measured_on("first batch") - {"flow"}
MEASURED = OF_GRADIENTS | OF_ONE_BATCH | measured_on("inputs") | measured_on("outputs")
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

    Raises `InvalidArgument` for what is missing, `Unsupported` for a fact that cannot be measured, `NonFinite`.
    """
    check_measurable(needs, data, loss, where=where)
    meters: list[Forward | Gradients] = []
    if needs - OF_GRADIENTS:
        meters.append(Forward(model, wanted, needs - OF_GRADIENTS))
    if needs & OF_GRADIENTS and loss:
        meters.append(Gradients(model, list(wanted.values()), needs & OF_GRADIENTS, loss))
    with steady(model):
        for batch in batches(data, where=where):
            for meter in meters:
                meter.see(batch)
            if needs <= OF_ONE_BATCH:
                break
    found = {fact: values for meter in meters for fact, values in meter.result().items()}
    for fact in sorted(needs):
        missing = sorted(set(wanted) - set(found[fact]))
        if missing:
            raise Unsupported(
                f"the fact {fact!r} cannot be measured for this weight",
                where=missing[0],
                hint=f"exclude={missing[0]!r}",
            )
        for name, values in found[fact].items():
            if not np.isfinite(values).all():
                raise NonFinite(f"the measured {fact} is NaN or infinite", where=name)
    return found


def following(
    model: Any, wanted: Mapping[str, Oriented], data: Iterable[Any], *, where: str
) -> dict[str, Any]:
    """Return name of a kernel -> the only layer that normalises its outputs, by the first batch."""
    forward = Forward(model, wanted, frozenset({"gate"}))
    forward.see(next(batches(data, where=where)))
    return {name: norms[0] for name, norms in forward.norms.items() if len(norms) == 1}


def check_measurable(needs: frozenset[str], data: Any, loss: Any, *, where: str) -> None:
    """Raise `Unsupported` for facts that are not measured here, `InvalidArgument` for missing arguments."""
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
