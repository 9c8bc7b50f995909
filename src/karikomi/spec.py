"""Rules as data: rule <-> dict <-> TOML. Strict, because a key that is silently ignored is a lost run.

A rule is written as its fields plus its name: ``{"rule": "ByGlobalNorm", "limit": 1.0}``. A schedule
may be given in place of a number: ``{"schedule": "Linear", "start": 1.0, "stop": 0.1, "steps": [0, 100]}``.
A score, pattern or allocation with fields is such a table as well:
``{"rule": "OneShot", "sparsity": 0.5, "pattern": {"rule": "n:m", "keep": 2, "of": 4}}``.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from karikomi import registry, schedule
from karikomi.errors import BadFile, InvalidArgument, KarikomiError, UnknownName, suggest
from karikomi.files import as_path
from karikomi.rule import Composite, Quantity, Rule

SCHEDULES = {cls.__name__: cls for cls in (schedule.Linear, schedule.Cubic, schedule.Stepwise)}
OF_FIELDS = {
    "score": "score",
    "pattern": "pattern",
    "allocation": "allocator",
    "others": "allocator",
}
"""Field -> the kind of the objects in it; elsewhere there are clips and bounds."""

T = TypeVar("T")


def to_dict(rule: Any, kind: str = "clip") -> dict[str, Any]:
    """Return a registered rule as a dict of plain values.

    >>> import karikomi as kk
    >>> to_dict(kk.clip.ByGlobalNorm(1.0))
    {'rule': 'ByGlobalNorm', 'limit': 1.0, 'norm': 2.0}
    """
    return {"rule": registry.name_of(kind, rule), **_fields(rule)}


def from_dict(spec: Mapping[str, Any], kind: str = "clip") -> Any:
    """Return the rule that a dict describes; unknown and missing keys are errors with suggestions.

    >>> import karikomi as kk
    >>> from_dict({"rule": "ByNorm", "limit": 2.0})
    ByNorm(limit=2.0)
    """
    if not isinstance(spec, Mapping):
        raise InvalidArgument("a rule is a table", where=kind, got=repr(spec))
    if "rule" not in spec:
        raise InvalidArgument("the key 'rule' is missing", where=kind, got=sorted(spec))
    cls = registry.find(kind, str(spec["rule"]))
    values = {key: _plain_to_value(value, key) for key, value in spec.items() if key != "rule"}
    return construct(cls, values, where=f"{kind} {spec['rule']}")


def construct(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Return ``cls(**values)`` for a dataclass after checking that its keys are known and complete."""
    fields = {field.name: field for field in _declared(cls, where) if field.init}
    for key in values:
        if key not in fields:
            raise UnknownName("unknown key", where=where, got=repr(key), hint=suggest(key, fields))
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise InvalidArgument("a key is missing", where=where, got=sorted(values), allowed=name)
    return getattr(cls, "from_fields", cls)(**values)


def validated(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Like `construct`, after checking every value against the type that its field declares."""
    import pydantic

    probe = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    loose = pydantic.ConfigDict(arbitrary_types_allowed=True)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in probe:
            construct(cls, {key: value}, where=where)
        try:
            adapter = pydantic.TypeAdapter(hints[key], config=loose)
            checked[key] = adapter.validate_python(_plain_to_value(value), strict=True)
        except pydantic.ValidationError as error:
            message = error.errors()[0]["msg"]
            raise InvalidArgument(message, where=f"{where}: {key}", got=repr(value)) from None
    return construct(cls, checked, where=where)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return a TOML file as a dict, or raise a `KarikomiError` that names the file and the line."""
    try:
        return tomllib.loads(as_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile("cannot read the file", where=str(path), got=error.strerror) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadFile("this is not TOML", where=str(path), got=error) from error


def _fields(thing: Any) -> dict[str, Any]:
    return {
        field.name: _value_to_plain(getattr(thing, field.name), field.name)
        for field in _declared(thing, "spec")
        if field.init
    }


def _declared(thing: Any, where: str) -> tuple[dataclasses.Field[Any], ...]:
    if dataclasses.is_dataclass(thing):
        return dataclasses.fields(thing)
    name = getattr(thing, "__name__", type(thing).__name__)
    raise InvalidArgument(
        "a class without declared fields has no plain form",
        where=where,
        got=name,
        hint="make its class a dataclass",
    )


def _value_to_plain(value: Any, field: str = "") -> Any:
    if type(value) in SCHEDULES.values():
        return {"schedule": type(value).__name__, **_fields(value)}
    if isinstance(value, tuple):
        return [_value_to_plain(element) for element in value]
    if field in OF_FIELDS and not isinstance(value, str | None):
        return to_dict(value, OF_FIELDS[field])
    if isinstance(value, Rule | Composite) and not isinstance(value, type):
        return to_dict(value, "bound" if value.of is Quantity.WEIGHT else "clip")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    as_list = getattr(value, "tolist", None)
    if as_list is not None:
        return as_list()
    raise KarikomiError("this value has no plain form", where="spec", got=repr(value))


def _plain_to_value(value: Any, field: str = "") -> Any:
    if isinstance(value, list):
        return tuple(_plain_to_value(element) for element in value)
    if not isinstance(value, Mapping):
        return value
    if "rule" in value or field in OF_FIELDS:
        return from_dict(value, OF_FIELDS.get(field, "clip"))
    name = value.get("schedule")
    if name not in SCHEDULES:
        raise UnknownName(
            "unknown schedule", where="spec", got=repr(name), hint=suggest(str(name), SCHEDULES)
        )
    rest = {key: _plain_to_value(element) for key, element in value.items() if key != "schedule"}
    return construct(SCHEDULES[name], rest, where=f"schedule {name}")
