"""A registered rule as one line of text and back: ``Chain(ZClip(), ByGlobalNorm(1.0))``."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from karikomi import registry
from karikomi.errors import InvalidArgument, KarikomiError, Unsupported


def rule_of(text: str, kind: str = "clip") -> Any:
    """Return the rule that a text describes: the call of a registered class, with numbers, texts and such calls.

    Raises `InvalidArgument` for another form, and `UnknownName` with the nearest names.

    >>> rule_of("AutoClip(20)")
    AutoClip(percentile=20.0, window=512)
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise _other_form(text, kind) from error
    if isinstance(tree, ast.Name):
        tree = ast.Call(tree, [], [])
    if not isinstance(tree, ast.Call):
        raise _other_form(text, kind)
    return _value(tree, text, kind)


def text_of(rule: Any, kind: str = "clip") -> str:
    """Return the shortest call that makes a rule again; fields at their defaults are left out.

    Raises `Unsupported` for a rule that no such call makes: one that is not registered, or holds a schedule.

    >>> import karikomi as kk
    >>> text_of(kk.clip.Chain(kk.clip.ZClip(), kk.clip.ByGlobalNorm(1.0)))
    'Chain(ZClip(), ByGlobalNorm(1.0))'
    """
    try:
        text = _call(rule, kind)
        same = rule_of(text, kind) == rule
    except (KarikomiError, TypeError) as error:
        raise _no_text(rule) from error
    if not same:
        raise _no_text(rule)
    return text


def _call(rule: Any, kind: str) -> str:
    fields = [field for field in dataclasses.fields(rule) if field.init]
    if hasattr(rule, "rules") and [field.name for field in fields] == ["rules"]:
        arguments = [_call(inner, kind) for inner in rule.rules]
    else:
        arguments, in_place = [], True
        for field in fields:
            value = getattr(rule, field.name)
            if value == field.default:
                in_place = False
                continue
            written = _call(value, kind) if dataclasses.is_dataclass(value) else repr(value)
            named = field.kw_only or not in_place
            arguments.append(f"{field.name}={written}" if named else written)
    return f"{registry.name_of(kind, rule)}({', '.join(arguments)})"


def _value(node: ast.expr, text: str, kind: str) -> Any:
    if isinstance(node, ast.Name) and node.id == "inf":
        return float("inf")
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or any(word.arg is None for word in node.keywords):
            raise _other_form(text, kind)
        make = registry.find(kind, node.func.id)
        given = [_value(argument, text, kind) for argument in node.args]
        named = {str(word.arg): _value(word.value, text, kind) for word in node.keywords}
        try:
            return make(*given, **named)
        except TypeError as error:
            raise InvalidArgument(
                "the rule takes other arguments", where=kind, got=f"{text}: {error}"
            ) from error
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise _other_form(text, kind) from error


def _other_form(text: str, kind: str) -> InvalidArgument:
    examples = {"bound": "MaxNorm(2.0)"}.get(kind, "AutoClip(10)")
    return InvalidArgument(f"not a {kind}", where="sweep", got=repr(text), allowed=examples)


def _no_text(rule: Any) -> Unsupported:
    return Unsupported(
        "this rule cannot be written as one call of a registered class",
        where="sweep",
        got=repr(rule),
        hint="register its class, and give numbers for schedules and predicates",
    )
