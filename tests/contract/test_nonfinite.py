"""Rule x framework x law, for NaN and infinite entries: policies, and what they never teach."""

from __future__ import annotations

import numpy as np
import pytest

import karikomi as kk
from contract.frameworks import DROPS_GRADIENTS, FRAMEWORKS, SHAPES, Apply, idle, network
from contract.row import Row
from contract.rows import CLIPS, EVERY
from contract.test_laws import assert_equal, cases, referred, sample
from depth import turns
from karikomi.errors import InvalidArgument, NonFinite

BAD = [float("nan"), float("inf"), -float("inf")]
DROPPING = [FRAMEWORKS[name] for name in DROPS_GRADIENTS]
# There it is met as a gradient, before it makes an update.
clips = cases(CLIPS, but=frozenset({"torch_updates"}))


def spoiled(name: str, entry: float, seed: int = 10) -> dict[str, np.ndarray]:
    """Return tensors above every limit, with one entry of one tensor replaced."""
    tensors = sample(seed, scale=10.0)
    tensors[name].reshape(-1)[-1] = entry
    return tensors


@clips
def test_the_default_is_no_step_at_all(row: Row, apply: Apply) -> None:
    for name in SHAPES:
        for entry in turns(BAD, row, apply, name):
            found, outcome, state = apply(row, spoiled(name, entry))
            for array in found.values():
                assert array is None if apply in DROPPING else not array.any()  # type: ignore[union-attr]
            assert (outcome.action, outcome.nonfinite, outcome.post) == ("skipped", (name,), 0.0)
            assert name in str(outcome) and outcome.as_row()["nonfinite"] == [name]
            assert (int(state["attempted"]), int(state["accepted"])) == (1, 0)
            assert int(state["bad_in_a_row"]) == 1


@clips
def test_zero_removes_the_bad_tensor_only(row: Row, apply: Apply) -> None:
    for entry in turns(BAD, row, apply, "zero"):
        tensors = spoiled("up.weight", entry)
        found, outcome, state = apply(row, tensors, nonfinite="zero")
        rest = referred(row, {**tensors, "up.weight": None})
        assert_equal(found, {**rest, "up.weight": np.zeros(SHAPES["up.weight"])}, rtol=1e-12)
        assert (outcome.action, outcome.nonfinite) == ("zeroed", ("up.weight",))
        assert np.isfinite(outcome.post) and int(state["accepted"]) == 1


@clips
def test_pass_leaves_the_bad_tensor_alone(row: Row, apply: Apply) -> None:
    for entry in turns(BAD, row, apply, "pass"):
        tensors = spoiled("linear.bias", entry)
        found, outcome, _ = apply(row, tensors, nonfinite="pass")
        rest = referred(row, {**tensors, "linear.bias": None})
        assert_equal(found, {**rest, "linear.bias": tensors["linear.bias"]}, rtol=1e-12)
        assert (outcome.action, outcome.nonfinite) == ("passed", ("linear.bias",))


@clips
def test_raise_names_the_tensor(row: Row, apply: Apply) -> None:
    for entry in turns(BAD, row, apply, "raise"):
        with pytest.raises(NonFinite, match=r"grid\.weight") as raised:
            apply(row, spoiled("grid.weight", entry), nonfinite="raise")
        assert "linear" not in str(raised.value) and isinstance(raised.value, ArithmeticError)


@pytest.mark.parametrize("row", [row for row in CLIPS if not row.of_updates], ids=str)
def test_raise_changes_nothing(row: Row) -> None:
    tensors = spoiled("gain", float("nan"))
    model = network(tensors, gradients=True)
    with pytest.raises(NonFinite):
        optimizer = idle(row, model.parameters())
        kk.torch.clip_(model, row.rule, nonfinite="raise", optimizer=optimizer)
    kept = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert_equal(kept, tensors)


@clips
def test_an_unknown_policy_is_refused(row: Row, apply: Apply) -> None:
    with pytest.raises(InvalidArgument, match="skip.*raise.*zero.*pass"):
        apply(row, sample(0), nonfinite="ignore")


@clips
def test_a_bad_step_teaches_nothing(row: Row, apply: Apply) -> None:
    good = [sample(seed, scale=2.0**seed) for seed in range(4)]

    def run(series: list[dict[str, np.ndarray]]) -> tuple[list[dict], dict]:
        state, results = None, []
        for tensors in series:
            found, _, state = apply(row, tensors, state)
            results.append(found)
        return results, state or {}

    without, expected = run(good)
    for place in (0, 2):
        for entry in turns(BAD, row, apply, place):
            with_it, after = run([*good[:place], spoiled("gain", entry), *good[place:]])
            rest = with_it[:place] + with_it[place + 1 :]
            for found, wanted in zip(rest, without, strict=True):
                assert_equal(found, wanted)
            assert int(after.pop("attempted")) == int(expected["attempted"]) + 1
            assert _plain(after) == _plain({k: v for k, v in expected.items() if k != "attempted"})


def _plain(state: dict) -> dict:
    return {key: np.asarray(value).tolist() for key, value in state.items()}


@clips
def test_bad_steps_in_a_row_are_counted(row: Row, apply: Apply) -> None:
    state, counts = None, []
    for tensors in [spoiled("gain", BAD[0])] * 3 + [sample(1)] + [spoiled("gain", BAD[1])]:
        _, _, state = apply(row, tensors, state)
        counts.append(int(state["bad_in_a_row"]))
    assert counts == [1, 2, 3, 0, 1]


@cases([row for row in EVERY if row.kind == "bound"])
def test_no_bound_mends_a_bad_weight(row: Row, apply: Apply) -> None:
    for entry in BAD:
        with pytest.raises(NonFinite, match=r"linear\.weight"):
            apply(row, spoiled("linear.weight", entry))
