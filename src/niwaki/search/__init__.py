"""From a task and a budget to a verified artefact, resumable: `compress`, and `sweep` over a grid."""

from niwaki.search.grid import sweep
from niwaki.search.pipeline import compress

__all__ = ["compress", "sweep"]
