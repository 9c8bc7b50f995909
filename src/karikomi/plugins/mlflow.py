"""A record's scalars in MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from karikomi.errors import Unavailable, UnknownName, Unsupported
from karikomi.plugins.scalars import scalars

MOST = 1_000
"""Metrics that MLflow's interface takes in one request."""

_FORBIDDEN = re.compile(r"[^\w\-./ ]")


class MLflow:
    """A sink that logs the scalars of all steps as metrics of a run, many in one request.

    `run_id`: of the run, by default the active one when the sink is created. Metrics
    are sent when the recorder flushes, since a request for each step would slow the training down;
    the metrics of a failed request are not sent again. Characters that MLflow does not allow in a name
    become ``_``.

    Raises `Unavailable` without mlflow, `Unsupported` without a run, `UnknownName` for a run that is not found.
    """

    def __init__(self, run_id: str | None = None) -> None:
        try:
            import mlflow  # pyright: ignore[reportMissingImports]
            from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise Unavailable(
                f"mlflow is not installed ({error})", hint="pip install mlflow"
            ) from error
        self._metric = Metric
        self._client = mlflow.MlflowClient()
        self._run_id = _active(mlflow) if run_id is None else _known(self._client, run_id)
        self._pending: list[Any] = []

    def write(self, row: Mapping[str, Any]) -> None:
        """Store the scalars of one row."""
        now = int(1000 * time.time())
        self._pending += [
            self._metric(_FORBIDDEN.sub("_", name), value, now, row.get("step", 0))
            for name, value in scalars(row).items()
        ]

    def flush(self) -> None:
        """Send the stored metrics."""
        pending, self._pending = self._pending, []
        for first in range(0, len(pending), MOST):
            self._client.log_batch(self._run_id, metrics=pending[first : first + MOST])

    def close(self) -> None:
        """Send the stored metrics; the run is not ended."""
        self.flush()


def _active(mlflow: Any) -> str:
    run = mlflow.active_run()
    if run is None:
        raise Unsupported(
            "no run of MLflow is active", where="MLflow", hint="mlflow.start_run(), or give run_id="
        )
    return run.info.run_id


def _known(client: Any, run_id: str) -> str:
    try:
        client.get_run(run_id)
    except Exception as error:
        raise UnknownName(
            "MLflow does not find this run",
            where="MLflow(run_id)",
            got=repr(run_id),
            hint=str(error),
        ) from error
    return run_id
