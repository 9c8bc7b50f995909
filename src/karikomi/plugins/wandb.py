"""A record's scalars in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.errors import InvalidArgument
from karikomi.plugins.scalars import PREFIX, scalars

_STEP = f"{PREFIX}step"


class WandB:
    """A sink that logs the scalars of every step to a run, over the axis ``karikomi/step``.

    `run`: what ``wandb.init()`` returned; it stays yours to finish. W&B's own step counter only rises,
    and drops what comes with a lower step; so no step is given to it, and curves have their own axis.
    `commit`: whether every row counts as one of W&B's steps. Choose ``False`` in a loop that calls
    ``run.log`` itself after each optimizer step, above all with ``step=``: the scalars then join the
    row that it commits.

    Raises `InvalidArgument` for what is no run.

    >>> class Run:
    ...     def define_metric(self, name, step_metric=None): ...
    ...     def log(self, data, commit):
    ...         print(data)
    >>> WandB(Run()).write({"event": "step", "step": 3, "norm": 0.5})
    {'karikomi/norm': 0.5, 'karikomi/step': 3}
    """

    def __init__(self, run: Any, *, commit: bool = True) -> None:
        if not all(callable(getattr(run, name, None)) for name in ("log", "define_metric")):
            raise InvalidArgument(
                "this is no run of W&B",
                where="WandB",
                got=type(run).__name__,
                hint="give what wandb.init() returned",
            )
        self._run, self._commit = run, commit
        run.define_metric(_STEP)
        run.define_metric(f"{PREFIX}*", step_metric=_STEP)

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the scalars of one row."""
        found = scalars(row)
        if found:
            self._run.log({**found, _STEP: row.get("step")}, commit=self._commit)

    def flush(self) -> None:
        """Do nothing: W&B sends by itself."""

    def close(self) -> None:
        """Do nothing: the run is finished by whoever began it."""
