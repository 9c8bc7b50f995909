"""Rules as data: strict about keys, and plain about what is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import karikomi as kk
from karikomi import spec
from karikomi.errors import BadFile, InvalidArgument, KarikomiError, UnknownName


@dataclass(frozen=True)
class Settings:
    epochs: int
    rate: float = 0.1
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("plain", "error", "text"),
    [
        ({"rule": "ByNrom", "limit": 1.0}, UnknownName, "unknown clip; got 'ByNrom'; did you mean"),
        (
            {"rule": "ByNorm", "limt": 1.0},
            UnknownName,
            "clip ByNorm: unknown key; got 'limt'; did ",
        ),
        ({"rule": "ByNorm"}, InvalidArgument, "a key is missing; got []; allowed: limit"),
        ({"limit": 1.0}, InvalidArgument, "the key 'rule' is missing; got ['limit']"),
        ("ByNorm", InvalidArgument, "clip: a rule is a table; got 'ByNorm'"),
        ({"rule": "ByNorm", "limit": -1}, InvalidArgument, "ByNorm: the limit must be positive"),
        (
            {"rule": "ByNorm", "limit": {"schedule": "Liner", "start": 1, "stop": 2}},
            UnknownName,
            "unknown schedule; got 'Liner'; did you mean 'Linear'",
        ),
        ({"rule": "ByNorm", "limit": {"start": 1}}, UnknownName, "unknown schedule; got None"),
        (
            {"rule": "ByNorm", "limit": {"schedule": "Linear", "start": 1, "stop": 2}},
            InvalidArgument,
            "schedule Linear: a key is missing; got ['start', 'stop']; allowed: steps",
        ),
        (
            {"rule": "ByNorm", "limit": {"schedule": "Linear", "start": 1, "end": 2}},
            UnknownName,
            "schedule Linear: unknown key; got 'end'",
        ),
        (
            {"rule": "ByNorm", "limit": {"schedule": "Linear", "start": 1, "stop": 2, "steps": 9}},
            InvalidArgument,
            "Linear: steps must be (first, last); got 9",
        ),
    ],
)
def test_wrong_tables_are_named(plain: Any, error: type, text: str) -> None:
    with pytest.raises(error) as raised:
        spec.from_dict(plain)
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_a_nested_schedule_becomes_plain_and_comes_back() -> None:
    rule = kk.clip.ByNorm(kk.schedule.Cubic(1.0, 0.1, steps=(0, 100)))
    plain = spec.to_dict(rule)
    assert plain == {
        "rule": "ByNorm",
        "limit": {"schedule": "Cubic", "start": 1.0, "stop": 0.1, "steps": [0, 100]},
        "norm": 2.0,
        "per": "tensor",
    }
    assert spec.from_dict(plain) == rule
    # As files of before norms of other orders have it.
    assert spec.from_dict({"rule": "ByNorm", "limit": plain["limit"]}) == rule


def test_a_bound_is_no_clip() -> None:
    with pytest.raises(UnknownName, match="not a registered clip; got Clamp"):
        spec.to_dict(kk.bound.Clamp(1.0))
    assert spec.to_dict(kk.bound.Clamp(1.0), "bound") == {"rule": "Clamp", "limit": 1.0}


def test_what_has_no_plain_form_is_refused() -> None:
    class Own:
        def value(self, step: Any, *, xp: Any) -> Any:
            return step

    with pytest.raises(KarikomiError, match="no plain form"):
        spec.to_dict(kk.clip.ByNorm(Own()))


def test_values_are_checked_against_declared_types() -> None:
    good = spec.validated(Settings, {"epochs": 3, "names": ["a"]}, where="task")
    assert good == Settings(3, 0.1, ("a",))
    with pytest.raises(InvalidArgument, match=r"^task: epochs: .*; got .many"):
        spec.validated(Settings, {"epochs": "many"}, where="task")
    with pytest.raises(UnknownName, match="task: unknown key; got 'epoch'; did you mean 'epochs'"):
        spec.validated(Settings, {"epoch": 3}, where="task")


@pytest.mark.parametrize("content", [b"limit = ", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_what_is_no_toml_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rule.toml"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=r"rule\.toml: this is not TOML; got "):
        spec.read_toml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"none\.toml: cannot read the file; got No such file"):
        spec.read_toml(tmp_path / "none.toml")


def test_a_path_with_a_nul_character_is_an_invalid_argument(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="NUL"):
        spec.read_toml(tmp_path / "a\0b.toml")


@pytest.mark.parametrize(
    ("rule", "toml"),
    [
        (
            kk.prune.OneShot(0.5, pattern=kk.prune.NofM(keep=2, of=4)),
            'sparsity = 0.5\npattern = {rule = "n:m", keep = 2, of = 4}',
        ),
        (
            kk.prune.OneShot(0.5, pattern=kk.prune.Blocks(4, 4), score=kk.prune.L2Norm()),
            'sparsity = 0.5\npattern = {rule = "blocks", units = 4, inputs = 4}\n'
            'score = {rule = "l2"}',
        ),
        (
            kk.prune.OneShot(0.5, pattern=kk.prune.Units(), score=kk.prune.Taylor()),
            'sparsity = 0.5\npattern = {rule = "units"}\nscore = {rule = "taylor"}',
        ),
        (
            kk.prune.OneShot(0.5, score=kk.prune.Random(seed=3), only=("a*", "b*")),
            'sparsity = 0.5\nonly = ["a*", "b*"]\nscore = {rule = "random", seed = 3}',
        ),
        (kk.prune.OneShot(0.5, score="taylor"), 'sparsity = 0.5\nscore = "taylor"'),
    ],
)
def test_schedules_of_pruning_with_objects(rule: Any, toml: str, tmp_path: Path) -> None:
    assert spec.from_dict(json.loads(json.dumps(spec.to_dict(rule, "prune"))), "prune") == rule
    path = tmp_path / "rule.toml"
    path.write_text(f'rule = "OneShot"\n{toml}\n', encoding="utf-8")
    read = spec.read_toml(path)
    assert spec.from_dict(read, "prune") == rule
    # What was written by hand is what would be written, but for defaults.
    plain = spec.to_dict(rule, "prune")
    assert _of(plain, read) == read


def _of(plain: Any, read: Any) -> Any:
    """Return what of the plain form was written by hand."""
    return {key: _of(plain[key], read[key]) for key in read} if isinstance(read, dict) else plain


def test_scores_without_a_name_or_without_fields_have_no_plain_form() -> None:
    class Own(kk.prune.Score):
        pass

    with pytest.raises(UnknownName, match="not a registered score; got Own"):
        spec.to_dict(kk.prune.OneShot(0.5, score=Own()), "prune")
    with pytest.raises(UnknownName, match="unknown score; got 'tayler'; did you mean 'taylor'"):
        spec.from_dict({"rule": "OneShot", "sparsity": 0.5, "score": {"rule": "tayler"}}, "prune")
    with pytest.raises(InvalidArgument, match="score: the key 'rule' is missing"):
        spec.from_dict({"rule": "OneShot", "sparsity": 0.5, "score": {"seed": 1}}, "prune")
    with pytest.raises(InvalidArgument, match="without declared fields .*Own.*dataclass"):
        spec.construct(Own, {}, where="score own")
