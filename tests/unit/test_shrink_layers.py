"""Residual branches that go whole: the least needed, replaced by what they added on average, saved and shrunk on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import karikomi as kk
from karikomi.errors import BadFile, Unsupported
from karikomi.torch.exporting.exported import exported
from karikomi.torch.exporting.residual_branches import branches_of
from karikomi.torch.labelling.label_run import LabelRun
from karikomi.torch.modules.kept_units import RemovedLayer
from shrink_networks import Forward


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Block(nn.Module):
    """Two convolutions beside a shortcut; `way`: how the sum is written; `gain`: of the branch."""

    def __init__(self, inputs: int, width: int, way: str = "plus", gain: float = 1.0) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.c1, self.n1 = nn.Conv2d(inputs, 6, 3, stride, 1, bias=False), nn.BatchNorm2d(6)
        self.c2, self.n2 = nn.Conv2d(6, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(inputs, width, 1, 2) if inputs != width else nn.Identity()
        self.way = way
        with torch.no_grad():
            self.n2.weight.fill_(gain)
            self.n2.bias.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        if self.way == "onto the branch":
            y += self.shortcut(x)
            return F.relu(y)
        x = self.shortcut(x)
        if self.way == "onto the stream":
            x = x * 1.0
            x += y
            return x.relu_()
        return F.relu(x + y)


GAINS = (1.0, 0.01, 1.0, 0.1)


def blocks(way: str = "plus") -> nn.Sequential:
    rest = [Block(8, 8, way, gain) for gain in GAINS]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *rest, Block(8, 12, way), *head).eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def expected(model: nn.Sequential, places: list[int], inputs: torch.Tensor) -> torch.Tensor:
    """Return the outputs with the branches of some blocks as the means over X of what they add."""
    twin = copy.deepcopy(model)
    means: dict[int, torch.Tensor] = {}

    def note(place: int) -> Any:
        def hook(layer: nn.Module, args: Any, y: torch.Tensor) -> None:
            means[place] = y.mean((0, 2, 3)).clone()

        return hook

    hooks = [twin[p].n2.register_forward_hook(note(p)) for p in places]
    with torch.no_grad():
        twin(X)
        for hook in hooks:
            hook.remove()
        for place in places:
            mean = means[place][:, None, None]
            twin[place].n2.register_forward_hook(
                lambda layer, args, y, mean=mean: mean.expand(y.shape).clone()
            )
        return twin(inputs)


@pytest.mark.parametrize("way", ["plus", "onto the branch", "onto the stream"])
def test_the_branches_go_that_matter_least(way: str) -> None:
    model = blocks(way)
    before = copy.deepcopy(model.state_dict())
    small, report = kk.torch.shrink(model, X, layers=0.6)
    assert report.form == "module" and report.max_difference <= 1e-5
    gone = [n for n, width in report.widths_after.items() if width == 0]
    assert gone == ["2.c1", "2.c2", "4.c1", "4.c2"] and report.removed == 2 * (6 + 8)
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    assert report.parameters_after == report.parameters_before - 2 * (2 * 6 * 8 * 9 + 2 * 14)
    assert report.macs_after == report.macs_before - 2 * 4 * (2 * 6 * 8 * 9 * 64)
    fresh = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            small(fresh), expected(model, [2, 4], fresh), rtol=1e-4, atol=1e-5
        )
        # A constant is not written to.
        torch.testing.assert_close(small(fresh), small(fresh))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(report.left_alone) == ["1.c1", "3.c1", "5.c1"]
    assert all(" of the outputs is " in why for why in report.left_alone.values())


def test_the_loss_on_the_data_decides_where_it_is_given() -> None:
    net = Forward(
        lambda m, x: (lambda h: m.o(h + m.b(h.relu()) + m.c(h.tanh())))(m.a(x)),
        **{name: nn.Linear(6, 6) for name in "abc"},
        o=nn.Linear(6, 6),
    )
    with torch.no_grad():
        net.o.weight.copy_(torch.eye(6))
        net.b.weight.copy_(torch.eye(6) * 3)
        net.c.weight.copy_(torch.eye(6))
    data = [(x, torch.zeros(8)) for x in torch.randn(3, 8, 6)]
    # b changes the outputs most, and by itself the loss only here.
    _, by_distance = kk.torch.shrink(net, data[0][0], layers=0.5, data=data)
    assert (by_distance.widths_after["b"], by_distance.widths_after["c"]) == (6, 0)
    second = lambda outputs, targets: outputs.square().mean()  # noqa: E731
    _, by_loss = kk.torch.shrink(net, data[0][0], layers=0.5, data=data, loss=second)
    assert (by_loss.widths_after["b"], by_loss.widths_after["c"]) == (0, 6)


def test_a_branch_is_measured_again_when_others_have_gone() -> None:
    net = Forward(
        lambda m, x: (lambda h: m.o(h + m.b(h) + m.c(h) + m.d(h)))(m.a(x)),
        **{name: nn.Linear(6, 6, bias=False) for name in "abcdo"},
    )
    eye = torch.eye(6)
    with torch.no_grad():
        for layer, scale in {"a": 1.0, "b": 1.0, "c": 1.1, "d": -1.2, "o": 1.0}.items():
            getattr(net, layer).weight.copy_(eye * scale)
    # Each by itself: b, c, d. After b, which takes 1 away, d gives 1.2 back, and c takes 1.1 more.
    _, report = kk.torch.shrink(net, torch.randn(64, 6), layers=0.34)
    assert [n for n, width in report.widths_after.items() if width == 0] == ["b", "d"]


class Attending(nn.Module):
    """A layer of a transformer; its attention returns a tuple."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Dropout(0.1))
        with torch.no_grad():
            self.attention.out_proj.weight.mul_(gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.n1(x)
        mixed, _ = self.attention(y, y, y, need_weights=False)
        x = x + mixed
        return x + self.mlp(self.n2(x))


def test_attention_goes_with_its_norm() -> None:
    model = nn.Sequential(Attending(1.0), Attending(1e-3), nn.Linear(16, 3)).eval()
    x = torch.randn(2, 5, 16)
    small, report = kk.torch.shrink(model, x, layers=0.75)
    assert report.form == "module"
    assert isinstance(small[1].attention, RemovedLayer) and isinstance(small[1].n1, RemovedLayer)
    assert sum(isinstance(part, RemovedLayer) for part in small.modules()) == 2
    assert report.widths_after["1.attention.out_proj"] == 0
    assert small(torch.randn(3, 7, 16)).shape == (3, 7, 3)


def scaled(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Return two layers of which the second, of a width that the forward has as a number, is scaled by a parameter."""
    h = m.a(x)
    h = h + m.b(h).relu()
    return m.o(h + m.gain * m.d(m.c(h).view(-1, 12).relu()))


def test_the_graph_form_takes_any_batch() -> None:
    parts = {
        "a": nn.Linear(6, 8),
        "b": nn.Linear(8, 8),
        "c": nn.Linear(8, 12),
        "d": nn.Linear(12, 8),
    }
    net = Forward(scaled, o=nn.Linear(8, 3), gain=nn.Parameter(torch.full((8,), 1e-3)), **parts)
    small, report = kk.torch.shrink(net.train(), torch.randn(4, 6), layers=0.5)
    assert report.form == "graph" and small.training
    assert report.widths_after == {"a": 8, "b": 8, "c": 0, "d": 0, "o": 3}
    left = 7 * 8 + 9 * 8 + 9 * 3
    assert report.parameters_after == left == sum(p.numel() for p in small.parameters())
    x = torch.randn(9, 6)
    with torch.no_grad():
        # What is left of it is small.
        torch.testing.assert_close(small(x), net(x), rtol=1e-2, atol=1e-2)


def _half_in_place(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h[:, :3].relu_(), h[:, 3:]], 1)


def test_which_branches_there_are() -> None:
    def found(forward: Any, *inputs: torch.Tensor) -> list[str]:
        parts = {name: nn.Linear(6, 6) for name in "abcd"}
        graph = exported(
            Forward(forward, p=nn.Parameter(torch.randn(6)), **parts).eval(), inputs, {}
        )
        branches = branches_of(graph, LabelRun(graph).run())
        return [",".join(sorted({w.split(".")[0] for w in b.weights})) for b in branches]

    x = torch.randn(2, 6)
    assert found(lambda m, x: x + m.a(m.b(x)), x) == ["a,b"]
    # Of two branches side by side the longer one.
    assert found(lambda m, x: m.a(x) + m.b(m.c(x)), x) == ["b,c"]
    assert found(lambda m, x: (lambda y: m.b(x + y) + y)(m.a(x)), x) == ["b"]
    # What others read too, a sum with a parameter, and one with another input are none.
    assert found(lambda m, x: (lambda y: m.b(x + y) * y)(m.a(x)), x) == []
    assert found(lambda m, x: m.a(x) + m.p, x) == []
    assert found(lambda m, x, y: m.a(x) + m.b(y), x, x + 1) == []
    # One within the other.
    assert found(lambda m, x: x + m.c((lambda y: y + m.b(y))(m.a(x))), x) == ["b", "a,b,c"]
    # Writing to what is outside of it.
    assert found(lambda m, x: (lambda h: h + m.b(_half_in_place(h)))(m.a(x)), x) == []


def test_of_a_branch_within_another_the_lesser_goes() -> None:
    net = Forward(
        lambda m, x: m.o(x + 1e-3 * m.c((lambda y: y + m.b(y))(m.a(x)))),
        **{name: nn.Linear(6, 6) for name in "abco"},
    )
    _, report = kk.torch.shrink(net, torch.randn(3, 6), layers=0.5)
    # One of the two stays: the outer one, whose removal changes more.
    assert report.widths_after == {"a": 6, "b": 0, "c": 6, "o": 6}


def test_networks_without_branches_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(Unsupported, match="no layers can go whole.*residual.*width= or heads="):
        kk.torch.shrink(net, torch.randn(2, 4), layers=0.5)
    # Those that only= and exclude= leave.
    _, report = kk.torch.shrink(blocks(), X, layers=0.5, only=["1.*", "3.*"])
    assert [n for n, width in report.widths_after.items() if width == 0] == ["1.c1", "1.c2"]
    whole, report = kk.torch.shrink(blocks(), X, layers=1.0)
    assert report.removed == 0 and report.form == "module"
    assert not any(isinstance(part, RemovedLayer) for part in whole.modules())


@pytest.mark.parametrize("order", ["layers first", "width first", "layers alone"])
def test_a_file_takes_the_layers_out_of_a_fresh_instance(tmp_path: Path, order: str) -> None:
    model = blocks()
    steps = {"layers first": ("layers", "width"), "width first": ("width", "layers")}
    small: nn.Module = model
    for target in steps.get(order, ("layers",)):
        small, report = kk.torch.shrink(small, X, **{target: 0.6})  # type: ignore[arg-type]
        assert report.form == "module"
    kk.save(small, tmp_path / "small.karikomi")
    torch.manual_seed(5)
    fresh = blocks()
    kk.load(tmp_path / "small.karikomi", into=fresh)
    assert sum(p.numel() for p in fresh.parameters()) == sum(p.numel() for p in small.parameters())
    torch.testing.assert_close(fresh.eval()(X), small.eval()(X))
    # Once more: it is as small already.
    kk.load(tmp_path / "small.karikomi", into=fresh)
    other = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Flatten(), nn.Linear(512, 5))
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    with pytest.raises(Unsupported, match="a layer that was removed does not fit the module"):
        kk.load(tmp_path / "small.karikomi", into=other)
    assert shapes == {name: tensor.shape for name, tensor in other.state_dict().items()}


@pytest.mark.parametrize("own", [[0], [0, [3, -1]], [-1, None], [0, "x"], 7, [0, [1 << 40]]])
def test_an_account_of_removed_layers_is_checked(own: Any) -> None:
    import json

    from karikomi.torch.modules.arrays import fill_, notes_of, to_arrays

    small, _ = kk.torch.shrink(blocks(), X, layers=0.6)
    whole = json.loads(notes_of(small)["shrunk"])
    whole["removed"]["2.n2"] = own
    fresh = blocks()
    names = list(fresh.state_dict())
    with pytest.raises((BadFile, Unsupported)):
        fill_(fresh, to_arrays(small), {"shrunk": json.dumps(whole)})
    assert list(fresh.state_dict()) == names


def test_an_optimizer_follows() -> None:
    model = blocks().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().mean().backward()
    optimizer.step()
    small, _ = kk.torch.shrink(model, X, layers=0.6, follow=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in small.parameters()}
    assert set(optimizer.state) == set(held)
    small(X).square().mean().backward()
    optimizer.step()
