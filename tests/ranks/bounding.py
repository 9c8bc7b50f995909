"""Bounds on a network whose weights lie on several ranks, and on the same one alone: the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import karikomi as kk
from depth import turns
from ranks.masks import differing, here
from ranks.networks import attached, backward, gap, message, pair, rank, weights

Build = Callable[[], tuple[Any, Any]]
RULES = {
    "clamp": kk.bound.Clamp(0.25),
    "clamp that narrows": kk.bound.Clamp(kk.schedule.Linear(0.6, 0.2, steps=(0, 2))),
    "clamp out of reach": kk.bound.Clamp(50.0),
    "non-negative": kk.bound.NonNegative(),
    "max norm": kk.bound.MaxNorm(0.5),
    "max norm of tensors": kk.bound.MaxNorm(0.9, per="tensor"),
    "max norm of all": kk.bound.MaxNorm(0.9, per="global"),
    "max 1-norm": kk.bound.MaxNorm(0.9, norm=1),
    "box": kk.bound.Box(-0.2, 0.25),
    "unit norm": kk.bound.UnitNorm(0.7),
    "unit norm of tensors": kk.bound.UnitNorm(per="tensor"),
    "init scaled": kk.bound.InitScaled(0.6),
    "spectral cap": kk.bound.SpectralCap(0.8),
}


@torch.no_grad()
def moved(model: Any, step: int) -> None:
    """Change the weights as a step would, by what every rank knows of the whole."""
    for parameter in model.parameters():
        own = here(parameter)
        own.mul_(1.1 + 0.2 * step).add_(0.01)


def found(outcome: Any) -> list[Any]:
    """Return what a person reads of a bound."""
    return [
        *(outcome.tensors(), outcome.pre, outcome.post, outcome.engaged),
        *(list(outcome.names), sorted(outcome.left_alone), outcome.share_at_bound),
    ]


def small(state: Any) -> Any:
    """Return a state as lists."""
    vectors = {name: one.double().tolist() for name, one in state.get("vectors", {}).items()}
    return {**state, "vectors": vectors}


def bounded(build: Build, rule: Any, dtype: Any = None) -> dict[str, Any]:
    """Bound both for some steps; numbers, weights and the state are those of one process."""
    model, alone = build()
    facts: list[list[Any]] = []
    state = alone_state = None
    for step in range(3):
        for one in (model, alone):
            moved(one, step)
        outcome, state = kk.torch.bound_(model, rule, state)
        expected, alone_state = kk.torch.bound_(alone, rule, alone_state)
        facts.append(["outcome", found(outcome), found(expected)])
        facts.append(["weights", gap(weights(model), weights(alone)), 0.0])
        if rule.scope is kk.rule.Scope.ELEMENT:
            facts.append(["bits", differing(model, alone), []])
    assert state is not None and alone_state is not None
    facts.append(["state", small(state), small(alone_state)])
    return {"facts": facts, "same": {"numbers": facts[-3][1], "state": small(state)}}


def in_halves(build: Build) -> dict[str, Any]:
    """The limit is rounded as the dtype of the whole rounds it."""
    model, alone = (one.to(torch.bfloat16) for one in build())
    facts = []
    for rule in (kk.bound.Clamp(0.1), kk.bound.MaxNorm(0.3), kk.bound.InitScaled(0.3)):
        outcome, _ = kk.torch.bound_(model, rule)
        expected, _ = kk.torch.bound_(alone, rule)
        facts.append(["outcome", found(outcome), found(expected)])
        facts.append(["bits", differing(model, alone), []])
    return {"facts": facts}


def in_training(build: Build, optimizer: Any, *bounds: str) -> dict[str, Any]:
    """Clip and bound through `attach`, for some rules."""
    facts, same = [], {}
    for key in bounds:
        rules = {"clip": kk.clip.ByGlobalNorm(0.5), "bound": RULES[key]}
        done = attached(*build(), optimizer, rules=rules)
        facts += [[f"{key}, {what}", own, alone] for what, own, alone in done["facts"]]
        same[key] = done["same"]["numbers"]
    return {"facts": facts, "same": same}


def nan_on_one_rank(build: Build, place: str, at: int = 1, most: int = 99) -> dict[str, Any]:
    """A weight that is not finite on one rank raises on all, and no rank waits for another.

    `place`: its name; it need not be sharded. Ranks that have other parts, or a copy, may not know the name.
    `most`: of how many rules, others at another place; of all in a full run.
    """
    said = {}
    rules = turns(list(RULES), "nan", place, at, most=min(most, len(RULES)))
    for key, rule in ((key, RULES[key]) for key in rules):
        model, _ = build()
        if rank() == at:
            # One that is above zero is nothing to a rule of what is below.
            bad = torch.inf if key == "non-negative" else torch.nan
            here(model.get_parameter(place)).view(-1)[-1] = bad
        said[key] = message(partial(kk.torch.bound_, model, rule))
    raised = {key: text.startswith("NonFinite: ") for key, text in said.items()}
    named = [f"non-finite weights in {place}" in text for text in said.values()]
    heard = ["non-finite weights on another rank" in text for text in said.values()]
    either = [one or (other and rank() != at) for one, other in zip(named, heard, strict=True)]
    return {
        "facts": [
            ["raised", raised, dict.fromkeys(rules, True)],
            ["named", either, [True] * len(rules)],
        ]
    }


def named_by_all(build: Build) -> dict[str, Any]:
    """Of a sharded weight every rank says the name, and nothing has changed."""
    model, _ = build()
    if rank() == 0:
        here(model.up.weight).view(-1)[0] = torch.inf
    before = {name: here(one).clone() for name, one in model.named_parameters()}
    said = [message(partial(kk.torch.bound_, model, rule)) for rule in RULES.values()]
    same = [torch.equal(here(one), before[name]) for name, one in model.named_parameters()]
    named = [text.startswith("NonFinite: torch.bound_: non-finite weights in up.") for text in said]
    return {
        "facts": [["named", named, [True] * len(said)], ["unchanged", all(same), True]],
        "same": {"said": said},
    }


class Attending(nn.Module):
    """An attention that is declared, of layers that can be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 8)
        kk.torch.declare_attention(self, heads=2, q="q", k="k")


def refused() -> dict[str, Any]:
    """What cannot be done right on parts is refused on all ranks before anything changes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rule = kk.bound.QKClip(1.0)
    model = Attending()
    whole = model.q.weight.detach().clone()
    dist.broadcast(whole, 0)
    model.q.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    sums = nn.Linear(2, 2)
    sums.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))
    said = {
        "heads": message(lambda: kk.torch.bound_(model, rule, logits={"": [9.0, 9.0]})),
        "attach": message(lambda: kk.torch.attach(sgd, model, bound=rule)),
        "sums": message(lambda: kk.torch.bound_(sums, kk.bound.Clamp(0.1))),
    }
    clear = {
        "heads": "Unsupported: torch.bound_ (QKClip): heads of sharded weights lie on several ranks",
        "attach": "Unsupported: torch.bound_ (QKClip): heads of sharded weights lie on several ranks",
        "sums": "Unsupported: torch.bound_: weight: sums that are still to be made",
    }
    told = [said[key].startswith(text) and "(" in said[key] for key, text in clear.items()]
    unchanged = torch.equal(weights(model)["q.weight"], whole)
    return {
        "facts": [["told", told, [True] * 3], ["unchanged", unchanged, True]],
        "same": {"said": said},
    }


def apart() -> dict[str, Any]:
    """Where the units of one rank do not lie where they should, all ranks refuse, and none waits."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = nn.Linear(2, 4)
    rows = (1, 1, 2, 0)[rank()]
    layer.weight = nn.Parameter(
        DTensor.from_local(torch.ones(rows, 2), mesh, [Shard(0)], shape=(4, 2), stride=(2, 1))
    )
    said = message(lambda: kk.torch.bound_(layer, kk.bound.MaxNorm(1.0), only="weight"))
    outcome, _ = kk.torch.bound_(layer, kk.bound.MaxNorm(1.0, per="tensor"), only="weight")
    kept = here(layer.weight).flatten().tolist()
    return {
        "facts": [
            ["refused", said.startswith("Unsupported: ") and "side by side" in said, True],
            ["by tensor", outcome.pre, 8**0.5],
            ["kept", kept, [8**-0.5] * (2 * rows)],
        ]
    }


def uneven() -> tuple[Any, Any]:
    """Return a network whose weights lie in parts of all sizes, none among them, and as copies; alone."""
    model, alone = pair()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    lies = {"up": Shard(1), "down": Shard(0), "head": Shard(0), "norm": Replicate()}
    for name, placement in lies.items():
        layer = model.get_submodule(name)
        whole = layer.weight.detach()
        layer.weight = nn.Parameter(distribute_tensor(whole, mesh, [placement]))
    # 7 rows over two or four ranks; 5 columns.
    odd = torch.linspace(-1.0, 1.0, 35).reshape(7, 5)
    for one in (model, alone):
        one.odd = nn.Linear(5, 7, bias=False)
        one.odd.weight = nn.Parameter(odd.clone())
    model.odd.weight = nn.Parameter(distribute_tensor(odd, mesh, [Shard(0)]))
    return model, alone


def copies() -> tuple[Any, Any]:
    """Return a network of nothing but whole copies; and alone."""
    model, alone = pair()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.norm, model.up, model.down, model.head):
        for leaf, one in list(layer.named_parameters()):
            whole = distribute_tensor(one.detach(), mesh, [Replicate()])
            setattr(layer, leaf, nn.Parameter(whole))
    return model, alone


def reductions(build: Build, expected: dict[str, int]) -> dict[str, Any]:
    """How many reductions a bound makes; for plain weights none."""
    facts = []
    for key, many in expected.items():
        for one, count in zip(build(), (many, 0), strict=True):
            with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as calls:
                kk.torch.bound_(one, RULES[key])
            facts.append([key, calls.call_count, count])
    return {"facts": facts}


def after_a_forward(build: Build) -> dict[str, Any]:
    """A forward pass before it, that nothing follows, changes nothing."""
    facts = []
    actions: dict[str, Callable[[Any], Any]] = {
        "bound": lambda one: kk.torch.bound_(one, RULES["clamp"]),
        "prune": lambda one: kk.torch.prune_(one, 0.5, protect=()),
        "masks": lambda one: kk.torch.Masks(whole).apply_(one),
    }
    whole = kk.torch.prune_(build()[1], 0.5, protect=())
    model: Any = None
    for key, action in actions.items():
        model, alone = build()
        for one in (model, alone):
            with torch.no_grad():
                one(torch.ones(2, 6))
            action(one)
        outputs = [one(torch.ones(2, 6)).flatten().tolist() for one in (model, alone)]
        facts.append([f"outputs, {key}", *outputs])
        backward(model)
        facts.append([f"weights, {key}", gap(weights(model), weights(alone)), 0.0])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model(torch.ones(2, 6))
    said = message(lambda: kk.torch.attach(sgd, model, bound=RULES["clamp"]))
    facts.append(["attach", said, "no error"])
    return {"facts": facts}


def largest_logits() -> dict[str, Any]:
    """Heads are bounded by the largest logits of all ranks, of which not all passed through every layer."""
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    kk.torch.watch_logits(model)
    kk.torch.note_logits(model["a"], torch.tensor([4.0, 1.0] if rank() else [1.0, 9.0]))
    if rank():
        kk.torch.note_logits(model["b"], torch.tensor([2.0, 0.5]))
    outcome, _ = kk.torch.bound_(model, kk.bound.QKClip(1.0))
    entries = {name: value.flatten().tolist() for name, value in model.state_dict().items()}
    return {"facts": [["norms", list(outcome.norms), [4.0, 9.0, 2.0, 0.5]]], "same": entries}


def scenarios(label: str, build: Build) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the scenarios of one way in which weights lie."""
    return {
        **{f"bound {label}, {key}": partial(bounded, build, rule) for key, rule in RULES.items()},
        f"bound {label}, named by all": partial(named_by_all, build),
    }
