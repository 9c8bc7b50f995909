"""Measure the facts that a score needs of a network.

The network is run on the user's data as it is and left exactly as it was: modes, flags, gradients,
buffers and random numbers. Memory does not grow with the number of batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.prune.facts import measured_on
from karikomi.torch.facts import forward
from karikomi.torch.facts.flow import flows
from karikomi.torch.facts.forward import Forward
from karikomi.torch.facts.gradients import Gradients, Loss
from karikomi.torch.facts.inputs import READERS
from karikomi.torch.modules.parameters import check_names, unwrapped
from karikomi.torch.tracing.batches import Batch, batches_of, is_whole, length_of
from karikomi.torch.tracing.eval_mode import steady
from karikomi.torch.tracing.isolation import isolated

OF_GRADIENTS = measured_on("gradients")
OF_ONE_BATCH = measured_on("first batch")
MEASURED = OF_GRADIENTS | OF_ONE_BATCH | measured_on("outputs") | READERS.keys()
"""The names of the facts that can be measured on data."""

_ELSEWHERE = {
    "moved": "it is gathered during training: attach",
    "importance": "kk.torch.prune_(module, ..., importance={name: tensor}) takes it",
}

Facts = dict[str, dict[str, torch.Tensor]]


def measure(
    module: nn.Module,
    needs: Iterable[str],
    weights: Mapping[str, torch.Tensor] | Iterable[str],
    *,
    data: Iterable[Any] | None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
    where: str = "prune_",
) -> Facts:
    """Return fact -> weight name -> tensor, for the facts in `needs` and the parameters in `weights`.

    Means over batches: ``gradient`` dL/dw, ``squared_gradient`` (dL/dw)^2 (batches of one example give
    the Fisher diagonal; larger ones less, as gradients cancel), ``hessian_gradient`` H dL/dw: all of the
    weight's shape. ``flow``: see `karikomi.torch.facts.flow.flows`. Sums over samples and positions:
    ``input_norm``, broadcastable to the weight, and ``gram`` X^T X / N, (groups, d, d).
    One number per unit, after the norm and activation that directly follow: ``zeros``, ``output``,
    ``deviation``; ``gate``, the norm's scale. ``macs``: multiply-accumulates per example, one number.

    `data`: batches ``(inputs, targets)``, or inputs alone where no loss is needed; an iterator serves
    one pass (``hessian_gradient`` takes two); ``flow``, ``gate`` and ``macs`` read the first batch.
    `loss`: ``(outputs, targets) -> one number``, a mean over the batch. All is measured in eval mode (no
    dropout), but batch norms without running statistics use the batch's statistics (not for ``flow``).

    Raises `InvalidArgument` for arguments that are missing or invalid, `UnknownName` for a parameter,
    `Unsupported` for a fact that is not defined for a weight, `NonFinite` naming a weight.

    >>> layer = nn.Linear(2, 1)
    >>> data = [torch.tensor([[3.0, 1.0], [4.0, 0.0]])]
    >>> measure(layer, {"input_norm"}, ["weight"], data=data)["input_norm"]["weight"].tolist()
    [[5.0, 1.0]]

    Source: of the formulas, the scores that use them.
    """
    module, needs = unwrapped(module), frozenset(needs)
    chosen = _chosen(module, weights, where)
    if not needs or not chosen:
        return {fact: {} for fact in needs}
    _check(needs, data, loss, where)
    with _isolated(module, seed):
        meters = _meters(module, needs, chosen, loss)
        passes = max(meter.passes for meter in meters)
        if passes > 1 and isinstance(data, Iterator):
            raise Unsupported(
                "this score reads the data twice, and an iterator yields it once",
                where=f"{where}: data",
                got=type(data).__name__,
                hint="pass a list or a DataLoader",
            )
        for number in range(passes):
            reading = [meter for meter in meters if meter.passes > number]
            _read(reading, data, module, number, needs <= OF_ONE_BATCH, progress, where)
        found = {fact: values for meter in meters for fact, values in meter.result().items()}
    for fact, values in found.items():
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise NonFinite(
                    f"the measured {fact} is NaN or infinite",
                    where=name,
                    hint="non-finite inputs, or a network that diverged?",
                )
    return found


def following(module: nn.Module, data: Iterable[Any], *, where: str = "prune_") -> dict[str, str]:
    """Return layer name -> name of the normalisation that takes its output, by the first batch.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    >>> following(net, [torch.zeros(4, 2)])
    {'0': '1'}
    """
    module = unwrapped(module)
    check_data(data, where)
    with _isolated(module, 0):
        batch = next(batches_of(data, module, where=f"{where}: data"))
        return forward.following(module, batch)


class _Flow:
    """The flow as a meter: it takes the first batch alone."""

    passes = 1

    def __init__(self, module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        self._module, self._weights = module, weights
        self._found: dict[str, torch.Tensor] = {}

    def see(self, batch: Batch, number: int) -> None:
        if not self._found:
            self._found = flows(self._module, self._weights, batch)

    def result(self) -> Facts:
        return {"flow": self._found}


_Meter = Gradients | Forward | _Flow


def _meters(
    module: nn.Module, needs: frozenset[str], weights: Mapping[str, torch.Tensor], loss: Loss | None
) -> list[_Meter]:
    meters: list[_Meter] = []
    gradients, seen = needs & OF_GRADIENTS, needs - OF_GRADIENTS - {"flow"}
    if gradients and loss:
        meters.append(Gradients(module, weights, gradients, loss))
    if seen:
        meters.append(Forward(module, weights, seen))
    if "flow" in needs:
        meters.append(_Flow(module, weights))
    return meters


def _read(
    meters: list[_Meter],
    data: Any,
    module: nn.Module,
    number: int,
    one_batch: bool,
    progress: bool,
    where: str,
) -> None:
    batches = batches_of(data, module, where=f"{where}: data")
    if one_batch:
        batches = iter([next(batches)])
    total = 1 if one_batch else length_of(data)
    # None: tqdm shows its bar on a terminal only.
    hidden = None if progress and not one_batch else True
    for batch in tqdm(
        batches, desc="measure", unit="batch", total=total, disable=hidden, leave=False
    ):
        for meter in meters:
            meter.see(batch, number)


@contextmanager
def _isolated(module: nn.Module, seed: int) -> Iterator[None]:
    """Restore modes, flags and random numbers after the block; compiled parts run eagerly in it."""
    with (
        torch.inference_mode(False),
        torch.compiler.set_stance("force_eager"),
        isolated(seed, 0),
        steady(module),
    ):
        yield


def _chosen(
    module: nn.Module, weights: Mapping[str, torch.Tensor] | Iterable[str], where: str
) -> dict[str, torch.Tensor]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    check_names(weights, parameters, where=where)
    return {name: parameters[name] for name in weights}


def _check(needs: frozenset[str], data: Any, loss: Any, where: str) -> None:
    for fact in sorted(needs - MEASURED):
        raise InvalidArgument(
            "this fact is not measured on data",
            where=where,
            got=repr(fact),
            allowed=", ".join(sorted(MEASURED)),
            hint=_ELSEWHERE.get(fact),
        )
    if data is None:
        raise InvalidArgument(
            f"the score needs {_listed(needs)}, measured on data",
            where=where,
            hint="pass data=, an iterable of batches "
            + ("(inputs, targets)" if needs & OF_GRADIENTS else "of inputs"),
        )
    check_data(data, where)
    if needs & OF_GRADIENTS and not callable(loss):
        raise InvalidArgument(
            f"the score needs {_listed(needs & OF_GRADIENTS)}, the gradient of a loss",
            where=where,
            got=None if loss is None else repr(loss)[:80],
            hint="pass loss=, such as torch.nn.functional.cross_entropy",
        )


def _listed(facts: Iterable[str]) -> str:
    return " and ".join(sorted(facts))


def check_data(data: Any, where: str) -> None:
    """Raise `InvalidArgument` for a single batch, whose rows or halves would pass for batches; not for a whole pair."""
    if is_whole(data) or isinstance(data, Dataset):
        return
    single = isinstance(data, tuple) and any(isinstance(batch, torch.Tensor) for batch in data)
    if single or isinstance(data, torch.Tensor | Mapping) or not isinstance(data, Iterable):
        raise InvalidArgument(
            "data is an iterable of batches",
            where=f"{where}: data",
            got=type(data).__name__,
            allowed="such as [(inputs, targets)] or a DataLoader",
        )


def check_rereadable(data: Any, where: str) -> None:
    """Raise `InvalidArgument` for an iterator as data that may be read more than once."""
    if isinstance(data, Iterator):
        raise InvalidArgument(
            "data may be read more than once, and an iterator yields it once",
            where=f"{where}: data",
            got=type(data).__name__,
            allowed="a list or a DataLoader of batches",
        )
