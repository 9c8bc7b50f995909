"""Advice from a finished run: the regime, a limit for it, the replay of rules, and what happened first and why."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.advising import limits
from karikomi.advising.assembly import named_norm
from karikomi.advising.causes.always_clipped import engaged_share
from karikomi.advising.causes.asking import NO_FAULT, findings
from karikomi.advising.causes.finding import Finding
from karikomi.advising.formats import open_run
from karikomi.advising.limits import Limit
from karikomi.advising.narrative import account
from karikomi.advising.onset import HeatMap, Largest, Onset, heat_map, largest, onsets
from karikomi.advising.recorded import Recorded
from karikomi.advising.replay import Replayed, replayed, spike_kind
from karikomi.advising.signals import Signals
from karikomi.clip import Recommended
from karikomi.errors import InvalidArgument
from karikomi.record import Recorder


@dataclass(frozen=True, slots=True)
class Advice:
    """The result of `advise`; its text is the account for a person, `as_dict` the same for a program.

    `regime`: ``rescue``, ``plateau`` or ``normaliser``. `limit`: the recommended limit, or ``None`` with too few norms.
    `findings`: suspected causes, the first being *the* cause, the others also seen. `onsets`: tensors in the
    order in which they left their usual range. `largest`: the largest norm with tensor and step. `replay`: what rules
    would have done. `caveats`: what the limit cannot do, and how far the record allows the claim. `missing`: what
    was not recorded. `lost`: rows that could not be used.
    """

    source: str
    format: str
    rows: int
    first_step: int
    last_step: int
    stride: float
    optimizer: str | None
    regime: str
    engaged: float
    limit: Limit | None
    findings: tuple[Finding, ...]
    event_step: int | None
    cause_step: int | None
    onsets: tuple[Onset, ...]
    largest: Largest | None
    heat: HeatMap | None
    replay: tuple[Replayed, ...]
    spikes: str
    caveats: tuple[str, ...]
    missing: tuple[str, ...]
    lost: tuple[str, ...]

    @property
    def cause(self) -> str:
        """The key of the suspected cause; ``none`` if nothing happened, ``unknown`` if no rule explains it."""
        return self.findings[0].cause if self.findings else "none"

    @property
    def tensor(self) -> str | None:
        """The first suspect: of the cause, else the first tensor that left its usual range."""
        named = self.findings[0].tensors if self.findings else ()
        first = self.onsets[0].tensor if self.onsets else None
        return named[0] if named else first

    def __str__(self) -> str:
        return account(self)

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the heat map as plain JSON data; numbers that are not finite are ``None``."""
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "heat"
        }
        if self.limit is not None:
            more = {"multiple": self.limit.multiple, "rule": self.limit.rule}
            found["limit"] = {**_plain(self.limit), **more, "order": f"{self.limit.order:g}"}
        return _plain({**found, "cause": self.cause, "tensor": self.tensor})


def advise(
    record: str | os.PathLike[str] | Recorder,
    *,
    columns: Mapping[str, str] | None = None,
    stage: str | None = None,
) -> Advice:
    """Read a finished run, and return which clip limit fits it, what exploded first, and why.

    `record`: a record of karikomi (or its `Recorder`, which is flushed), a run folder with one, TensorBoard event
    files or their folder, Hugging Face ``trainer_state.json``, Lightning ``metrics.csv``, a W&B history (csv, json,
    parquet), an MLflow store (folder of metrics, or SQLite file), a Megatron log, or any CSV. `columns`: quantity
    (``norm``, ``loss``, ``lr``, ``factor``, ``loss_scale``, ``step``) -> name of its column or key, where that is not
    one of the usual ones. `stage`: of a record with stages, by default its first.

    The limit is that of `kk.clip.Recommended`: ``median * e^(3 sd)`` of the norms of the last half, between 3 and 10
    medians, or 0.7 medians where large norms are frequent. The replay is open loop: the run would have changed. Causes
    are suspicions by rules with their numbers; `benchmarks/post_mortem.py` measures how often they are right.

    Raises `BadFile` for a file that cannot be read, is of no known format, or has neither norms nor losses,
    `UnknownName` for a column or stage that is not there, `InvalidArgument` for other arguments.

    >>> import tempfile, pathlib, numpy as np, karikomi as kk
    >>> path, state = pathlib.Path(tempfile.mkdtemp()) / "record.jsonl", None
    >>> with kk.record.Recorder(path) as recorder:
    ...     for step in range(1, 401):
    ...         gradient = {"w": np.array([1.0 + 0.1 * np.sin(step)]) * (500.0 if step == 300 else 1.0)}
    ...         _, outcome, state = kk.numpy.clip(gradient, kk.clip.ByGlobalNorm(np.inf), state)
    ...         recorder.step(step, outcome, {"loss": 0.5})
    >>> advice = advise(path)
    >>> advice.regime, advice.limit.value, advice.largest.tensor, advice.largest.step
    ('rescue', 3.0, 'w', 300)
    """
    if isinstance(record, Recorder):
        record.flush()
        record = record.path
    if not isinstance(record, str | os.PathLike):
        raise InvalidArgument(
            "not a record",
            where="advise",
            got=type(record).__name__,
            allowed="a path, or a kk.record.Recorder",
        )
    return advice_for(open_run(record, columns=columns, stage=stage))


def advice_for(run: Recorded) -> Advice:
    """Return the advice for a run that was read."""
    signals = Signals(run)
    found = findings(run, signals)
    limit = limits.recommended(run, signals, Recommended())
    biggest = largest(run)
    fault = next((item for item in found if item.cause not in NO_FAULT), None)
    row = _event(run, signals, fault, biggest)
    order = [] if row is None or fault is None else onsets(run, signals, row)
    first = [*(fault.tensors if fault else ()), *(item.tensor for item in order)]
    regime = limits.regime(run, signals)
    return Advice(
        source=run.source,
        format=run.format,
        rows=len(run),
        first_step=int(run.steps[0]),
        last_step=int(run.steps[-1]),
        stride=run.stride,
        optimizer=run.facts.get("optimizer"),
        regime=regime,
        engaged=engaged_share(run),
        limit=limit,
        findings=tuple(found),
        event_step=None if signals.disturbed is None else int(run.steps[signals.disturbed]),
        cause_step=None if fault is None else int(run.steps[fault.row]),
        onsets=tuple(order),
        largest=biggest,
        heat=None if row is None else heat_map(run, signals, row, first),
        replay=tuple(
            replayed(run, signals, None if limit is None else limit.value, _median(limit, run))
        ),
        spikes=spike_kind(run),
        caveats=tuple(_caveats(run, regime, fault)),
        missing=tuple(run.missing),
        lost=tuple(run.lost),
    )


def _event(
    run: Recorded, signals: Signals, fault: Finding | None, biggest: Largest | None
) -> int | None:
    """Return the row to look around: that of the cause, of the first excursion, or of the largest norm."""
    slow = fault is None or fault.cause in (
        "slow_growth",
        "vanishing",
        "near_epsilon",
        "learning_rate",
    )
    if fault is not None and not slow:
        return fault.row
    if signals.disturbed is not None:
        return signals.disturbed
    if fault is not None:
        return fault.row
    return None if biggest is None else int(np.searchsorted(run.steps, biggest.step))


def _median(limit: Limit | None, run: Recorded) -> float:
    if limit is not None:
        return limit.median
    norms = run.columns["norm"]
    return float(np.nanmedian(norms)) if np.isfinite(norms).any() else 1.0


def _caveats(run: Recorded, regime: str, fault: Finding | None) -> list[str]:
    found = []
    if fault is not None and not fault.clip_helps and fault.cause != "unknown":
        found.append("a clip limit is not the fix for the suspected cause")
    if run.adaptive or run.adaptive is None:
        subject = "under Adam" if run.adaptive else "if the optimizer is Adam (it was not recorded)"
        found.append(
            f"{subject} a limit that is always met changes next to nothing, since the factor cancels in g / sqrt(v): "
            "only its variation does, and what is being tuned is the learning rate"
        )
    elif regime == "normaliser":
        found.append("under SGD limit and learning rate are one number here: move them inversely")
    if run.order != 2.0:
        found.append(
            f"the norms are {named_norm(run.order)}: limits are for ByGlobalNorm of this norm, and rules that learn "
            "from 2-norms were not replayed"
        )
    if run.mean_of > 1:
        found.append(
            f"each loss is the mean of about {run.mean_of:g} steps, and each norm that of the last one"
        )
    if run.stride > 1:
        found.append(
            f"one row in {run.stride:g} steps: no claim about single spikes, and onsets are only known to that"
        )
    left = int(run.left_out.sum())
    if left:
        found.append(f"the record left out {left:,} steps at its bound")
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
