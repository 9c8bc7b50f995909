"""The ledger of certify examples: a set of examples serves one certificate, or as many as were planned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from karikomi.errors import BadFile, Unsupported, check
from karikomi.files import write_json
from karikomi.search.certificate.example_identity import digest_of


class SpentIds:
    """The uses of certify examples in a run folder, each with its candidates and the level that it was given.

    `uses`: how many certificates the examples serve. One has the full level; of several, planned beforehand, use k
    has alpha / 2^k, so that all together stay below alpha.
    """

    def __init__(self, path: Path, *, uses: int = 1) -> None:
        check("SpentIds", (uses >= 1, "uses is a number of certificates", uses, ">= 1"))
        self.path, self._uses = path, uses
        try:
            self._lines: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["uses"]
        except FileNotFoundError:
            self._lines = []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadFile(
                "the ledger of certify examples cannot be read", where=str(path), got=error
            ) from error

    def spend(self, ids: np.ndarray, candidates: Sequence[str], *, alpha: float) -> float:
        """Return the level for one certificate of these candidates, after writing it down.

        `candidates`: their digests, in the order of the tests. The same certificate again (a run that was
        stopped) has the level it had. Raises `Unsupported` where the examples are spent.
        """
        own, wanted = digest_of(ids), list(candidates)
        earlier = [line for line in self._lines if line["ids"] == own]
        for line in earlier:
            if line["candidates"] == wanted and line["of"] == alpha:
                return float(line["alpha"])
        if len(earlier) >= self._uses:
            raise Unsupported(
                "the certify examples are spent: another choice after looking at them would not be certified",
                where=str(self.path),
                got=f"{len(earlier)} of {self._uses} certificates on them",
                hint="certify on other examples, or plan several certificates before the first",
            )
        level = alpha if self._uses == 1 else alpha / 2 ** (len(earlier) + 1)
        line = {"ids": own, "n": len(ids), "candidates": wanted, "of": alpha, "alpha": level}
        self._lines.append(line)
        write_json(self.path, {"uses": self._lines})
        return level
