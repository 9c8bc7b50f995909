"""LoggedCurves by key, as trackers log them, to a run: which key is the norm, which the loss, which a tensor's norm."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from karikomi.advising.assembly import Assembly
from karikomi.advising.recorded import COLUMNS, Recorded
from karikomi.errors import BadFile, InvalidArgument, UnknownName, suggest
from karikomi.record.log_codes import codes_of

ALIASES: dict[str, tuple[str, ...]] = {
    "norm": (
        *(
            "grad_norm",
            "train/grad_norm",
            "gradient_norm",
            "grad norm",
            "grad.norm",
            "global_grad_norm",
        ),
        *("karikomi/norm", "optim/total grad norm", "l2_norm/grad/global", "total_norm", "norm"),
        *("train_grad_norm", "grad_norm_step", "train/grad_norm_step", "train/gradient_norm"),
    ),
    "loss": (
        *("loss", "train/loss", "train_loss", "training_loss", "lm loss", "karikomi/loss"),
        *("train_loss_step", "train/loss_step", "train/ce loss", "loss/train"),
    ),
    "lr": (
        "learning_rate",
        "train/learning_rate",
        "learning rate",
        "karikomi/lr",
        "lr",
        "train/lr",
    ),
    "factor": ("karikomi/factor", "clip_coef", "clip_factor"),
    "loss_scale": ("loss_scale", "loss scale", "karikomi/loss_scale", "train/loss_scale"),
}
"""Names of the columns in the tools that log them, in lower case, the first that is there counts."""

_TOTAL = re.compile(r"(?:.*/)?grad_(?:[\d.]+|inf)_norm_total$|.*grad_norm_total$")
_ORDER = re.compile(r"(?:.*/)?grad_(?P<p>[\d.]+|inf)_norm(?:_total$|/)")
_RATE = re.compile(r"lr-\w+(?:/pg1)?$")
_TENSOR = re.compile(r"(?:.*/)?(?:grad_(?:[\d.]+|inf)_norm|l2_norm/grad)/(?P<name>.+)$")
MOST_KEYS, MOST_POINTS = 20_000, 20_000_000


class LoggedCurves:
    """Key -> step -> value, of one run; a step that goes back drops what a killed run wrote after it."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, float]] = {}
        self._last: dict[str, int] = {}
        self._points = 0
        self.dropped = 0
        """Points that were written again after a restart."""

    def add(self, key: str, step: int, value: float) -> None:
        """Add one point; raises `BadFile` beyond the budget of keys and points."""
        curve = self._values.get(key)
        if curve is None:
            if len(self._values) >= MOST_KEYS:
                raise BadFile("too many keys", got=f"> {MOST_KEYS:,}")
            curve = self._values[key] = {}
        elif step <= self._last[key]:
            orphans = [known for known in curve if known >= step]
            for known in orphans:
                del curve[known]
            self.dropped += len(orphans)
        self._points += 1
        if self._points > MOST_POINTS:
            raise BadFile("too many points", got=f"> {MOST_POINTS:,}")
        curve[step] = value
        self._last[key] = step

    @property
    def keys(self) -> list[str]:
        """The keys in the order of their first point."""
        return list(self._values)

    def curve(self, key: str) -> Mapping[int, float]:
        """Return step -> value of a key."""
        return self._values[key]


def run_of(
    curves: LoggedCurves,
    *,
    source: str,
    format: str,
    columns: Mapping[str, str] | None = None,
    lost: Iterable[str] = (),
    mean_loss: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Recorded:
    """Return the run of some curves.

    `columns`: quantity -> key, where it is none of `ALIASES`. `mean_loss`: whether the tool logs the mean loss since
    the row before, but the norm of the last step only. Raises `UnknownName` for a key that is not there.
    """
    chosen = _chosen(curves, columns or {}, source)
    if "norm" not in chosen and "loss" not in chosen:
        raise BadFile(
            "no column of gradient norms and none of losses was recognised",
            where=source,
            got=", ".join(curves.keys[:12]) or "no number at all",
            hint="name it with --map norm=COLUMN (columns={'norm': ...})",
        )
    tensors = {
        match["name"]: key
        for key in curves.keys
        if (match := _TENSOR.match(key)) and key not in chosen.values()
        # Lightning names the order; norms of another one than that of the whole are no parts of it.
        if "norm" not in chosen or _order_of(key) == _order_of(chosen["norm"])
    }
    known = [curves.curve(key) for key in [*chosen.values(), *tensors.values()]]
    steps = sorted({step for curve in known for step in curve})
    assembly = Assembly(source, format, lost=list(lost))
    if curves.dropped:
        assembly.lost.append(f"{curves.dropped:,} points that were written again after a restart")
    columns_of = {of: curves.curve(key) for of, key in chosen.items()}
    # A tool that logs losses more often than norms would leave gaps that look like unknown norms.
    if "norm" in columns_of:
        steps = [step for step in steps if step in columns_of["norm"]] or steps
    order = _order_of(chosen.get("norm", ""))
    for step in steps:
        values = {of: curve.get(step) for of, curve in columns_of.items()}
        assembly.add(step, values, order=order)
    codes = _codes(curves, tensors, steps) if tensors else None
    run = assembly.finish(names=tuple(tensors), codes=codes, facts=facts)
    return _with_provenance(run, mean_loss)


def _order_of(key: str) -> float:
    """Return the p that Lightning writes into the key of a norm, else 2.

    >>> [_order_of(key) for key in ("grad_1.0_norm_total", "grad_inf_norm/fc.weight", "grad_norm")]
    [1.0, inf, 2.0]
    """
    match = _ORDER.match(key.lower())
    order = as_number(match["p"]) if match else None
    return order if order is not None and order >= 1.0 else 2.0


def _chosen(curves: LoggedCurves, columns: Mapping[str, str], source: str) -> dict[str, str]:
    unknown = sorted(set(columns) - set(COLUMNS) - {"step"})
    if unknown:
        raise InvalidArgument(
            "unknown quantity", where="advise(columns)", got=unknown, allowed=(*COLUMNS, "step")
        )
    lower = {key.lower(): key for key in reversed(curves.keys)}
    found = {}
    for of, names in ALIASES.items():
        key = next((lower[name] for name in names if name in lower), None)
        pattern = {"norm": _TOTAL, "lr": _RATE}.get(of)
        if key is None and pattern is not None:
            key = next((own for own in curves.keys if pattern.match(own.lower())), None)
        if key is not None:
            found[of] = key
    for of, key in columns.items():
        if of == "step":
            continue
        if key not in curves.keys:
            raise UnknownName(
                f"no column {key!r} with numbers", where=source, hint=suggest(key, curves.keys)
            )
        found[of] = key
    return found


def _codes(
    curves: LoggedCurves, tensors: Mapping[str, str], steps: list[int]
) -> dict[str, np.ndarray]:
    matrix = np.zeros((len(steps), len(tensors)), np.uint16)
    places = {step: row for row, step in enumerate(steps)}
    for column, key in enumerate(tensors.values()):
        pairs = [(places[s], value) for s, value in curves.curve(key).items() if s in places]
        if pairs:
            rows, values = zip(*pairs, strict=True)
            matrix[list(rows), column] = codes_of(np.array(values))
    return {"gradients": matrix}


def _with_provenance(run: Recorded, mean_loss: bool) -> Recorded:
    stride = run.stride if mean_loss else 1.0
    return replace(run, mean_of=max(stride, 1.0), after_clip=_looks_clipped(run.columns["norm"]))


def _looks_clipped(norms: np.ndarray) -> bool:
    """Return whether the largest norm occurs again and again, as after a clip.

    >>> _looks_clipped(np.array([0.5, 1.0, 0.7, 1.0, 1.0, 0.9, 1.0, 1.0, 0.2]))
    True
    """
    finite = norms[np.isfinite(norms)]
    if finite.size < 8 or finite.max() <= 0.0:
        return False
    at_most = int(np.sum(finite > 0.999 * finite.max()))
    return at_most >= max(5, 0.05 * finite.size)


def as_number(text: Any) -> float | None:
    """Return a number, NaN and infinities among them; ``None`` for other text and for nothing.

    >>> as_number("1e-3"), as_number(""), as_number("nan"), as_number(True), as_number("Infinity")
    (0.001, None, nan, None, inf)
    """
    if isinstance(text, bool) or text is None:
        return None
    if isinstance(text, int | float):
        try:
            return float(text)
        except OverflowError:
            return math.inf
    if not isinstance(text, str) or not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        return None
