"""Errors are one line that says what, where, got, allowed and the next step."""

from __future__ import annotations

import pickle

import pytest

from karikomi import errors
from karikomi.errors import KarikomiError, suggest

CHILDREN = {
    errors.InvalidArgument: ValueError,
    errors.UnknownName: LookupError,
    errors.Unsupported: RuntimeError,
    errors.NonFinite: ArithmeticError,
    errors.BadFile: ValueError,
    errors.Unavailable: ImportError,
    errors.Unwritable: OSError,
}


def test_no_child_is_forgotten_here() -> None:
    assert set(KarikomiError.__subclasses__()) == set(CHILDREN)


@pytest.mark.parametrize(("child", "builtin"), CHILDREN.items(), ids=lambda one: one.__name__)
def test_each_child_has_one_line_and_is_the_builtin_that_fits(child: type, builtin: type) -> None:
    error = child("too\n  large", where="x", got=[1, 2], allowed="< 1", hint="make it\tsmaller")
    assert str(error) == "x: too large; got [1, 2]; allowed: < 1; make it smaller"
    assert isinstance(error, builtin) and isinstance(error, KarikomiError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(child("alone")) == "alone"


def test_what_is_not_finite_is_the_error_of_torch_too() -> None:
    # clip_grad_norm_(error_if_nonfinite=True) raises a RuntimeError.
    assert issubclass(errors.NonFinite, RuntimeError)


def test_what_is_got_may_be_falsy() -> None:
    assert str(errors.InvalidArgument("wrong", got=0, allowed=())) == "wrong; got 0; allowed: ()"


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("limt", ["limit", "every"], "did you mean 'limit'?"),
        ("wight", ["weight", "width"], "did you mean 'weight' or 'width'?"),
        ("zzz", ["b", "a", "a"], "known: a, b"),
        ("zzz", [], "known: nothing"),
        ("zzz", map(str, range(20)), "known: 0, 1, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, ..."),
    ],
)
def test_the_nearest_names_are_suggested(name: str, known: list[str], text: str) -> None:
    assert suggest(name, known) == text
