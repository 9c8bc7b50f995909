"""PyTorch on small cases worked by hand, of two parameter groups, two steps or two tensors that differ."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import karikomi as kk
from contract.probe import Noting
from karikomi.errors import NonFinite, Unsupported
from karikomi.prune import Gradual, OneShot, RigL
from karikomi.quantize import Coded
from karikomi.rule import Scope
from karikomi.schedule import Stepwise
from karikomi.torch.attachment.limit_warnings import LimitWarnings
from karikomi.torch.exporting.equivalence import equal
from karikomi.torch.exporting.proof import apart
from karikomi.torch.facts.measure import measure
from karikomi.torch.facts.running_stats import RunningStats
from karikomi.torch.modules.fingerprint import fingerprint
from karikomi.torch.modules.resizing import resize_
from karikomi.torch.numerics.norms import norm, norms
from karikomi.torch.numerics.scaling import scale_, scale_units_
from karikomi.torch.quantization.trained_codebook import share_, shared
from karikomi.torch.reconstruction.calibration import Regressions
from karikomi.torch.recovery.distillation import DistillationLoss
from karikomi.torch.recovery.training_loop import TrainingLoop
from karikomi.torch.tracing.batches import MISSING, batch_of
from karikomi.torch.tracing.isolation import isolated
from karikomi.torch.tracing.source_line import called_at
from karikomi.torch.tracing.windows import window_of


def pair(first: list[float], second: list[float]) -> nn.ModuleDict:
    layers = nn.ModuleDict()
    for name, entries in (("first", first), ("second", second)):
        layers[name] = nn.Linear(len(entries), 1, bias=False)
        layers[name].weight.data = torch.tensor([entries])
    return layers


def groups(model: nn.ModuleDict, **options: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Return a parameter group per layer, each with its own of these options."""
    return [
        {"params": [layer.weight], **{key: value[place] for key, value in options.items()}}
        for place, layer in enumerate(model.values())
    ]


def set_gradients(model: nn.ModuleDict, *gradients: list[float] | None) -> None:
    for layer, entries in zip(model.values(), gradients, strict=True):
        layer.weight.grad = None if entries is None else torch.tensor([entries])


def rows(model: nn.ModuleDict) -> list[list[float]]:
    return [layer.weight.detach()[0].tolist() for layer in model.values()]


def test_updates_are_in_units_of_the_rate_of_their_group() -> None:
    model = pair([0.0, 0.0], [0.0, 0.0])
    optimizer = torch.optim.SGD(groups(model, lr=(0.5, 0.125)))
    handle = kk.torch.attach(optimizer, model, update=kk.clip.BlockRMS(2.0))
    set_gradients(model, [3.0, -4.0], [1.0, 1.0])
    optimizer.step()
    # Root mean squares of 5 / sqrt(2) and 1.
    factor = 2.0 * math.sqrt(2.0) / 5.0
    assert rows(model)[0] == pytest.approx([-1.5 * factor, 2.0 * factor], rel=1e-6)
    assert rows(model)[1] == [-0.125, -0.125]
    assert handle.last_update is not None
    assert list(handle.last_update.norms) == pytest.approx([5.0, math.sqrt(2.0)])


def test_a_step_that_was_skipped_is_an_attempt_for_the_clip_of_updates() -> None:
    model = pair([0.0], [0.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    limits = Stepwise(((0, 1.0), (1, 2.0), (2, 3.0)))
    kk.torch.attach(optimizer, model, update=kk.clip.BlockRMS(limits))
    steps = []
    for gradient in (-9.0, math.nan, -9.0):
        before = rows(model)[0][0]
        set_gradients(model, [gradient], [gradient])
        optimizer.step()
        steps.append(rows(model)[0][0] - before)
    # The second limit went by with the step that was skipped.
    assert steps == pytest.approx([1.0, 0.0, 3.0])


def test_second_moments_are_corrected_by_the_decay_of_their_group() -> None:
    moved = []
    for rule in (None, kk.clip.StableAdamW(1.0)):
        model = pair([0.0], [0.0])
        decays = ((0.0, 0.9), (0.0, 0.5))
        optimizer = torch.optim.Adam(groups(model, betas=decays), lr=1.0, eps=1e-12)
        kk.torch.attach(optimizer, model, update=rule)
        for gradient in (1.0, 3.0):
            before = rows(model)
            set_gradients(model, [gradient], [gradient])
            optimizer.step()
        moved.append([old[0] - new[0] for old, new in zip(before, rows(model), strict=True)])
    # Of squares 1 and 9, the corrected means (0.09 + 0.9) / 0.19 and (0.25 + 4.5) / 0.75.
    factors = [math.sqrt((0.99 / 0.19) / 9.0), math.sqrt((4.75 / 0.75) / 9.0)]
    found = [ours / plain for ours, plain in zip(moved[1], moved[0], strict=True)]
    assert found == pytest.approx(factors, rel=1e-5)


def test_movement_is_in_units_of_the_rate_of_each_group() -> None:
    # Both move towards zero, the second ten times as fast.
    model = pair([2.0], [2.0])
    optimizer = torch.optim.SGD(groups(model, lr=(0.01, 0.1)))
    rule = Gradual(0.5, steps=(1, 2), every=1, initial=0.5, score="movement")
    handle = kk.torch.attach(optimizer, model, prune=rule)
    set_gradients(model, [1.0], [1.0])
    optimizer.step()
    assert handle.masks is not None
    assert {name: bool(mask) for name, mask in handle.masks.items()} == {
        "first.weight": True,
        "second.weight": False,
    }


def test_running_statistics_by_hand() -> None:
    model = pair([2.0, -1.0], [3.0])
    weights = dict(model.named_parameters())
    stats = RunningStats(frozenset({"gradient", "squared_gradient", "moved"}))
    rates = {"first.weight": 0.5, "second.weight": 2.0}
    for first, second, taken in (
        ([1.0, 4.0], [2.0], True),
        ([9.0, 9.0], [9.0], False),
        ([3.0, 2.0], None, True),
    ):
        set_gradients(model, first, second)
        stats.note(weights, rates, torch.tensor(1.0))
        assert stats.waiting
        if taken:
            stats.take_in()
        else:
            stats.drop()
    found = {
        fact: {n: v.tolist() for n, v in of.items()} for fact, of in stats.found(weights).items()
    }
    assert found == {
        "gradient": {"first.weight": [[2.0, 3.0]], "second.weight": [[1.0]]},
        "squared_gradient": {"first.weight": [[5.0, 10.0]], "second.weight": [[2.0]]},
        # -0.5 * 2 * (1 + 3), 0.5 * (4 + 2) and -2 * 3 * 2.
        "moved": {"first.weight": [[-4.0, 3.0]], "second.weight": [[-12.0]]},
    }
    stats.restart()
    set_gradients(model, [8.0, 16.0], [4.0])
    stats.note(weights, rates, torch.tensor(4.0))
    stats.take_in()
    after = stats.found(weights)
    assert after["gradient"]["first.weight"].tolist() == [[2.0, 4.0]]
    assert after["moved"]["second.weight"].tolist() == [[-12.0 - 6.0]]


@pytest.mark.parametrize(
    ("clipped", "accepted", "warned"),
    [
        (475, 500, False),
        (476, 500, True),
        (499, 499, False),
        (10, 10_000, False),
        (9, 10_000, True),
    ],
)
def test_the_share_of_clipped_steps_that_is_warned_of(
    clipped: int, accepted: int, warned: bool
) -> None:
    found = LimitWarnings([kk.clip.ByNorm(1.0)], {})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(accepted - 1):
            found.count(engaged=step < clipped, skipped=False)
        # Skipped steps count neither as clipped nor as accepted.
        for _ in range(50):
            found.count(engaged=False, skipped=True)
        assert not said and found.accepted == accepted - 1
        found.count(engaged=clipped == accepted, skipped=False)
    assert bool(said) is warned and found.engaged == clipped


def test_a_shared_codebook_learns_the_sums_of_the_gradients_of_its_weights() -> None:
    model = pair([0.5, 0.0, -1.0], [2.0, 2.0])
    coded = kk.torch.quantize_(model, entries=4)
    share_(model, coded)
    slopes = [torch.tensor([[3.0, 5.0, 7.0]]), torch.tensor([[1.0, 10.0]])]
    loss = sum(
        (layer.weight * slope).sum() for layer, slope in zip(model.values(), slopes, strict=True)
    )
    loss.backward()  # type: ignore[union-attr]
    for layer, expected in zip(model.values(), ({0.5: 3.0, -1.0: 7.0}, {2.0: 11.0}), strict=True):
        book = layer.parametrizations.weight.original
        slope = dict(zip(book.detach().tolist(), book.grad.tolist(), strict=True))
        # The zero stays, and a value without a weight has no slope.
        assert {value: s for value, s in slope.items() if s} == expected and slope[0.0] == 0.0
    with torch.no_grad():
        for layer in model.values():
            layer.parametrizations.weight.original.mul_(2.0)
    found = shared(model)
    assert isinstance(found["first.weight"], Coded)
    assert found["first.weight"].decode().tolist() == [[1.0, 0.0, -2.0]]
    assert found["second.weight"].decode().tolist() == rows(model)[1:] == [[4.0, 4.0]]


def test_a_shared_codebook_of_tied_weights_is_one() -> None:
    model = pair([1.0, 2.0], [1.0, 2.0])
    model["second"].weight = model["first"].weight
    share_(model, kk.torch.quantize_(model, entries=3))
    (model["first"].weight * 3.0 + model["second"].weight).sum().backward()
    books = [layer.parametrizations.weight.original for layer in model.values()]
    assert books[0] is books[1] and len(list(model.parameters())) == 1
    assert sorted(books[0].grad.tolist()) == [0.0, 4.0, 4.0]


def test_rates_fall_together_from_those_of_their_groups() -> None:
    model = pair([1.0], [1.0])
    optimizer = torch.optim.SGD(groups(model, lr=(0.5, 0.125)))
    whole = nn.Sequential(*model.values())
    loop = TrainingLoop(whole, optimizer, DistillationLoss(loss=F.mse_loss), 4)
    loop.attach_()
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    batches = [batch_of((torch.ones(1, 1), torch.zeros(1, 1)), torch.device("cpu"), where="")] * 3
    losses = [float(loss) for loss in loop.epoch(batches)]
    half = 0.5 * (1.0 + math.cos(math.pi / 4))
    assert seen[0] == [0.5, 0.125] and seen[2] == pytest.approx([0.25, 0.0625])
    assert seen[1] == pytest.approx([0.5 * half, 0.125 * half]) and losses[0] == 1.0
    loop.detach_()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]


def test_a_fingerprint_is_of_all_names_types_shapes_and_entries() -> None:
    def of(**tensors: torch.Tensor) -> str:
        return fingerprint(tensors)

    first, second = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([3.0])
    prints = [
        of(a=first, b=second),
        of(a=first, c=second),
        of(a=first, b=second.double()),
        of(a=first.T, b=second),
        of(a=first, b=torch.tensor([3.5])),
        of(a=torch.tensor([[1.0, 3.0, 2.0]]), b=second),
        of(a=torch.tensor([[1.0, 2.0, 4.0]]), b=second),
        of(a=first),
    ]
    assert len(set(prints)) == len(prints) and prints[0] == of(a=first.clone(), b=second.clone())


def test_an_isolated_part_has_its_own_random_numbers_and_threads() -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    drawn = []
    for seed in (1, 1, 2):
        with isolated(seed, threads + 1):
            drawn.append(torch.rand(2).tolist())
            assert torch.get_num_threads() == threads + 1
        assert torch.get_num_threads() == threads
    assert drawn[0] == drawn[1] != drawn[2] and torch.rand(2).tolist() == expected


def test_each_linear_layer_is_quantized_along_its_own_outputs() -> None:
    model = pair([1.0, -1.0], [1.0, -1.0])
    model["first"].weight = nn.Parameter(torch.tensor([[1.0, 0.5], [1e-3, 5e-4]]))
    coded = kk.torch.quantize_(model, bits=8)
    scales = np.asarray(coded["first.weight"].grid.scale).ravel()  # type: ignore[union-attr]
    np.testing.assert_allclose(scales[0] / scales[1], 1e3, rtol=1e-5)
    np.testing.assert_allclose(rows(model)[0], [1.0, 0.5], atol=1 / 127)
    np.testing.assert_allclose(model["first"].weight[1].tolist(), [1e-3, 5e-4], atol=1e-3 / 127)


def test_the_sizes_and_weights_of_units_are_those_of_each_unit() -> None:
    layer, rule = nn.Linear(3, 2), Noting(Scope.UNIT)
    layer.weight.data = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    layer.bias.data = torch.tensor([5.0, 12.0])
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3), torch.zeros(2)
    kk.torch.clip_(layer, rule)
    assert rule.noted["sizes"].tolist() == [3.0, 3.0, 2.0]
    assert rule.noted["weights"].tolist() == pytest.approx([5.0, 2.0, 13.0])
    assert rule.noted["norms"].tolist() == pytest.approx([math.sqrt(3), math.sqrt(3), 0.0])


def test_ten_bad_steps_in_a_row_stop_a_training() -> None:
    model = pair([1.0], [1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kk.torch.attach(optimizer, model)
    # A good step ends the count.
    for entry in (*[math.nan] * 9, 1.0, *[math.nan] * 9):
        set_gradients(model, [entry], [1.0])
        optimizer.step()
    set_gradients(model, [math.nan], [1.0])
    with pytest.raises(NonFinite, match="^torch.attach, step 20: 10 step"):
        optimizer.step()


def test_the_norms_of_large_tensors_are_those_of_all_their_entries() -> None:
    tail = torch.cat([torch.ones(40_000), torch.tensor([300.0])])
    tensors = [torch.ones(40_000), torch.full((300, 300), 2.0), tail, torch.tensor([3.0, 4.0])]
    assert norms(tensors).tolist() == pytest.approx([200.0, 600.0, math.sqrt(130_000.0), 5.0])
    assert [float(norm(tensor)) for tensor in tensors] == pytest.approx(
        [200.0, 600.0, math.sqrt(130_000.0), 5.0]
    )


def test_a_tiny_factor_is_applied_in_full() -> None:
    assert scale_(torch.tensor([1e20, -2e20]), 1e-36).tolist() == pytest.approx([1e-16, -2e-16])


def test_multiply_accumulates_are_those_of_an_example_of_the_first_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 5))
    data = [torch.ones(2, 3, 4), torch.ones(2, 7, 4)]
    found = measure(model, {"macs"}, ["0.weight", "1.weight"], data=data)["macs"]
    assert {name: float(macs) for name, macs in found.items()} == {"0.weight": 24, "1.weight": 30}


def test_the_extra_entry_of_an_odd_padding_is_at_the_end() -> None:
    inputs = torch.tensor([[[1.0, 2.0, 3.0]]])
    window = window_of(torch.ones(1, 1, 2), inputs, transposed=False, padding="same")
    assert [tap.flatten().tolist() for tap in window.taps(inputs)] == [
        [1.0, 2.0, 3.0],
        [2.0, 3.0, 0.0],
    ]


def test_an_account_has_the_error_of_each_layer_over_all_batches() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2.0]])
    model[1].weight.data = torch.tensor([[5.0], [4.0]])
    data = [torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.0]])]
    account = kk.torch.prune_(model, {"*": 0.5}, data=data).account
    # Outputs 3 and 3 become 2 and 0; 15 and 12 become 15 and 0, twice.
    assert [row.output_error for row in account.rows] == pytest.approx(
        [math.sqrt(10 / 18), math.sqrt(288 / 738)]
    )
    # Of the network 15, 12 and 15, 12 become 10, 0 and 0, 0.
    assert account.output_error == pytest.approx(math.sqrt((25 + 144 + 225 + 144) / 738))


def test_the_loss_of_an_epoch_is_the_mean_over_its_batches() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    data = [(torch.ones(1, 1), torch.zeros(1, 1)), (torch.ones(1, 1), torch.full((1, 1), 3.0))]
    masks = kk.torch.prune_(model, sparsity=0.0)
    found = kk.torch.recover_(
        model, masks, data, loss=F.mse_loss, epochs=2, rate=1e-12, progress=False
    )
    assert found.losses == pytest.approx((2.5, 2.5))


def test_the_epochs_of_a_recovery_draw_their_own_numbers() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1))
    data = [(torch.ones(4, 64), torch.zeros(4, 1))]
    masks = kk.torch.prune_(model, sparsity=0.0)
    first, second, again = (
        kk.torch.recover_(
            *(model, masks, data),
            loss=F.mse_loss,
            epochs=2,
            rate=1e-12,
            seed=seed,
            progress=False,
        ).losses
        for seed in (0, 1, 0)
    )
    assert first == pytest.approx(again, rel=1e-6)
    assert len({round(loss, 9) for loss in (*first, *second)}) == 4


@torch.no_grad()
def test_outputs_are_compared_on_the_inputs_that_are_given() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.bias.data = layer.bias.data.clone()
    assert equal(layer, other, (torch.zeros(1, 2),), {}) == 0.0
    with pytest.raises(Unsupported, match="would differ"):
        equal(layer, other, (torch.ones(1, 2),), {})


def test_clipping_in_place_continues_from_its_state() -> None:
    parameter, state, left = nn.Parameter(torch.zeros(1)), None, []
    for entry in (4.0, 20.0, 40.0):
        parameter.grad = torch.tensor([entry])
        outcome, state = kk.torch.clip_([parameter], kk.clip.EMARatio(2.0, beta=0.5), state)
        left.append((outcome.pre, float(parameter.grad)))
    assert left == [(4.0, 4.0), (20.0, pytest.approx(8.0)), (40.0, pytest.approx(40 / 3))]


class Shared(nn.Module):
    """Four query heads of width 1 that share two heads of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        for name, outputs in (("q", 4), ("k", 2), ("v", 2)):
            setattr(self, name, nn.Linear(3, outputs, bias=False))
        self.out = nn.Linear(4, 3, bias=False)
        kk.torch.declare_attention(self, heads=4, kv_heads=2, q="q", k="k", v="v", out="out")


def test_heads_that_share_keys_go_together() -> None:
    model = Shared()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    # The largest single head is the first, and the smaller pair is the one that it is in.
    model.q.weight.data = torch.tensor([[9.0] * 3, [0.0] * 3, [5.0] * 3, [5.0] * 3])
    masks = kk.torch.prune_(model, width=0.5, pattern="heads")
    assert masks["q.weight"][:, 0].tolist() == [False, False, True, True]
    assert masks["k.weight"][:, 0].tolist() == masks["v.weight"][:, 0].tolist() == [False, True]
    assert masks["out.weight"][0].tolist() == [False, False, True, True]


def test_a_weight_that_comes_back_has_no_moments_of_before() -> None:
    model = pair([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.5)
    rule = RigL(0.5, until=50, every=2, drop=0.9, score="magnitude", allocation="uniform")
    handle = kk.torch.attach(optimizer, model, prune=rule)
    for step in (1, 2):
        set_gradients(model, [9.0, 1.0, 1.0, 1.0], [1.0, 9.0, 1.0, 1.0])
        if step == 2:
            for parameter in model.parameters():
                optimizer.state[parameter]["momentum_buffer"].fill_(8.0)
        optimizer.step()
    # Of 3 and 4 the first goes, and the largest gradient comes.
    assert handle.masks is not None
    kept = [mask[0].tolist() for mask in handle.masks.values()]
    assert kept == [[True, False, False, True], [False, True, False, True]]
    moments = [optimizer.state[p]["momentum_buffer"][0].tolist() for p in model.parameters()]
    assert moments == [[0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 5.0]]


def test_pruning_that_a_skipped_step_was_due_to_do_is_made_up_for() -> None:
    model = pair([1.0, 2.0], [3.0, 4.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    handle = kk.torch.attach(optimizer, model, prune=OneShot(0.5, 2))
    shares = []
    for entry in (1.0, math.nan, math.nan, 1.0, 1.0):
        set_gradients(model, [entry, 1.0], [1.0, 1.0])
        optimizer.step()
        shares.append(handle.sparsity)
    assert shares == [0.0, 0.0, 0.0, 0.5, 0.5] and rows(model)[0] == [0.0, 0.0]


def test_an_overflow_is_no_bad_step_in_a_row() -> None:
    model = pair([1.0], [1.0])
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-6, fused=True)
    handle = kk.torch.attach(optimizer, model, stop_after=2)
    for raised in (False, True):
        set_gradients(model, [math.nan], [1.0])
        with pytest.raises(NonFinite) if raised else warnings.catch_warnings():
            optimizer.step()
    optimizer.found_inf = torch.tensor(1.0)
    set_gradients(model, [math.inf], [1.0])
    optimizer.step()
    assert handle.steps == 3 and handle.state_dict()["clip"]["bad_in_a_row"] == 2


def test_resized_layers_have_their_new_numbers_of_features() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Conv1d(4, 5, 1))
    resize_(
        model,
        {
            **{"0.weight": (2, 3, 2), "0.bias": (2,), "2.weight": (5, 2, 1)},
            **{f"1.{leaf}": (2,) for leaf in ("weight", "bias", "running_mean", "running_var")},
        },
    )
    first, between, second = model
    assert (first.in_channels, first.out_channels) == (3, 2) and between.num_features == 2
    assert (second.in_channels, second.out_channels) == (2, 5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    resize_(model, {"0.weight": (1, 3), "0.bias": (1,), "1.weight": (2, 1)})
    assert [(layer.in_features, layer.out_features) for layer in model] == [(3, 1), (1, 2)]


def test_units_are_scaled_along_their_axis() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = scale_units_(rows.clone(), 1, np.array([1.0, 0.5]))
    assert found.tolist() == [[1.0, 1.0], [3.0, 2.0], [5.0, 3.0]]
    found = scale_units_(rows.clone(), 0, torch.tensor([1.0, 0.5, 2.0]))
    assert found.tolist() == [[1.0, 2.0], [1.5, 2.0], [10.0, 12.0]]


@torch.no_grad()
def test_a_refit_is_of_the_outputs_before_on_the_inputs_that_are_left() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    parameters = dict(model.named_parameters())
    dense = {"0.weight": torch.tensor([[2.0]]), "1.weight": torch.tensor([[3.0]])}
    model[0].weight.data, model[1].weight.data = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    data = [torch.tensor([[1.0]]), torch.tensor([[2.0]])]
    found = Regressions(model, parameters, dense, data, where="here").problem("1.weight")
    # Outputs of 6 and 12, from inputs that were 2 and 4 and are 1 and 2.
    assert (found.gram.ravel().tolist(), found.cross.ravel().tolist()) == ([5.0], [30.0])
    assert found.energy == 36.0 + 144.0


def test_the_targets_of_a_batch_are_the_second_of_two() -> None:
    first, second, targets = torch.zeros(1), torch.ones(1), torch.tensor([2.0])
    for given, inputs, expected in (
        (first, (first,), MISSING),
        ((first,), (first,), MISSING),
        ([first, targets], (first,), targets),
        ((first, None), (first,), None),
        (((first, second), targets), (first, second), targets),
        (([first, second],), (first, second), MISSING),
    ):
        batch = batch_of(given, torch.device("cpu"), where="here")
        assert [float(item) for item in batch.positional] == [float(item) for item in inputs]
        assert batch.targets is expected or float(batch.targets) == float(targets)


def test_the_line_of_an_error_is_the_innermost_of_the_forward() -> None:
    frames = (("tracer.py", 9), ("model.py", 3), ("block.py", 7), (f"{torch.__file__}", 5))
    trace = "\n".join(f'  File "{path}", line {line}, in forward' for path, line in frames)
    node: Any = SimpleNamespace(stack_trace=trace)
    assert called_at(node, after="tracer.py") == "at block.py:7"
    assert called_at(node, after="block.py") == ""


def test_a_nan_in_one_output_of_several_is_no_small_difference() -> None:
    here, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert max(map(apart, [here, here], [here, nan])) == float("inf")
    assert max(map(apart, [here, here], [nan, here])) == float("inf")
