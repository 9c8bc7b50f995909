"""Selections by name: globs, exact names, and what matches nothing."""

from __future__ import annotations

from typing import Any

import pytest

from karikomi.errors import InvalidArgument, UnknownName
from karikomi.select import select

NAMES = ["conv.weight", "conv.bias", "head.weight", "head.bias", "block[0].weight"]


@pytest.mark.parametrize(
    ("only", "exclude", "expected"),
    [
        (None, None, NAMES),
        ("*.bias", None, ["conv.bias", "head.bias"]),
        (["head.*", "conv.weight"], "*.bias", ["conv.weight", "head.weight"]),
        (None, ["*.weight"], ["conv.bias", "head.bias"]),
        ("block[0].weight", None, ["block[0].weight"]),
    ],
)
def test_globs_choose_in_order(only: object, exclude: object, expected: list[str]) -> None:
    assert select(iter(NAMES), only=only, exclude=exclude) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["only", "exclude"])
def test_a_pattern_that_matches_nothing_names_the_nearest(argument: str) -> None:
    with pytest.raises(UnknownName) as raised:
        select(NAMES, where="prune_", **{argument: ["*.bias", "conv.wieght"]})
    assert str(raised.value).startswith("prune_: the pattern matches no tensor; got 'conv.wieght'")
    assert "did you mean 'conv.weight'" in str(raised.value)


def test_letters_have_a_case() -> None:
    with pytest.raises(UnknownName):
        select(NAMES, only="CONV.*")


@pytest.mark.parametrize("argument", ["only", "exclude"])
@pytest.mark.parametrize("given", [5, True, b"conv*", ["*.bias", 5], {"conv*": 1}, iter(["conv*"])])
def test_what_holds_no_globs_is_named(argument: str, given: object) -> None:
    with pytest.raises(InvalidArgument) as raised:
        select(NAMES, where="prune_", **{argument: given})  # type: ignore[arg-type]
    assert str(raised.value) == (
        f"prune_: {argument}: names are selected by globs; got {given!r}; "
        "allowed: a string or a sequence of strings"
    )


@pytest.mark.parametrize("given", [("head.*",), {"head.*"}, {"head.*": 1}.keys()])
def test_globs_come_in_any_collection(given: Any) -> None:
    assert select(NAMES, only=given) == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("options", "got"), [({"exclude": "*"}, r"exclude='\*'"), ({"only": []}, r"only=\[\]")]
)
def test_a_selection_of_nothing_is_an_error(options: dict[str, object], got: str) -> None:
    with pytest.raises(UnknownName, match=f"leaves no tensor; got {got}$"):
        select(NAMES, **options)  # type: ignore[arg-type]


def test_where_there_is_nothing_no_selection_is_blamed() -> None:
    with pytest.raises(UnknownName, match="^here: there is no tensor to select from$"):
        select([], where="here")
