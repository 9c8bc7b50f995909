"""Units that go by the rank of a tensor, for rules that are to be compared with libraries which take them so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.errors import Unsupported
from karikomi.rule import Composite, Rule, Scope
from karikomi.rules.decide import leaves


def ranked_axes(
    rule: Rule | Composite, shapes: Mapping[str, tuple[int, ...]], *, where: str
) -> dict[str, tuple[int, ...]] | None:
    """Return name -> unit axes by the shapes of tensors, ``None`` where no rule goes by them.

    Raises `Unsupported` for rules in one clip that take units in several ways.
    """
    by_unit: list[Any] = [leaf for leaf in leaves(rule) if leaf.scope is Scope.UNIT]
    ways = {getattr(leaf, "unit", "layer") for leaf in by_unit}
    if ways <= {"layer"}:
        return None
    if len(ways) > 1:
        raise Unsupported(
            "the rules of one clip take the units of a tensor in one way",
            where=where,
            got=", ".join(sorted(ways)),
        )
    found = {name: by_unit[0].axes_by_rank(tuple(shape)) for name, shape in shapes.items()}
    return {name: axes for name, axes in found.items() if axes}
