"""Clipping torch gradients: sparse and tied ones, layouts, what counts as parameters."""

from __future__ import annotations

import dataclasses
import gc
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.rule import Decision, Quantity, Scope, leave
from karikomi.torch.modules.parameters import unit_axes
from karikomi.torch.numerics import norms
from karikomi.torch.numerics.norms import norm, peak, unit_norms

RULES = [kk.clip.ByValue(0.5), kk.clip.ByNorm(0.5), kk.clip.ByGlobalNorm(0.5)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = torch.tensor([[3.0, 4.0], [0.1, 0.0], [1.0, 1.0]])


def _with_gradient(gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(
        torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    )
    parameter.grad = gradient
    return parameter


def _sparse(*, coalesced: bool) -> torch.Tensor:
    """Return ``ROWS`` as rows 1, 4 and 5, one of them in two parts unless coalesced."""
    indices, values = torch.tensor([[1, 4, 5]]), ROWS.clone()
    if coalesced:
        return torch.sparse_coo_tensor(indices, values, (8, 2)).coalesce()
    indices = torch.tensor([[1, 4, 5, 1]])
    values = torch.cat(
        [ROWS - torch.tensor([[10.0, 0.0], [0, 0], [0, 0]]), ROWS.new_tensor([[10, 0]])]
    )
    return torch.sparse_coo_tensor(indices, values, (8, 2), check_invariants=True)


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_sparse_gradient_is_clipped_as_the_dense_one(rule: Any, coalesced: bool) -> None:
    gradient = _sparse(coalesced=coalesced)
    dense, sparse = _with_gradient(gradient.to_dense()), _with_gradient(gradient)
    expected, _ = kk.torch.clip_(dense, rule)
    outcome, _ = kk.torch.clip_(sparse, rule)
    assert outcome.pre == pytest.approx(expected.pre, rel=1e-12)
    assert sparse.grad is not None and sparse.grad.is_sparse and dense.grad is not None
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)


def test_the_second_stage_measures_a_sparse_gradient_after_the_first() -> None:
    gradient = _sparse(coalesced=False)
    rule = kk.clip.Chain(kk.clip.ByValue(1.0), kk.clip.ByGlobalNorm(0.5))
    dense, sparse = _with_gradient(gradient.to_dense()), _with_gradient(gradient)
    expected, _ = kk.torch.clip_(dense, rule)
    outcome, _ = kk.torch.clip_(sparse, rule)
    assert outcome.norms.tolist() == pytest.approx(expected.norms.tolist(), rel=1e-12)
    assert sparse.grad is not None and dense.grad is not None
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)


def test_skipped_is_a_bool_on_the_host() -> None:
    parameter = _with_gradient(ROWS.clone())
    outcome, _ = kk.torch.clip_(parameter, kk.clip.ByNorm(1.0))
    assert outcome.skipped is False


def test_an_embedding_with_sparse_gradients_trains() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([2, 2, 7])).mul(100.0).sum().backward()
    outcome, _ = kk.torch.clip_(embedding, kk.clip.ByGlobalNorm(1.0))
    optimizer.step()
    assert outcome.pre == pytest.approx(100 * (3 * 4 + 3) ** 0.5, rel=1e-6)
    moved = (embedding.weight.detach() - before).abs()
    assert float(moved.square().sum()) == pytest.approx(1.0, rel=1e-5)
    assert set(moved.sum(1).nonzero().flatten().tolist()) == {2, 7}


def test_a_sparse_gradient_with_nan_is_skipped() -> None:
    gradient = _sparse(coalesced=True)
    gradient._values()[1, 0] = float("nan")
    parameter = _with_gradient(gradient)
    outcome, _ = kk.torch.clip_(parameter, kk.clip.ByNorm(1.0))
    assert outcome.skipped and parameter.grad is None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_tied_weights_count_once(rule: Any) -> None:
    model = nn.ModuleDict({"encode": nn.Linear(3, 3), "decode": nn.Linear(3, 3, bias=False)})
    model["decode"].weight = model["encode"].weight
    model["encode"].weight.grad = torch.full((3, 3), 2.0)
    outcome, _ = kk.torch.clip_(model, rule)
    assert outcome.names == ("encode.weight", "encode.bias")
    assert outcome.pre == (2.0 if rule == RULES[0] else 6.0)
    size = peak if rule == RULES[0] else norm
    assert float(size(model["encode"].weight.grad)) == pytest.approx(0.5)
    again, _ = kk.torch.clip_([model["encode"].weight] * 3, kk.clip.ByGlobalNorm(100.0))
    assert again.names == ("0",)


def _strided(dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    shape = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5) / 40 - 1
    dense = shape.to(device=device, dtype=dtype)
    return {
        "contiguous": dense.clone(),
        "channels_last": dense.to(memory_format=torch.channels_last, copy=True),
        "transposed": dense.transpose(0, 3).clone(memory_format=torch.preserve_format),
        "every_other": dense.repeat(1, 1, 1, 2)[..., ::2],
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_dtype_device_and_layout_are_kept(rule: Any, dtype: torch.dtype, device: str) -> None:
    for layout, gradient in _strided(dtype, device).items():
        entries = gradient.double().cpu().numpy()
        stride, address = gradient.stride(), gradient.data_ptr()
        parameter = _with_gradient(gradient)
        kk.torch.clip_(parameter, rule)
        expected, _, _ = kk.numpy.clip([entries], rule)
        assert parameter.grad is gradient, layout
        assert (gradient.dtype, gradient.device.type) == (dtype, device)
        assert (gradient.stride(), gradient.data_ptr()) == (stride, address), layout
        rounding = 2 * torch.finfo(dtype).eps
        np.testing.assert_allclose(
            gradient.double().cpu().numpy(), expected[0], rtol=rounding, atol=rounding**2
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_survive_the_whole_range_of_a_dtype(dtype: torch.dtype, device: str) -> None:
    for entry in (torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal, 1.0):
        tensor = torch.full((100_000,), entry, dtype=dtype, device=device)
        tensor[1000:] = 0
        expected = float(tensor[0]) * 1000**0.5
        if expected < 1e308:
            assert float(norm(tensor)) == pytest.approx(expected, rel=1e-6)
        assert float(peak(tensor)) == float(tensor[0])


def test_the_norm_of_long_constants_is_exact() -> None:
    assert float(norm(torch.full((3_000_000,), 0.1))) == pytest.approx(0.1 * 3e6**0.5, rel=1e-6)
    assert float(norm(torch.full((3_000_000,), 100.0, dtype=torch.half))) == pytest.approx(
        173205.0808, rel=1e-6
    )


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 65_536, 199_999])
def test_no_bad_entry_is_missed(entry: float, place: int) -> None:
    tensor = torch.ones(200_000)
    tensor[place] = entry
    assert not np.isfinite(float(norm(tensor))) and not np.isfinite(float(peak(tensor)))
    assert np.isfinite(unit_norms(tensor.reshape(2, -1), 0).numpy()).sum() == 1


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 3, 4)])
def test_there_is_one_norm_per_unit(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = [float(norm(unit)) for unit in tensor]
    np.testing.assert_allclose(unit_norms(tensor, 0).numpy(), expected, rtol=1e-6)
    assert unit_norms(tensor, 0).dtype is torch.float64


def test_the_magnitude_of_complex_entries_counts() -> None:
    parameter = _with_gradient(torch.tensor([3 + 4j, 0j], dtype=torch.complex64))
    outcome, _ = kk.torch.clip_(parameter, kk.clip.ByNorm(1.0))
    assert outcome.pre == 5.0 and parameter.grad is not None
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6 + 0.8j, 0j]))


def test_complex_entries_are_refused_before_anything_is_clamped() -> None:
    first = _with_gradient(torch.tensor([9.0]))
    second = _with_gradient(torch.tensor([0.1 + 0.1j]))
    with pytest.raises(Unsupported, match="1: complex entries have no order"):
        kk.torch.clip_([first, second], kk.clip.ByValue(1.0))
    assert first.grad is not None and float(first.grad) == 9.0


def test_a_generator_is_consumed_once_and_an_exhausted_one_is_warned_of() -> None:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    generator = model.parameters()
    outcome, _ = kk.torch.clip_(generator, kk.clip.ByGlobalNorm(1.0))
    assert outcome.pre == pytest.approx(6**0.5) and outcome.engaged
    with pytest.warns(UserWarning, match="no parameter.*exhausted generator"):
        outcome, _ = kk.torch.clip_(generator, kk.clip.ByGlobalNorm(1.0))
    assert outcome.pre == 0.0


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_passed_as_parameters_are_refused(create_graph: bool) -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    gradients = torch.autograd.grad(weight.pow(3).sum(), [weight], create_graph=create_graph)
    with pytest.raises(InvalidArgument, match="were gradients passed as parameters"):
        kk.torch.clip_(gradients, kk.clip.ByGlobalNorm(1.0))
    del gradients
    gc.collect()


@pytest.mark.parametrize("wrong", [3, None, [3], ["weight"], {"weight": 1}])
def test_what_is_no_parameter_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="^torch.clip_: not a"):
        kk.torch.clip_(wrong, kk.clip.ByNorm(1.0))


def test_parameter_groups_of_an_optimizer_are_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(Unsupported, match=r"optimizer parameter groups.*group\['params'\]"):
        kk.torch.clip_(optimizer.param_groups, kk.clip.ByNorm(1.0))


def test_two_tensors_under_one_name_are_refused() -> None:
    pairs = [("weight", _with_gradient(torch.ones(1))), ("weight", _with_gradient(torch.ones(1)))]
    with pytest.raises(InvalidArgument, match="two tensors have the same name; got 'weight'"):
        kk.torch.clip_(pairs, kk.clip.ByNorm(1.0))


def test_tensors_below_the_limit_are_not_written_to() -> None:
    small, large = _with_gradient(torch.ones(1)), _with_gradient(torch.full((1,), 9.0))
    assert small.grad is not None and large.grad is not None
    versions = small.grad._version, large.grad._version
    kk.torch.clip_([small, large], kk.clip.ByNorm(2.0))
    assert (small.grad._version - versions[0], large.grad._version - versions[1]) == (0, 1)


def test_the_unit_axis_is_a_fact_of_the_layer() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 3),
            "conv": nn.Conv2d(2, 4, 3),
            "up": nn.ConvTranspose2d(2, 4, 3),
            "grouped": nn.ConvTranspose2d(2, 4, 3, groups=2),
            "embed": nn.Embedding(5, 2),
            "lstm": nn.LSTM(2, 3),
            "attend": nn.MultiheadAttention(4, 2),
            "norm": nn.BatchNorm1d(3),
        }
    )
    axes, reasons = unit_axes(model)
    assert {name for name, axis in axes.items() if axis == 1} == {"up.weight"}
    assert set(axes) == {
        *("linear.weight", "conv.weight", "up.weight", "embed.weight", "attend.in_proj_weight"),
        *("lstm.weight_ih_l0", "lstm.weight_hh_l0", "attend.out_proj.weight"),
    }
    assert reasons["grouped.weight"].startswith("a grouped transposed")
    assert reasons["norm.weight"] == "BatchNorm1d declares no unit axis"
    assert reasons["linear.bias"] == "a bias"
    assert set(axes) | set(reasons) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("limit", [0.3, 0.7])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bound_that_stands_is_reported_as_standing(dtype: torch.dtype, limit: float) -> None:
    layer = nn.Linear(4, 2, bias=False).to(dtype)
    layer.weight.data = torch.tensor([[9, 9, 0, 0], [-9, 0, 0, 0]], dtype=dtype)
    for _ in range(2):
        outcome, _ = kk.torch.bound_(layer, kk.bound.Clamp(limit))
        assert outcome.share_at_bound == 3 / 8
    assert not outcome.engaged
    assert float(layer.weight.detach().max()) == float(torch.tensor(limit, dtype=dtype))


def test_a_bound_speaks_of_what_it_leaves_alone_and_selects_by_glob() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
    outcome, _ = kk.torch.bound_(model, kk.bound.Clamp(1.0), only="*.weight", exclude="1.*")
    assert outcome.names == ("0.weight",)
    assert [float(p.detach().max()) for p in model.parameters()] == [1.0, 2.0, 2.0, 2.0]
    model.register_parameter("scale", nn.Parameter(torch.tensor([3 + 4j])))
    outcome, _ = kk.torch.bound_(model, kk.bound.Clamp(1.0))
    assert outcome.left_alone == {"scale": "not floating"}
    with pytest.raises(Unsupported, match="no selected tensor is floating"):
        kk.torch.bound_(model, kk.bound.Clamp(1.0), only="scale")


def test_a_bound_takes_modules_and_finite_weights_only() -> None:
    with pytest.raises(InvalidArgument, match="bounds act on a module; got list"):
        kk.torch.bound_([nn.Parameter(torch.ones(1))], kk.bound.Clamp(1.0))  # type: ignore[arg-type]
    layer = nn.Linear(2, 2)
    layer.bias.data[0] = float("inf")
    before = layer.weight.detach().clone()
    with pytest.raises(NonFinite, match="non-finite weights in bias"):
        kk.torch.bound_(layer, kk.bound.Clamp(1e-6))
    assert torch.equal(layer.weight, before)


class Syncs(TorchDispatchMode):
    """Count how often a number of a tensor is asked for on the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_all_norms_of_a_device_come_in_one_transfer(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    for place, parameter in enumerate(model.parameters()):
        parameter.grad = None if place == 3 else torch.full_like(parameter, place + 1.0)
    measuring = dataclasses.replace(rule, limit=float("inf"))
    expected, _ = kk.torch.clip_(model, measuring)
    moved: list[torch.Tensor] = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda one: moved.append(one) or real(one))
    with Syncs() as syncs:
        outcome, _ = kk.torch.clip_(model, measuring)
    assert (syncs.count, [tuple(one.shape) for one in moved]) == (0, [(9,)])
    assert outcome.names == expected.names and outcome.norms[3] == 0.0
    np.testing.assert_allclose(outcome.norms, expected.norms, rtol=1e-7)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("entry", [1e30, 1e-30, 1.0, float("nan")])
def test_a_device_measures_as_the_host_does(
    entry: float, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.full((3, 5000), 0.5)
    tensor[1] = entry
    expected = float(norm(tensor)), unit_norms(tensor, 0).numpy(), float(peak(tensor))
    monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    if narrow:
        monkeypatch.setattr(norms, "wide", lambda device: torch.float32)
    found = norm(tensor), unit_norms(tensor, 0), peak(tensor)
    assert {one.dtype for one in found} == {torch.float32 if narrow else torch.float64}
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.double().numpy(), other, rtol=2e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [1000, 1025, 70_000])
def test_unit_norms_of_constants_are_exact_and_no_unit_spoils_another(axis: int, size: int) -> None:
    rows = torch.full((6, size), 0.1)
    rows[1], rows[2], rows[3], rows[4] = 1e30, 1e-30, 0.0, 1e-42
    tensor = rows if axis == 0 else rows.T.contiguous()
    expected = np.linalg.norm(rows.double().numpy(), axis=1)
    np.testing.assert_allclose(unit_norms(tensor, axis).numpy(), expected, rtol=1e-6)
    rows[5, -1] = float("inf")
    assert np.isfinite(unit_norms(rows, 0).numpy()).tolist() == [True] * 5 + [False]


def test_units_are_measured_in_their_own_precision() -> None:
    rows = torch.randn(64, 512)
    seen: list[torch.dtype] = []

    class Widened(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.numel() == rows.numel():
                seen.append(made.dtype)
            return made

    with Widened():
        unit_norms(rows, 0)
    assert torch.float64 not in seen


def test_a_learned_statistic_goes_with_the_name_of_its_unit() -> None:
    rule, state = UnitMean(), None
    layer = nn.Linear(2, 3, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    _, state = kk.torch.bound_(layer, rule, state)
    assert state["names"] == ["weight"] * 3 and state["rule.sum"] == [1.0, 2.0, 3.0]
    layer.other = nn.Linear(2, 1, bias=False)
    layer.other.weight.data.fill_(0.0)
    _, state = kk.torch.bound_(layer, rule, json.loads(json.dumps(state)))
    assert state["names"] == ["weight", "weight", "weight", "other.weight"]
    assert state["rule.sum"] == [2.0, 4.0, 6.0, 0.0]
    axes = {"weight": 0, "new": 0}
    arrays = {"new": np.ones((1, 2)), "weight": np.ones((2, 1))}
    _, _, state = kk.numpy.bound(arrays, rule, state, unit_axes=axes)
    assert state["names"] == ["new", "weight", "weight"]
    assert state["rule.sum"] == pytest.approx([2**0.5, 3.0, 5.0])


@dataclass(frozen=True)
class UnitMean:
    """Add up the norm of every unit; change nothing."""

    scope: ClassVar[Scope] = Scope.UNIT
    of: ClassVar[Quantity] = Quantity.WEIGHT
    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, like: Any, *, xp: Any) -> dict[str, Any]:
        return {"sum": xp.zeros_like(like)}

    def decide(self, norms: Any, state: Any, *, present: Any, facts: Any, xp: Any) -> Any:
        return Decision(xp.ones_like(norms), None, leave(xp)), {"sum": state["sum"] + norms}


@pytest.mark.parametrize("policy", ["skip", "zero", "pass"])
def test_a_step_that_is_not_finite_teaches_no_second_moment(policy: str) -> None:
    model, state = nn.ParameterDict({name: torch.zeros(2) for name in "ab"}), None
    for entry in (2.0, float("nan")):
        model["a"].grad, model["b"].grad = torch.tensor([1.0, entry]), torch.tensor([3.0, 4.0])
        _, state = kk.torch.clip_(model, kk.clip.SPAM(1e9, warmup=0), state, nonfinite=policy)
    kept = {name: moments.tolist() for name, moments in state["second_moment"].items()}
    assert kept["a"] == pytest.approx([0.001, 0.004])
    assert kept["b"] == pytest.approx([0.009, 0.016])
