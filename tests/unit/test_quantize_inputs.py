"""The inputs that the rounding of a layer sees: of recurrent layers, transposed convolutions, attention."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from karikomi.torch.quantization.curvature import squared_gradients  # noqa: E402
from karikomi.torch.reconstruction.calibration import (  # noqa: E402
    Regressions,
    matrix_weight,
    weight_matrix,
)


def sums(module: nn.Module, data: list[Any], **more: Any) -> Regressions:
    weights = {name: item.detach() for name, item in module.named_parameters() if item.dim() > 1}
    present = {n: p for n, p in module.named_parameters() if n in weights}
    return Regressions(module, present, weights, data, where="test", everywhere=True, **more)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3, bias=False), (4, 5)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (3, 4, 7, 5)),
        (nn.ConvTranspose1d(4, 6, 3, dilation=2, padding=3, bias=False), (3, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False), (3, 4, 5, 4)),
        (nn.ConvTranspose3d(2, 3, (2, 1, 3), stride=(1, 2, 3), bias=False), (2, 2, 3, 2, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
@torch.no_grad()
def test_rows_times_weights_are_the_outputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = sums(layer, [x])
    problem, window = found.problem("weight"), found.windows["weight"]
    matrix = weight_matrix(layer.weight, window)
    assert torch.equal(matrix_weight(matrix, tuple(layer.weight.shape), window), layer.weight)
    assert problem.energy == pytest.approx(float(layer(x).square().sum()), rel=1e-5)
    assert problem.error(matrix.numpy()) < 1e-3
    assert found.grams(["weight"])["weight"] == pytest.approx(problem.gram, rel=1e-5, abs=1e-5)
    assert found.gram_entries("weight") == problem.gram.size


def cell_by_cell(net: Any, sequences: list[torch.Tensor]) -> dict[str, float]:
    """Return kernel name -> energy of its products, each layer and direction run as a layer of its own."""
    energy: dict[str, float] = {}
    for x in sequences:
        for layer in range(net.num_layers):
            outputs = []
            for ending in ("", "_reverse")[: 1 + net.bidirectional]:
                alone = type(net)(x.shape[-1], net.hidden_size, batch_first=True)
                for leaf in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    getattr(alone, f"{leaf}_l0").copy_(getattr(net, f"{leaf}_l{layer}{ending}"))
                given = x.flip(0) if ending else x
                states = alone(given[None])[0][0]
                before = torch.cat([torch.zeros(1, net.hidden_size), states[:-1]])
                for leaf, rows in (("weight_ih", given), ("weight_hh", before)):
                    name = f"{leaf}_l{layer}{ending}"
                    product = rows @ getattr(net, name).T
                    energy[name] = energy.get(name, 0.0) + float(product.square().sum())
                outputs.append(states.flip(0) if ending else states)
            x = torch.cat(outputs, -1)
    return energy


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_recurrent_kernels_are_read_step_by_step(kind: Any, both: bool, packed: bool) -> None:
    torch.manual_seed(0)
    net = kind(3, 4, num_layers=2, bidirectional=both, batch_first=True).eval()
    sequences = [torch.randn(5, 3), torch.randn(3 if packed else 5, 3)]
    x: Any = torch.stack(sequences) if not packed else None
    if packed:
        x = nn.utils.rnn.pack_sequence(sequences)
    found = sums(net, [x])
    energy = cell_by_cell(net, sequences)
    assert not found.unread and set(found.order) == set(energy)
    for name in found.order:
        assert found.problem(name).energy == pytest.approx(energy[name], rel=1e-4), name


@torch.no_grad()
def test_time_first_cells_and_states_that_are_passed_in() -> None:
    net, start = nn.GRU(3, 4).eval(), torch.randn(1, 2, 4)
    found = sums(net, [((torch.randn(1, 2, 3), start), None)])
    wanted = (start[0] @ net.weight_hh_l0.T).square().sum()
    assert found.problem("weight_hh_l0").energy == pytest.approx(float(wanted), rel=1e-5)
    cell, h = nn.LSTMCell(3, 4), torch.randn(2, 4)
    found = sums(cell, [((torch.randn(2, 3), (h, h)), None)])
    wanted = (h @ cell.weight_hh.T).square().sum()
    assert found.problem("weight_hh").energy == pytest.approx(float(wanted), rel=1e-5)


@torch.no_grad()
def test_some_positions_of_a_convolution_stand_for_all() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3, bias=False), torch.randn(50, 3, 12, 12)
    whole, some = (sums(layer, [x], positions=count).problem("weight") for count in (None, 20))
    assert some.gram / 20 == pytest.approx(whole.gram / 100, abs=6.0)
    assert some.error(weight_matrix(layer.weight, None).numpy()) < 1e-3
    few = sums(layer, [x[:1]], positions=20).problem("weight").gram[0]
    assert int((torch.linalg.eigvalsh(torch.from_numpy(few)) > 1e-4).sum()) == 20


@torch.no_grad()
def test_weights_of_the_same_inputs_are_summed_in_one_pass() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.q(x) + self.k(x)
            return self.out(y.relu_()) + self.q(y.relu_())

    net, x = Three(), torch.randn(20, 4)
    found = sums(net, [x])
    assert found.order == ["q.weight", "k.weight", "out.weight"]
    # q is read twice, and once with other inputs.
    assert found.together == [["q.weight"], ["k.weight"], ["out.weight"]]

    class Pair(Three):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out((self.q(x) + self.k(x)).relu_())

    net = Pair()
    found = sums(net, [x])
    assert found.together == [["q.weight", "k.weight"], ["out.weight"]]
    problems = found.problems(["q.weight", "k.weight"])
    for name, problem in problems.items():
        alone = found.problem(name)
        assert (problem.gram == alone.gram).all() and (problem.cross == alone.cross).all()


@torch.no_grad()
def test_looking_ahead_changes_nothing_and_leaves_shuffled_data_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)
    )
    data = [torch.randn(6, 2, 6, 6), torch.randn(3, 2, 6, 6)]
    names = ["0.weight", "3.weight", "4.weight"]
    plain, ahead = sums(net, data, positions=5), sums(net, data, positions=5)
    assert ahead._entries == {"0.weight": 6 * 4 * 5, "3.weight": 6 * 8, "4.weight": 6 * 3}
    ahead.look_ahead(names, 2 * (120 + 48))
    assert [ahead.is_ahead(name) for name in names] == [True, True, False]
    for name in names:
        one, other = plain.problem(name), ahead.problem(name)
        assert (one.gram == other.gram).all() and (one.cross == other.cross).all()
        assert one.energy == other.energy and plain.rows[name] == ahead.rows[name]
    loader: Any = torch.utils.data.DataLoader(torch.cat(data), batch_size=3, shuffle=True)
    shuffled = sums(net, loader)
    shuffled.look_ahead(names, 1 << 20)
    assert not shuffled.is_ahead("0.weight")
    for name in names:
        matrix = weight_matrix(net.get_parameter(name), shuffled.windows[name])
        assert shuffled.problem(name).error(matrix.numpy()) < 1e-3


def test_drawn_gradients_are_those_of_examples_in_the_mean() -> None:
    torch.manual_seed(0)
    layer, data = nn.Linear(3, 2, bias=False), [torch.randn(500, 3) for _ in range(4)]
    found = squared_gradients(layer, {"weight": layer.weight}, data, None, draws=300, where="")
    wanted = torch.cat(data).square().mean(0).expand(2, 3)
    torch.testing.assert_close(found["weight"], wanted, rtol=0.25, atol=0.0)


def test_drawn_labels_give_the_fisher_information() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4, bias=False), torch.randn(200, 3)
    loss = nn.functional.cross_entropy
    found = squared_gradients(layer, {"weight": layer.weight}, [x], loss, draws=600, where="")
    shares = layer(x).softmax(1).detach()
    wanted = ((shares * (1 - shares)).T @ x.square()) / len(x)
    torch.testing.assert_close(found["weight"], wanted, rtol=0.25, atol=0.0)


def test_targets_in_the_data_are_used_as_they_are() -> None:
    layer, x, y = nn.Linear(3, 1, bias=False), torch.randn(1, 3), torch.randn(1, 1)
    loss = nn.functional.mse_loss
    found = squared_gradients(layer, {"weight": layer.weight}, [(x, y)], loss, where="")
    wanted = (2 * (layer(x) - y) * x).detach().square()
    torch.testing.assert_close(found["weight"], wanted)
