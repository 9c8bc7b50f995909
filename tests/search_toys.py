"""Toy candidates for the tests of the search's driver: pure functions of proposal, seed and a folder."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from karikomi.errors import Unsupported
from karikomi.search.driver import Finished, Measured, Proposal


def parabola(proposal: Proposal, seed: int, reference: Any) -> Measured:
    """Return a drop that rises and bytes that fall with ``x``, and write the seed into the artefact."""
    settings = proposal.settings
    facts = {
        "drop": settings["x"] ** 2 / 1000 + seed * 1e-6,
        "bytes": 1000 - 10 * settings["x"],
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    path = Path(reference) / f"{proposal.digest}.txt"
    path.write_text(f"{settings['x']} {seed}")
    return Measured(facts, path.name)


def counted(proposal: Proposal, seed: int, reference: Any) -> Measured:
    """Evaluate `parabola`, and leave one file per evaluation, so that repetitions are seen."""
    with open(Path(reference) / f"asked-{proposal.settings['x']}", "a") as stream:
        stream.write("x")
    return parabola(proposal, seed, reference)


def killed_once(proposal: Proposal, seed: int, reference: Any) -> Measured:
    """Die by SIGKILL at x = 2 the first time; elsewhere as `counted`."""
    mark = Path(reference) / "killed"
    if proposal.settings["x"] == 2 and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return counted(proposal, seed, reference)


def failing(proposal: Proposal, seed: int, reference: Any) -> Measured:
    """Fail for good at x = 1, and for lack of memory at x = 2 until the folder has a file ``memory``."""
    counted(proposal, seed, reference)
    if proposal.settings["x"] == 1:
        raise Unsupported("odd", where="toy")
    if proposal.settings["x"] == 2 and not (Path(reference) / "memory").exists():
        raise MemoryError("too large")
    return parabola(proposal, seed, reference)


def busy(proposal: Proposal, seed: int, reference: Any) -> Measured:
    """Hash for about `reference` million blocks: work of a processor that holds no lock of another."""
    digest = hashlib.sha256(proposal.text.encode())
    for _ in range(int(float(reference) * 1_000_000)):
        digest.update(b"karikomi")
    return Measured({"drop": 0.0, "bytes": int(digest.hexdigest()[:4], 16)})


class Ladder:
    """Proposes x = 0..`first` at once, then the successor of the best as long as it holds."""

    def __init__(self, first: int = 3, limit: float = 0.03) -> None:
        self.first, self.limit = first, limit

    def propose(self, finished: Mapping[Proposal, Finished]) -> Sequence[Proposal]:
        if not finished:
            return [Proposal.of(x=x) for x in range(self.first + 1)]
        good = [f for f in finished.values() if f.error is None and f.facts["drop"] <= self.limit]
        step = max(f.proposal.settings["x"] for f in good) + 1
        return [Proposal.of(x=step)] if Proposal.of(x=step) not in finished else []


class Once:
    """Proposes the same x all at once, and nothing else."""

    def __init__(self, *xs: int) -> None:
        self.xs = xs

    def propose(self, finished: Mapping[Proposal, Finished]) -> Sequence[Proposal]:
        return [Proposal.of(x=x) for x in self.xs]


def asleep(proposal: Proposal, seed: int, reference: Any) -> Measured:
    """Wait for `reference` seconds: what two workers do at once whatever else the machine does."""
    time.sleep(float(reference))
    return Measured({"drop": 0.0, "bytes": proposal.settings["x"]})
