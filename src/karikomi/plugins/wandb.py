"""A record's scalars in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.errors import InvalidArgument
from karikomi.plugins.scalars import PREFIX, scalars

_STEP = f"{PREFIX}step"


class WandB:
    """A sink that logs the scalars of all steps to a run, over the axis ``karikomi/step``.

    `run`: the result of ``wandb.init()``; it is not finished by the sink. W&B's step counter only rises,
    and rows with a lower step are dropped; so no step is passed to it, and curves have their own axis.
    `commit`: whether each row counts as one of W&B's steps. Choose ``False`` in a loop that calls
    ``run.log`` itself after each optimizer step, above all with ``step=``: the scalars are then part of the
    row that it commits.

    Raises `InvalidArgument` if `run` is not a run.

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
                "not a run of W&B",
                where="WandB",
                got=type(run).__name__,
                hint="pass the result of wandb.init()",
            )
        self._run, self._commit = run, commit
        run.define_metric(_STEP)
        run.define_metric(f"{PREFIX}*", step_metric=_STEP)

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the scalars of one row."""
        if values := scalars(row):
            self._run.log({**values, _STEP: row.get("step")}, commit=self._commit)

    def flush(self) -> None:
        """Do nothing: W&B sends rows itself."""

    def close(self) -> None:
        """Do nothing: the run is not finished by the sink."""
