"""Gates: held, missed, undecided for want of examples, not run; and the exit codes of these."""

from __future__ import annotations

from typing import Any

import pytest

from karikomi.audit.gates import HELD, MISSED, NOT_RUN, UNDECIDED, gate_of, judged, verdict_of
from karikomi.errors import InvalidArgument


def result(lost: int, gained: int, n: int, **more: Any) -> dict[str, Any]:
    from karikomi.audit.paired.paired_outcomes import drop_interval, share_interval

    outcomes = {
        "drop": (lost - gained) / n,
        "drop_interval": list(drop_interval(lost, gained, n)),
        "negative_flips": lost / n,
        "negative_flips_interval": list(share_interval(lost, n)),
        "churn": (lost + gained) / n,
        "churn_interval": list(share_interval(lost + gained, n)),
    }
    return {"outcomes": outcomes, "drop": (lost - gained) / n, **more}


@pytest.mark.parametrize(
    ("text", "lost", "gained", "n", "outcome"),
    [
        ("drop>0.02", 10, 10, 10_000, HELD),
        ("drop>0.02", 500, 10, 10_000, MISSED),
        ("drop>0.005", 2, 1, 200, UNDECIDED),
        ("drop<-0.02", 10, 10, 10_000, HELD),
        ("negative_flips>0.01", 0, 0, 1_000, HELD),
        ("negative_flips>0.01", 0, 0, 100, UNDECIDED),
        ("churn>0.5", 2, 2, 1_000, HELD),
        ("slice_drop>0.1", 0, 0, 1_000, NOT_RUN),
        ("explanation<0.5", 0, 0, 1_000, NOT_RUN),
    ],
)
def test_outcomes(text: str, lost: int, gained: int, n: int, outcome: str) -> None:
    assert judged(gate_of(text), result(lost, gained, n)).outcome == outcome


def row(name: str, lost: int, gained: int, n: int) -> dict[str, Any]:
    shares = {"before": 0.9, "after": 0.9 - (lost - gained) / n}
    return {"class": name, "lost": lost, "gained": gained, "examples": n, **shares}


def test_one_bad_class_of_many_is_enough_and_is_named() -> None:
    rows = [row(str(k), 5, 5, 1_000) for k in range(9)]
    verdict = judged(gate_of("class_drop>0.05@holm"), result(0, 0, 9, classes=rows))
    assert verdict.outcome == HELD
    verdict = judged(
        gate_of("class_drop>0.05@holm"), result(0, 0, 9, classes=[*rows, row("cat", 150, 5, 1_000)])
    )
    assert (verdict.outcome, verdict.where) == (MISSED, "class cat")
    assert verdict.value == pytest.approx(0.145)


def test_all_classes_together_need_wider_intervals_than_one() -> None:
    rows = [row(str(k), 12, 2, 400) for k in range(50)]
    found = [
        judged(gate_of(f"class_drop>0.05{at}"), result(0, 0, 9, classes=rows))
        for at in ("", "@holm")
    ]
    widths = [verdict.interval[1] - verdict.interval[0] for verdict in found if verdict.interval]
    assert widths[1] > 1.3 * widths[0]


def test_measurements_without_an_interval_decide_by_their_value() -> None:
    layers = [{"layer": "a", "cka": 0.99}, {"layer": "b", "cka": 0.4}, {"layer": "c", "cka": None}]
    verdict = judged(gate_of("alignment<0.5"), {"layers": layers})
    assert (verdict.outcome, verdict.where, verdict.value) == (MISSED, "layer b", 0.4)
    assert judged(gate_of("alignment<0.3"), {"layers": layers}).outcome == HELD


def test_one_verdict_of_several_gates() -> None:
    good, bad = result(10, 10, 10_000), result(900, 10, 10_000)
    held, missed = (judged(gate_of("drop>0.02"), found) for found in (good, bad))
    absent = judged(gate_of("slice_drop>0.02"), good)
    several = ([], [held], [held, missed, absent], [held, absent])
    assert [verdict_of(verdicts) for verdicts in several] == [HELD, HELD, MISSED, UNDECIDED]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "drop",
        "drop>x",
        "drop>=0.1",
        "drops>0.1",
        "class_drop>0.1@bonferroni",
        "drop>0.1@holm",
        "drop>1e",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--fail-if"):
        gate_of(text)
