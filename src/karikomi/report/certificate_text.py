"""The certificate, the verdict and the front of a compress result, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.report.result_checks import named, table
from karikomi.report.wording import count, number, plain, size


def certificate_sentence(result: Mapping[str, Any]) -> str:
    """Return what the certificate states, or why there is none; empty for a result without one.

    >>> test = {"drop": 0.001, "bound": 0.004, "passed": True}
    >>> seen = {"status": "certified", "alpha": 0.05, "n": 800, "split": "test", "tried": 5, "tests": [test]}
    >>> print(certificate_sentence({"certificate": seen}))
    certified: a drop of at most 0.004 at 95 % (observed 0.001, 800 test examples, 5 files tried)
    """
    found = table(result.get("certificate"))
    if not found:
        return ""
    status = named(found.get("status"))
    if status == "not run":
        return f"not run: {named(found.get('reason'))}"
    tests = [table(test) for test in found.get("tests") or []]
    passed = [test for test in tests if test.get("passed") is True]
    shown = (passed or tests or [{}])[-1]
    level = number(found.get("alpha"))
    where = f"{count(found.get('n'))} {named(found.get('split'))} examples"
    tried = f"{count(found.get('tried'))} files tried"
    seen = f"observed {plain(shown.get('drop'))}, {where}, {tried}"
    sure = "n/a" if level is None else f"{100 * (1 - level):g} %"
    if passed:
        return f"certified: a drop of at most {plain(shown.get('bound'))} at {sure} ({seen})"
    return (
        f"NOT certified: the drop may be up to {plain(shown.get('bound'))} at {sure} ({seen});"
        " it held on the validation split alone"
    )


def missed_sentence(result: Mapping[str, Any]) -> str:
    """Return which limit was missed, and what could be met instead; empty where none was.

    >>> print(missed_sentence({"verdict": "missed", "binding": "bytes",
    ...                        "nearest_budgets": [{"drop": 0.01, "bytes": 2000}]}))
    the limit on bytes was missed; could be met: drop 0.01, bytes 2.00 kB
    """
    if result.get("verdict") != "missed":
        return ""
    nearest = [
        ", ".join(f"{name} {_value(name, value)}" for name, value in table(row).items())
        for row in result.get("nearest_budgets") or []
    ]
    could = f"; could be met: {'; or '.join(nearest)}" if nearest else ""
    return f"the limit on {named(result.get('binding'), 'a budget')} was missed{could}"


def _value(name: str, value: Any) -> str:
    return size(value) if name == "bytes" else plain(value)
