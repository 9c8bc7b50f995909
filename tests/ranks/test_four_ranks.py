"""Four ranks on gloo: norms, factors and gradients are those of one process, on every rank."""

from __future__ import annotations

from typing import Any

import pytest

from ranks import launch
from ranks.facts import check
from ranks.four_ranks import SCENARIOS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what all four ranks found."""
    return launch.results("four_ranks", 4, tmp_path_factory)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_four_ranks_are_as_one(world: list[dict[str, Any]], scenario: str) -> None:
    check([rank[scenario] for rank in world])
