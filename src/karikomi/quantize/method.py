"""The quantizer that a call asks for, with its options and the size of its grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from karikomi.errors import InvalidArgument, check
from karikomi.quantize.nearest import UniformQuantizer
from karikomi.quantize.quantizer import DEFAULTS
from karikomi.registry import find, name_of

MOST_RATE = 16.0
PLAIN = {"group": None, "symmetric": True, "range": "max"}
"""The options of `UniformQuantizer`, as they are by default."""


class Method(NamedTuple):
    """`quantizer`: with its options. `size`: its bits or entries, or a `rate` in bits per number, in place of them."""

    quantizer: Any
    size: int
    rate: float | None = None

    @property
    def compensates(self) -> bool:
        """Whether errors are compensated by the inputs of layers, for which data is needed."""
        return bool(getattr(self.quantizer, "needs", None))

    @classmethod
    def of(
        cls,
        method: Any,
        sizes: Mapping[str, Any],
        options: Mapping[str, Any] = PLAIN,
        *,
        data: bool = False,
        where: str,
    ) -> Method:
        """Return the method of a name or an object, by default the one for the given size.

        `sizes`: ``"bits"``, ``"entries"`` and, where there are rates, ``"rate"``, of which exactly one is given.
        `options`: as in `PLAIN`. `data`: whether there is any. Raises `InvalidArgument`, or `UnknownName` with the
        nearest names.

        >>> Method.of(None, {"bits": 4, "entries": None}, where="quantize_").size
        4
        """
        given = {key: size for key, size in sizes.items() if size is not None}
        if len(given) != 1:
            raise InvalidArgument(
                "give bits for a uniform grid, entries for a codebook, or a rate"
                if "rate" in sizes
                else "give bits for a uniform grid, or entries for a codebook",
                where=where,
                got=", ".join(f"{key}={size}" for key, size in sizes.items()),
                allowed="exactly one",
            )
        ((key, size),) = given.items()
        method = method or {**DEFAULTS, "rate": "gptq" if data else "uniform"}[key]
        made = find("quantizer", method)() if isinstance(method, str) else method
        found = cls(_with_options(made, options, where), size)
        if key == "rate":
            good, plain = (
                isinstance(size, int | float) and 0.0 < size <= MOST_RATE,
                options == PLAIN,
            )
            what = "a rate takes one step per tensor: no group, zero point or range"
            check(
                where,
                (good, "rate out of range", size, f"above 0 to {MOST_RATE:g} bits"),
                (plain, what, None, None),
            )
            found = cls(found.quantizer, 0, float(size))
        if made.argument != ("bits" if key == "rate" else key):
            name = method if isinstance(method, str) else name_of("quantizer", made)
            what = f"the quantizer {name!r} takes {made.argument}"
            raise InvalidArgument(what, where=where, got=f"{key}={size}")
        if found.compensates and not data:
            raise InvalidArgument(
                "this method compensates errors by the inputs of layers, and needs data",
                where=where,
                hint="pass data=, an iterable of batches of inputs",
            )
        return found


def _with_options(quantizer: Any, options: Mapping[str, Any], where: str) -> Any:
    """Return a quantizer whose uniform grid has these options."""
    changed = {key: value for key, value in options.items() if value != PLAIN[key]}
    if not changed:
        return quantizer
    if isinstance(quantizer, UniformQuantizer):
        return replace(quantizer, **changed)
    if isinstance(getattr(quantizer, "grid", None), UniformQuantizer):
        return replace(quantizer, grid=replace(quantizer.grid, **changed))
    raise InvalidArgument(
        "this method has no uniform grid, and so none of these options",
        where=where,
        got=", ".join(changed),
    )
