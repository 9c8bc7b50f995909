"""What four ranks do: two-dimensional meshes, several meshes in one network, stages of sharded parts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import karikomi as kk
from depth import turns
from karikomi.torch.distributed.dtensors import own_units
from ranks import bounding, masks, together
from ranks.networks import (
    STRENGTHS,
    Block,
    attached,
    backward,
    clipped,
    gap,
    gradients,
    message,
    numbers,
    pair,
    rank,
)

RULES = {
    "global": kk.clip.ByGlobalNorm(0.5),
    "value": kk.clip.ByValue(0.05),
    "agc": kk.clip.AGC(0.01),
    "zclip": kk.clip.ZClip(warmup=2),
    "chain": kk.clip.Chain(kk.clip.AGC(0.05), kk.clip.ByGlobalNorm(0.5)),
}


@cache
def two_by_two(rows: str = "dp", columns: str = "tp") -> DeviceMesh:
    """Return the ranks as a square: data by rows, tensors by columns.

    One for all scenarios, as a program has one: each mesh connects its rows and columns by groups of its own.
    """
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=(rows, columns))


def fsdp_and_tp() -> tuple[Any, Any]:
    """Return a network that is split for tensors and then for data; and alone."""
    model, alone = pair(lambda: Block().double())
    mesh = two_by_two()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh["dp"])
    # Norm and head are on the data mesh alone: two meshes in one network.
    return fully_shard(model, mesh=mesh["dp"]), alone


def hybrid() -> tuple[Any, Any]:
    """Return a network that is sharded over pairs and replicated over the pairs; and alone."""
    model, alone = pair()
    return fully_shard(model, mesh=two_by_two()), alone


def mixed() -> tuple[Any, Any]:
    """Return a network on a line of four, on a square, on pairs, and plain, by layer; and alone."""
    model, alone = pair(lambda: Block().double())
    square = two_by_two()
    plan = {"down": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, square["tp"], plan)
    fully_shard(model.up, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(model.norm, mesh=square)
    return model, alone


def by_hand(first: Any, second: Any) -> tuple[Any, Any]:
    """Return a network whose weights lie as two placements say, without a forward of its own."""
    model, alone = pair()
    mesh = two_by_two()
    for layer in (model.up, model.down):
        weight = layer.weight.detach()
        layer.weight = nn.Parameter(distribute_tensor(weight, mesh, [first, second]))
    return model, alone


def crossed() -> tuple[Any, Any]:
    """Return a network of a layer on the rows of the square and one on its columns, none on all; and alone."""
    model, alone = pair()
    square = two_by_two()
    for layer, axis in ((model.up, "tp"), (model.down, "dp")):
        layer.weight = nn.Parameter(
            distribute_tensor(layer.weight.detach(), square[axis], [Shard(0)])
        )
    return model, alone


def by_rule(build: Callable[[], tuple[Any, Any]], rule: Any) -> dict[str, Any]:
    """Compare a rule over several steps, the ranks compared as well."""
    return clipped(*build(), rule, strengths=STRENGTHS, check_ranks=True)


def by_placement(first: Any, second: Any, rule: Any) -> dict[str, Any]:
    """Compare one step on weights that lie in any way; gradients are given as they lie."""
    model, alone = by_hand(first, second)
    backward(alone)
    for parameter, given in zip(model.parameters(), alone.parameters(), strict=True):
        gradient = given.grad.clone()
        if hasattr(parameter, "placements"):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    outcome, _ = kk.torch.clip_(model, rule, check_ranks=True)
    expected, _ = kk.torch.clip_(alone, rule)
    return {
        "facts": [
            ["outcome", numbers(outcome), numbers(expected)],
            ["tensors", outcome.tensors(), expected.tensors()],
            ["gradients", gap(gradients(model), gradients(alone)), 0.0],
        ],
        "same": {"numbers": numbers(outcome)},
    }


def units_lie_where_they_are_said_to_lie() -> dict[str, Any]:
    """The rows that a rank holds, for widths that divide evenly and that do not."""
    mesh, wrong = two_by_two(), []
    for rows in range(1, 14):
        for placements in ([Shard(0), Shard(0)], [Shard(0), Replicate()], [Shard(1), Shard(0)]):
            labels = torch.arange(rows).double().reshape(-1, 1).repeat(1, 2)
            whole = distribute_tensor(labels, mesh, placements)
            found = own_units(whole, 0)
            said = list(range(rows))[found]
            if whole.to_local().shape[1] and whole.to_local()[:, 0].tolist() != said:
                wrong.append([rows, str(placements), said])
    for rows in (4, 5, 6, 7, 8, 9, 10):
        layer = nn.Sequential(nn.Linear(2, rows, bias=False))
        with torch.no_grad():
            layer[0].weight.copy_(torch.arange(rows).reshape(-1, 1).repeat(1, 2))
        parallelize_module(layer, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(layer, mesh=mesh["dp"])
        weight = layer[0].weight
        found = own_units(weight, 0)
        said = list(range(rows))[found]
        if weight.to_local()[:, 0].tolist() != said:
            wrong.append([rows, str(weight.placements), said])
    strided = _StridedShard(0, split_factor=2)
    apart = DTensor.from_local(torch.ones(4, 2), mesh, [strided, Replicate()])
    said = message(lambda: own_units(apart, 0))
    return {
        "facts": [
            ["wrong", wrong, []],
            ["not side by side", said.startswith("Unsupported") and "side by side" in said, True],
        ]
    }


def stages_of_shards() -> dict[str, Any]:
    """Two stages, each in fully sharded parts over two ranks, joined by the group across stages."""
    square = two_by_two("pp", "dp")
    place = rank() // 2
    layers = [nn.Linear(6, 5), nn.Linear(5, 3)]
    whole = nn.ModuleDict({str(at): layer for at, layer in enumerate(layers)})
    for at, parameter in enumerate(whole.parameters()):
        nn.init.constant_(parameter, 1.0)
        parameter.grad = torch.full_like(parameter, 0.1 * (at + 1))
    own = nn.Sequential(OrderedDict({str(place): nn.Linear(*((6, 5), (5, 3))[place])}))
    fully_shard(own, mesh=square["dp"])
    expected, facts = dict(whole.named_parameters()), []
    for name, parameter in own.named_parameters():
        parameter.grad = distribute_tensor(
            expected[name].grad.clone(), parameter.device_mesh, parameter.placements
        )
    across = square.get_group("pp")
    rule = kk.clip.Chain(kk.clip.ByGlobalNorm(0.8), kk.clip.ByGlobalNorm(0.5))
    outcome, _ = kk.torch.clip_(own, rule, process_group=across, check_ranks=True)
    alone, _ = kk.torch.clip_(whole, rule)
    facts.append(["outcome", numbers(outcome), numbers(alone)])
    mine = gradients(own)
    facts.append(["gradients", gap(mine, {n: expected[n].grad for n in mine}), 0.0])
    over_all = message(
        lambda: kk.torch.clip_(own, rule, process_group={f"{place}.*": square.get_group("dp")})
    )
    facts.append(["counted by the mesh", over_all.startswith("UnknownName"), True])
    return {"facts": facts}


def replicated_experts() -> dict[str, Any]:
    """Experts differ along rows of the square and are replicas along its columns; the rest is FSDP."""
    square = two_by_two("replica", "expert")
    own, facts = rank() % 2, []
    names = ["shared.weight", "experts.0.weight", "experts.1.weight"]
    grown = {name: torch.full((6, 5), 0.1 * (at + 1)) for at, name in enumerate(names)}
    alone = [(name, nn.Parameter(torch.zeros(6, 5))) for name in names]
    for name, parameter in alone:
        parameter.grad = grown[name].clone()
    line = init_device_mesh("cpu", (4,))
    shared = nn.Parameter(distribute_tensor(torch.zeros(6, 5), line, [Shard(0)]))
    shared.grad = distribute_tensor(grown[names[0]], line, [Shard(0)])
    expert = nn.Parameter(torch.zeros(6, 5))
    expert.grad = grown[names[1 + own]].clone()
    held = [(names[0], shared), (names[1 + own], expert)]
    arguments = {"process_group": {"experts.*": square.get_group("expert")}, "check_ranks": True}
    outcome, _ = kk.torch.clip_(held, kk.clip.ByGlobalNorm(0.5), **arguments)
    expected, _ = kk.torch.clip_(alone, kk.clip.ByGlobalNorm(0.5))
    facts.append(["outcome", numbers(outcome), numbers(expected)])
    facts.append(["expert", float(expert.grad[0, 0]), float(alone[1 + own][1].grad[0, 0])])
    return {"facts": facts}


def trap() -> dict[str, Any]:
    """torch's own clip fails on two meshes (pytorch#180346); ours does not, and on one they agree."""
    model, alone = fsdp_and_tp()
    backward(model)
    backward(alone)
    torchs = message(lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    outcome, _ = kk.torch.clip_(model, RULES["global"])
    expected = float(nn.utils.clip_grad_norm_(alone.parameters(), 0.5))
    single, _ = pair()
    fully_shard(single)
    backward(single)
    lazy: Any = nn.utils.get_total_norm([parameter.grad for parameter in single.parameters()])
    ours, _ = kk.torch.clip_(single, kk.clip.ByGlobalNorm(1e9))
    return {
        "facts": [
            ["torch on two meshes", torchs.startswith(("RuntimeError", "ValueError")), True],
            ["ours on two meshes", outcome.pre, expected],
            ["both on one mesh", ours.pre, float(lazy.full_tensor())],
        ]
    }


def sequence_parallel() -> dict[str, Any]:
    """A replicated norm whose gradient is a pending sum over the ranks of a sequence."""
    model, alone = pair(lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1)).double())
    mesh = init_device_mesh("cpu", (4,))
    parallelize_module(model, mesh, {"0": SequenceParallel(sequence_dim=0, use_local_output=False)})
    torch.manual_seed(2)
    inputs = torch.randn(8, 6, dtype=torch.float64)
    alone(inputs).square().sum().backward()
    split = model[0](inputs.chunk(4)[rank()]).redistribute(placements=[Replicate()]).to_local()
    model[1](split).square().sum().backward()
    pending = [str(p) for p in model[0].weight.grad.placements]
    outcome, _ = kk.torch.clip_(model, RULES["global"], check_ranks=True)
    expected, _ = kk.torch.clip_(alone, RULES["global"])
    return {
        "facts": [
            ["outcome", numbers(outcome), numbers(expected)],
            ["gradients", gap(gradients(model), gradients(alone)), 0.0],
        ],
        "same": {"placements": pending},
    }


def attach(build: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    """Train for some steps."""
    adam = partial(torch.optim.AdamW, lr=1e-2, foreach=False)
    return attached(*build(), adam, rules={"clip": RULES["chain"]}, check_ranks=True)


def reductions() -> dict[str, Any]:
    """One reduction for each set of ranks that share parameters, whatever meshes they have."""
    counts = []
    for build in (fsdp_and_tp, hybrid, mixed):
        model, _ = build()
        backward(model)
        calls, real = [], dist.all_reduce

        def counted(*given: Any, calls: list[Any] = calls, real: Any = real, **more: Any) -> Any:
            calls.append(given)
            return real(*given, **more)

        dist.all_reduce = counted
        kk.torch.clip_(model, RULES["global"])
        dist.all_reduce = real
        counts.append(len(calls))
    # The square, and the rows of it; the square; the square (and the line of four), and columns.
    return {"facts": [["reductions", counts, [2, 1, 2]]]}


PLACEMENTS = {
    "rows twice": (Shard(0), Shard(0)),
    "rows and columns": (Shard(0), Shard(1)),
    "columns and copies": (Shard(1), Replicate()),
    "copies": (Replicate(), Replicate()),
}
Scenarios = dict[str, Callable[[], dict[str, Any]]]
BUILDS = {"fsdp x tp": fsdp_and_tp, "hybrid": hybrid, "mixed": mixed}
LAYOUTS = BUILDS | {how: partial(by_hand, *where) for how, where in PLACEMENTS.items()}


def some(scenarios: Scenarios, most: int, *key: str) -> Scenarios:
    """Return `most` of the scenarios, other ones for another key; all in a full run."""
    return {name: scenarios[name] for name in turns(list(scenarios), *key, most=most)}


def by_layout(family: Callable[[str, Any], Scenarios], most: int) -> Scenarios:
    """Return `most` of a family's scenarios for every network, and one for every pair of placements."""
    return {
        name: scenario
        for how, build in LAYOUTS.items()
        for name, scenario in some(family(how, build), most if how in BUILDS else 1, how).items()
    }


def rules_of(how: str, build: Any) -> Scenarios:
    """Return the scenarios of the clip rules."""
    return {f"{how} {key}": partial(by_rule, build, rule) for key, rule in RULES.items()}


def rules_where(how: str) -> Scenarios:
    """Return the scenarios of weights that lie as placements say."""
    return {
        f"{how}, {key}": partial(by_placement, *PLACEMENTS[how], RULES[key])
        for key in ("agc", "value", "global")
    }


SCENARIOS: Scenarios = {
    **{n: s for how in BUILDS for n, s in some(rules_of(how, BUILDS[how]), 3, how).items()},
    **{n: s for how in PLACEMENTS for n, s in some(rules_where(how), 1, how).items()},
    "own units": units_lie_where_they_are_said_to_lie,
    "stages of shards": stages_of_shards,
    "replicated experts": replicated_experts,
    "trap": trap,
    "sequence parallel": sequence_parallel,
    "attach fsdp x tp": partial(attach, fsdp_and_tp),
    "attach hybrid": partial(attach, hybrid),
    "reductions": reductions,
    **by_layout(masks.scenarios, 2),
    **by_layout(bounding.scenarios, 2),
    **some(bounding.scenarios("uneven", bounding.uneven), 5, "uneven parts"),
    # The norm lies on the columns of the square alone: two of the ranks see it only in passing.
    "bound nan of a column": partial(
        bounding.nan_on_one_rank, fsdp_and_tp, "head.weight", at=0, most=4
    ),
    "bound in training": partial(
        *(bounding.in_training, fsdp_and_tp),
        *(partial(torch.optim.AdamW, lr=1e-2, foreach=False), "clamp", "max norm"),
    ),
    **{
        f"bound nan in a cross, {name} of {at}": partial(
            bounding.nan_on_one_rank, crossed, f"{name}.weight", at=at, most=4
        )
        for name, at in (("up", 0), ("up", 3), ("down", 1), ("down", 2), ("head", 3))
    },
    **some(
        {
            f"bound crossed, {key}": partial(bounding.bounded, crossed, rule)
            for key, rule in bounding.RULES.items()
        },
        2,
        "crossed",
    ),
    "bound apart": bounding.apart,
    "together fsdp x tp": partial(together.resumed, fsdp_and_tp),
    **some(together.scenarios("fsdp x tp", fsdp_and_tp), 3, "fsdp x tp"),
    **some(
        {
            f"penalty {how}, {key}": partial(together.penalised, build, rule, beside=True)
            for how, build in (("hybrid", hybrid), ("mixed", mixed))
            for key, rule in together.PENALTIES.items()
        },
        3,
        "penalty",
    ),
    "bound reductions": partial(
        bounding.reductions, fsdp_and_tp, {"max norm": 2, "clamp": 4, "clamp out of reach": 2}
    ),
}
