"""The recorder: writes rows of a run to a journal of bounded size, and to sinks, from one process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from karikomi.errors import InvalidArgument, check
from karikomi.files import as_path
from karikomi.record.journal import Journal
from karikomi.record.log_codes import Pooling
from karikomi.record.reading import FIRST, FIRST_LINE, latest
from karikomi.record.rows import Norms, line, plain, step_row
from karikomi.record.sinks import Fanout, Sink
from karikomi.record.tensors import listed, sketched
from karikomi.record.thinning import LeftOut, keeps
from karikomi.rules.outcome import Outcome
from karikomi.schedule import whole_from

DETAILS = ("top", "all", "none")
"""Detail of a row on single tensors; the first is the default."""

LEAST_BYTES = 1 << 16
"""The smallest bound of a record."""


class Recorder:
    """Append rows to a JSONL file and to `sinks`, flushing after every `flush_every` rows.

    Use it as a context manager, or call `close`. An existing record is continued, without an incomplete
    last line after a crash. A non-finite number is written as ``null``, since JSON has none.

    `tensors`: what `step` writes of single tensors: ``top`` (the `most` largest norms by name,
    quantiles of all, and the codes of all in 16 bits each, `karikomi.record.log_codes`, which `karikomi.advise`
    reads), ``all`` (plain lists), or ``none``. With ``top`` a row has less than 12 KiB beside its `facts`, for any
    number of tensors (`most` of 8, names up to 100 bytes; 1 to 2 KiB is usual): beyond 512 tensors there is one code
    per module. `weights_every`: every how many steps `attach` measures weights and updates for the
    record, >= 1, or 0 for never.

    `max_bytes`: the bound on the file, >= 65,536, by default 256 MiB; ``None`` for no bound. From half
    of it on only every 2nd, then every 4th, 8th, ... step is kept, besides skipped steps, the first
    clipped one after unclipped ones, and the newest at each `flush`. ``left_out`` of a row counts the steps
    left out before it, so that sums are exact: see `tally`. Rows of other events are always kept,
    and `close` writes the newest step even beyond the bound.

    `sinks`: receive all rows, kept or not; see `karikomi.plugins`. A sink that fails is named in a warning,
    once, and the run continues. They are not rewound. `rank`: of this process, by default the environment
    variable RANK, else 0. A recorder of another rank than 0 does nothing, and its `flush` returns 0.

    Raises `BadFile`, without changing the file, if it is not a record or of a later version;
    `Unwritable` if a row cannot be written, `InvalidArgument` for values that JSON does not support.

    >>> import tempfile, pathlib
    >>> from karikomi.record import read
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "record.jsonl"
    >>> with Recorder(path) as recorder:
    ...     recorder.step(1, facts={"loss": 0.5})
    >>> [row["event"] for row in read(path)]
    ['start', 'step']
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        flush_every: int = 100,
        tensors: str = "top",
        most: int = 8,
        weights_every: int = 1,
        max_bytes: int | None = 1 << 28,
        sinks: Iterable[Sink] = (),
        rank: int | None = None,
    ) -> None:
        self.path = as_path(path)
        self.weights_every = _at_least(0, weights_every, "weights_every")
        self._flush_every = _at_least(1, flush_every, "flush_every")
        known = tensors in DETAILS
        check("Recorder(tensors)", (known, "unknown detail", repr(tensors), DETAILS))
        self._tensors, self._most = tensors, _at_least(1, most, "most")
        self._bound = None if max_bytes is None else _at_least(LEAST_BYTES, max_bytes, "max_bytes")
        self._sinks = Fanout(sinks)
        self._silent = _rank(rank) != 0
        self._pools: dict[str, Pooling] = {}
        if self._silent:
            return
        self._journal = Journal(self.path)
        self._resume()
        if self._journal.length == 0:
            self.write(FIRST)
            self._drain()

    def step(
        self,
        step: int,
        outcome: Outcome | None = None,
        facts: Mapping[str, Any] | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        updates: Mapping[str, float] | None = None,
    ) -> None:
        """Append the row of one step: the outcome of the clip, `facts`, and norms of single tensors.

        `outcome` adds ``norm`` (and ``norm_order``, its p, if it is no 2-norm), ``factor``, ``clipped``, ``skipped``,
        ``nonfinite`` (the first names) and the gradients' norms as the rule measured them, before clipping. `weights`
        and `updates` are tables of name -> norm, and add ``weight_norm`` and ``update_norm`` too. ``gradients``,
        ``weights`` and ``updates`` are sketches (`karikomi.record.tensors.sketched`) or, with all tensors,
        lists in the order of names in the last row of the event ``names``; in that order are also ``codes``.

        Raises `InvalidArgument` for a fact with one of these names, and for invalid tables of norms.
        """
        if self._silent:
            return
        given = {"weights": weights, "updates": updates}
        row, norms = step_row(_at_least(0, step, "step"), outcome, facts or {}, given)
        if self._tensors == "top":
            self._code(row, norms)
            row.update({of: sketched(norm, self._most) for of, norm in norms.items()})
        elif self._tensors == "all":
            self._name({of: list(norm) for of, norm in norms.items()})
            row.update({of: listed(norm) for of, norm in norms.items()})
        self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row of any event; one without an ``event`` is a ``note``."""
        if self._silent:
            return
        # The event first: `latest` searches for it.
        entry = plain({"event": "note", **row})
        if entry["event"] != "step":
            self._journal.append(line(entry))
        elif not self._keep(entry):
            self._left, self._newest = self._left_out(), entry
        self._sinks.write(entry)
        self._waiting += 1
        if self._waiting >= self._flush_every:
            self._drain()

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Append a row of the event ``run`` with facts about the run, unless the newest one has the same.

        `karikomi.advise` reads ``optimizer`` (name of its class), ``betas``, ``eps``, ``clip``, ``sizes`` (name ->
        entries),
        and the provenance of the rows: ``norms``, ``weights``, ``updates``, ``loss``.
        """
        if self._silent:
            return
        row = plain({"event": "run", **facts})
        if self._journal.length:
            self._drain()
        known = latest(self.path, "run", self._journal.length) if self._journal.length else None
        if known != row:
            self.write(row)

    def flush(self) -> int:
        """Write the pending rows and return the length of the file in bytes, for `rewind`."""
        if self._silent:
            return 0
        self._settle()
        self._drain()
        return self._journal.length

    def rewind(self, place: int) -> None:
        """Drop all rows after `place`, which a killed run wrote after its last checkpoint.

        A place of 0 keeps the first row. Raises `BadFile` if the record is shorter than that, or
        no row ends there.
        """
        if self._silent:
            return
        self._journal.cut(_at_least(0, place, "place") or len(FIRST_LINE))
        self._resume()

    def close(self) -> None:
        """Write the pending rows and the newest step, and close the sinks."""
        if self._silent:
            return
        try:
            self._settle(beyond=True)
            self._drain()
        finally:
            self._sinks.close()

    def _resume(self) -> None:
        """Set the state from the file, as after opening it."""
        length = self._journal.length
        self._waiting = 0
        self._left, self._newest = LeftOut(), None
        bounded = self._bound is not None and 2 * length >= self._bound
        newest = latest(self.path, "step", length) if bounded else None
        self._clipping = bool(newest and newest.get("clipped"))
        names = latest(self.path, "names", length) if self._tensors != "none" and length else None
        self._names: dict[str, Any] = {} if names is None else names

    def _keep(self, row: dict[str, Any]) -> bool:
        """Append the row of a step if it is to be kept, and return whether it was."""
        left = self._left_out()
        content = _counting(row, left)
        if self._bound is not None:
            quiet = not (self._clipping or left.clipped)
            if not keeps(row, len(content), self._journal.length, self._bound, quiet=quiet):
                return False
        self._append_step(row, content)
        return True

    def _settle(self, *, beyond: bool = False) -> None:
        """Append the newest step if it was left out, and reset the count.

        A run that continues from here and one that is resumed here then have the same state.
        """
        if self._newest is not None:
            content = _counting(self._newest, self._left)
            if beyond or self._bound is None or self._journal.length + len(content) <= self._bound:
                self._append_step(self._newest, content)
        self._left, self._newest = LeftOut(), None

    def _append_step(self, row: dict[str, Any], content: bytes) -> None:
        self._journal.append(content)
        self._left, self._newest, self._clipping = LeftOut(), None, bool(row.get("clipped"))

    def _left_out(self) -> LeftOut:
        return self._left if self._newest is None else self._left.plus(self._newest)

    def _code(self, row: dict[str, Any], norms: Norms) -> None:
        """Add the codes of all tensors to a row."""
        if not norms:
            return
        for of, norm in norms.items():
            if of not in self._pools or self._pools[of].names != tuple(norm):
                self._pools[of] = Pooling(list(norm))
        self._name({of: self._pools[of].labels for of in norms})
        row["codes"] = {of: self._pools[of].codes(norm) for of, norm in norms.items()}

    def _name(self, names: Mapping[str, list[str]]) -> None:
        """Write the names of the tensors when they first occur, and when they change."""
        if any(self._names.get(of) != now for of, now in names.items()):
            self._names = {**self._names, "event": "names", **names}
            self.write(self._names)

    def _drain(self) -> None:
        self._journal.drain()
        self._waiting = 0
        self._sinks.flush()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _counting(row: dict[str, Any], left: LeftOut) -> bytes:
    return line({**row, "left_out": left._asdict()} if left.steps else row)


def _at_least(least: int, value: object, name: str) -> int:
    return whole_from(least, value, f"{name} must be a whole number", where="Recorder")


def _rank(given: int | None) -> int:
    if given is not None:
        return _at_least(0, given, "rank")
    text = os.environ.get("RANK", "0")
    if not text.isdecimal():
        raise InvalidArgument(
            "the environment variable RANK is not a rank",
            where="Recorder",
            got=repr(text),
            allowed=">= 0",
            hint="pass rank=0 to the recorder of the process that writes",
        )
    return int(text)
