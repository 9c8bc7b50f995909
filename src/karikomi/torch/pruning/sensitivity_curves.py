"""Sensitivity curves: the loss of the validation metric by pruning each weight alone, at several sparsities."""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from karikomi.errors import BadFile, InvalidArgument, NonFinite, Unsupported
from karikomi.files import as_path, write_json
from karikomi.prune import Score, Unstructured, as_score, check_sparsity
from karikomi.selection.exact_masks import check_combination
from karikomi.selection.request import selected
from karikomi.tasks.metrics import sign_of
from karikomi.torch.facts.measure import check_rereadable, measure
from karikomi.torch.modules.fingerprint import fingerprint
from karikomi.torch.modules.prunable import prunable
from karikomi.torch.pruning.in_place import prune_
from karikomi.torch.tracing.eval_mode import Judge, steady
from karikomi.torch.tracing.isolation import isolated
from karikomi.torch.tracing.restoring import restored_unless_kept

WHERE = "torch.sensitivity"
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
_FORMAT = "karikomi sensitivity 1"
_PARTS = {"format", "score", "goal", "module", "dense", "curves"}

Points = dict[str, dict[float, float]]


class Curves(Mapping[str, Mapping[float, float]]):
    """Parameter name -> sparsity -> the loss of the validation metric; a gain is negative.

    `dense`: the metric of the network as it is. Prints as a table.

    >>> print(Curves(0.97, {"fc.weight": {0.5: 0.0, 0.9: 0.125}}))
    tensor        50%      90%
    fc.weight  0.0000   0.1250
    dense      0.9700
    """

    def __init__(self, dense: float, curves: Mapping[str, Mapping[float, float]]) -> None:
        self.dense = dense
        self._curves = {name: dict(curve) for name, curve in curves.items()}

    def __getitem__(self, name: str) -> Mapping[float, float]:
        return self._curves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._curves)

    def __len__(self) -> int:
        return len(self._curves)

    def __repr__(self) -> str:
        return f"Curves({len(self)} tensors, dense {self.dense:.4g})"

    def __str__(self) -> str:
        """Return a table with one line per tensor."""
        shares = sorted({share for curve in self._curves.values() for share in curve})
        width = max([len(name) for name in self._curves] + [len("tensor")])
        head = "".join(f" {f'{100 * share:.4g}%':>8}" for share in shares)
        lines = [f"{'tensor':<{width}}{head}"]
        for name, curve in self._curves.items():
            losses = (f"{curve[share]:.4f}" if share in curve else "-" for share in shares)
            lines.append(f"{name:<{width}}" + "".join(f" {loss:>8}" for loss in losses))
        return "\n".join([*lines, f"{'dense':<{width}} {self.dense:>8.4f}"])


def sensitivity(
    module: nn.Module,
    judge: Judge,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    score: str | Score = "magnitude",
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    goal: str = "max",
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Curves:
    """Return what pruning each weight alone costs, and leave the module as it is, bit for bit.

    ``loss_i(s) = judge(f) - judge(f with weight i pruned to sparsity s)``. For
    ``prune_(..., allocation="sensitivity", facts={"curve": curves})`` with the same selection.

    `judge`: ``judge(module) -> number``, higher is better, or lower with ``goal="min"``, which changes the
    sign of the losses; on data that the final test does not use. It is called in eval mode, once for
    the module and once per weight and sparsity. `sparsities`: in [0, 1). `score`, `only`,
    `exclude`, `data`, `loss`: as in `prune_`; facts are measured once, on the dense module, where the score
    allows. `checkpoint`: a JSON file, written after each point; what it
    contains of this module and score is not measured again.

    Raises what `prune_` raises, `NonFinite` for a judge that returns NaN or infinity, `Unsupported` for a
    checkpoint of another module, score or judge, `BadFile` for a file of another kind.

    >>> net = nn.Linear(4, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    >>> curves = sensitivity(net, lambda one: float(one.weight.sum()), sparsities=(0.25, 0.75))
    >>> curves["weight"], net.weight.sum().item()
    ({0.25: 1.0, 0.75: 6.0}, 10.0)

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (figure 2); Han et al. 2015.
    """
    sign, shares = sign_of(goal, where=WHERE), _checked(judge, sparsities, data)
    scored_by = as_score(score)
    check_combination(scored_by, Unstructured())
    weights, left_alone = prunable(module)
    names, _ = selected(
        weights,
        left_alone,
        only=only,
        exclude=exclude,
        where=WHERE,
        allowed="weights of Linear and Conv layers",
    )
    weights = {name: weights[name] for name in names}
    before = _judged(judge, module, "the dense module")
    notes = _Notes(checkpoint, module, scored_by, before, goal)
    facts, data = _facts(scored_by, module, weights, data, loss)
    missing = [(name, share) for name in weights for share in shares if share not in notes.of(name)]
    hidden = None if progress else True
    for name, share in tqdm(missing, desc="sensitivity", unit="point", disable=hidden, leave=False):
        with restored_unless_kept(lambda name=name: {name: weights[name]}):
            prune_(
                module,
                share,
                score=scored_by,
                only=glob.escape(name),
                data=data,
                loss=loss,
                facts=facts,
            )
            after = _judged(judge, module, f"{name} at sparsity {share:g}")
        notes.write(name, share, sign * (notes.dense - after))
    return Curves(notes.dense, {n: {s: notes.of(n)[s] for s in shares} for n in weights})


class _Notes:
    """The points measured so far, in memory and, with a path, in a file."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        module: nn.Module,
        score: Score,
        dense: float,
        goal: str,
    ) -> None:
        self._path = None if path is None else as_path(path)
        self._identity = {}
        self.dense: float = dense
        self._points: Points = {}
        if self._path is not None:
            self._identity = {"score": repr(score), "goal": goal, "module": fingerprint(module)}
            if self._path.exists():
                self._read(self._path)

    def of(self, name: str) -> Mapping[float, float]:
        """Return the points of a tensor."""
        return self._points.get(name, {})

    def write(self, name: str, share: float, loss: float) -> None:
        """Note a point."""
        self._points.setdefault(name, {})[share] = loss
        if self._path is None:
            return
        curves = {name: sorted(curve.items()) for name, curve in self._points.items()}
        content = {"format": _FORMAT, **self._identity, "dense": self.dense, "curves": curves}
        write_json(self._path, content)

    def _read(self, path: Path) -> None:
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if set(saved) != _PARTS or saved["format"] != _FORMAT:
                raise ValueError("other keys")
            dense = float(saved["dense"])
            points = {
                name: {float(share): float(loss) for share, loss in curve}
                for name, curve in saved["curves"].items()
            }
            if not all(math.isfinite(item) for curve in points.values() for item in curve.values()):
                raise ValueError("a loss that is not finite")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise BadFile(
                "these are not curves of sensitivity", where=str(path), got=error
            ) from error
        self._check_same(path, saved, dense)
        self.dense, self._points = dense, points

    def _check_same(self, path: Path, saved: Mapping[str, Any], dense: float) -> None:
        differing = [key for key in self._identity if saved[key] != self._identity[key]]
        # A metric computed on a device may differ in its last digits from run to run.
        if not math.isclose(dense, self.dense, rel_tol=1e-3, abs_tol=1e-6):
            differing.append("judge")
        if differing:
            raise Unsupported(
                f"the curves in this file are of another {' and '.join(differing)}",
                where=str(path),
                hint="give another path, or delete the file to begin anew",
            )


def _checked(judge: Any, sparsities: Sequence[float], data: Any) -> list[float]:
    if not callable(judge):
        raise InvalidArgument(
            "the judge is a function of the module",
            where=WHERE,
            got=type(judge).__name__,
            allowed="judge(module) -> number, higher is better",
        )
    check_rereadable(data, WHERE)
    if isinstance(sparsities, int | float | str) or not list(sparsities):
        raise InvalidArgument(
            "sparsities are one or more shares", where=WHERE, got=repr(sparsities)
        )
    for share in sparsities:
        check_sparsity(share, where=f"{WHERE}: sparsities")
    return sorted({float(share) for share in sparsities})


def _facts(
    score: Score,
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    data: Iterable[Any] | None,
    loss: Callable[[Any, Any], torch.Tensor] | None,
) -> tuple[dict[str, dict[str, torch.Tensor]] | None, Iterable[Any] | None]:
    """Return the facts of the dense module, or the data for a score that measures as it prunes."""
    if score.rounds > 1 or score.updates:
        return None, data
    needs = score.needs - {"noise"}
    return measure(module, needs, weights, data=data, loss=loss, where=WHERE), None


def _judged(judge: Judge, module: nn.Module, what: str) -> float:
    # The same random numbers each time, should the judge draw any.
    with torch.no_grad(), steady(module, fresh=False), isolated(0, 0):
        number = float(judge(module))
    if not math.isfinite(number):
        raise NonFinite(f"the judge returned {number} for {what}", where=WHERE)
    return number
