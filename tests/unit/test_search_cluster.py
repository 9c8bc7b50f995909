"""A search on a dask cluster of this machine, one of whose workers is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

distributed = pytest.importorskip("distributed")

import search_toys as toys  # noqa: E402
from karikomi.errors import Unsupported  # noqa: E402
from karikomi.search.driver import Proposal, RunJournal, drive, opened  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def cluster() -> Iterator[Any]:
    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(2, silence_logs=50, **options) as found:
        yield found


def test_a_killed_worker_of_a_cluster_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    with (
        RunJournal(tmp_path / "journal.jsonl", {}) as journal,
        opened(scheduler=cluster.scheduler_address) as executor,
    ):
        assert executor.places == 2  # type: ignore[attr-defined]
        found = drive(
            toys.Once(0, 1, 2, 3),
            toys.killed_once,
            journal=journal,
            executor=executor,
            seed=1,
            reference=str(tmp_path),
        )
    assert (tmp_path / "killed").exists()
    assert [item.error for item in found.values()] == [None] * 4
    wanted = [toys.parabola(Proposal.of(x=x), 1, str(tmp_path)) for x in range(4)]
    assert [item.facts["drop"] for item in found.values()] == [w.facts["drop"] for w in wanted]


def test_no_scheduler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError("timed out")

    monkeypatch.setattr(distributed, "Client", refused)
    with pytest.raises(Unsupported, match="no scheduler answers; got tcp://127.0.0.1:9: timed out"):
        with opened(scheduler="tcp://127.0.0.1:9"):
            pass
