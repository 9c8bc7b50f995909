"""What goes wrong without a word around a module, each trap shown not to: measuring, precisions, layers, copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import karikomi as kk
from karikomi.errors import Unsupported
from karikomi.prune import Blocks, NofM, SynFlow
from karikomi.torch.pruning.masks import Masks
from prune_networks import batches, linear, mlp, net, parameter, untouched

prune_: Callable[..., Masks] = kk.torch.prune_
loss = F.cross_entropy


# --- measuring leaves no trace ---

SCORES = "taylor snip fisher grasp synflow wanda activation apoz deviation bn_scale obc sparsegpt"


@pytest.mark.parametrize("score", SCORES.split())
def test_after_measuring_all_is_as_it_was(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = net(), batches()
    module(data[0][0])
    module[1].eval()
    module[4].weight.requires_grad_(False)
    module[9].weight.grad = torch.ones(10, 32)
    of_units = score in ("activation", "apoz", "deviation", "bn_scale")
    how: dict[str, Any] = {"pattern": "units", "width": 0.5} if of_units else {"sparsity": 0.5}
    if score == "synflow":
        how["score"] = SynFlow(rounds=3)
    monkeypatch.setattr(Masks, "apply_", lambda *_: None)
    if score in ("obc", "sparsegpt"):
        return interrupted(module, {"score": score, **how})
    with untouched(module):
        masks = prune_(module, data=data, loss=loss, **{"score": score, **how})
        assert masks.sparsity == pytest.approx(0.5)
    monkeypatch.undo()
    interrupted(module, {"score": score, **how})


def interrupted(module: nn.Module, how: Mapping[str, Any]) -> None:
    """Show that an interrupt at any reading of the data leaves a module as it was."""

    class Interrupted:
        readings = 0

        def __init__(self, at: int) -> None:
            self.at = at

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for one in batches():
                self.readings += 1
                if self.readings == self.at:
                    raise KeyboardInterrupt
                yield one

    data = Interrupted(0)
    prune_(copy.deepcopy(module), data=data, loss=loss, **how)
    for at in sorted({1, 2, data.readings // 2, data.readings}):
        with untouched(module), pytest.raises(KeyboardInterrupt):
            prune_(module, data=Interrupted(at), loss=loss, **how)


@pytest.mark.parametrize("score", ["obc", "sparsegpt", SynFlow(rounds=2)])
def test_an_error_after_weights_have_changed_puts_them_back(
    score: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = mlp(8, 8, 4), [(torch.randn(32, 8), torch.randint(0, 4, (32,)))]
    before = bits(module)

    def differ(*_: Any) -> None:
        seen.append(bits(module) != before)
        if len(seen) == (1 if isinstance(score, str) else 2):
            raise Unsupported("the ranks found different masks")

    seen: list[bool] = []
    monkeypatch.setattr("karikomi.torch.pruning.in_place._check_replicas", differ)
    with pytest.raises(Unsupported):
        prune_(module, sparsity=0.5, score=score, data=data)
    # A re-fit has moved them by then, rounds put them back themselves before the last.
    assert seen == ([True] if isinstance(score, str) else [False, False])
    assert bits(module) == before
    monkeypatch.undo()
    dense = copy.deepcopy(module)
    masks = prune_(module, sparsity=0.5, score=score, data=data)
    kept = masks["0.weight"]
    stays = torch.equal(parameter(module, "0.weight")[kept], parameter(dense, "0.weight")[kept])
    assert stays != isinstance(score, str)


def bits(module: nn.Module) -> list[bytes]:
    return [one.detach().numpy().tobytes() for one in module.parameters()]


def test_an_account_of_several_rounds_speaks_of_all_of_them() -> None:
    module = mlp(6, 12, 4)
    dense, data = copy.deepcopy(module), [torch.rand(4, 6)]
    masks = prune_(module, sparsity=0.6, score=SynFlow(rounds=50), data=data)
    with torch.no_grad():
        before, after = dense(data[0]), module(data[0])
    expected = float(torch.linalg.vector_norm(before - after) / torch.linalg.vector_norm(before))
    assert masks.account.output_error == pytest.approx(expected, rel=1e-5)
    assert not any("inf" in row.why for row in masks.account.rows)


class Heads(nn.Module):
    """Several outputs in a container."""

    def __init__(self, made: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.made = nn.Linear(6, 4), nn.Linear(6, 3), made

    def forward(self, x: torch.Tensor) -> Any:
        return self.made(self.a(x), self.b(x))


@pytest.mark.parametrize(
    "made",
    [
        lambda a, b: (a, b),
        lambda a, b: {"logits": a, "more": [b, None, a.argmax(1)]},
        lambda a, b: torch.cat([a, b], 1),
    ],
    ids=["tuple", "dict", "tensor"],
)
def test_the_error_of_several_outputs_is_that_over_all_of_them(made: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    module, data = Heads(made), [torch.randn(8, 6)]
    dense = torch.cat([module.a(data[0]), module.b(data[0])], 1)
    masks = prune_(module, sparsity=0.5, data=data)
    pruned = torch.cat([module.a(data[0]), module.b(data[0])], 1)
    expected = torch.linalg.vector_norm(dense - pruned) / torch.linalg.vector_norm(dense)
    assert masks.account.output_error == pytest.approx(expected.item(), rel=1e-5)


def test_outputs_of_other_shapes_have_no_error() -> None:
    module = Heads(lambda a, b: [a[a[:, 0] > 0], b])
    masks = prune_(module, sparsity=0.9, data=[torch.randn(64, 6)])
    assert masks.account.output_error is None


@pytest.mark.parametrize("score", ["magnitude", "taylor", "obc"])
def test_shuffled_data_gives_the_error_of_the_masks_and_not_of_the_order(score: str) -> None:
    torch.manual_seed(3)
    rows = TensorDataset(torch.randn(40, 8), torch.randint(0, 4, (40,)))
    data = DataLoader(rows, batch_size=2, shuffle=True)
    with untouched(module := mlp(8, 8, 4)):
        assert (
            prune_(module, sparsity=0.0, score=score, data=data, loss=loss).account.output_error
            == 0
        )


def test_new_statistics_are_kept_only_if_they_help() -> None:
    module, data = net(), batches()
    for inputs, _ in batches(20, seed=7):
        module(inputs)
    module.eval()
    dense = copy.deepcopy(module)

    def near(one: nn.Module) -> float:
        return -float(sum((one(x) - dense(x)).square().sum() for x, _ in data))

    with untouched(module):
        assert not kk.torch.recalibrate_(module, data, judge=near).kept
    prune_(module, sparsity=0.95)
    before = parameter_of_buffer(module)
    assert kk.torch.recalibrate_(module, [one for one, _ in batches(20, seed=7)], judge=near).kept
    assert not torch.equal(before, parameter_of_buffer(module)) and not module[1].training


def parameter_of_buffer(module: nn.Module) -> torch.Tensor:
    return module.get_buffer("1.running_mean").clone()


# --- precisions, layouts and kinds of layers ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("score", ["magnitude", "l2", "lamp", "fpgm"])
def test_sums_over_units_do_not_overflow_or_vanish(dtype: torch.dtype, score: str) -> None:
    # Squares of 6e4 are no float16, those of 1e20 no bfloat16, and sums of them no float32.
    large, small = {torch.float16: (6e4, 1e-7)}.get(dtype, (1e30, 1e-30))
    rows = [[large] * 4, [large, 0, 0, 0], [small] * 4, [0, large / 2, 0, 0]]
    for scale in (1.0, small / large):
        layer = linear(torch.tensor(rows, dtype=torch.float64) * scale, dtype)
        module = nn.Sequential(layer, nn.Linear(4, 2, dtype=dtype))
        wide = parameter(layer).double()
        apart = torch.cdist(wide, wide).sum(1) if score == "fpgm" else wide.abs().sum(1)
        masks = prune_(module, width=0.75, pattern="units", score=score)
        assert masks["0.bias"].logical_not().nonzero().item() == int(apart.argmin())


@pytest.mark.parametrize("score", ["wanda", "taylor", "fisher", "activation"])
def test_facts_of_half_precision_are_taken_in_single(score: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)).half()
    # Their squares sum to 6e8, beyond float16.
    data = [(torch.full((64, 64), 400.0).half(), torch.randint(0, 4, (64,)))]
    masks = prune_(
        *(module,),
        width=0.5,
        pattern="units",
        score=score,
        data=data,
        loss=lambda o, t: loss(o / 1e4, t),
    )
    assert masks.counts()["0.bias"] == (4, 8) and module[0].weight.dtype == torch.float16


def test_one_layer_in_double_precision() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8).double(), nn.Linear(8, 4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(inputs.double()).relu().float())

    for score in ("magnitude", "wanda", "taylor", "grasp", "obc"):
        module = Mixed()
        data = [(torch.randn(9, 8), torch.randint(0, 4, (9,)))]
        masks = prune_(module, sparsity=0.5, score=score, data=data, loss=loss)
        assert masks.sparsity == 0.5 and module.first.weight.dtype == torch.float64
        assert not parameter(module, "first.weight")[~masks["first.weight"]].any()


def test_channels_last_gives_the_same_masks_and_keeps_its_strides() -> None:
    for how in (
        {"sparsity": 0.5},
        {"width": 0.5, "pattern": "units"},
        {"pattern": NofM(keep=2, of=4)},
    ):
        plain, other = net(), net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        strides = [one.stride() for one in other.parameters()]
        expected, found = prune_(plain, **how), prune_(other, **how)
        assert all(torch.equal(found[name], one) for name, one in expected.items())
        assert strides == [one.stride() for one in other.parameters()]
        for _ in range(2):
            with torch.no_grad():
                for one in other.parameters():
                    one.add_(1.0)
            found.apply_(other)
            assert all(not parameter(other, n)[~mask].any() for n, mask in found.items())
            found = Masks({n: mask.contiguous() for n, mask in found.items()})


def test_inputs_that_n_of_m_does_not_divide_are_named() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.Conv2d(8, 4, 3, groups=4))
    masks = prune_(module, pattern=NofM(keep=1, of=4))
    assert set(masks) == {"1.weight"} and masks.sparsity == 0.75
    assert "4 does not divide" in masks.left_alone["0.weight"]
    # Of a grouped convolution the inputs of a group count: 2, not 8.
    assert "(4, 2, 3, 3)" in masks.left_alone["2.weight"]
    with pytest.raises(Unsupported, match="multiple of 4"):
        prune_(nn.Linear(6, 8), pattern=NofM(keep=1, of=4))


def test_grouped_convolutions() -> None:
    module, data = nn.Sequential(nn.Conv2d(8, 6, 1, groups=2, bias=False)), torch.randn(9, 8, 2, 2)
    data[:, 4:] *= 100.0
    weight = parameter(module, "0.weight").clone()
    masks = prune_(copy.deepcopy(module), pattern=NofM(keep=2, of=4), score="wanda", data=[data])
    norms = torch.linalg.vector_norm(data, dim=(0, 2, 3)).reshape(2, 4).repeat_interleave(3, 0)
    order = (weight[..., 0, 0].abs() * norms).argsort(1)
    expected = torch.ones(6, 4, dtype=torch.bool).scatter_(1, order[:, :2], False)
    assert torch.equal(masks["0.weight"][..., 0, 0], expected)
    masks = prune_(module, width=0.5, pattern="units", score="wanda", data=[data], protect=())
    # Those of the first group, whose inputs are a hundredth.
    assert not masks["0.weight"][:3].any() and masks["0.weight"][3:].all()


def test_a_grouped_transposed_convolution_has_no_axis_of_units() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 8, 2, groups=4))
    data = [torch.randn(2, 4, 4, 4)]
    assert "1.weight" in prune_(copy.deepcopy(module), sparsity=0.5)
    for how in ({"pattern": NofM(keep=2, of=4)}, {"sparsity": 0.5, "score": "wanda"}):
        masks = prune_(copy.deepcopy(module), data=data, **how)
        assert masks.left_alone["1.weight"] == "which axis are its units is not known"
    with pytest.raises(Unsupported, match="is not known"):
        prune_(module, pattern=Blocks(2, 2), sparsity=0.5, only="1.*")


def test_masked_heads_leave_the_scale_of_attention_alone() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 4, batch_first=True)
    dense, inputs = copy.deepcopy(layer), torch.randn(2, 5, 8)
    nn.init.normal_(layer.in_proj_bias)
    dense.load_state_dict(layer.state_dict())
    masks = prune_(layer, width=0.5, pattern="heads")
    stay = masks["out_proj.weight"][0]
    with torch.no_grad():
        dense.out_proj.weight[:, ~stay] = 0.0
    torch.testing.assert_close(layer(inputs, inputs, inputs)[0], dense(inputs, inputs, inputs)[0])


def test_what_has_no_values_or_no_plain_ones_is_named() -> None:
    with torch.device("meta"):
        nowhere = nn.Linear(8, 8)
    plain, scattered = nn.Linear(8, 8), nn.Linear(8, 8)
    scattered.weight = nn.Parameter(parameter(scattered).to_sparse())
    module = nn.Sequential(nowhere, nn.LazyLinear(8), scattered, plain)
    why = dict.fromkeys(("0.weight", "1.weight"), "it has no values yet")
    for how in (
        {"sparsity": 0.5},
        {"width": 0.5, "pattern": "units", "protect": ()},
        {"bytes": 0.9},
    ):
        masks = prune_(module, **how)
        assert [name for name in masks if name.endswith("weight")] == ["3.weight"]
        assert why.items() <= masks.left_alone.items()
        assert masks.left_alone["2.weight"] == "its layout is torch.sparse_coo"


def test_frozen_parameters_are_scored_and_stay_frozen() -> None:
    module = mlp(8, 8, 4).requires_grad_(False)
    data = [(torch.randn(9, 8), torch.randint(0, 4, (9,)))]
    free = prune_(mlp(8, 8, 4), sparsity=0.5, score="taylor", data=data, loss=loss)
    masks = prune_(module, sparsity=0.5, score="taylor", data=data, loss=loss)
    assert all(torch.equal(masks[name], one) for name, one in free.items())
    assert not any(one.requires_grad or one.grad is not None for one in module.parameters())


# --- names, copies and checkpoints ---


def test_names_are_the_user_s_in_wrapped_modules() -> None:
    expected = prune_(net(), sparsity=0.5)
    for wrap in (nn.DataParallel, partial(torch.compile, backend="eager")):
        wrapped: Any = wrap(net())
        masks = prune_(wrapped, sparsity=0.5)
        assert all(torch.equal(masks[name], one) for name, one in expected.items())
        masks.apply_(wrapped)
        masks.apply_(net())


def test_names_in_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        masks = prune_(wrapped, sparsity=0.5, score="taylor", data=batches(), loss=loss)
        assert set(masks) == {"0.weight", "4.weight", "9.weight"}
        masks.apply_(wrapped)
        # The module holds on to the group, which waits for its threads when it goes.
        del wrapped
    finally:
        torch.distributed.destroy_process_group()


def test_copies_are_apart() -> None:
    module = mlp(8, 8, 4)
    masks = prune_(module, sparsity=0.5)
    copied, held = copy.deepcopy((module, masks))
    nn.init.ones_(copied.get_parameter("0.weight"))
    held.apply_(copied)
    assert held.counts() == masks.counts()
    held["0.weight"].fill_(False)
    assert masks.counts()["0.weight"][0] < 64 and parameter(module, "0.weight").any()


def test_a_checkpoint_has_a_bit_per_weight_and_loads_as_plain_data() -> None:
    module = mlp(64, 63, 5)
    masks = prune_(module, sparsity=0.7)
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert sum(one["bits"].numel() for one in state.values()) == -(-64 * 63 // 8) + -(-63 * 5 // 8)
    loaded = Masks.from_state_dict(state)
    assert all(torch.equal(loaded[name], one) for name, one in masks.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.1),
    ],
)
def test_no_optimizer_brings_a_weight_back(make: Callable[[Iterable[Any]], Any]) -> None:
    module, data = mlp(8, 8, 4), [(torch.randn(9, 8), torch.randint(0, 4, (9,)))]
    optimizer = make(module.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss(module(data[0][0]), data[0][1]).backward()
        optimizer.step()

    step()
    masks = prune_(module, sparsity=0.5)
    step()
    # Alone it does.
    assert parameter(module, "0.weight")[~masks["0.weight"]].any()
    masks.apply_(module)
    handle = kk.torch.attach(optimizer, module, prune=kk.prune.OneShot(0.6, 1))
    for _ in range(3):
        step()
    assert handle.masks is not None and handle.masks.sparsity == pytest.approx(0.6, abs=0.01)
    for name, mask in handle.masks.items():
        own = module.get_parameter(name)
        held = [own.detach(), *optimizer.state[own].values()]
        held = [one for one in held if isinstance(one, torch.Tensor) and one.shape == mask.shape]
        assert len(held) > 1 and not any(one[~mask].any() for one in held)
