"""The pages and terminal tables, from plausible results, damaged results and hostile ones."""

from __future__ import annotations

import copy
import math
import os
import random
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import karikomi as kk
from karikomi import report
from karikomi.errors import InvalidArgument, Unwritable
from pages import plain

LAYERS = (("0", 64, 256), ("2", 256, 128), ("4", 128, 10))
EVIL = '<script>alert("1")</script>'


def audit_result() -> dict[str, Any]:
    """Return an audit of ten classes in which class 8 lost."""
    classes = [
        {"class": str(k), "examples": 36, "before": 1.0 - k / 200, "after": 1.0 - k / 150}
        for k in range(10)
    ]
    classes[8]["after"] = 0.91
    return {
        "task": "digits",
        "before": "runs/x/dense.karikomi",
        "after": "runs/x/model.karikomi",
        "examples": 360,
        "metric": "accuracy",
        "metric_before": 0.974,
        "metric_after": 0.972,
        "classes": classes,
        "agreement": 0.989,
        "changed": 4,
        "lost": 3,
        "gained": 1,
        "changed_examples": [
            {"index": 5, "label": "3", "before": "3", "after": "8"},
            {"index": 90, "label": "8", "before": "1", "after": "8"},
            {"index": 91, "label": "8", "before": "1", "after": "2"},
        ],
        "noise": [
            {"sigma": s, "before": 0.97 - s * s, "after": 0.97 - 1.3 * s * s}
            for s in (0.05, 0.1, 0.2, 0.4)
        ],
        "gradient_agreement": {
            "mean_cosine": 0.9,
            "median_cosine": 0.93,
            "share_above_0.9": 0.8,
        },
        "warnings": ["class 8 lost 5.0 points (the mean is 0.3)"],
    }


def tensors() -> list[dict[str, Any]]:
    """Return the tensors of a small dense network."""
    made = []
    for name, inputs, units in LAYERS:
        for kind, shape in (("weight", [units, inputs]), ("bias", [units])):
            elements, matrix = math.prod(shape), kind == "weight"
            dense = 4 * elements
            packed = int(dense * 0.0137) if matrix else int(dense * 0.26)
            made.append(
                {
                    "name": f"{name}.{kind}",
                    "shape": shape,
                    "elements": elements,
                    "nonzero": elements // 27 if matrix else elements,
                    "sparsity": 0.963 if matrix else 0.0,
                    "codec": "gaps" if matrix else "raw",
                    "quantizer": "codebook 16" if matrix else "uniform 8",
                    "bits_per_weight": 8 * packed / elements,
                    "bytes": {
                        "dense": dense,
                        "pruned": int(dense * 0.045) if matrix else dense,
                        "quantized": int(dense * 0.017) if matrix else dense // 4,
                        "packed": packed,
                    },
                }
            )
    return made


def candidates() -> list[dict[str, Any]]:
    """Return the candidates of a search that stopped at the floor."""
    prune = [(0.8, 0.975), (0.9, 0.974), (0.95, 0.97), (0.975, 0.958)]
    quantize = [(8, 0.955), (16, 0.971), (32, 0.972)]
    return [
        {
            "stage": stage,
            "what": f"sparsity {value}" if stage == "prune" else f"{value} entries",
            "value": value,
            "validation": validation,
            "passed": validation >= 0.97,
            "chosen": value in (0.95, 16),
        }
        for stage, tried in (("prune", prune), ("quantize", quantize))
        for value, validation in tried
    ]


def compress_result() -> dict[str, Any]:
    """Return a whole compress result, as the search writes it."""
    each = tensors()
    causes = {c: sum(t["bytes"][c] for t in each) for c in ("dense", "pruned", "quantized")}
    return {
        "task": "digits",
        "framework": "torch",
        "network": "DigitsNet 64-256-128-10",
        "seed": 0,
        "karikomi": "0.1.0",
        "metric": "accuracy",
        "metric_before": 0.974,
        "metric_after": 0.972,
        "drop": 0.002,
        "validation_before": 0.975,
        "validation_after": 0.971,
        "max_drop": 0.005,
        "examples": {"train": 1077, "validation": 360, "test": 360},
        "bytes_dense": 203_000,
        "bytes_packed": 5_100,
        "ratio": 39.8,
        "sparsity": 0.96,
        "parameters": 50_826,
        "nonzero": 2_100,
        "verified": True,
        "seconds": 41.2,
        "resumed": False,
        "file": "runs/x/model.karikomi",
        "report": "runs/x/report.html",
        "record": "runs/x/record.jsonl",
        "bytes_by_cause": {**causes, "packed": sum(t["bytes"]["packed"] for t in each)},
        "tensors": each,
        "candidates": candidates(),
        "clip": {"rule": "ByGlobalNorm(1.0)", "steps": 2000, "clipped": 750, "skipped": 3},
        "shrink": {
            "widths_before": {"0": 256, "2": 128},
            "widths_after": {"0": 201, "2": 128},
            "removed": 55,
            "left_alone": {"4": "its units are the outputs of the network"},
            "parameters_before": 50_826,
            "parameters_after": 40_156,
        },
        "audit": audit_result(),
        "environment": {"python": "3.11.7", "numpy": "2.4.6", "machine": "x86_64", "threads": 2},
    }


def record_rows(steps: int = 2000) -> list[dict[str, Any]]:
    """Return the rows of a run with a spike, skipped steps and three stages."""
    draw, rows = random.Random(0), []
    stages = (("train", 0.5), ("prune", 0.35), ("quantize", 0.15))
    for stage, share in stages:
        for step in range(int(steps * share)):
            decay = 0.05 + 2.2 * math.exp(-step / (steps * 0.06))
            loss = decay * draw.lognormvariate(0, 0.25)
            norm = 3 * decay * draw.lognormvariate(0, 0.6) * (30 if step == 77 else 1)
            skipped = stage == "train" and step in (300, 301, 620)
            rows.append(
                {
                    "event": "step",
                    "stage": stage,
                    "epoch": step // 40,
                    "step": step,
                    "loss": loss,
                    "norm": None if skipped else norm,
                    "factor": min(1.0, 1 / norm),
                    "clipped": norm > 1 and not skipped,
                    "skipped": skipped,
                    "sparsity": 0.0 if stage == "train" else 0.95,
                }
            )
            if step % 40 == 39:
                value = 0.975 - 0.5 * math.exp(-step / (steps * 0.05)) - draw.random() / 100
                rows.append(
                    {"event": "epoch", "stage": stage, "epoch": step // 40, "step": step + 1}
                    | {"loss": loss, "validation": value, "sparsity": 0.0}
                )
    return rows


def sweep_result() -> dict[str, Any]:
    """Return a sweep of five limits and four sparsities; one point is missing."""

    def stat(mean: float, spread: float) -> dict[str, float]:
        return {"mean": mean, "min": max(mean - spread, 0.0), "max": mean + 0.7 * spread}

    points = [
        {
            "limit": limit,
            "sparsity": sparsity,
            "runs": 3,
            "accuracy": stat(0.975 - 0.1 * sparsity**6 - (0.04 if limit == 0.01 else 0), 0.004),
            "gap": stat(0.02 - 0.01 * sparsity, 0.002),
            "ms_per_step": stat(1.3, 0.1),
            "bytes": stat(203_000 * (1 - sparsity) + 2000, 300),
            "clipped": stat(0.0 if limit is None else 0.6 / (1 + limit * 4), 0.03),
        }
        for limit in (0.01, 0.1, 1.0, 10.0, None)
        for sparsity in (0.0, 0.5, 0.9, 0.97)
    ]
    del points[6]
    return {
        "task": "digits",
        "seeds": [0, 1, 2],
        "metric": "accuracy",
        "points": points,
        "environment": {"python": "3.11.7"},
    }


class _Outline(HTMLParser):
    """Collects tags, ids and what a page would load; checks that tags close in order."""

    VOID = ("meta", "link", "br", "hr", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.loads += [found[key] or "" for key in ("src", "href", "xlink:href") if key in found]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


PAGES = {
    "compress": lambda: report.compress_page(compress_result(), record_rows()),
    "sweep": lambda: report.sweep_page(sweep_result()),
    "audit": lambda: report.audit_page(audit_result()),
    "importances": lambda: report.importance_page(IMPORTANCES),
}
IMPORTANCES = kk.prune.Importances(
    {
        "fc.weight": np.array([[0.0, 1.0], [2.0, 50.0]], np.float32),
        "empty": np.zeros(0, np.float32),
        "head": np.array([-0.5, 3.0], np.float32),
    },
    score="own score",
    left_alone={"fc.bias": "a bias"},
)


@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole_alone_and_repeatable(name: str) -> None:
    html = PAGES[name]()
    outline = _Outline(html)
    assert outline.open == []
    assert "script" not in outline.tags
    assert outline.loads == ["data:,"]
    assert "url(" not in html and "@import" not in html
    assert len(set(outline.ids)) == len(outline.ids) > 0
    assert outline.tags.count("svg") == outline.tags.count("desc") > 0
    assert "nan" not in html.replace("nance", "").lower() and "None" not in html
    assert html == PAGES[name]()
    assert len(html.encode()) < 300_000


def test_long_record_and_many_tensors_stay_below_the_limit() -> None:
    result = compress_result()
    result["tensors"] = [
        dict(t, name=f"layer.{i}.{t['name']}") for i in range(60) for t in tensors()
    ]
    html = report.compress_page(result, record_rows(40_000))
    assert 50_000 < len(html.encode()) < 300_000
    assert "The 100 largest of 360 tensors are shown; the other 260 are not." in html


def test_compress_page_says_what_was_promised() -> None:
    html = report.compress_page(compress_result(), record_rows(200))
    text = " ".join(" ".join(_Outline(html).text).split())
    for said in (
        "39.8x",
        "203 kB → 5.10 kB",
        "97.20 %",
        "before 97.40 %: -0.20 points",
        "The budget of 0.50 points was held on the validation split",
        "the test split was only measured",
        "One of the 360 test examples is worth 0.28 points",
        "the file was loaded again and gives the figures shown here",
        "prune: sparsity 0.95 was chosen: 97.00 % is the floor itself;"
        " below the floor: sparsity 0.975 (95.80 %).",
        "55 units were removed",
        "4 was left alone: its units are the outputs of the network.",
        "1 train (steps 0 to 99), 2 prune (steps 100 to 169), 3 quantize (steps 170 to 199)",
        "class 8 lost 5.0 points",
        "arrays = kk.load('runs/x/model.karikomi')",
        "karikomi compress digits --max-drop 0.005 --seed 0 --out runs/x",
    ):
        assert said in text
    assert "NOT held" not in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"validation_after": 0.9699}, "was NOT held"),
        ({"validation_after": None}, "cannot be judged"),
        ({"verified": False}, "do not rely on it"),
    ],
)
def test_compress_page_admits_what_went_wrong(changed: dict[str, Any], said: str) -> None:
    result = compress_result() | changed
    html = report.compress_page(result, [])
    assert said in html
    assert 'class="warning"' in html or changed == {"validation_after": None}


def test_budget_is_not_broken_by_rounding() -> None:
    result = compress_result() | {"validation_before": 0.975, "validation_after": 0.97}
    assert result["validation_before"] - result["validation_after"] > result["max_drop"]
    assert "was held" in report.compress_page(result, [])


def test_clipped_steps_are_marked() -> None:
    marks = report.compress_page(compress_result(), record_rows(200)).count('class="m1" d="M')
    calm = [row | {"clipped": False} for row in record_rows(200)]
    assert report.compress_page(compress_result(), calm).count('class="m1" d="M') < marks


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf"), "text", [], {}, True])
@pytest.mark.parametrize("make", [compress_result, sweep_result, audit_result])
def test_missing_values_do_not_break_a_view(make: Any, missing: Any) -> None:
    whole = make()
    for path in _leaves(whole):
        damaged = copy.deepcopy(whole)
        _put(damaged, path, missing)
        for html in _views(damaged):
            assert "nan" not in html.replace("nance", "").lower()


def test_empty_lists_and_rows() -> None:
    result = compress_result()
    del result["audit"]
    for key in ("tensors", "candidates", "bytes_by_cause", "clip", "shrink", "environment"):
        result[key] = None
    html = report.compress_page(result, [])
    assert "No steps were recorded" in html and "No candidates were recorded" in html
    assert "No points." in report.sweep_page(sweep_result() | {"points": []})
    assert "digits: no points" in report.sweep_table(sweep_result() | {"points": []})
    bare = {key: None for key in audit_result()}
    assert "n/a" in report.audit_page(bare)


def test_rows_without_values() -> None:
    rows = [dict.fromkeys(row, None) | {"event": row["event"]} for row in record_rows(100)]
    assert "nothing recorded" in report.compress_page(compress_result(), rows)


@pytest.mark.parametrize("make", [compress_result, sweep_result, audit_result])
def test_everything_is_escaped(make: Any) -> None:
    evil = _poison(make())
    for html in _pages(evil):
        assert "<script" not in html
        assert EVIL.replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;") in html
        assert _Outline(html).open == []


def test_names_with_control_characters_do_not_reach_the_terminal() -> None:
    result = _poison(compress_result(), "a\x1b[2J\r\nb\u202e")
    for text in (report.compress_table(result), report.audit_table(result["audit"])):
        assert "\x1b" not in text and "\r" not in text and "\u202e" not in text


def test_half_surrogates_and_zero_bytes_can_be_written(tmp_path: Any) -> None:
    html = report.compress_page(compress_result() | {"network": "a\ud800b\0c"}, [])
    written = report.write_page(tmp_path / "runs" / "page.html", html)
    assert written.read_text(encoding="utf-8") == html
    assert "\0" not in html


def test_compress_table_reads_at_eighty_columns() -> None:
    result = compress_result()
    result["tensors"][0]["name"] = "encoder.layers.0.self_attention.in_projection.weight"
    lines = report.compress_table(result).splitlines()
    assert len(lines) <= 22
    assert max(map(len, lines)) <= 80
    assert "accuracy (test)" in lines[2] and "97.40 %" in lines[2] and "-0.20 points" in lines[2]
    head = next(line for line in lines if line.startswith("tensor"))
    rows = lines[lines.index(head) + 1 : lines.index(head) + 1 + len(result["tensors"])]
    assert {len(line) for line in rows} == {len(head)}
    assert lines[-2:] == ["file      runs/x/model.karikomi", "report    runs/x/report.html"]


def test_many_tensors_are_counted_in_the_terminal() -> None:
    result = compress_result() | {"tensors": tensors() * 4}
    assert "and 16 smaller tensors: see the report" in report.compress_table(result)


def test_sweep_table_reads_at_eighty_columns_and_marks_the_best() -> None:
    lines = report.sweep_table(sweep_result()).splitlines()
    assert len(lines) == 22
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if "*" in line][0].startswith("0.1 ")
    marked = [line.split(" *")[0].split()[-2] for line in lines[:-1] if " *" in line]
    best = max(point["accuracy"]["mean"] for point in sweep_result()["points"])
    assert marked and {float(one) for one in marked} == {round(100 * best, 2)}
    assert lines[-3].startswith("none") and lines[-1].startswith("* highest mean on the test split")


def test_audit_table_puts_the_worst_class_first() -> None:
    lines = report.audit_table(audit_result()).splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("class"))
    assert lines[head + 1].startswith("8 ") and "-5.00 points" in lines[head + 1]
    assert "warning: class 8 lost 5.0 points (the mean is 0.3)" in lines
    assert max(map(len, lines[head:])) <= 80


def test_many_classes_are_cut_with_a_word() -> None:
    result = audit_result()
    result["classes"] = [
        {"class": f"c{k}", "examples": 5, "before": 0.9, "after": 0.9 - k / 10_000}
        for k in range(1000)
    ]
    assert "The 100 that lost most of 1000." in report.audit_page(result)
    assert "and 980 classes that changed less" in report.audit_table(result)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: report.compress_page([], []), "must be a mapping"),  # type: ignore[arg-type]
        (lambda: report.compress_table({"task": "t"}), "lacks metric, metric_before"),
        (lambda: report.compress_page(compress_result(), "rows"), "rows must be a list"),  # type: ignore[arg-type]
        (lambda: report.compress_page(compress_result(), [1]), "entry 0 of rows"),  # type: ignore[list-item]
        (lambda: report.sweep_page({"task": "t", "metric": "m", "points": 3}), "points must be"),
        (lambda: report.audit_table(audit_result() | {"classes": "x"}), "classes must be"),
        (lambda: report.write_page("page.html", b"x"), "must be text"),  # type: ignore[arg-type]
    ],
)
def test_wrong_input_gives_one_line(call: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Any) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(Unwritable):
        report.write_page(tmp_path / "taken" / "page.html", "<p>")
    assert os.listdir(tmp_path) == ["taken"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_json_gives_a_page_or_one_clear_error(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([compress_result, sweep_result, audit_result]))()
    paths = data.draw(st.lists(st.sampled_from(_leaves(whole)), min_size=1, max_size=4))
    for path in paths:
        try:
            _put(whole, path, data.draw(_JSON))
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    try:
        views = list(_views(whole))
    except InvalidArgument as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(view, str) and view for view in views)


def _pages(result: dict[str, Any]) -> list[str]:
    if "points" in result:
        return [report.sweep_page(result)]
    if "tensors" in result:
        return [report.compress_page(result, record_rows(60))]
    return [report.audit_page(result)]


def _views(result: dict[str, Any]) -> list[str]:
    tables: dict[str, Any] = {"points": report.sweep_table, "tensors": report.compress_table}
    kind = next((key for key in tables if key in result), None)
    return [*_pages(result), (tables[kind] if kind else report.audit_table)(result)]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in list(pairs)[:12]:
        # The second entry of a list is damaged as the first is.
        if isinstance(key, int) and key > 0:
            continue
        nested = isinstance(inner, dict | list) and inner
        found += _leaves(inner, (*path, key)) if nested else [(*path, key)]
    return found


def _put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def _poison(value: Any, evil: str = EVIL) -> Any:
    if isinstance(value, dict):
        return {key: _poison(inner, evil) for key, inner in value.items()}
    if isinstance(value, list):
        return [_poison(inner, evil) for inner in value]
    return evil if isinstance(value, str) and value != "accuracy" else value


def test_what_pruning_left_alone_and_warnings_stand_on_page_and_table() -> None:
    result = compress_result() | {
        "left_alone": {"norm.weight": "weight of BatchNorm1d <b>"},
        "warnings": ["training lowered the accuracy", "a long one " * 20 + "to its end"],
    }
    page, text = report.compress_page(result, []), report.compress_table(result)
    assert "norm.weight was not pruned: weight of BatchNorm1d &lt;b&gt;." in page
    assert "Warning: training lowered the accuracy." in page
    assert "not pruned: norm.weight: weight of BatchNorm1d <b>" in text
    assert "warning: training lowered the accuracy" in text
    whole = " ".join(text.split())
    assert f"accuracy warning: {'a long one ' * 20}to its end before after" in whole
    assert page.index("to its end.") < page.index('<dl class="tiles">')


@pytest.mark.parametrize(("after", "held"), [(0.5935, False), (0.4130, True), (0.3, True)])
def test_an_error_is_held_to_its_budget_in_its_own_direction(after: float, held: bool) -> None:
    error = compress_result() | {
        **{"metric": "mse", "goal": "min", "max_drop": 0.005, "validation_before": 0.4126},
        **{"validation_after": after, "metric_before": 0.4126, "metric_after": after},
    }
    table, page = report.compress_table(error), report.compress_page(error, [])
    assert ("0.005 held" in table, "0.005 NOT HELD" in table) == (held, not held)
    assert ("0.005 was held" in page, "0.005 was NOT held" in page) == (held, not held)
    assert "validation mse is at most 0.4176: 0.4126 before, plus the budget of 0.005." in page
    moved = "below" if after < 0.4176 else "above"
    chosen = {"stage": "prune", "what": "x", "validation": after, "passed": held, "chosen": True}
    said = report.compress_page(error | {"candidates": [chosen]}, [])
    assert f"{moved} the ceiling" in said and "floor" not in said


def test_the_checks_of_an_audit_have_sections_with_their_figures() -> None:
    """Read back from the page: what was not checked, gates, slices, corruptions, layers, explanation."""
    result = {
        "metric": "accuracy",
        "metric_before": 0.9,
        "metric_after": 0.85,
        "gates": [{"gate": "drop>0.01", "outcome": "missed", "value": 0.05, "interval": [0.03, 0.07], "where": ""}],
        "not_checked": {"slices": "no slices were given"},
        "slices": [
            {"slice": "dark", "examples": 40, "before": 0.9, "after": 0.6, "lost": 12, "gained": 0, "p": 0.0002,
             "least_drop": 0.175, "named": True}
        ],
        "corruptions": {
            "examples": 100,
            "rows": [{"corruption": "fog", "before": [0.8] * 5, "after": [0.7, 0.6, 0.5, 0.4, 0.3], "drop": 0.3,
                      "relative": 2.5, "p": 0.001}],
        },
        "layers": [{"layer": "a", "cka": 0.99, "alone": 0.0}, {"layer": "b", "cka": 0.5, "alone": 0.04}],
        "explanation": {
            "method": "integrated gradients",
            "examples": 8,
            "measures": dict.fromkeys(
                ("cosine", "rank", "top"), {"networks": 0.6, "floor": 0.2, "ceiling": 1.0, "place": 0.5}
            ),
            "classes": [{"class": "3", "examples": 5, "cosine": 0.1, "others": 0.9, "p": 0.001}],
            "shown": [
                {"cosine": 0.1, "input": [[0, 1], [1, 0]], "before": [[0, 1], [-1, 0]], "after": [[1, 0], [0, 0]]}
            ],
        },
    }  # fmt: skip
    html = report.audit_page(result)
    text = plain(html)
    for words in (
        "no slices were given",
        "drop>0.01",
        "missed",
        "0.03 to 0.07",
        "dark",
        "17.5",
        "fog",
        "are at 0.5",
    ):
        assert words in text, words
    # The input and two attributions, for broad and for narrow screens.
    assert html.count("<image ") == 6
    # 5 severities: (0.7 + 0.6 + 0.5 + 0.4 + 0.3) / 5 = 0.5.
    assert "50" in text and "30" in text
