"""What two ranks do: sharded, tensor-parallel, replicated and different parameters, spoiled gradients."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import karikomi as kk
from depth import turns
from ranks import bounding, masks, recovering, together
from ranks.networks import (
    STRENGTHS,
    Block,
    attached,
    backward,
    clipped,
    compared,
    gap,
    gradients,
    message,
    numbers,
    pair,
    plain,
    rank,
    weights,
)

RULES = {
    "global": kk.clip.ByGlobalNorm(0.5),
    "global, 1-norm": kk.clip.ByGlobalNorm(2.0, norm=1),
    "global, 3-norm": kk.clip.ByGlobalNorm(0.4, norm=3),
    "largest entry": kk.clip.ByNorm(0.1, norm="inf"),
    "3-norm of units": kk.clip.ByNorm(0.1, norm=3, per="unit"),
    "norm": kk.clip.ByNorm(0.3),
    "value": kk.clip.ByValue(0.05),
    "agc": kk.clip.AGC(0.01),
    "zclip": kk.clip.ZClip(warmup=2),
    "autoclip": kk.clip.AutoClip(50),
    "adagc": kk.clip.AdaGC(1.05, warmup=2),
    "chain": kk.clip.Chain(kk.clip.AGC(0.05), kk.clip.ByGlobalNorm(0.5)),
    "remeasured": kk.clip.Chain(kk.clip.ByValue(0.2), kk.clip.ByGlobalNorm(0.5)),
    "groups": kk.clip.Groups({"head.*": kk.clip.ByValue(0.1)}, default=kk.clip.ByGlobalNorm(0.5)),
    "scheduled": kk.clip.ByGlobalNorm(kk.schedule.Linear(2.0, 0.5, steps=(0, 4))),
}


def fsdp() -> tuple[Any, Any]:
    """Return a network in fully sharded parts, and alone."""
    model, alone = pair()
    for layer in (model.up, model.down):
        fully_shard(layer)
    return fully_shard(model), alone


def fsdp_normed() -> tuple[Any, Any]:
    """Return a network with a batch norm in fully sharded parts, and alone."""
    model, alone = pair(together.Normed)
    return fully_shard(model), alone


def tensor_parallel() -> tuple[Any, Any]:
    """Return a network whose feed-forward pair is split, norm and head plain replicas; and alone."""
    model, alone = pair(lambda: Block().double())
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model, alone


def by_rule(build: Any, rule: Any) -> dict[str, Any]:
    """Compare a rule over several steps."""
    return clipped(*build(), rule, strengths=STRENGTHS)


def spam() -> dict[str, Any]:
    """Second moments lie where the gradients lie."""
    return clipped(*fsdp(), kk.clip.SPAM(50.0), strengths=(1.0, 1.0, 30.0, 1.0))


def replicas() -> dict[str, Any]:
    """Replicated gradients (DDP) need no sharding."""
    model, alone = pair()
    wrapped = nn.parallel.DistributedDataParallel(model)
    backward(wrapped)
    backward(alone)
    outcome, _ = kk.torch.clip_(wrapped, RULES["global"], check_ranks=True)
    expected, _ = kk.torch.clip_(alone, RULES["global"])
    return {"facts": compared(outcome, expected, model, alone)}


def attach_fused() -> dict[str, Any]:
    """A fused optimizer of sharded parameters takes no folded factor; the handle multiplies."""
    adam = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    return attached(*fsdp(), adam, rules={"clip": RULES["global"]})


def attach_plain() -> dict[str, Any]:
    """Tensor parallel beside plain replicas, an adaptive rule, SGD; the ranks are compared."""
    sgd = partial(torch.optim.SGD, lr=1e-2)
    rules = {"clip": kk.clip.Chain(kk.clip.AutoClip(50), kk.clip.ByGlobalNorm(0.5))}
    return attached(*tensor_parallel(), sgd, rules=rules, check_ranks=True)


def spikes(build: Any) -> dict[str, Any]:
    """The ranks skip the same step, and take the next one."""
    rule = kk.clip.SkipSpikes(2.0, window=3, warmup=2, patience=1)
    strengths = (1.0, 0.8, 1.2, 30.0, 30.0, 1.0)
    sgd = partial(torch.optim.SGD, lr=1e-4)
    return attached(*build(), sgd, strengths=strengths, rules={"clip": rule})


def two_optimizers() -> dict[str, Any]:
    """The parameters of two optimizers of one handle are split, and have one joint norm."""
    model, alone = fsdp()
    optimizers = []
    for one in (model, alone):
        parts = [[*one.up.parameters()], [p for n, p in one.named_parameters() if "up." not in n]]
        optimizers.append([torch.optim.SGD(part, lr=1e-2, momentum=0.5) for part in parts])
    rule = kk.clip.AutoClip(50)
    handles = [
        kk.torch.attach(own, one, clip=rule)
        for own, one in zip(optimizers, (model, alone), strict=True)
    ]
    facts: list[list[Any]] = []
    for strength in STRENGTHS:
        for one, own in zip((model, alone), optimizers, strict=True):
            backward(one, strength)
            for optimizer in own:
                optimizer.step()
        facts.append(["outcome", *[numbers(handle.last) for handle in handles]])
        facts.append(["weights", gap(weights(model), weights(alone)), 0.0])
    facts.append(["steps", *[handle.steps for handle in handles]])
    return {"facts": facts}


def attach_update() -> dict[str, Any]:
    """Updates of sharded weights."""
    sgd = partial(torch.optim.SGD, lr=1e-2)
    return attached(*fsdp(), sgd, rules={"update": kk.clip.BlockRMS(0.01)})


def nan_on_one_rank(nonfinite: str) -> dict[str, Any]:
    """One NaN in the part of rank 1: both ranks do the same and name the same tensor."""

    def spoil(model: Any, step: int) -> None:
        gradient = model.up.weight.grad
        if step != 2 or gradient is None:
            return
        if not isinstance(gradient, DTensor):
            gradient[-1, 0] = torch.nan
        elif rank() == 1:
            gradient.to_local()[-1, 0] = torch.nan

    sgd = partial(torch.optim.SGD, lr=1e-2)
    rules = {"clip": kk.clip.ZClip(warmup=2), "nonfinite": nonfinite}
    return attached(*fsdp(), sgd, before=spoil, rules=rules)


def nan_raises() -> dict[str, Any]:
    """The policy to raise raises on both ranks."""
    model, _ = fsdp()
    backward(model)
    if rank() == 0:
        model.down.bias.grad.to_local()[0] = torch.inf
    said = message(lambda: kk.torch.clip_(model, kk.clip.AGC(0.01), nonfinite="raise"))
    return {"facts": [["named", "down.bias" in said and said.startswith("NonFinite"), True]]}


def nan_by_value() -> dict[str, Any]:
    """A maximum over ranks loses no NaN."""
    model, _ = fsdp()
    backward(model)
    if rank() == 0:
        model.down.weight.grad.to_local()[0, 0] = torch.nan
    outcome, _ = kk.torch.clip_(model, kk.clip.ByValue(1.0))
    gone = all(parameter.grad is None for parameter in model.parameters())
    return {
        "facts": [
            ["action", [outcome.action, outcome.nonfinite], ["skipped", ["down.weight"]]],
            ["gradients gone", gone, True],
        ]
    }


def none_on_one_rank() -> dict[str, Any]:
    """Where one rank has no gradient for its part, that part counts as zero, on all ranks."""
    model, alone = fsdp()
    backward(model)
    backward(alone)
    if rank() == 1:
        model.up.weight.grad = None
    alone.up.weight.grad[5:] = 0.0
    outcome, state = kk.torch.clip_(model, kk.clip.AdaGC(1.05))
    expected, expected_state = kk.torch.clip_(alone, kk.clip.AdaGC(1.05))
    facts = [
        ["outcome", numbers(outcome), numbers(expected)],
        ["state", plain(state), plain(expected_state)],
    ]
    return {"facts": facts, "same": {"state": plain(state)}}


def pending_sum() -> dict[str, Any]:
    """A gradient that is still a sum to be made is made before it is measured."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    weight.grad = DTensor.from_local(
        torch.tensor([1.0, 2.0, 2.0]) * (rank() + 1), mesh, [Partial()]
    )
    outcome, _ = kk.torch.clip_([weight], kk.clip.ByGlobalNorm(3.0), check_ranks=True)
    kept = weight.grad.to_local().tolist()
    return {"facts": [["norm", outcome.pre, 9.0], ["gradient", kept, [1.0, 2.0, 2.0]]]}


def huge_and_tiny() -> dict[str, Any]:
    """Squares of float64 norms neither overflow nor vanish where norms are far from 1."""
    mesh = init_device_mesh("cpu", (2,))
    facts = []
    for size in (1e-60, 1e30, 1e200, 1e243):
        weight = nn.Parameter(
            distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, [Shard(0)])
        )
        weight.grad = distribute_tensor(
            torch.full((4,), size, dtype=torch.float64), mesh, [Shard(0)]
        )
        outcome, _ = kk.torch.clip_([weight], kk.clip.ByGlobalNorm(size))
        facts.append([f"norm {size}", outcome.pre / size, 2.0])
        facts.append([f"gradient {size}", float(weight.grad.to_local()[0]) / size, 0.5])
    return {"facts": facts}


class Experts(nn.Module):
    """A shared layer and some experts, each of its own."""

    def __init__(self, own: tuple[int, ...]) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.experts = nn.ModuleDict({str(one): nn.Linear(6, 6) for one in own})


def given(model: Any, own: tuple[int, ...]) -> None:
    """Give gradients that depend on the expert and on nothing else."""
    for name, parameter in model.named_parameters():
        number = float(name.split(".")[1]) if name.startswith("experts") else 0.5
        nn.init.constant_(parameter, 1.0 + number)
        parameter.grad = torch.full_like(parameter, 0.1 * (number + 1.0))


def experts() -> tuple[Any, Any, dict[str, Any]]:
    """Return what this rank has of a network with two experts per rank, all of it, and the group."""
    own = (2 * rank(), 2 * rank() + 1)
    model, alone = Experts(own), Experts((0, 1, 2, 3))
    given(model, own)
    given(alone, (0, 1, 2, 3))
    return model, alone, {"process_group": {"experts.*": dist.group.WORLD}}


def by_experts(rule: Any, *, joint: int = 5) -> dict[str, Any]:
    """Each rank's experts are different parameters, the shared layer is one.

    `joint`: how much of the outcome is that of all ranks: nothing where the last rule acts on single
    tensors, which each rank reports of its own.
    """
    model, alone, arguments = experts()
    outcome, _ = kk.torch.clip_(model, rule, check_ranks=True, **arguments)
    expected, _ = kk.torch.clip_(alone, rule)
    own = {
        name: gradient for name, gradient in gradients(alone).items() if name in gradients(model)
    }
    facts = [["gradients", gap(gradients(model), own), 0.0]]
    facts.append(["outcome", numbers(outcome)[:joint], numbers(expected)[:joint]])
    return {"facts": facts}


def experts_chain() -> dict[str, Any]:
    """A joint norm after a rule on single tensors is measured again: others' tensors were clipped too."""
    model, alone, arguments = experts()
    rule = kk.clip.Chain(kk.clip.ByNorm(0.7), kk.clip.ByGlobalNorm(0.6))
    outcome, _ = kk.torch.clip_(model, rule, check_ranks=True, **arguments)
    last = dataclasses.replace(outcome, earlier=())  # the stage of the joint norm, by itself
    between, _ = kk.torch.clip_(alone, kk.clip.ByNorm(0.7))
    expected, _ = kk.torch.clip_(alone, kk.clip.ByGlobalNorm(0.6))
    own = {
        name: gradient for name, gradient in gradients(alone).items() if name in gradients(model)
    }
    return {
        "facts": [
            ["gradients", gap(gradients(model), own), 0.0],
            ["before", last.pre, between.post],
            ["outcome", numbers(last), numbers(expected)],
        ]
    }


def experts_update() -> dict[str, Any]:
    """Rules that need sizes get those of the other ranks."""
    model, alone, arguments = experts()
    kept = []
    for one, more in ((model, arguments), (alone, {})):
        sgd = torch.optim.SGD(one.parameters(), lr=1.0)
        handle = kk.torch.attach(sgd, one, update=kk.clip.BlockRMS(0.15), **more)
        sgd.step()
        kept.append({name: parameter.detach() for name, parameter in one.named_parameters()})
    own = {name: parameter for name, parameter in kept[1].items() if name in kept[0]}
    return {"facts": [["weights", gap(kept[0], own), 0.0], ["joint", handle.last.factor, 1.0]]}


def experts_nan() -> dict[str, Any]:
    """A NaN in an expert of rank 1: rank 0 skips too, and says where it was."""
    found = {}
    for key, rule in (("norm", kk.clip.ByNorm(0.1)), ("global", RULES["global"])):
        model, _, arguments = experts()
        if rank() == 1:
            model.experts["3"].weight.grad[0, 0] = torch.nan
        outcome, _ = kk.torch.clip_(model, rule, **arguments)
        found[key] = [outcome.action, outcome.nonfinite]
    named = "experts.3.weight" if rank() == 1 else "(other ranks of experts.*)"
    return {"facts": [[key, value, ["skipped", [named]]] for key, value in found.items()]}


def experts_learn() -> dict[str, Any]:
    """A rule that learns has the same state on all ranks, and goes on from it."""
    states, alone_state = None, None
    for strength in STRENGTHS:
        model, alone, arguments = experts()
        for parameter in (*model.parameters(), *alone.parameters()):
            parameter.grad *= strength
        outcome, states = kk.torch.clip_(model, kk.clip.ZClip(warmup=2), states, **arguments)
        expected, alone_state = kk.torch.clip_(alone, kk.clip.ZClip(warmup=2), alone_state)
    facts = [
        ["state", states, alone_state],
        ["outcome", numbers(outcome), numbers(expected)],
    ]
    return {"facts": facts}


def experts_refused() -> dict[str, Any]:
    """Of other ranks only one number is known, so a group of rules takes all or nothing of it."""
    model, _, arguments = experts()
    rule = kk.clip.Groups(
        {"*.weight": kk.clip.ByGlobalNorm(0.1)}, default=kk.clip.ByGlobalNorm(0.2)
    )
    said = message(lambda: kk.torch.clip_(model, rule, **arguments))
    wrong = message(
        lambda: kk.torch.clip_(model, rule, process_group={"expert.*": dist.group.WORLD})
    )
    none = message(lambda: kk.torch.clip_(model, rule, process_group=7))
    return {
        "facts": [
            ["partial", said.startswith("Unsupported") and "same globs" in said, True],
            ["unknown", wrong.startswith("UnknownName") and "expert.*" in wrong, True],
            ["no group", none.startswith("InvalidArgument") and "int" in none, True],
        ]
    }


def pipeline() -> dict[str, Any]:
    """Each rank has a stage of its own; one group says so."""
    stages = [nn.Linear(6, 6), nn.Linear(6, 3)]
    for place, stage in enumerate(stages):
        for parameter in stage.parameters():
            parameter.grad = torch.full_like(parameter, 0.2 + place)
    alone = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)])
    for place, stage in enumerate(alone):
        for parameter in stage.parameters():
            parameter.grad = torch.full_like(parameter, 0.2 + place)
    facts = []
    own = nn.ModuleList([stages[0]]) if rank() == 0 else nn.ModuleDict({"1": stages[1]})
    sizes = kk.clip.ByGlobalNorm(1.0)
    outcome, _ = kk.torch.clip_(own, sizes, process_group=dist.group.WORLD, check_ranks=True)
    expected, _ = kk.torch.clip_(alone, sizes)
    kept = gradients(alone)
    facts.append(["outcome", numbers(outcome), numbers(expected)])
    mine = gradients(own)
    facts.append(["gradients", gap(mine, {name: kept[name] for name in mine}), 0.0])
    return {"facts": facts}


def different_decisions() -> dict[str, Any]:
    """Ranks with different limits are found out before anything changes."""
    model, _ = fsdp()
    backward(model)
    before = gradients(model)
    rule = kk.clip.ByGlobalNorm(0.5 if rank() == 0 else 0.25)
    said = message(lambda: kk.torch.clip_(model, rule, check_ranks=True))
    replica, _ = pair()
    backward(replica)
    if rank() == 1:
        replica.head.bias.grad[0] = torch.nan
    skipped = message(lambda: kk.torch.clip_(replica, kk.clip.ByNorm(1.0), check_ranks=True))
    facts = [
        ["limit", said.startswith("Unsupported") and "to 0.25" in said and "to 0.5" in said, True],
        ["unchanged", gap(gradients(model), before), 0.0],
        ["skip", skipped.startswith("Unsupported") and "rank 1 skips" in skipped, True],
    ]
    return {"facts": facts, "same": {"said": said, "skipped": skipped}}


def in_place() -> dict[str, Any]:
    """What is multiplied is the DTensor's own data."""
    model, _ = fsdp()
    backward(model)
    gradient = model.up.weight.grad
    before = whole_sum(gradient)
    kk.torch.clip_(model, kk.clip.ByNorm(1e-3))
    after = whole_sum(model.up.weight.grad)
    return {
        "facts": [
            ["same tensor", model.up.weight.grad is gradient, True],
            ["changed", abs(after) < abs(before), True],
        ]
    }


def whole_sum(tensor: DTensor) -> float:
    """Return the sum of the magnitudes, as torch makes it."""
    return float(tensor.full_tensor().abs().sum())


SPLIT = {"fsdp": fsdp, "tp": tensor_parallel}
SCENARIOS = {
    **{f"fsdp {key}": partial(by_rule, fsdp, rule) for key, rule in RULES.items()},
    **{f"tp {key}": partial(by_rule, tensor_parallel, rule) for key, rule in RULES.items()},
    "fsdp spam": spam,
    "replicas": replicas,
    "attach fused": attach_fused,
    "attach tensor parallel": attach_plain,
    "attach update": attach_update,
    "fsdp two optimizers": two_optimizers,
    **{f"{key} spikes": partial(spikes, build) for key, build in SPLIT.items()},
    **{f"nan {one}": partial(nan_on_one_rank, one) for one in ("skip", "zero")},
    "nan raise": nan_raises,
    "nan by value": nan_by_value,
    "none on one rank": none_on_one_rank,
    "pending sum": pending_sum,
    "huge and tiny": huge_and_tiny,
    "experts global": partial(by_experts, RULES["global"]),
    "experts norm": partial(by_experts, RULES["norm"], joint=0),
    "experts value": partial(by_experts, kk.clip.ByValue(0.25)),
    "experts agc": partial(by_experts, RULES["agc"], joint=0),
    "experts chain": experts_chain,
    "experts chain back": partial(
        by_experts, kk.clip.Chain(kk.clip.ByGlobalNorm(0.6), kk.clip.ByNorm(0.2)), joint=0
    ),
    "experts update": experts_update,
    "experts groups": partial(
        by_experts,
        kk.clip.Groups({"experts.*": kk.clip.ByGlobalNorm(0.3)}, default=kk.clip.ByGlobalNorm(0.2)),
    ),
    "experts nan": experts_nan,
    "experts learn": experts_learn,
    "experts refused": experts_refused,
    "pipeline": pipeline,
    "different decisions": different_decisions,
    "in place": in_place,
    **masks.scenarios("fsdp", fsdp),
    **masks.scenarios("tp", tensor_parallel),
    **{f"prune whole masks {k}": partial(masks.whole_masks, b) for k, b in SPLIT.items()},
    **{f"prune refused {k}": partial(masks.refused, b) for k, b in SPLIT.items()},
    **{f"prune nan {k}": partial(masks.nan_on_one_rank, b) for k, b in SPLIT.items()},
    "prune in training": partial(masks.in_training, fsdp, partial(torch.optim.AdamW, lr=1e-2)),
    "prune in training tp": partial(
        masks.in_training, tensor_parallel, partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
    ),
    "prune moments": partial(masks.moments_forgotten, fsdp),
    "prune ddp": masks.in_ddp,
    "recover ddp": recovering.continued,
    **bounding.scenarios("fsdp", fsdp),
    **bounding.scenarios("tp", tensor_parallel),
    **{f"bound halves {k}": partial(bounding.in_halves, b) for k, b in SPLIT.items()},
    **bounding.scenarios("uneven", bounding.uneven),
    "bound in training": partial(
        *(bounding.in_training, fsdp, partial(torch.optim.AdamW, lr=1e-2)),
        *turns(list(bounding.RULES), "in training", most=5),
    ),
    "bound in training tp": partial(
        *(bounding.in_training, tensor_parallel),
        *(partial(torch.optim.SGD, lr=1e-2, momentum=0.9), "clamp", "unit norm", "spectral cap"),
    ),
    "bound nan of a part": partial(bounding.nan_on_one_rank, fsdp, "down.weight"),
    "bound nan of a plain one": partial(bounding.nan_on_one_rank, tensor_parallel, "head.weight"),
    "bound nan of a copy": partial(bounding.nan_on_one_rank, bounding.copies, "up.weight"),
    "bound refused": bounding.refused,
    "together fsdp": partial(together.resumed, fsdp),
    "together tp": partial(together.resumed, tensor_parallel),
    **together.scenarios("fsdp", fsdp),
    **together.scenarios("tp", tensor_parallel),
    "penalty fsdp, scales": partial(
        together.penalised, fsdp_normed, kk.prune.ScaleL1(0.1), beside=True
    ),
    "bound by the largest logits of all": bounding.largest_logits,
    "bound after a forward": partial(bounding.after_a_forward, fsdp),
    "bound reductions": partial(
        bounding.reductions, fsdp, {"max norm": 1, "clamp": 2, "clamp out of reach": 1}
    ),
}
