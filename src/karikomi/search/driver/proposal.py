"""A proposal: the techniques by which a candidate is made, as one canonical text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Proposal:
    """The settings of each technique, as JSON with sorted keys: equal settings have equal texts.

    A whole number and a float stay apart: 1.0 of the width is a share, and 1 a count.

    >>> first = Proposal.of(sparsity=0.9, entries=16)
    >>> first == Proposal.of(entries=np.int64(16), sparsity=0.9), first.text
    (True, '{"entries":16,"sparsity":0.9}')
    """

    text: str

    @classmethod
    def of(cls, **techniques: Any) -> Proposal:
        """Return the proposal of settings by technique: numbers, texts, None, and lists and mappings of them.

        Raises `InvalidArgument` for a value that JSON has not, NaN and infinity among them.
        """
        try:
            return cls(
                json.dumps(
                    techniques,
                    sort_keys=True,
                    separators=(",", ":"),
                    allow_nan=False,
                    default=_plain,
                )
            )
        except (TypeError, ValueError) as error:
            raise InvalidArgument(
                "a setting of a proposal is no plain value", where="Proposal", got=error
            ) from error

    @property
    def settings(self) -> dict[str, Any]:
        """Technique -> settings."""
        return json.loads(self.text)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def words(self) -> str:
        """Return the settings as a user reads them.

        >>> Proposal.of(sparsity=0.9, parent="0f").words()
        'parent 0f, sparsity 0.9'
        """
        return ", ".join(f"{name} {value}" for name, value in self.settings.items()) or "nothing"


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as they come back from the journal: lists for tuples, numbers for those of NumPy.

    >>> plain_facts({"shape": (2, np.int64(3))})
    {'shape': [2, 3]}
    """
    return json.loads(json.dumps(dict(facts), default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r}")
