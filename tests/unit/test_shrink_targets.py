"""Targets, scores and limits of shrink, and what the smaller copy keeps: modes, dtypes, sharing, any batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim

import karikomi as kk
from karikomi import registry
from karikomi.errors import KarikomiError, Unsupported
from karikomi.torch.exporting.proof import samples_of
from karikomi.torch.shrinking.smaller_copy import shrink
from shrink_networks import Forward


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """5 -> 16 -> 12 -> 3: 96 + 204 + 39 = 339 parameters and 80 + 192 + 36 = 308 multiply-accumulates."""
    layers = [nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).to(dtype)


X = torch.randn(1, 5)


def costs(a: int, b: int) -> tuple[int, int]:
    """Return parameters and multiply-accumulates of 5 -> a -> b -> 3."""
    macs = 5 * a + a * b + 3 * b
    return macs + a + b + 3, macs


def widths(report: Any) -> tuple[int, int]:
    return report.widths_after["0"], report.widths_after["2"]


@pytest.mark.parametrize("allocation", ["uniform", "global", "isomorphic"])
@pytest.mark.parametrize(
    ("target", "whole", "place", "scale"),
    [("parameters", 339, 0, 1), ("macs", 308, 1, 1), ("bytes", 339 * 4, 0, 4)],
)
@pytest.mark.parametrize("share", [0.5, 0.21])
def test_budgets_are_met_from_below_by_less_than_a_unit(
    allocation: str, target: str, whole: int, place: int, scale: int, share: float
) -> None:
    budgets = [share, int(share * whole)]
    results = [shrink(net(), X, allocation=allocation, **{target: budget}) for budget in budgets]  # type: ignore[arg-type]
    small, report = results[0]
    a, b = widths(report)
    cost = costs(a, b)[place] * scale
    assert cost <= share * whole
    assert (report.parameters_after, report.macs_after) == costs(a, b)
    assert (report.parameters_before, report.macs_before) == (339, 308)
    # One unit more in both layers would be too many.
    assert costs(min(a + 1, 16), min(b + 1, 12))[place] * scale > share * whole
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    assert abs(results[1][1].parameters_after - report.parameters_after) <= 20


def test_a_budget_in_milliseconds_is_measured() -> None:
    wide = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64))
    x = torch.randn(64, 64)
    _, whole = shrink(wide, x, ms=1e6)
    assert whole.parameters_after == whole.parameters_before
    ((share, dense),) = whole.latencies
    assert share == 1.0 and dense > 0
    _, report = shrink(wide, x, ms=dense / 3)
    assert report.parameters_after < report.parameters_before
    chosen = max(share for share, taken in report.latencies if taken <= dense / 3)
    assert report.widths_after["0"] == pytest.approx(4096 * chosen, abs=1)


def test_the_lowest_scores_go_over_all_weights_of_a_unit() -> None:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        # Unit 3 is small in what it reads, unit 5 in what reads it; a bias does not count.
        model[0].weight[3], model[2].weight[:, 5] = 0.1, 0.1
        model[0].bias[7] = 0.0
        model[0].weight += torch.arange(16)[:, None] * 1e-4
    small, _ = shrink(model, X, width=14 / 16, only="0.*")
    kept = [round(float(row) * 1e4) - 10_000 for row in small[0].weight[:, 0].tolist()]
    assert [n for n in kept if n >= 0] == [n for n in range(16) if n not in (3, 5)]


def _loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, targets)


NAMES = sorted(entry.name for entry in registry.entries() if entry.kind == "score")


REFUSED = {
    "obc": "re-fits single weights",
    "sparsegpt": "re-fits single weights",
    "bn_scale": "no one normalisation",
    "movement": "gathered during training",
    "importance": "prune_(module, ..., importance=",
}


@pytest.mark.parametrize("score", NAMES)
def test_every_score_works_or_says_why_not(score: str) -> None:
    model = net()
    data = [(torch.randn(8, 5), torch.randint(0, 3, (8,))) for _ in range(2)]
    try:
        small, report = shrink(model, X, width=0.5, score=score, data=data, loss=_loss)
    except KarikomiError as error:
        assert score in REFUSED, error
        assert REFUSED[score] in str(error)
    else:
        assert score not in REFUSED
        assert widths(report) == (8, 6) and report.max_difference <= 1e-5
        x = torch.randn(4, 5)
        assert small(x).shape == (4, 3)


def test_random_scores_come_from_the_seed() -> None:
    model = net()
    kept = [
        shrink(model, X, width=0.5, score=kk.prune.Random(seed=seed))[0][0].weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_limits() -> None:
    model = net()
    assert widths(shrink(model, X, width=0.4, multiple_of=4)[1]) == (8, 4)
    assert widths(shrink(model, X, width=0.1, least=3)[1]) == (3, 3)
    assert widths(shrink(model, X, width=0.5, exclude="0.*")[1]) == (16, 6)
    assert widths(shrink(model, X, width=0.5, only="0.*")[1]) == (8, 12)
    assert widths(shrink(model, X, width=1.0)[1]) == (16, 12)
    with pytest.raises(Unsupported, match="no unit can go"):
        shrink(model, X, width=0.5, only="4.*")
    with pytest.raises(LookupError):
        shrink(model, X, width=0.5, only="9.*")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_mode_and_what_learns_are_kept(dtype: torch.dtype) -> None:
    model = net(dtype).train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small, report = shrink(model, X.to(dtype), width=0.5)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert [m.training for m in small.modules()] == [True, True, True, False, True, True]
    assert [p.requires_grad for p in small.parameters()] == [False, True, True, True, True, True]
    assert small[0].out_features == small[2].in_features == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert report.max_difference <= 8 * torch.finfo(dtype).eps or dtype is torch.float64


def test_the_graph_form_has_modes_too() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.d, self.o = nn.Dropout(0.5), nn.Linear(8 * 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o(self.d(self.n(self.a(x)).view(-1, 32)))

    small, report = shrink(Written().train(), torch.randn(4, 3, 2, 2), width=0.5)
    x = torch.randn(7, 3, 2, 2)
    assert report.form == "graph" and report.literals[0].endswith(": 32 -> 16") and small.training
    mean = small.n.running_mean.clone()
    assert not torch.equal(small(x), small(x)) and not torch.equal(small.n.running_mean, mean)
    assert not small.eval().training and torch.equal(small(x), small(x))
    small.train()(x).sum().backward()
    assert small.a.weight.grad.shape == (4, 3, 1, 1)


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, 4, 8).transpose(1, 2) for layer in (m.q, m.k, m.v))
    merged = torch.baddbmm(
        torch.zeros(n * 4, t, t), q.reshape(n * 4, t, 8), k.reshape(n * 4, t, 8).mT
    )
    mixed = merged.softmax(-1) @ v.reshape(n * 4, t, 8)
    return m.o(mixed.view(n, 4, t, 8).transpose(1, 2).reshape(n, t, 32))


@pytest.mark.parametrize("target", ["width", "heads"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_graph_form_takes_other_batches_than_the_example(target: str, batch: int) -> None:
    parts = {name: nn.Linear(16, 32) for name in "qkv"}
    module = Forward(attention, o=nn.Linear(32, 5), **parts)
    small, report = shrink(module, torch.randn(batch, 6, 16), **{target: 0.5})  # type: ignore[arg-type]
    assert report.form == "graph" and report.parameters_after == 3 * 16 * 17 + 85
    x = torch.randn(5, 6, 16)
    apart = torch.cat([small(x[:3]), small(x[3:])])
    torch.testing.assert_close(small(x), apart, rtol=1e-4, atol=1e-5)


def test_shapes_that_are_chosen_as_dynamic() -> None:
    shapes = {"x": {0: Dim("batch"), 1: Dim("tokens", min=2, max=64)}}

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(16, 32), nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o(
                self.a(x).view(x.shape[0] * x.shape[1], 4, 8).mT.reshape(*x.shape[:2], 32)
            )

    small, report = shrink(Named(), torch.randn(2, 6, 16), width=0.5, dynamic_shapes=shapes)
    assert report.form == "graph" and small(torch.randn(3, 9, 16)).shape == (3, 9, 5)


def test_a_mapping_of_inputs_and_several_outputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(5, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
            h = self.a(x)
            return {"logits": self.o(h) * scale, "rest": (h.sum(1), None, 3)}

    for example in ({"x": X, "scale": 2.0}, ((X,), {"scale": 2.0})):
        small, report = shrink(Named(), example, width=0.5)
        assert report.parameters_after == 8 * 6 + 27
        assert small(X, scale=3.0)["logits"].shape == (1, 3)


def test_shared_weights_stay_shared() -> None:
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    model[3].weight = model[1].weight
    small, report = shrink(model, X, width=0.5)
    assert small[3].weight is small[1].weight and small[1].weight.shape == (4, 4)
    # 5 x 4 + 4, one 4 x 4, twice 4, 4 x 3 + 3.
    assert report.parameters_after == 24 + 16 + 8 + 15
    twice = nn.Sequential(
        nn.Linear(5, 8), shared := nn.Linear(8, 8), nn.ReLU(), shared, nn.Linear(8, 3)
    )
    small, report = shrink(twice, X, width=0.5)
    assert small[1] is small[3] and report.parameters_after == 24 + 20 + 15


def test_a_tied_layer_is_counted_and_selected_under_each_of_its_names() -> None:
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    model[3].weight = model[1].weight
    small, report = shrink(model, X, width=0.5)
    assert report.widths_after == {"0": 4, "1": 4, "4": 3} and small[3].weight is small[1].weight
    assert report.frozen == {"4": "its units are outputs of the network"}
    data = [(torch.randn(8, 5), torch.randint(0, 3, (8,)))]
    by_loss = shrink(model, X, width=0.5, score="taylor", data=data, loss=_loss)[1]
    for name in ("1.weight", "3.weight"):
        only = shrink(model, X, width=0.5, only=["0.weight", name])[1]
        assert only.widths_after == by_loss.widths_after == report.widths_after
        with pytest.raises(Unsupported, match="no unit can go"):
            shrink(model, X, width=0.5, exclude=name)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_wrappers_are_taken_off() -> None:
    model = net()
    plain, _ = shrink(model, X, width=0.5)
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        small, report = shrink(wrapped, X, width=0.5, only=["0.*", "2.*"])
        assert type(small) is nn.Sequential and widths(report) == (8, 6)
        assert torch.equal(small(X), plain(X))


class Passing(nn.Module):
    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return x + places.sum()


def test_the_proof_runs_on_other_inputs_than_the_example() -> None:
    zeros = (torch.zeros(2, 5), torch.tensor([3, 1, 2]))
    given, drawn = samples_of(fx.symbolic_trace(Passing()), zeros)
    assert given is zeros and drawn[0].std() > 0.5 and sorted(drawn[1].tolist()) == [1, 2, 3]


def test_integers_that_cannot_be_shuffled_stay_in_the_proof() -> None:
    module = Forward(
        lambda m, x, starts: m.o(m.e(x, starts)), e=nn.EmbeddingBag(20, 16), o=nn.Linear(16, 5)
    )
    example = (torch.randint(0, 20, (12,)), torch.tensor([0, 5, 7]))
    assert shrink(module, example, width=0.5)[1].parameters_after == 20 * 8 + 45


def test_the_report_says_what_goes_together_and_why() -> None:
    module = Forward(
        lambda m, x: m.o(m.a(x) + m.b(x)), a=nn.Linear(5, 8), b=nn.Linear(5, 8), o=nn.Linear(8, 3)
    )
    _, report = shrink(module, X, width=0.5)
    (sites,) = report.together.values()
    assert any(site.startswith("add at ") for site in sites)
    assert report.frozen == {"o": "its units are outputs of the network"} and not report.statistics
    norm = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert shrink(norm, X, width=0.5)[1].statistics == ["layer_norm in 1"]
    # Nothing of it goes: then no statistic changes.
    assert shrink(norm, X, width=1.0)[1].statistics == []


class SplitBias(nn.Module):
    """Attention whose bias of queries, keys and values is put together in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 3)
        self.query_bias, self.value_bias = (nn.Parameter(torch.randn(16)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        parts = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, 2, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_factor_of_a_computed_bias_stays_in_the_graph() -> None:
    small, report = shrink(SplitBias().eval(), torch.randn(2, 5, 16), width=0.5)
    assert report.form == "graph" and report.max_difference < 1e-6
    assert small(torch.randn(2, 5, 16)).shape == (2, 5, 3)


def test_a_whole_number_of_a_budget_may_be_a_float() -> None:
    torch.manual_seed(0)
    model = net()
    whole = shrink(model, X, parameters=150)[1]
    assert shrink(model, X, parameters=150.0)[1].widths_after == whole.widths_after


CONVOLUTIONS = nn.Sequential(
    nn.Conv2d(3, 8, 3, bias=False),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.ConvTranspose2d(8, 6, 3),
    nn.PReLU(6),
    nn.Conv2d(6, 4, 3),
    nn.ReLU(),
    nn.Conv2d(4, 2, 1),
)


@pytest.mark.parametrize("name", ["0", "3", "5"])
def test_a_layer_is_selected_by_its_weight_alone(name: str) -> None:
    """The biases and norms of its units go along, whatever `only` says of them."""
    image = torch.randn(1, 3, 8, 8)
    _, report = shrink(CONVOLUTIONS, image, width=0.5, only=f"{name}.weight")
    changed = {n for n, width in report.widths_after.items() if width < report.widths_before[n]}
    assert changed == {name}
    others = [f"{n}.weight" for n in ("0", "3", "5") if n != name]
    _, other = shrink(CONVOLUTIONS, image, width=0.5, exclude=others)
    assert other.widths_after == report.widths_after


def test_columns_of_an_embedding_are_selected_by_the_embedding_alone() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    ids = torch.randint(9, (2, 3))
    _, report = shrink(model, ids, width=0.5, only="0.weight")
    assert report.widths_after == {"0": 4, "1": 6, "3": 2}


def test_rows_of_another_layer_with_the_units_have_to_be_selected_too() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x))

    x = torch.randn(2, 4)
    with pytest.raises(Unsupported, match="no unit can go"):
        shrink(Sum(), x, width=0.5, only="a.weight")
    _, report = shrink(Sum(), x, width=0.5, only=["a.weight", "b.weight"])
    assert report.widths_after == {"a": 4, "b": 4, "c": 2}
