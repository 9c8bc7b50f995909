"""The folder of a run: its identity, its finished stages and a checkpoint, so that a killed run resumes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from karikomi.errors import BadFile, Unsupported, Unwritable
from karikomi.files import tensor_file, write_bytes, write_json
from karikomi.record import Recorder
from karikomi.search.lock import AFRESH, claim, lock, read_json
from karikomi.tasks import Arrays, Phase, Training

OnEpoch = Callable[[str, int], object]
"""Called with the stage and the number of epochs that are newly done, or were before."""


class Folder:
    """A run folder, opened for the run that `identity` describes; another run in it is `Unsupported`."""

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.stages = self.path / "stages"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unwritable(
                f"cannot make the output folder ({error.strerror or error})",
                where=str(self.path),
                hint="choose another --out",
            ) from error
        self._lock = lock(self.path)
        try:
            self._open(identity)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.recorder.close()
        self._lock.close()

    @property
    def seconds(self) -> float:
        """Seconds that finished stages took, over all calls that worked on this run."""
        return float(self.state["seconds"])

    def done(self, stage: str) -> dict[str, Any] | None:
        """Return the facts of a finished stage, or ``None``."""
        return self.state["done"].get(stage)

    def finish(self, stage: str, facts: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        """Mark a stage as done, after its arrays are safely on disk."""
        if arrays is not None:
            self.write_arrays(stage, arrays)
        self.state["place"] = self.recorder.flush()
        self.state["done"][stage] = dict(facts)
        now = time.monotonic()
        self.state["seconds"] += now - self._since
        self._since = now
        write_json(self.path / "state.json", self.state)
        (self.stages / "checkpoint.safetensors").unlink(missing_ok=True)

    def once(self, stage: str, find: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the facts of a stage as JSON gives them back, found at the first call and kept for every later one."""
        if self.done(stage) is None:
            self.finish(stage, json.loads(json.dumps(find())))
        return dict(self.state["done"][stage])

    def write_arrays(
        self,
        name: str,
        arrays: Arrays,
        facts: Mapping[str, Any] | None = None,
        *,
        durable: bool = True,
    ) -> None:
        """Write named arrays, and facts as JSON beside them, to ``<name>.safetensors``."""
        metadata = {"facts": json.dumps(facts or {}, sort_keys=True)}
        content = tensor_file(arrays, metadata)
        write_bytes(self.stages / f"{name}.safetensors", content, durable=durable)

    def read_arrays(self, name: str) -> tuple[Arrays, dict[str, Any]]:
        """Return the arrays and facts of `write_arrays`."""
        return self.stored(self.stages / f"{name}.safetensors")

    @staticmethod
    def stored(path: Path) -> tuple[Arrays, dict[str, Any]]:
        """Return the arrays and facts of a file of `write_arrays`; a folder that is done needs no lock to be read."""
        try:
            with safetensors.safe_open(path, framework="numpy") as stored:
                facts = json.loads((stored.metadata() or {}).get("facts", "{}"))
                # Copies, because what is read is mapped from a file that may be replaced.
                return {key: np.array(stored.get_tensor(key)) for key in stored.keys()}, facts  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, ValueError) as error:
            raise BadFile(
                "a file of the run folder cannot be read",
                where=str(path),
                got=error,
                hint=AFRESH,
            ) from error

    def train(self, stage: str, training: Training, phase: Phase, on_epoch: OnEpoch) -> Training:
        """Run a phase to its end from the last checkpoint, writing one after every epoch."""
        place = self.state["place"]
        if (self.stages / "checkpoint.safetensors").exists():
            arrays, facts = self.read_arrays("checkpoint")
            if facts["stage"] == stage:
                training.restore(arrays, facts["training"])
                place = facts["place"]
                on_epoch(stage, training.epoch)
        self.recorder.rewind(place)
        while training.epoch < phase.epochs:
            training.run_epoch(self.recorder)
            arrays, facts = training.checkpoint()
            place = self.recorder.flush()
            # Not waiting for the disk: epochs may take milliseconds, and a finished stage does wait.
            facts = {"stage": stage, "training": facts, "place": place}
            self.write_arrays("checkpoint", arrays, facts, durable=False)
            on_epoch(stage, 1)
        return training

    def _open(self, identity: Mapping[str, Any]) -> None:
        foreign = sorted(item.name for item in self.path.iterdir() if item.name[0] != ".")
        if foreign and "run.json" not in foreign:
            raise Unsupported(
                "the folder holds files of something else",
                where=str(self.path),
                got=", ".join(foreign[:5]),
                hint="choose another --out",
            )
        self.resumed = claim(self.path / "run.json", identity)
        for leftover in [*self.path.glob(".*.part"), *self.stages.glob(".*.part")]:
            leftover.unlink()
        self.state: dict[str, Any] = read_json(self.path / "state.json") or {
            "done": {},
            "place": None,
            "seconds": 0.0,
        }
        self._since = time.monotonic()
        fresh = not (self.path / "record.jsonl").exists()
        if fresh and self.state["done"]:
            raise BadFile(
                "the record of this run is gone, and with it what the report needs",
                where=str(self.path / "record.jsonl"),
                hint=AFRESH,
            )
        self.recorder = Recorder(self.path / "record.jsonl")
        if fresh or self.state["place"] is None:
            self.state["place"] = self.recorder.flush()
            write_json(self.path / "state.json", self.state)
