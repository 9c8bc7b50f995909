"""A callback that reads a clipped optimizer after each batch, for a record, logs, a page and a summary."""

from __future__ import annotations

import math
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import keras

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.files import as_path
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.callbacks.summary import Tally
from karikomi.record import Recorder, read
from karikomi.schedule import whole

WHERE = "keras.Monitor"

Report = Callable[[Iterable[Mapping[str, Any]]], object]


class Monitor(keras.callbacks.Callback):
    """Record the clipping of `kk.keras.clipped` in ``fit``, on every backend.

    After each batch: raises `NonFinite` where the optimizer's ``check`` does, so that a run of bad steps ends the
    training; puts ``grad_norm`` (before clipping; of an epoch the median) and ``clipped`` (the share of the steps of
    the epoch so far) into the logs, from where the progress bar, ``History`` and, if they stand after it in
    the list of callbacks, ``CSVLogger``, ``TensorBoard`` and ``EarlyStopping`` take them
    (``EarlyStopping("grad_norm", mode="min")``: by itself it does not know which way is better); writes a row. At
    the end it prints two lines, which stay in ``summary``: how often it clipped and skipped, the median norm,
    who contributed most, the tensor and step of the largest norm, and whether the limit was never or nearly
    always met. ``fit(verbose=0)`` prints nothing.

    `record`: the path of a record, or a `kk.record.Recorder` of yours, which stays open. A path is continued
    where the optimizer's steps go on: rows of later steps than it has taken are dropped, all of them when
    a new training starts. The ``loss`` of a row is that of its batches, not Keras' mean since the epoch began; after
    a batch whose loss is not finite it is unknown for the rest of the epoch. `report`: called with the rows
    of the record at the end, such as ``kk.report.TrainingPage("clip.html")``; a failure of it is a warning.
    `every`: look after every n-th batch only, >= 1; on a device each look waits for the step. With
    ``steps_per_execution`` it sees the last of these steps.

    Raises `InvalidArgument` for arguments of another kind and for a report without a record; when training
    starts, `Unsupported` for a model whose optimizer is not `kk.keras.clipped`.

    >>> import keras, numpy as np, karikomi as kk
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(kk.keras.clipped(keras.optimizers.SGD(0.1), kk.clip.ByGlobalNorm(1.0)), loss="mse")
    >>> monitor = Monitor("run.jsonl")
    >>> history = model.fit(np.ones((8, 2)), 9 * np.ones((8, 1)), batch_size=4, verbose=0, callbacks=[monitor])
    >>> history.history["clipped"], monitor.summary[0][:40]
    ([1.0], 'karikomi: 2 steps, 2 clipped (100.0%), 0')
    """

    def __init__(
        self,
        record: str | os.PathLike[str] | Recorder | None = None,
        *,
        report: Report | None = None,
        every: int = 1,
    ) -> None:
        super().__init__()
        self._given = _where(record)
        self._report = _checked(report, record)
        self._every = whole(every) or 0
        if self._every < 1:
            raise InvalidArgument("every n-th batch", where=WHERE, got=repr(every), allowed=">= 1")
        self.summary: list[str] = []
        """The two lines of the last training."""
        self._recorder: Recorder | None = None
        self._closing: weakref.finalize | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Raise an error for an optimizer that does not clip, and reset the counts."""
        self._thread = threading.get_ident()
        self._optimizer = _clipped(self.model)
        self._tally, self._of_epoch = Tally(), Tally()
        self._epoch: int | None = None
        self._batches = 0
        self._seen_loss = (0.0, 0.0)
        self._close()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Open the record in the first epoch, whose number shows whether training resumes."""
        self._step = self._optimizer.steps
        if self._epoch is None:
            self._recorder = self._opened(epoch)
        self._epoch, self._of_epoch = epoch, Tally()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Read the outcome of the step, if it is due."""
        if threading.get_ident() != self._thread:
            raise Unsupported(
                "Keras calls this from another thread, where the step is not known",
                where=WHERE,
                hint="give fit a list: callbacks=[monitor]",
            )
        logs = {} if logs is None else logs
        self._batches += 1
        if self._batches % self._every == 0:
            try:
                self._look(logs)
            except BaseException:
                # Keras calls nothing more after an error.
                self._finish()
                raise
        if self._of_epoch.steps:
            logs.update(self._curves(self._norm))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the statistics of the epoch to the logs."""
        logs = {} if logs is None else logs
        if self._recorder is not None:
            losses = {"loss": logs.get("loss"), "validation": logs.get("val_loss")}
            row = {"event": "epoch", "epoch": epoch, "step": self._step}
            self._recorder.write({**row, **{k: v for k, v in losses.items() if v is not None}})
            self._recorder.flush()
        if self._of_epoch.steps:
            logs.update(self._curves(self._of_epoch.norm))

    def on_train_end(self, logs: Any = None) -> None:
        """Close the record, render the page, and print the summary."""
        self._finish()
        if self.params is None or self.params.get("verbose") != 0:
            sys.stdout.write("\n".join([*self.summary, ""]))

    def _look(self, logs: Mapping[str, Any]) -> None:
        # On JAX it is asking for the model that brings the variables up to date.
        loss = self._loss(self.model, logs)
        outcome, step = self._optimizer.last, self._optimizer.steps
        if outcome is None or step == self._step:
            return  # Nothing was decided: gradients are being accumulated, or a loss scale was too large.
        self._step, self._norm = step, outcome.pre
        self._tally.add(outcome, step)
        self._of_epoch.add(outcome)
        if self._recorder is not None:
            facts = {"epoch": self._epoch, **({} if loss is None else {"loss": loss})}
            self._recorder.step(step, outcome, facts)
        self._optimizer.check()

    def _curves(self, norm: float) -> dict[str, float]:
        return {"grad_norm": norm, "clipped": self._of_epoch.share_clipped}

    def _loss(self, model: Any, logs: Mapping[str, Any]) -> float | None:
        """Return the loss of the batches since the last read, from the sums of Keras' own mean."""
        tracker = next((metric for metric in model.metrics if metric.name == "loss"), None)
        sums = [float(on_host(getattr(tracker, name, math.nan))) for name in ("total", "count")]
        (total, count), (total_before, count_before) = sums, self._seen_loss
        self._seen_loss = (total, count)
        if count < count_before:  # a new epoch
            total_before = count_before = 0.0
        if count > count_before:
            return (total - total_before) / (count - count_before)
        return logs.get("loss")

    def _opened(self, epoch: int) -> Recorder | None:
        if not isinstance(self._given, Path):
            return self._given
        recorder = Recorder(self._given)
        # Keras calls nothing after an error of its own, so the last rows are written whatever happens.
        self._closing = weakref.finalize(self, recorder.close)
        if self._given.exists() and (self._step or not epoch):
            recorder.rewind(_place(self._given, self._step))
        return recorder

    def _finish(self) -> None:
        self.summary = self._tally.lines(getattr(self._optimizer, "rule", None))
        recorder = self._recorder
        self._close()
        if self._report is not None and recorder is not None and recorder.path.exists():
            try:
                self._report(read(recorder.path))
            except Exception as error:
                # The training is done, and what fit returns must not be lost for a page.
                text = f"{type(error).__name__}: {error}"
                warnings.warn(f"karikomi: the report was not drawn ({text})", stacklevel=2)

    def _close(self) -> None:
        if self._recorder is self._given and self._recorder is not None:
            self._recorder.flush()
        elif self._closing is not None:
            self._closing()
        self._recorder = self._closing = None


def _clipped(model: Any) -> Any:
    optimizer = getattr(model, "optimizer", None)
    inside = optimizer
    while inside is not None and not hasattr(inside, "last"):
        inside = getattr(inside, "inner_optimizer", None)
    if inside is None:
        raise Unsupported(
            "the optimizer of this model clips nothing that could be watched",
            where=WHERE,
            got=type(optimizer).__name__,
            hint="model.compile(kk.keras.clipped(optimizer, kk.clip.ByGlobalNorm(1.0)), ...)",
        )
    return inside


def _where(record: Any) -> Recorder | Path | None:
    if isinstance(record, str | os.PathLike):
        return as_path(record)
    if record is None or isinstance(record, Recorder):
        return record
    raise InvalidArgument(
        "the record is a path or a Recorder", where=WHERE, got=type(record).__name__
    )


def _checked(report: Any, record: object) -> Report | None:
    if report is not None and not callable(report):
        raise InvalidArgument(
            "the report is something to be called with rows",
            where=WHERE,
            got=repr(report),
            hint=f"report=kk.report.TrainingPage({str(report)!r})",
        )
    if report is not None and record is None:
        raise InvalidArgument(
            "a report is drawn from a record",
            where=WHERE,
            hint="give one: Monitor('run.jsonl', ...)",
        )
    return report


def _place(path: Path, steps: int) -> int:
    """Return where, in bytes, the rows of the first `steps` steps end."""
    place = end = 0
    with path.open("rb") as stream:
        for line, row in zip(stream, read(path), strict=False):
            end += len(line)
            if row.get("step", math.inf) <= steps:
                place = end
    return place
