"""The protocol of a quantizer, which is registered by name, and its look-up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

from numpy.typing import NDArray

from karikomi.errors import InvalidArgument
from karikomi.quantize.grids import Coded
from karikomi.quantize.units import OutputUnits
from karikomi.registry import find

DEFAULTS = {"bits": "uniform", "entries": "kmeans"}


class Quantizer(Protocol):
    """A class without arguments that is registered as a ``"quantizer"``."""

    argument: ClassVar[str]
    """What sets the size of its grid: ``"bits"`` or ``"entries"``."""

    def quantize(self, weights: NDArray, size: int, *, units: OutputUnits, name: str) -> Coded:
        """Return the codes of a float array, in its shape, and their grid; zeros stay zeros.

        `size`: the value of `argument`. `units`: the output units of `weights`. `name` is used in
        errors only. Raises `InvalidArgument` for a size out of range, `NonFinite` for NaN or infinity.
        """
        ...


def quantizer_for(
    method: str | None = None,
    *,
    bits: int | None = None,
    entries: int | None = None,
    where: str,
) -> Callable[..., Coded]:
    """Return ``(weights, units=, name=) -> Coded`` of a registered quantizer, its size filled in.

    `method`: its name; by default ``"uniform"`` for `bits` and ``"kmeans"`` for `entries`, of which
    exactly one is given. Raises `InvalidArgument`, or `UnknownName` with the nearest names.
    """
    sizes = {"bits": bits, "entries": entries}
    sizes = {key: size for key, size in sizes.items() if size is not None}
    if len(sizes) != 1:
        raise InvalidArgument(
            "give bits for a uniform grid, or entries for a codebook",
            where=where,
            got=f"bits={bits}, entries={entries}",
            allowed="exactly one",
        )
    ((argument, size),) = sizes.items()
    name = method or DEFAULTS[argument]
    chosen: Any = find("quantizer", name)()
    if chosen.argument != argument:
        raise InvalidArgument(
            f"the quantizer {name!r} takes {chosen.argument}",
            where=where,
            got=f"{argument}={size}",
        )
    return partial(chosen.quantize, size=size)
