"""Kinds of modules and outputs: each is shrunk, or refused with the operator, its place and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import karikomi as kk
from karikomi.errors import Unsupported
from shrink_networks import Forward

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


class Here(Forward):
    """Its forward is in this file, so that this is the place of its operators."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.written(self, *inputs)


def written(forward: Callable[..., Any], **more: Any) -> Here:
    return Here(forward, a=nn.Linear(6, 8), o=nn.Linear(8, 5), **more)


# Outputs.


class Pair(NamedTuple):
    logits: torch.Tensor
    more: list[torch.Tensor]


@dataclass
class Result:
    logits: torch.Tensor
    more: torch.Tensor | None = None


def test_named_tuples_stay_named_tuples() -> None:
    small, report = kk.torch.shrink(
        written(lambda m, x: Pair(m.o(m.a(x).relu()), [x])), X, width=0.5
    )
    assert report.widths_after == {"a": 4, "o": 5} and report.max_difference <= 1e-5
    assert isinstance(small(X), Pair) and small(X).logits.shape == (3, 5)


def test_a_model_output_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.BertConfig(**small, max_position_embeddings=16)
    module = transformers.BertForSequenceClassification(config).eval()
    tokens = {
        "input_ids": torch.arange(12).reshape(2, 6),
        "attention_mask": torch.ones(2, 6).long(),
    }
    other, report = kk.torch.shrink(module, tokens, width=0.5, only="*.intermediate.*")
    assert report.form == "module" and report.max_difference <= 1e-5
    assert report.widths_after["bert.encoder.layer.0.intermediate.dense"] == 16
    with torch.no_grad():
        output = other(**tokens)
    assert type(output) is type(module(**tokens)) and output.logits.shape == (2, 2)
    graph, report = kk.torch.shrink(module, tokens, width=0.5)
    assert report.parameters_after < report.parameters_before
    assert graph(**tokens).logits.shape == (2, 2)


def test_a_class_of_outputs_that_torch_does_not_know_is_refused_with_the_way_round() -> None:
    with pytest.raises(
        Unsupported, match="torch.export does not take the module.*Result"
    ) as caught:
        kk.torch.shrink(written(lambda m, x: Result(m.o(m.a(x).relu()))), X, width=0.5)
    assert "register_dataclass" in str(caught.value)


# Wrappers.


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_sharded_modules_are_refused_with_the_way_round(world: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    sharded = mlp()
    fully_shard(sharded[0])
    with pytest.raises(Unsupported, match=r"0\.weight: the tensor is sharded.*load the full state"):
        kk.torch.shrink(sharded, X, width=0.5)
    cpu = torch.device("cpu")
    for original in (False, True):
        flat = FullyShardedDataParallel(mlp(), device_id=cpu, use_orig_params=original)
        inside = nn.Sequential(FullyShardedDataParallel(mlp(), device_id=cpu), nn.Linear(5, 2))
        for module, place in ((flat, "torch.shrink"), (inside, "torch.shrink: 0")):
            with pytest.raises(Unsupported, match=f"{place}.*FullyShardedDataParallel.*full state"):
                kk.torch.shrink(module, X, width=0.5)


@pytest.mark.filterwarnings("ignore")
def test_wrappers_are_taken_off_inside_too(world: None) -> None:
    plain, _ = kk.torch.shrink(mlp(), X, width=0.5)
    part = torch.compile(mlp(), backend="eager")
    small, report = kk.torch.shrink(nn.Sequential(part, nn.Linear(5, 2)), X, width=0.5)
    assert report.parameters_after < report.parameters_before
    assert small(X).shape == (3, 2) and plain(X).shape == (3, 5)
    parallel = nn.parallel.DistributedDataParallel(mlp())
    small, report = kk.torch.shrink(parallel, X, width=0.5)
    assert type(small) is nn.Sequential and report.widths_after == {"0": 4, "2": 5}


# Quantized, empty, frozen.


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_of_torch_are_refused() -> None:
    coded = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, torch.qint8)
    with pytest.raises(Unsupported, match="weights are quantized.*shrink before"):
        kk.torch.shrink(coded, X, width=0.5)


def test_parts_on_the_meta_device_are_refused_by_name() -> None:
    module = mlp()
    module[2] = nn.Linear(8, 5, device="meta")
    with pytest.raises(
        Unsupported, match=r"2\.weight: a tensor on the meta device.*fill the module"
    ):
        kk.torch.shrink(module, X, width=0.5)


@pytest.mark.parametrize("training", [False, True])
def test_frozen_modules_shrink_and_stay_frozen(training: bool) -> None:
    module = mlp().requires_grad_(False).train(training)
    small, report = kk.torch.shrink(module, X, width=0.5)
    assert report.widths_after == {"0": 4, "2": 5} and small.training is training
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_a_tensor_without_entries_is_no_obstacle() -> None:
    module = written(
        lambda m, x: m.o(torch.cat([m.a(x), m.none.expand(3, 0)], 1).relu()), none=torch.zeros(0)
    )
    small, report = kk.torch.shrink(module, X, width=0.5)
    assert report.widths_after == {"a": 4, "o": 5} and small(X).shape == (3, 5)


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    module = mlp()
    with torch.no_grad():
        module[0].weight[1, 2] = float("nan")
    with pytest.raises(kk.errors.KarikomiError, match=r"0\.weight"):
        kk.torch.shrink(module, X, width=0.5)


class Scaled(torch.Tensor):
    """A tensor that is a class of its own."""


def test_parameters_that_torch_cannot_copy_are_refused() -> None:
    module = mlp()
    own = module[0].weight.detach().clone().as_subclass(Scaled)
    module[0].weight = nn.Parameter(own)
    with pytest.raises(Unsupported, match="cannot be copied.*__deepcopy__"):
        kk.torch.shrink(module, X, width=0.5)


# Shared modules and buffers.


def test_a_module_at_two_places_stays_one_module() -> None:
    block = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    module = nn.ModuleDict({"first": block, "again": block})
    net = written(lambda m, x: m.o(m.b.again(m.b.first(m.a(x)))), b=module)
    net.b = module
    small, report = kk.torch.shrink(net, X, width=0.5)
    assert small.b["first"] is small.b["again"]
    assert report.parameters_after == 4 * 7 + 6 * 5 + 4 * 7 + 5 * 5
    assert small.b["first"][0].weight.shape == (6, 4)


class Averaging(nn.Module):
    """A running mean of its own, written in the forward: by copying, by assignment, or by index."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.o, self.way = nn.Linear(6, 8), nn.Linear(8, 5), way
        self.register_buffer("mean", torch.rand(8))
        self.register_buffer("seen", torch.zeros(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        if self.way == "copied":
            self.mean.copy_(self.mean * 0.9 + h.mean(0) * 0.1)
        elif self.way == "assigned":
            self.mean = self.mean * 0.9 + h.mean(0) * 0.1
        else:
            self.seen[1] = h.mean(0)
        return self.o(F.relu(h - self.mean + self.seen[1]))


@pytest.mark.parametrize("way", ["copied", "assigned", "indexed"])
def test_buffers_that_a_forward_writes_get_smaller_too(way: str) -> None:
    module = Averaging(way).eval()
    small, report = kk.torch.shrink(module, X, width=0.5)
    assert report.widths_after == {"a": 4, "o": 5} and report.max_difference <= 1e-5
    kept = report.kept["mean"][0]
    assert torch.equal(small.mean, module.mean[kept]) and torch.equal(small.seen, torch.zeros(4, 4))
    small(X)
    module(X)
    torch.testing.assert_close(small.mean, module.mean[kept])
    torch.testing.assert_close(small.seen, module.seen[:, kept])


# Control flow and sizes that depend on the data.


def _branches(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.o(torch.cond(x.sum() > 0, lambda y: m.b(y).relu(), lambda y: m.c(y), (m.a(x),)))


# What torch says itself when a branch runs.
@pytest.mark.filterwarnings("ignore")
def test_what_reaches_a_branch_stays_and_the_rest_shrinks() -> None:
    net = written(_branches, b=nn.Linear(8, 8), c=nn.Linear(8, 8), d=nn.Linear(5, 12))
    net.p = nn.Linear(12, 4)
    net.written = lambda m, x: m.p(m.d(_branches(m, x)).relu())
    small, report = kk.torch.shrink(net, X, width=0.5)
    assert report.widths_after == {"a": 8, "o": 3, "b": 8, "c": 8, "d": 6, "p": 4}
    assert f"cond at {__file__}" in report.frozen["a"]
    assert small(X).shape == (3, 4)


def test_branches_alone_are_refused_with_operator_and_place() -> None:
    net = written(_branches, b=nn.Linear(8, 8), c=nn.Linear(8, 8))
    with pytest.raises(Unsupported, match="no unit can go") as caught:
        kk.torch.shrink(net, X, width=0.5)
    assert f"cond at {__file__}:" in str(caught.value)


@pytest.mark.parametrize(
    ("forward", "operator"),
    [
        (lambda m, x: m.o(m.a(x).masked_select(x[:, :1] > 0).view(-1, 8)), "masked_select"),
        (lambda m, x: m.o(m.a(x).unique(dim=0)), "unique_dim"),
        (lambda m, x: m.o(m.a(x).repeat_interleave(x[:, 0].long().clamp(0, 2), 0)), "repeat_interleave"),
    ],
)  # fmt: skip
def test_sizes_that_depend_on_the_data_are_refused(
    forward: Callable[..., Any], operator: str
) -> None:
    with pytest.raises(Unsupported) as caught:
        kk.torch.shrink(written(forward), X.abs(), width=0.5)
    message = str(caught.value)
    assert "depends on the data" in message or "data-dependent" in message.lower()
    assert operator in message and f"{__file__}:" in message


# Sums that count what went.


SUMS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "a sum of what is zero": (lambda m, x: m.o(m.a(x).relu()).sum(1) + m.a(x).sum(1), []),
    "a sum of exponentials": (lambda m, x: m.o(m.a(x)) / m.a(x).exp().sum(1, keepdim=True), ["sum"]),
    "a product of two": (lambda m, x: (m.a(x).sigmoid() * m.o(m.a(x)).mean()) @ m.a(x).exp().T, ["matmul"]),
    "a product with zeros": (lambda m, x: m.a(x).sigmoid() @ m.a(x).relu().T, []),
    "letters": (lambda m, x: torch.einsum("ij,kj->ik", m.a(x).exp(), m.a(x).cos()), ["einsum"]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SUMS))
def test_sums_that_lose_entries_are_named_where_zeros_would_count(name: str) -> None:
    forward, named = SUMS[name]
    _, report = kk.torch.shrink(written(forward), X, width=0.5, only="a.*")
    assert report.widths_after["a"] == 4 and report.max_difference <= 1e-5
    assert [place.split()[0] for place in report.statistics] == named
    assert all(f" at {__file__}:" in place for place in report.statistics)
    # Nothing goes, nothing changes.
    assert kk.torch.shrink(written(forward), X, width=1.0)[1].statistics == []
