"""Loading: check everything, decode chunk by chunk, return all tensors or none."""

from __future__ import annotations

import copy
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from karikomi.errors import BadFile, InvalidArgument, KarikomiError, check_known
from karikomi.pack.codecs import adaptive
from karikomi.pack.container import first_manifest, header, manifest
from karikomi.pack.container.contents import Contents, ManifestEntry, TensorGroup
from karikomi.pack.container.header import Header
from karikomi.pack.delta import check_base, restored
from karikomi.pack.groups.coding import Decoded, unpacked
from karikomi.pack.groups.on_cores import ahead
from karikomi.pack.read_budget import Budget
from karikomi.pack.stored import Stored
from karikomi.quantize import Coded

T = TypeVar("T")
MANY = 2**20
"""Symbols of a file from which on threads pay."""


class Opened(NamedTuple):
    """A file whose header, directory and manifest agree; its payloads are still unread."""

    header: Header
    contents: Contents
    stream: BinaryIO
    where: str
    size: int
    base: Mapping[str, Stored] | None = None

    @property
    def entries(self) -> list[ManifestEntry]:
        """The tensors that are stored, in the order of the manifest."""
        return [entry for group in self.contents.groups for entry in group.entries]

    @property
    def notes(self) -> dict[str, str]:
        """The notes."""
        return self.contents.notes

    @property
    def equal(self) -> dict[str, str]:
        """Name -> name of the tensor that it is equal to."""
        return self.contents.equal

    def named(
        self, content: Callable[[Decoded], T], only: Collection[str] | None = None
    ) -> dict[str, T]:
        """Return name -> content of each tensor, in the order of the names; of equal ones each has its own.

        `only`: the names that are wanted; groups without any of them are not read.
        """
        known = {entry.name for entry in self.entries} | self.equal.keys()
        for name in only or ():
            check_known(name, known, "there is no such tensor", where=self.where)
        wanted = known if only is None else set(only)
        stored = {self.equal.get(name, name) for name in wanted}
        groups = [
            group
            for group in self.contents.groups
            if not stored.isdisjoint(entry.name for entry in group.entries)
        ]
        found: dict[str, T] = {}
        for tensors in self._decoded(groups):
            decoded = (item for item in tensors if item.entry.name in stored)
            found |= {item.entry.name: content(item) for item in decoded}
        found |= {
            name: copy.copy(found[other]) for name, other in self.equal.items() if name in wanted
        }
        return {name: found[name] for name in sorted(wanted)}

    def tensors(self) -> Iterator[Decoded]:
        """Yield each tensor decoded and verified; raise `BadFile` at the first bad one."""
        for group in self.contents.groups:
            yield from self.decoded(group)

    def decoded(self, group: TensorGroup) -> list[Decoded]:
        """Return the tensors of a group; raise `BadFile` for a bad one."""
        return self._unpacked((group, self._payload(group)))

    def _decoded(self, groups: list[TensorGroup]) -> Iterator[list[Decoded]]:
        """Yield the tensors of each group; of large ones the next is decoded meanwhile."""
        payloads = ((group, self._payload(group)) for group in groups)
        large = sum(group.symbols for group in groups) >= MANY
        yield from (ahead if large else map)(self._unpacked, payloads)

    def _payload(self, group: TensorGroup) -> bytes:
        self.stream.seek(group.start)
        return self.stream.read(group.size)

    def _unpacked(self, coded: tuple[TensorGroup, bytes]) -> list[Decoded]:
        group, payload = coded
        where = f"{self.where}, {group.label}"
        try:
            return [self._whole(item) for item in unpacked(group, payload)]
        except (BadFile, InvalidArgument) as error:
            raise BadFile(str(error), where=where) from error
        except MemoryError as error:
            raise BadFile("not enough memory for this tensor", where=where) from error

    def _whole(self, item: Decoded) -> Decoded:
        """Return a tensor; that of a difference with its base, if the file was opened with one."""
        name = item.entry.name
        if self.base is None or name not in self.contents.differences:
            return item
        stored = restored(item.stored, self.base.get(name))
        return Decoded(item.entry, stored, stored.decoded())

    def stored(self) -> dict[str, Stored]:
        """Return all tensors as they are stored."""
        return self.named(lambda item: item.stored)


def load(
    path: str | os.PathLike[str],
    *,
    only: Collection[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
) -> dict[str, np.ndarray]:
    """Return the tensors of a packed file as NumPy arrays by name.

    Arrays have the shape and type that were saved; quantized ones are float32. Every chunk's
    CRC32 and every tensor's digest is checked. `budget` bounds what is read, by
    default `Budget()`. `only`: names of the tensors that are wanted; others are neither read nor checked, but for those
    that are coded together with them. `base`: the file that a delta was saved against. Raises `BadFile` naming the
    tensor and the fact, `UnknownName` for a name that is not there, `InvalidArgument` for a delta without its base;
    there is no partial result.

    >>> import tempfile
    >>> from karikomi.pack import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load(save({"x": np.arange(3)}, folder + "/x.karikomi"))
    {'x': array([0, 1, 2])}
    """
    names = _names(only)
    with opened(path, budget, base) as file:
        return file.named(lambda item: item.dense, names)


def load_coded(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
) -> dict[str, np.ndarray | Coded]:
    """Return the tensors as they were given to `save`: quantized ones as codes with their grid.

    Checks and errors as for `load`.
    """
    return load_with_notes(path, base=base, budget=budget)[0]


def load_with_notes(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
) -> tuple[dict[str, np.ndarray | Coded], dict[str, str]]:
    """Return the tensors as `load_coded` does, and the notes."""
    with opened(path, budget, base) as file:
        return file.named(lambda item: item.stored.value()), file.notes


@contextmanager
def opened(
    path: str | os.PathLike[str],
    budget: Budget | None = None,
    base: str | os.PathLike[str] | None = None,
    *,
    apart: bool = False,
) -> Iterator[Opened]:
    """Open a packed file and check all that can be checked without its payloads.

    `base`: the file that a delta was saved against; `apart`: differences are left as they are.
    """
    budget = budget or Budget()
    before = None
    if base is not None:
        with opened(base, budget) as file:
            before = file.stored()
    path = Path(path).expanduser()
    where = str(path)
    try:
        # Before opening: a pipe would wait for its writer for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadFile("not a regular file", where=where)
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = header.read(stream, size, budget, where)
            if head.manifest is None:
                contents = manifest.load(stream, head, budget, where)
            else:
                contents = first_manifest.load(head.manifest, head, budget, where)
            _admit(contents, size, budget, where)
            if not apart:
                check_base(contents.base, before, where)
            yield Opened(head, contents, stream, where, size, before)
    except (OSError, ValueError) as error:
        if isinstance(error, KarikomiError):
            raise
        raise BadFile(f"cannot be read ({error})", where=where) from error


def _names(only: Collection[str] | None) -> Collection[str] | None:
    if isinstance(only, str):
        raise InvalidArgument(
            "only: a list of names", where="load", got=repr(only), hint=f"[{only!r}]"
        )
    return only if only is None else list(only)


def _admit(contents: Contents, stored: int, budget: Budget, where: str) -> None:
    sizes = {entry.name: entry.decoded_size for group in contents.groups for entry in group.entries}
    decoded = sum(sizes.values()) + sum(sizes[other] for other in contents.equal.values())
    budget.admit_decoded(decoded, stored, where)
    slow = [group.symbols for group in contents.groups if group.codec == adaptive.NAME]
    budget.admit("slow", sum(slow), where)
