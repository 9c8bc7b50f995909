"""From a task and a budget to a verified artefact, resumable: `compress`, and `sweep` over a grid."""

from karikomi.search.grid import sweep
from karikomi.search.pipeline import compress

__all__ = ["compress", "sweep"]
