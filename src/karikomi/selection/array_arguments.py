"""Checks of what a caller passes beside a dict of host arrays: facts, layouts, groups, earlier masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.prune import Coupled, Layout, mask_mapping
from karikomi.prune.facts import PER_TENSOR, Facts, check_facts, check_mapping, check_names


def check_weight(array: Any, *, where: str) -> None:
    """Raise `InvalidArgument` for what is not a real floating array."""
    array = wide(array)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fc":
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise InvalidArgument("not a floating array", where=where, got=got, allowed="float")
    if np.iscomplexobj(array):
        raise InvalidArgument("complex weights have no scores", where=where)


def check_array_facts(
    facts: Facts, needs: Collection[str], arrays: Mapping[str, np.ndarray], *, where: str
) -> None:
    """Check as `check_facts`, and that values are curves, numbers or arrays, as their fact is defined."""
    check_facts(facts, needs, arrays, where=where)
    for fact, of in facts.items():
        for name, value in of.items():
            if fact == "curve":
                kind, fits = "a mapping", isinstance(value, Mapping)
            else:
                array = wide(np.asarray(value))
                kind, fits = "an array of real numbers", array.dtype.kind in "biuf"
                if fact in PER_TENSOR:
                    kind, fits = "a number", fits and array.ndim == 0
            if not fits:
                raise InvalidArgument(
                    f"the fact {fact!r} of an array is {kind}",
                    where=f"{where}: {name}",
                    got=repr(value)[:80],
                )


def check_layouts(
    layouts: Mapping[str, Layout], arrays: Mapping[str, np.ndarray], *, where: str
) -> None:
    """Raise `InvalidArgument` for what is not a layout, or does not fit its array."""
    check_mapping(
        layouts, where=f"{where}: layouts", allowed="name of an array -> karikomi.prune.Layout"
    )
    check_names(layouts, arrays, where=f"{where}: layouts")
    for name, layout in layouts.items():
        if not isinstance(layout, Layout):
            raise InvalidArgument(
                "not a layout",
                where=f"{where}: layouts[{name!r}]",
                got=repr(layout)[:80],
                allowed="such as kk.prune.Layout(units=0, inputs=1)",
            )
        layout.check(arrays[name].shape, where=f"{where}: {name}")


def check_coupled(
    coupled: Sequence[Coupled], arrays: Mapping[str, Any], *, where: str
) -> Sequence[Coupled]:
    """Return the groups, or raise for what is not a group of these arrays."""
    for group in coupled:
        if not isinstance(group, Coupled):
            raise InvalidArgument(
                "not a group of parts of arrays",
                where=f"{where}: coupled",
                got=repr(group)[:80],
                allowed="karikomi.prune.Coupled",
            )
        names = [member.name for member in group.members]
        check_names(names, arrays, where=f"{where}: coupled {group.of!r}")
    return coupled


def check_masks(masks: Any, arrays: Mapping[str, Any], *, where: str, leaf: str) -> None:
    """Check as `mask_mapping.check_masks`; an absent array fits any mask, and errors call an array `leaf`."""
    if not isinstance(masks, Mapping):
        plural = "leaves" if leaf == "leaf" else f"{leaf}s"
        raise InvalidArgument(
            f"masks go by the names of {plural}",
            where=where,
            got=type(masks).__name__,
        )
    shapes = {
        name: None if array is None or name not in masks else np.shape(array)
        for name, array in arrays.items()
    }
    mask_mapping.check_masks(masks, shapes, where=where, leaf=leaf)


def wide(array: Any) -> Any:
    """Return an array of a float type that NumPy lacks (bfloat16, float8) as float32, exactly."""
    if not isinstance(array, np.ndarray) or array.dtype.kind == "f":
        return array
    foreign = array.dtype.name.startswith(("bfloat", "float"))
    return array.astype(np.float32) if foreign else array
