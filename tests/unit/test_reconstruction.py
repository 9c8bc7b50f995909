"""Reconstruction: the formulas by brute force, exact counts, and networks of every kind of layer."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported
from karikomi.prune import NofM
from karikomi.prune.account import Account, Row
from karikomi.prune.scores.reconstruction import OBC, SparseGPT
from karikomi.reconstruction import least_squares
from karikomi.reconstruction.least_squares import LeastSquares
from karikomi.reconstruction.obc import obc, operations
from karikomi.reconstruction.sparsegpt import sparsegpt
from karikomi.torch.reconstruction.refit import reconstruct_
from karikomi.torch.tracing.patches import patches
from karikomi.torch.tracing.weight_reads import Reading, WeightReadHooks

METHODS = [obc, sparsegpt]


def layer(
    seed: int, rows: int = 3, inputs: int = 8, groups: int = 1
) -> tuple[np.ndarray, LeastSquares]:
    """Return weights and the regression on inputs that are correlated and of many sizes."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=(rows * groups, inputs))
    mixed = random.normal(size=(groups, inputs, inputs)) @ random.normal(size=(groups, inputs, 40))
    samples = mixed * random.uniform(0.1, 3.0, size=(groups, inputs, 1))
    return weights, LeastSquares.of(weights, samples @ samples.swapaxes(1, 2))


def damped(problem: LeastSquares, share: float) -> np.ndarray:
    size = problem.gram.shape[-1]
    return problem.gram[0] + share * np.trace(problem.gram[0]) / size * np.eye(size)


def resolved(row: np.ndarray, gram: np.ndarray, left: list[int]) -> tuple[float, np.ndarray]:
    """Return the loss and the weights of the best fit that uses only `left`."""
    found = np.zeros_like(row)
    if left:
        found[left] = np.linalg.solve(gram[np.ix_(left, left)], gram[left] @ row)
    return float((row - found) @ gram @ (row - found)), found


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_one_removal_is_the_best_there_is(seed: int) -> None:
    weights, problem = layer(seed)
    gram = damped(problem, 0.01)
    found = obc(weights, problem, 1)
    losses = {
        (r, i): resolved(row, gram, [j for j in range(8) if j != i])[0]
        for r, row in enumerate(weights)
        for i in range(8)
    }
    assert [tuple(at) for at in np.argwhere(~found.kept)] == [min(losses, key=losses.__getitem__)]


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(0, 24))
def test_obc_is_the_published_algorithm_with_downdated_inverses(seed: int, remove: int) -> None:
    weights, problem = layer(seed)
    gram, trace = damped(problem, 0.01), []
    for r, row in enumerate(weights):
        row, inverse, highest = row.copy(), np.linalg.inv(gram), -1.0
        left = list(range(8))
        while left:
            p = min(left, key=lambda i: row[i] ** 2 / inverse[i, i])
            highest = max(highest, row[p] ** 2 / inverse[p, p])
            trace.append((highest, r, p))
            row -= row[p] / inverse[p, p] * inverse[:, p]
            inverse -= np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
            left.remove(p)
            row[p], inverse[p, p] = 0.0, 1.0
    kept = np.ones((3, 8), bool)
    for _, r, p in sorted(trace, key=lambda one: one[0])[:remove]:
        kept[r, p] = False
    found = obc(weights, problem, remove)
    np.testing.assert_array_equal(found.kept, kept)
    expected = [
        resolved(w, gram, list(np.flatnonzero(k)))[1] for w, k in zip(weights, kept, strict=True)
    ]
    np.testing.assert_allclose(found.weights, expected, atol=1e-9)


def test_rows_that_leave_early_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, problem = layer(5, rows=12, inputs=30)
    weights *= np.linspace(0.1, 3.0, 12)[:, None]
    problem = LeastSquares.of(weights, problem.gram)
    monkeypatch.setattr("karikomi.reconstruction.obc.STEPS", 1000)
    expected = obc(weights, problem, 150)
    monkeypatch.setattr("karikomi.reconstruction.obc.STEPS", 2)
    np.testing.assert_array_equal(obc(weights, problem, 150).kept, expected.kept)
    monkeypatch.setattr("karikomi.reconstruction.obc.MEMORY", 5 * 30 * 30)
    np.testing.assert_array_equal(obc(weights, problem, 150).kept, expected.kept)


def test_sparsegpt_is_the_published_algorithm() -> None:
    weights, problem = layer(3, rows=4, inputs=12)
    upper = np.linalg.cholesky(np.linalg.inv(damped(problem, 0.01))).T
    work = weights.copy()
    for first in range(0, 12, 4):
        columns = slice(first, first + 4)
        losses = work[:, columns] ** 2 / np.diag(upper)[columns] ** 2
        gone = losses <= np.sort(losses, axis=None)[8 - 1]
        for j in range(first, first + 4):
            lost = np.where(gone[:, j - first], work[:, j], 0.0)
            work[:, j:] -= np.outer(lost / upper[j, j], upper[j, j:])
            work[gone[:, j - first], j] = 0.0
    found = sparsegpt(weights, problem, 24, block=4)
    np.testing.assert_allclose(found.weights, work, atol=1e-9)
    assert problem.error(found.weights) < problem.error(np.where(found.kept, weights, 0.0))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15)
@given(st.integers(0, 1000), st.data())
def test_exactly_as_many_go_as_asked_and_what_is_gone_counts(method, seed: int, data) -> None:
    weights, problem = layer(seed, groups=2)
    gone = np.random.default_rng(seed).random(weights.shape) < 0.2
    remove = data.draw(st.integers(int(gone.sum()), weights.size))
    found = method(weights, problem, remove, gone=gone)
    assert int((~found.kept).sum()) == remove
    assert not (found.kept & gone).any()
    np.testing.assert_array_equal(found.weights[~found.kept], 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_of_every_four_inputs_one_stays(method) -> None:
    weights, problem = layer(1, groups=2)
    found = method(weights, problem, NofM(keep=1, of=4))
    np.testing.assert_array_equal(found.kept.reshape(6, 2, 4).sum(2), 1)
    assert problem.error(found.weights) < problem.error(np.where(found.kept, weights, 0.0))
    gone = np.zeros(weights.shape, bool)
    gone[0, :4] = True
    assert method(weights, problem, NofM(keep=1, of=4), gone=gone).kept[0, :4].sum() == 0


def test_the_best_of_all_masks_bounds_obc() -> None:
    weights, problem = layer(8, rows=1)
    gram = damped(problem, 0.01)
    best = min(
        resolved(weights[0], gram, list(left))[0] for left in itertools.combinations(range(8), 4)
    )
    found = obc(weights, problem, 4)
    difference = weights[0] - found.weights[0]
    assert best <= difference @ gram @ difference * (1 + 1e-9)
    assert difference @ gram @ difference < resolved(weights[0], gram, [4, 5, 6, 7])[0] * 10


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_always_zero_lose_their_weights_first_and_no_more_than_asked(
    method,
) -> None:
    weights, problem = layer(2)
    gram = problem.gram.copy()
    gram[:, 5], gram[:, :, 5] = 0.0, 0.0
    problem = LeastSquares.of(weights, gram)
    found = method(weights, problem, 3) if method is obc else method(weights, problem, 3, block=8)
    assert not found.kept[:, 5].any()
    few = method(weights, problem, 2) if method is obc else method(weights, problem, 2, block=8)
    row = int(np.flatnonzero(few.kept[:, 5])[0])
    assert few.weights[row, 5] == pytest.approx(weights[row, 5])
    silent = method(weights, LeastSquares.of(weights, 0.0 * gram), 3)
    assert int((~silent.kept).sum()) == 3


def test_damping_that_had_to_grow_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.ones((1, 2))
    indefinite = np.array([[1.0, 1.5], [1.5, 1.0]])
    assert obc(weights, LeastSquares.of(weights, indefinite), 1).damping == pytest.approx(1.0)
    monkeypatch.setattr(least_squares, "ATTEMPTS", 2)
    with pytest.raises(NonFinite, match="fc: .* no Cholesky factor; got damping 0.01 to 0.1"):
        obc(weights, LeastSquares.of(weights, indefinite), 1, where="fc")


@pytest.mark.parametrize("method", METHODS)
def test_bad_requests_are_one_line(method) -> None:
    weights, problem = layer(0)
    with pytest.raises(InvalidArgument, match="cannot remove that many; got 25"):
        method(weights, problem, 25)
    with pytest.raises(InvalidArgument, match="does not fit"):
        method(weights[:, :4], problem, 1)
    with pytest.raises(InvalidArgument, match="not a multiple"):
        method(weights, problem, NofM(keep=1, of=3))
    with pytest.raises(NonFinite):
        method(np.where(weights == weights[0, 0], np.nan, weights), problem, 1)
    with pytest.raises(InvalidArgument, match="without damping"):
        OBC(damping=0.0)
    with pytest.raises(InvalidArgument, match="one column"):
        SparseGPT(block=0)


def test_what_would_take_hours_is_refused_before_data_is_read() -> None:
    # 16 rows of 8,192 inputs, of each of which 4,096 go: 16 * 4096^2 * 8192 operations.
    wide = nn.Conv1d(1024, 16, 8)
    assert operations((16, 8192), 16 * 4096) == 16 * 4096**2 * 8192
    unread = [torch.full((1, 1, 1), float("nan"))]
    with pytest.raises(
        Unsupported, match=r"weight: obc needs about 2e\+12 .*some 73 minutes.*sparsegpt"
    ):
        reconstruct_(wide, {"weight": 8 * 8192}, unread)
    small = nn.Linear(8, 4)
    with pytest.raises(Unsupported, match="about 5e"):  # 4 * 4^2 * 8 = 512
        reconstruct_(small, {"weight": 16}, unread, OBC(most_operations=511))
    with pytest.raises(Unsupported, match="about 5e"):
        nofm = NofM(keep=2, of=4)
        reconstruct_(small, {"weight": 0}, unread, OBC(most_operations=511), pattern=nofm)
    done = reconstruct_(small, {"weight": 16}, [torch.randn(9, 8)], OBC(most_operations=512))
    assert int((~done.masks["weight"]).sum()) == 16
    with pytest.raises(InvalidArgument, match="most_operations"):
        OBC(most_operations=0)


@pytest.mark.parametrize("remove", [48, NofM(keep=16, of=32)])
def test_obc_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, remove: int | NofM) -> None:
    from karikomi.reconstruction import obc as module

    monkeypatch.setattr(module, "MEMORY", 1)  # a part for each row
    weights, problem = layer(0, rows=2, inputs=32)
    shares: list[float] = []
    obc(weights, problem, remove, progress=shares.append)
    assert shares == sorted(shares) and len(shares) >= 2
    assert 0 < shares[0] < shares[-1] <= 1


LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 9)),
    "same": (nn.Conv2d(4, 6, (2, 3), dilation=2, padding="same"), (3, 4, 7, 6)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 7, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (3, 4, 7, 6)),
    "conv3d": (nn.Conv3d(2, 4, 2), (3, 2, 4, 3, 3)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "channels last": (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (3, 4, 7, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_patches_times_weights_are_the_outputs(kind: str) -> None:
    module, shape = LAYERS[kind]
    torch.manual_seed(0)
    inputs, seen = torch.randn(shape), []
    with torch.no_grad(), WeightReadHooks({"weight": module.weight}, [seen.append]):
        outputs = module(inputs)
    reading: Reading = seen[0]
    weight = module.weight.detach().movedim(1, -1)
    blocks = list(patches(reading))
    matrix = weight.reshape(blocks[0].shape[0], -1, blocks[0].shape[2])
    found = torch.cat([block @ matrix.mT for block in blocks], dim=1).movedim(0, 1).flatten(1)
    if module.bias is not None:
        found = found + module.bias.detach()
    axis = -1 if kind == "linear" else outputs.dim() - 1 - len(module.kernel_size)
    torch.testing.assert_close(found, outputs.movedim(axis, -1).reshape(found.shape))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 5)),
    )


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 4, 6, 6), torch.zeros(16)) for _ in range(count)]


REMOVES = {"0.weight": 100, "4.weight": 90, "7.weight": 500}


@pytest.mark.parametrize("method", [OBC(), SparseGPT(block=16)])
def test_a_network_loses_exactly_that_and_gives_more_like_outputs(method) -> None:
    module, data = network().train(), batches()
    dense = copy.deepcopy(module)
    found = reconstruct_(module, REMOVES, data, method, progress=False)
    plain = copy.deepcopy(dense)
    for name, count in REMOVES.items():
        assert int((~found.masks[name]).sum()) == count
        weight = module.get_parameter(name)
        assert not weight[torch.from_numpy(~found.masks[name])].any()
        plain.get_parameter(name).data *= torch.from_numpy(found.masks[name])
    assert [row.name for row in found.rows] == list(REMOVES)
    assert all(row.refitted < row.masked and row.updated for row in found.rows)
    assert module.training and module[1].training
    torch.testing.assert_close(module[1].running_mean, dense[1].running_mean)
    inputs = data[0][0]
    with torch.no_grad():
        outputs = [one.eval()(inputs) for one in (dense, module, plain)]
    assert (outputs[1] - outputs[0]).norm() < 0.8 * (outputs[2] - outputs[0]).norm()


def test_the_row_says_the_error_of_the_outputs() -> None:
    module, data = nn.Linear(6, 4), [torch.randn(20, 6), torch.randn(7, 6)]
    before = torch.cat([module(one).detach() - module.bias.detach() for one in data])
    row = reconstruct_(module, {"weight": 12}, data, progress=False).rows[0]
    after = torch.cat([module(one).detach() - module.bias.detach() for one in data])
    assert row.error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


def test_of_every_four_inputs_of_a_kernel_position_two_stay() -> None:
    module = network()
    found = reconstruct_(
        module, {"0.weight": 144}, batches(), pattern=NofM(keep=2, of=4), progress=False
    )
    np.testing.assert_array_equal(found.masks["0.weight"].sum(axis=1), 2)


def test_a_refit_that_is_no_better_is_not_kept_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import karikomi.torch.reconstruction.refit as driver

    def worse(weights, problem, remove, **given):
        found = obc(weights, problem, remove, **given)
        return least_squares.Reconstructed(100.0 * found.weights, found.kept, 0.1)

    monkeypatch.setattr(driver, "obc", worse)
    module = nn.Linear(6, 4)
    dense = module.weight.detach().clone()
    found = reconstruct_(module, {"weight": 5}, [torch.randn(20, 6)], progress=False)
    torch.testing.assert_close(
        module.weight.detach(), dense * torch.from_numpy(found.masks["weight"])
    )
    account = found.account(Account((Row(name="weight", removed=5, size=24, why=""),), 0.0))
    assert account.output_error is None
    assert account.rows[0].output_error == found.rows[0].masked
    assert [note.partition(":")[2] for note in account.notes] == [
        " masked only, a re-fit was no better",
        " damping 0.1, as 0.01 gave no Cholesky factor",
    ]


def test_a_refit_with_the_damping_that_was_asked_for_is_not_noted() -> None:
    module = nn.Linear(6, 4)
    found = reconstruct_(module, {"weight": 5}, [torch.randn(20, 6)], progress=False)
    assert found.rows[0].updated and found.rows[0].damping == found.damping == 0.01
    assert found.account(Account(notes=("a note",))).notes == ("a note",)


def test_earlier_masks_stay_and_count() -> None:
    module = network()
    first = reconstruct_(module, {"7.weight": 300}, batches(), progress=False)
    earlier = {name: torch.from_numpy(mask) for name, mask in first.masks.items()}
    again = reconstruct_(module, {"7.weight": 400}, batches(), earlier=earlier, progress=False)
    assert int((~again.masks["7.weight"]).sum()) == 400
    assert not (again.masks["7.weight"] & ~first.masks["7.weight"]).any()
    before = module[7].weight.detach().clone()
    same = reconstruct_(
        module,
        {"7.weight": 400},
        batches(),
        progress=False,
        earlier={"7.weight": torch.from_numpy(again.masks["7.weight"])},
    )
    assert same.rows == () and torch.equal(before, module[7].weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tied = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.tied(torch.relu(self.tied(x)))


def test_stacked_projections_and_a_layer_that_is_used_twice() -> None:
    torch.manual_seed(0)
    module = Attention()
    removes = {"attention.in_proj_weight": 90, "tied.weight": 30}
    found = reconstruct_(module, removes, [torch.randn(6, 5, 8)] * 2, progress=False)
    assert {name: int((~mask).sum()) for name, mask in found.masks.items()} == removes
    assert all(row.refitted < row.masked for row in found.rows)


def test_half_precision_stays_half() -> None:
    module = nn.Linear(6, 4).bfloat16()
    found = reconstruct_(module, {"weight": 12}, [torch.randn(20, 6).bfloat16()], progress=False)
    assert module.weight.dtype == torch.bfloat16
    assert int((module.weight == 0).sum()) == 12 == int((~found.masks["weight"]).sum())


def test_what_cannot_be_done_is_said_and_leaves_the_weights() -> None:
    module, data = network(), batches()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InvalidArgument, match="reads the data once for each"):
        reconstruct_(module, REMOVES, iter(data), progress=False)
    with pytest.raises(InvalidArgument, match="got NoneType"):
        reconstruct_(module, REMOVES, None, progress=False)
    with pytest.raises(UnknownName, match="did you mean '0.weight'"):
        reconstruct_(module, {"0.wieght": 1}, data, progress=False)
    with pytest.raises(Unsupported, match="not a matrix"):
        reconstruct_(module, {"0.bias": 1}, data, progress=False)
    with pytest.raises(InvalidArgument, match="7.weight: cannot remove that many"):
        reconstruct_(module, {**REMOVES, "7.weight": 10_000}, data, progress=False)
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
    with pytest.raises(Unsupported, match="transposed"):
        reconstruct_(
            nn.ConvTranspose1d(2, 2, 3), {"weight": 2}, [torch.randn(2, 2, 5)], progress=False
        )
    idle = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    idle.forward = lambda x: idle["used"](x)  # type: ignore[method-assign]
    with pytest.raises(Unsupported, match="idle.weight: .*got never read"):
        reconstruct_(idle, {"idle.weight": 1}, [torch.randn(2, 2)], progress=False)
