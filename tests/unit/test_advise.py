"""Advice from records: regime and limit, the replay by hand, causes on made-up series, onset, heat map, bounds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import karikomi as kk
from karikomi.advising import Advice
from karikomi.advising.causes.asking import CAUSES, RULES
from karikomi.advising.detection import alarm_level, cusum, filled, robust_z, trailing
from karikomi.advising.formats import open_run
from karikomi.advising.limits import gathered
from karikomi.advising.narrative import heat_lines, shade
from karikomi.cli.app import main
from karikomi.clip import Recommended, histogram
from karikomi.errors import UnknownName
from karikomi.rules.outcome import Outcome

NAMES = ("conv.weight", "conv.bias", "fc.weight", "head.weight")
SIZES = {"conv.weight": 400, "conv.bias": 4, "fc.weight": 400, "head.weight": 400}
ADAM = {"optimizer": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "sizes": SIZES}
SGD = {"optimizer": "SGD", "sizes": SIZES}


class Series:
    """Usual norms of four tensors over a run, to be spoilt."""

    def __init__(self, steps: int = 400, seed: int = 0) -> None:
        noise = np.random.default_rng(seed)
        shared = np.exp(0.2 * noise.standard_normal((steps, 1)))
        self.gradients = shared * np.exp(0.1 * noise.standard_normal((steps, 4)))
        self.weights = np.full((steps, 4), 10.0) * (1.0 + 1e-4 * np.arange(steps))[:, None]
        self.updates = 1e-2 * np.exp(0.1 * noise.standard_normal((steps, 4)))
        self.loss = np.exp(-np.arange(steps) / 400.0) * np.exp(0.1 * noise.standard_normal(steps))
        self.lr = np.full(steps, 1e-3)
        self.facts: dict[str, Any] = dict(SGD)
        self.more: dict[int, dict[str, Any]] = {}
        self.clipped = np.zeros(steps, dtype=bool)
        self.left_out = ""

    def advice(self, path: Path, **recorder: Any) -> Advice:
        return kk.advise(self.write(path / "record.jsonl", **recorder))

    def write(self, path: Path, **recorder: Any) -> Path:
        with kk.record.Recorder(path, **recorder) as record:
            record.describe(self.facts)
            for t, gradients in enumerate(self.gradients):
                after = 0.5 * gradients if self.clipped[t] else gradients
                outcome = Outcome(NAMES, gradients, after, not np.isfinite(gradients).all())
                facts = {"loss": self.loss[t], "lr": self.lr[t], **self.more.get(t, {})}
                if self.left_out:
                    del facts[self.left_out]
                tables: Mapping[str, Any] = {
                    of: dict(zip(NAMES, getattr(self, of)[t], strict=True))
                    for of in ("weights", "updates")
                }
                record.step(t + 1, outcome, facts, **tables)
        return path


@pytest.fixture
def no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the replay, most of the time of an advice, in tests of what does not depend on it."""
    monkeypatch.setattr("karikomi.advising.advice.replayed", lambda *_: [])


def test_a_usual_run_is_a_plateau_without_a_cause(tmp_path: Path) -> None:
    advice = Series().advice(tmp_path)
    assert (advice.regime, advice.cause, advice.event_step) == ("plateau", "none", None)
    assert "Nothing exploded" in str(advice) and "The largest norm was" in str(advice)
    assert advice.missing == () and advice.lost == ()


@pytest.mark.usefixtures("no_replay")
def test_the_limit_is_that_of_the_formula(tmp_path: Path) -> None:
    series = Series(800)
    advice = series.advice(tmp_path)
    norms = np.linalg.norm(series.gradients, axis=1)[400:]
    low, median, high = np.quantile(norms, (0.25, 0.5, 0.75))
    spread = math.log(high / low) / 1.34898
    limit = advice.limit
    assert limit is not None and limit.confidence == "good"
    assert limit.median == pytest.approx(median, rel=0.02)
    assert limit.spread == pytest.approx(spread, rel=0.1)
    wanted = median * math.exp(min(max(3 * spread, math.log(3)), math.log(10)))
    assert limit.value == pytest.approx(wanted, rel=0.25)
    assert limit.value == float(f"{limit.value:.2g}") and limit.first == 401
    assert f"kk.clip.ByGlobalNorm({limit.value:g})" in str(advice)


@pytest.mark.usefixtures("no_replay")
def test_limit_and_multiple_follow_the_scale_of_the_norms(tmp_path: Path) -> None:
    found = []
    for place, scale in enumerate((1.0, 1024.0)):
        series = Series()
        series.gradients *= scale
        (tmp_path / str(place)).mkdir()
        found.append(series.advice(tmp_path / str(place)).limit)
    assert found[1].value == pytest.approx(1024 * found[0].value, rel=0.05)
    assert found[1].multiple == pytest.approx(found[0].multiple, rel=0.05)


def test_advice_and_the_rule_pick_the_same_limit(tmp_path: Path) -> None:
    """Both are `typical` and `limit_of` over the histogram: exactly equal on the same norms."""
    norms = np.exp(0.3 * np.random.default_rng(0).standard_normal(64))
    rule, state = Recommended(warmup=64), None
    for norm in norms:
        _, _, state = kk.numpy.clip({"w": np.array([norm])}, rule, state)
    from karikomi.clip.recommended import typical

    assert state["rule.limit"] == float(rule.limit_of(*typical(gathered(norms), xp=np), xp=np))


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=40))
def test_norms_are_gathered_as_they_are_counted(norms: list[float]) -> None:
    state = histogram.begin(np.zeros(1), xp=np)
    for norm in norms:
        state = histogram.count(state, np.asarray(norm), np.asarray(True), xp=np)
    found = gathered(np.array(norms))
    assert {key: float(found[key]) for key in ("first", "smallest", "largest")} == {
        key: float(state[key]) for key in ("first", "smallest", "largest")
    }
    # At the edge of a bin the two logarithms may round apart.
    assert (
        np.abs(np.cumsum(found["counts"]) - np.cumsum(state["counts"])).sum() <= 1 + len(norms) // 8
    )


@pytest.mark.usefixtures("no_replay")
def test_a_limit_that_is_always_met_is_a_normaliser(tmp_path: Path) -> None:
    for facts, text in ((SGD, "move them inversely"), (ADAM, "the factor cancels in g / sqrt(v)")):
        series = Series()
        series.facts, series.clipped[5:] = facts, True
        (tmp_path / facts["optimizer"]).mkdir()
        advice = series.advice(tmp_path / facts["optimizer"])
        assert (advice.regime, advice.cause) == ("normaliser", "always_clipped")
        assert text in " ".join(str(advice).split()) and advice.cause_step is None


def spoil(series: Series, cause: str) -> None:
    """Change a series at step 301 (row 300) as the cause does."""
    at = 300
    if cause == "nonfinite_batch":
        series.gradients[at], series.loss[at] = math.nan, math.nan
    elif cause == "backward_overflow":
        series.gradients[at, 0] = math.inf
    elif cause == "loss_scale":
        series.gradients[at : at + 6, 2] = math.inf
        series.more = {t: {"loss_scale": 2.0 ** (16 - max(0, min(t - at, 6)))} for t in range(400)}
    elif cause == "changed_weights":
        series.weights[at:, 2] *= 100.0
        series.gradients[at:], series.loss[at:] = 30 * series.gradients[at:], 5 * series.loss[at:]
    elif cause == "learning_rate":
        series.lr[at:], series.updates[at:] = 1e-2, 10 * series.updates[at:]
        series.loss[at:] *= 2.0
    elif cause == "moment_lag":
        series.facts = {**ADAM, "betas": [0.9, 0.9999]}
        series.gradients[:at] /= 50.0
        series.loss[at:] *= 3.0
        series.updates[at : at + 40] *= 3.0
    elif cause == "bad_batch":
        series.gradients[at], series.loss[at] = 100 * series.gradients[at], 50 * series.loss[at]
        series.gradients[at, 2] *= 3.0
    elif cause == "data_shift":
        series.loss[at:], series.gradients[at:] = 4 * series.loss[at:], 2 * series.gradients[at:]
    elif cause == "single_tensor":
        series.gradients[:, 2] *= 0.1  # small, so that it shows in the joint norm some steps later
        series.gradients[at:, 2] *= np.exp(np.minimum(np.arange(100), 25) * 0.5)
    elif cause == "vanishing":
        series.gradients[:, 0] *= 1e-4
        series.gradients[:, 2] *= 1e-2
        series.loss[:] = 2.3 * np.exp(0.01 * np.random.default_rng(1).standard_normal(400))
    elif cause == "near_epsilon":
        series.facts = ADAM
        series.gradients *= 1e-7


TENSOR = {
    "changed_weights": "fc.weight",
    "loss_scale": "fc.weight",
    "backward_overflow": "conv.weight",
    "single_tensor": "fc.weight",
    "vanishing": "conv.weight",
    "bad_batch": "fc.weight",
}
MADE_UP = [
    cause for cause in CAUSES if cause not in ("unknown", "none", "always_clipped", "slow_growth")
]


@pytest.mark.usefixtures("no_replay")
@pytest.mark.parametrize("cause", MADE_UP)
def test_a_cause_is_found_on_a_series_that_shows_it(tmp_path: Path, cause: str) -> None:
    series = Series()
    spoil(series, cause)
    advice = series.advice(tmp_path)
    assert advice.cause == cause
    slow = cause in ("vanishing", "near_epsilon")
    assert slow or advice.cause_step in range(301, 308)
    if cause in TENSOR:
        assert advice.tensor == TENSOR[cause]
    text = " ".join(str(advice).split())
    assert f"Suspected cause: {CAUSES[cause]}" in text and advice.findings[0].numbers
    helps = advice.findings[0].clip_helps
    assert helps != ("a clip limit is not the fix" in text)
    json.dumps(advice.as_dict(), allow_nan=False)


@pytest.mark.usefixtures("no_replay")
@pytest.mark.parametrize(
    "name", ["blocks.0.attn.q_proj.weight", "h.0.attn.c_attn.weight", "lm_head.weight"]
)
def test_growth_of_logits_needs_its_names(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = Series()
    series.weights[:, 3] *= np.exp(np.arange(400) / 200.0)
    assert series.advice(tmp_path).cause == "none"
    monkeypatch.setattr(f"{__name__}.NAMES", (*NAMES[:3], name))
    (tmp_path / "named").mkdir()
    advice = series.advice(tmp_path / "named")
    assert (advice.cause, advice.tensor) == ("slow_growth", name)


@pytest.mark.usefixtures("no_replay")
def test_without_what_a_rule_needs_the_cause_is_unknown_and_says_what_lacks(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    norms = np.linalg.norm(Series().gradients, axis=1)
    norms[300:] *= np.exp(np.minimum(np.arange(100), 8) * 0.7)
    path.write_text("\n".join(["step,grad_norm", *(f"{n},{x}" for n, x in enumerate(norms))]))
    advice = kk.advise(path)
    assert advice.cause == "unknown" and advice.regime == "rescue"
    assert {"loss", "learning rate", "optimizer"} <= set(advice.missing)
    assert "Not recorded: loss, learning rate, gradient norms of single tensors" in " ".join(
        str(advice).split()
    )


@pytest.mark.usefixtures("no_replay")
@pytest.mark.parametrize("seed", range(8))
def test_noise_alone_has_no_cause(tmp_path: Path, seed: int) -> None:
    assert Series(600, seed).advice(tmp_path).cause == "none"


@pytest.mark.usefixtures("no_replay")
def test_a_schedule_with_warm_up_and_drops_is_no_jump(tmp_path: Path) -> None:
    series = Series()
    series.lr[:] = 1e-3 * np.minimum(np.arange(1, 401) / 50.0, 1.0)
    series.lr[200:] *= 0.1
    series.updates *= series.lr[:, None] / 1e-3
    assert series.advice(tmp_path).cause == "none"


@pytest.mark.usefixtures("no_replay")
def test_onsets_are_in_order_and_ties_are_said(tmp_path: Path) -> None:
    series = Series()
    for delay, place in ((0, 2), (3, 3), (3, 1)):
        rise = np.exp(0.8 * np.clip(np.arange(100) - delay, 0, 12))
        series.gradients[300:, place] *= 2 * rise
    advice = series.advice(tmp_path)
    assert [onset.tensor for onset in advice.onsets][0] == "fc.weight"
    steps = {onset.tensor: onset.step for onset in advice.onsets}
    assert steps["fc.weight"] < steps["head.weight"]
    assert [onset.together for onset in advice.onsets][:1] == [False]
    assert "First to leave their usual range" in str(advice)


def test_the_heat_map_shows_the_event_and_what_is_not_finite(tmp_path: Path) -> None:
    series = Series()
    series.gradients[300] *= 1e4
    series.loss[300] *= 50
    series.gradients[305, 0] = math.inf
    advice = series.advice(tmp_path)
    heat = advice.heat
    assert heat is not None and heat.steps[heat.event] == 301 and set(heat.tensors) == set(NAMES)
    assert heat.ratios[:, heat.event] == pytest.approx([4.0] * 4, abs=0.3)
    assert heat.ratios[0, heat.event + 5] == math.inf
    lines = heat_lines(heat)
    assert lines[1].endswith("@    X") and "^ step 301" in lines[5]
    assert max(map(len, lines)) <= 80 and shade(0.3) == " " and shade(0.4) == "."
    page = kk.report.advice_page(advice)
    # Drawn twice, for a screen and for a phone, whose picture ends where its last cell does.
    assert page.count('class="heat"') == 2 * (4 * 48 - 1) and "conv.weight" in page
    narrow = page.partition('<div class="narrow">')[2].partition("</div>")[0]
    cells = re.findall(r'class="heat" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', narrow)
    assert 'viewBox="0 0 340 ' in narrow
    assert max(float(x) + float(wide) for x, wide in cells) == pytest.approx(330, abs=0.2)


@pytest.mark.usefixtures("no_replay")
def test_the_largest_norm_is_always_named(tmp_path: Path) -> None:
    series = Series()
    series.gradients[123, 3] = 7.0
    largest = series.advice(tmp_path).largest
    assert largest is not None
    assert (largest.tensor, largest.step) == ("head.weight", 124)
    assert largest.norm == pytest.approx(7.0, rel=0.005)


def test_the_replay_of_fixed_limits_by_hand(tmp_path: Path) -> None:
    series = Series()
    series.gradients[300] *= 100.0
    series.loss[302] *= 50.0
    advice = series.advice(tmp_path)
    norms = np.linalg.norm(series.gradients, axis=1)
    assert advice.limit is not None
    fixed = [row for row in advice.replay if row.limit is not None]
    assert len(fixed) >= 5 and advice.limit.value in [row.limit for row in fixed]
    for row in fixed:
        assert row.limit is not None
        factors = np.minimum(1.0, row.limit / norms)
        assert row.engaged == pytest.approx(np.mean(norms > row.limit))
        assert row.removed == pytest.approx(1 - np.sum(factors * norms) / norms.sum())
        assert row.variation == pytest.approx(np.std(factors) / np.mean(factors))
        assert row.spikes == 1
    rail = next(row for row in fixed if row.limit == advice.limit.value)
    assert (rail.caught, rail.lead, rail.false_per_1000) == (1, 2.0, 0.0)
    tight = fixed[0]
    assert tight.lead == 8 and tight.false_per_1000 > 900


@pytest.mark.parametrize(
    "rule", [kk.clip.EMARatio(2.0), kk.clip.ZClip(2.5), kk.clip.SkipSpikes(6.0)]
)
def test_the_replay_of_rules_is_that_of_the_numpy_reference(tmp_path: Path, rule: Any) -> None:
    series = Series()
    series.gradients[::50] *= 20.0
    engaged, state = [], None
    norms = np.linalg.norm(series.gradients, axis=1)
    for norm in norms:
        _, outcome, state = kk.numpy.clip({"w": np.array([norm])}, rule, state)
        engaged.append(outcome.action in ("clipped", "skipped"))
    advice = series.advice(tmp_path)
    (row,) = [
        row
        for row in advice.replay
        if row.rule.startswith(type(rule).__name__) and "tensor" not in row.rule
    ]
    if row.rows == len(norms):
        assert row.engaged == pytest.approx(np.mean(engaged))
    else:
        assert row.engaged == pytest.approx(np.mean(engaged[len(norms) - row.rows :]), abs=0.02)


# Records


def test_records_of_all_details_and_of_the_version_before(tmp_path: Path) -> None:
    series = Series()
    series.gradients[300, 2] *= 1000.0
    series.loss[300] *= 50.0
    for tensors in ("top", "all", "none"):
        path = series.write(tmp_path / f"{tensors}.jsonl", tensors=tensors)
        run = open_run(path)
        assert run.measured("gradients") == (tensors != "none")
        assert kk.advise(path).cause == "bad_batch", tensors
    old = tmp_path / "old.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "top.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["event"] in ("start", "step")]
    for row in rows:
        row.pop("codes", None)
    old.write_text("".join(json.dumps(row) + "\n" for row in rows))
    advice = kk.advise(old)
    assert (
        advice.largest is not None
        and advice.largest.tensor == "fc.weight"
        and advice.largest.step == 301
    )


def test_a_record_at_its_bound_is_read(tmp_path: Path) -> None:
    advice = Series(3000).advice(tmp_path, max_bytes=1 << 20)
    assert advice.rows < 3000 and advice.last_step == 3000
    assert any("left out" in text for text in advice.caveats) and advice.cause == "none"


def test_a_torn_record_loses_its_last_row_only(tmp_path: Path) -> None:
    path = Series().write(tmp_path / "r.jsonl")
    path.write_bytes(path.read_bytes()[:-10])
    assert kk.advise(path).last_step == 399


def test_stages_of_compress_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    with kk.record.Recorder(path) as record:
        for stage in ("train", "prune-1"):
            for step in range(1, 101):
                record.write(
                    {
                        "event": "step",
                        "stage": stage,
                        "step": step,
                        "norm": 1.0 + (stage != "train"),
                    }
                )
    advice = kk.advise(tmp_path)
    assert advice.limit is not None and advice.limit.median == pytest.approx(1.0)
    assert advice.lost == ("the steps of 1 other stages: prune-1",)
    other = kk.advise(path, stage="prune-1").limit
    assert other is not None and other.median == pytest.approx(2.0)
    with pytest.raises(UnknownName, match="no such stage"):
        kk.advise(path, stage="prun")


def test_few_norms_give_no_limit_and_one_row_no_error(tmp_path: Path) -> None:
    for steps in (1, 2, 7, 30):
        (tmp_path / str(steps)).mkdir()
        advice = Series(steps).advice(tmp_path / str(steps))
        assert (advice.limit is None) == (steps < 8) and advice.rows == steps
        assert str(advice)


def test_names_with_control_characters_are_printed_safely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.NAMES", ("a\x1b[31m", "<i>", "c", "d"))
    advice = Series().advice(tmp_path)
    assert "\x1b" not in str(advice) and "<i>" not in kk.report.advice_page(advice)


# Detectors


def test_the_trailing_statistics_are_those_of_the_window() -> None:
    values = np.random.default_rng(0).standard_normal((90, 2))
    median, spread = trailing(values, 40)
    for t in (30, 40, 41, 89):
        before = values[max(t - 40, 0) : t]
        assert median[t] == pytest.approx(np.median(before, axis=0))
        mad = np.median(np.abs(before - np.median(before, axis=0)), axis=0)
        assert spread[t] == pytest.approx(np.maximum(1.4826 * mad, 0.05))
    assert np.isnan(median[:24]).all()


def test_a_chart_has_the_run_lengths_of_the_literature() -> None:
    """ARL of the one-sided chart, k 0.5, h 4: 8.4 after a shift of 1 sd, 335 without."""
    noise = np.random.default_rng(0).standard_normal((2000, 400))
    for shift, wanted in ((1.0, 8.4), (0.0, 335.0)):
        above = cusum(noise + shift) > 4.0
        first = np.where(above.any(axis=0), np.argmax(above, axis=0) + 1, 2000)
        assert float(first.mean()) == pytest.approx(wanted, rel=0.15)


def test_neighbours_that_are_alike_raise_the_alarm_level() -> None:
    noise = np.random.default_rng(0).standard_normal(4000)
    alike = np.convolve(noise, np.ones(8) / math.sqrt(8), "same")
    assert alarm_level(alike, 0.0) > 1.5 * alarm_level(noise, 0.0)
    assert alarm_level(noise[:10], 7.0) == 7.0


def test_scores_of_noise_are_small_and_do_not_see_the_future() -> None:
    values = 0.3 * np.random.default_rng(0).standard_normal(2000)
    z = robust_z(values)
    assert np.abs(z).max() < 6.0 and np.all(z[:24] == 0.0)
    changed = values.copy()
    changed[1500:] += 9.0
    assert np.array_equal(robust_z(changed)[:1500], z[:1500])
    assert filled(np.array([math.nan])).tolist() == [0.0]


# The command


def test_the_command_prints_the_account_the_json_and_a_page(tmp_path: Path) -> None:
    path = Series().write(tmp_path / "record.jsonl")
    shown = CliRunner().invoke(main, ["advise", str(tmp_path)])
    assert shown.exit_code == 0 and shown.output == f"{kk.advise(path)}\n"
    assert max(map(len, shown.output.splitlines())) <= max(80, len(str(path)) + 30)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["advise", str(path), "--json", "--out", str(page)])
    found = json.loads(result.output)
    assert found["regime"] == "plateau" and found["report"] == str(page) and page.exists()
    assert {"limit", "replay", "findings", "onsets", "largest", "cause", "tensor"} <= found.keys()
    assert CliRunner().invoke(main, ["advise", str(path), "--map", "norm"]).exit_code == 2
    assert CliRunner().invoke(main, ["advise", str(tmp_path / "no")]).exit_code == 1


def test_every_rule_is_explained() -> None:
    assert all((rule.__doc__ or "").strip() for rule in RULES) and len({*RULES}) == len(RULES)


def test_a_record_that_goes_back_counts_the_later_rows(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    with kk.record.Recorder(path) as record:
        for first, last, norm in ((1, 60, 1.0), (41, 80, 2.0)):
            for step in range(first, last + 1):
                record.write({"event": "step", "step": step, "norm": norm})
    run = open_run(path)
    assert run.steps.tolist() == list(range(1, 81))
    assert run.columns["norm"].tolist() == [1.0] * 40 + [2.0] * 40
    assert run.lost == ["20 rows of steps that were written again after a restart"]


@pytest.mark.usefixtures("no_replay")
def test_a_jump_that_a_step_made_is_no_foreign_write(tmp_path: Path) -> None:
    series = Series()
    series.weights[300:, 2] *= 100.0
    series.updates[300, 2] = 1000.0
    series.gradients[300, 2] *= 1e4
    series.loss[300] *= 20.0
    assert series.advice(tmp_path).cause == "bad_batch"
