"""Pruning a network whose weights lie on several ranks, and the same one alone: the same weights go."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import karikomi as kk
from ranks.networks import attached, backward, message, pair, rank, weights

Build = Callable[[], tuple[Any, Any]]


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that lies on this rank."""
    part = getattr(tensor, "to_local", None)
    return tensor.detach() if part is None else part().detach()


@torch.no_grad()
def tied(model: Any, *, equal: bool) -> None:
    """Make many weights equal in magnitude, or all of them."""
    for parameter in model.parameters():
        own = here(parameter)
        own.copy_(torch.ones_like(own) if equal else (own * 16.0).round() / 16.0)


def gathered(masks: Any) -> dict[str, list]:
    """Return whole masks, from the states of all ranks, as lists."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, through_a_file(masks.state_dict()))
    whole = kk.torch.Masks.joined(map(kk.torch.Masks.from_state_dict, states))
    return {name: mask.tolist() for name, mask in whole.items()}


def through_a_file(state: Any) -> Any:
    """Return what a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def as_lists(masks: Mapping[str, torch.Tensor]) -> dict[str, list]:
    """Return masks as lists."""
    return {name: mask.tolist() for name, mask in masks.items()}


def differing(model: Any, alone: Any) -> list[str]:
    """Return the names of parameters that are not the same to the bit."""
    ours, theirs = weights(model), weights(alone)
    return [name for name, one in theirs.items() if not torch.equal(one, ours[name])]


def pruned(build: Build, ties: str, **options: Any) -> dict[str, Any]:
    """Prune both twice, the second time further, from the first masks."""
    model, alone = build()
    facts: list[list[Any]] = []
    if ties != "none":
        for one in (model, alone):
            tied(one, equal=ties == "all")
    masks = expected = None
    for sparsity in (0.37, 0.81):
        masks = kk.torch.prune_(model, sparsity, masks=masks, **options)
        expected = kk.torch.prune_(alone, sparsity, masks=expected, **options)
        facts.append([f"masks {sparsity}", gathered(masks), as_lists(expected)])
        facts.append(["weights", differing(model, alone), []])
        facts.append(["left alone", sorted(masks.left_alone), sorted(expected.left_alone)])
    return {"facts": facts, "same": {"masks": facts[0][1]}}


def whole_masks(build: Build) -> dict[str, Any]:
    """Masks of one process go onto any parts; those of another rank's part do not."""
    model, alone = build()
    masks = kk.torch.Masks(kk.torch.prune_(alone, 0.5))
    masks.apply_(model)
    gone = [name for name in masks if differing(model, alone).count(name)]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, masks.state_dict())
    foreign = kk.torch.Masks.from_state_dict(states[1 - rank()])
    said = message(lambda: foreign.apply_(model))
    missing = message(lambda: kk.torch.Masks.joined([foreign]))
    return {
        "facts": [
            ["weights", gone, []],
            ["cut", {n: list(m.shape) for n, m in masks.items()}, shapes(model, masks)],
            ["foreign", said.startswith("InvalidArgument") and "joined" in said, True],
            ["missing", "masks of some ranks are missing" in missing, True],
        ]
    }


def shapes(model: Any, names: Any) -> dict[str, list[int]]:
    """Return name -> shape of the part that lies here."""
    return {n: list(here(p).shape) for n, p in model.named_parameters() if n in names}


def refused(build: Build) -> dict[str, Any]:
    """What a part does not tell is refused, on all ranks, before anything changes."""
    model, alone = build()
    batches = [torch.randn(4, 6)]
    asked = {
        "units": {"width": 0.5, "pattern": "units"},
        "by parameters": {"parameters": 0.5},
        "scores of inputs": {"sparsity": 0.5, "score": "wanda"},
        "random": {"sparsity": 0.5, "score": "random"},
        "data": {"sparsity": 0.5, "data": batches},
        "lamp": {"sparsity": 0.5, "allocation": "lamp"},
        "nothing": {},
    }
    said = {
        key: message(lambda own=own: kk.torch.prune_(model, **own)) for key, own in asked.items()
    }
    kinds = {key: text.partition(":")[0] for key, text in said.items()}
    expected = dict.fromkeys(asked, "Unsupported")
    expected |= dict.fromkeys(("lamp", "nothing"), "InvalidArgument")
    return {
        "facts": [["errors", kinds, expected], ["unchanged", differing(model, alone), []]],
        "same": {"said": said},
    }


def nan_on_one_rank(build: Build) -> dict[str, Any]:
    """A NaN in the part of rank 1 is named on every rank."""
    model, _ = build()
    if rank() == 1:
        here(model.up.weight).view(-1)[0] = torch.nan
    said = message(lambda: kk.torch.prune_(model, 0.5))
    return {"facts": [["named", said.startswith("NonFinite: up.weight"), True]]}


def in_training(build: Build, optimizer: Any) -> dict[str, Any]:
    """Gradual pruning through `attach`: weights, statistics and decisions as in one process."""
    rules = {
        "clip": kk.clip.ZClip(warmup=2),
        "prune": kk.prune.Gradual(0.7, steps=(0, 4), every=2),
    }
    return attached(*build(), optimizer, rules=rules)


def moments_forgotten(build: Build) -> dict[str, Any]:
    """The moments of masked weights are zero in every part."""
    model, _ = build()
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    handle = kk.torch.attach(adam, model, prune=kk.prune.OneShot(0.5, step=2))
    for _ in range(2):
        backward(model)
        adam.step()
    left = [
        int(here(adam.state[parameter][key])[~handle.masks[name]].count_nonzero())
        for name, parameter in model.named_parameters()
        if name in handle.masks
        for key in ("exp_avg", "exp_avg_sq")
    ]
    return {"facts": [["moments", left, [0] * len(left)], ["some", len(left) > 0, True]]}


def in_ddp() -> dict[str, Any]:
    """Replicas: names are the user's, every rank has the same masks, and they hold while training."""
    model, alone = pair()
    wrapped = nn.parallel.DistributedDataParallel(model)
    masks, expected = kk.torch.prune_(wrapped, 0.6), kk.torch.prune_(alone, 0.6)
    sgd = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    kk.torch.attach(sgd, wrapped, clip=kk.clip.ByGlobalNorm(0.5), prune=masks)
    for _ in range(3):
        backward(wrapped)
        sgd.step()
    regrown = [n for n, p in model.named_parameters() if n in masks and p[~masks[n]].any()]
    copied = copy.deepcopy(masks)
    copied.apply_(copy.deepcopy(model))
    before = {n: p.tolist() for n, p in model.named_parameters()}
    own = [torch.randn(8, 6, generator=torch.Generator().manual_seed(rank()))]
    refused = message(lambda: kk.torch.prune_(wrapped, 0.8, score="wanda", data=own, masks=masks))
    after = {n: p.tolist() for n, p in model.named_parameters()}
    return {
        "facts": [
            ["masks", as_lists(masks), as_lists(expected)],
            ["copied", as_lists(copied), as_lists(expected)],
            ["regrown", regrown, []],
            ["refused", refused.startswith("Unsupported: torch.prune_: the ranks found"), True],
            ["untouched", after == before, True],
        ],
        "same": {"weights": {n: p.tolist() for n, p in model.named_parameters()}},
    }


def scenarios(label: str, build: Build) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the scenarios of one way in which weights lie."""
    return {
        **{f"prune {label}, {t} ties": partial(pruned, build, t) for t in ("none", "some", "all")},
        f"prune {label}, uniform": partial(pruned, build, "some", allocation="uniform"),
        f"prune {label}, erk": partial(pruned, build, "some", allocation="erk"),
    }
