"""Training goes on in a smaller network: optimizers, averages of weights, masks and handles follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.torch.modules.deep_copies import copied
from karikomi.torch.modules.kept_units import Follower, Move, chosen
from karikomi.torch.modules.parameters import unwrapped

WHERE = "torch.shrink: follow"
Commit = Callable[[], None]


@torch.no_grad()
def follow_(things: Any, move: Move) -> None:
    """Let optimizers, averages of weights, masks and handles continue with the smaller network, in place.

    `things`: one, or several. All are checked before the first is changed. Parameter groups, hooks and schedulers
    of an optimizer stay the same objects; its parameters and their moments are those of the smaller network.
    """
    commits = [_commit(thing, move) for thing in _each(things)]
    for commit in commits:
        commit()


def _each(things: Any) -> list[Any]:
    """Return the things once each, with the optimizers of handles before these."""
    several = isinstance(things, Iterable) and not isinstance(things, Mapping | nn.Module)
    found: dict[int, Any] = {}
    for thing in list(things) if several else [things]:
        for part in [*getattr(thing, "optimizers", ()), thing]:
            found.setdefault(id(part), part)
    # A handle counts the parameters of its optimizers, which have to be the new ones by then.
    return sorted(found.values(), key=lambda part: hasattr(part, "optimizers"))


def _commit(thing: Any, move: Move) -> Commit:
    if isinstance(thing, torch.optim.Optimizer):
        return _optimizer(thing, move)
    if hasattr(thing, "following"):
        follower: Follower = thing
        return follower.following(move)
    if isinstance(getattr(thing, "module", None), nn.Module):
        return _average(thing, move)
    raise InvalidArgument(
        "this cannot follow a module to its smaller copy",
        where=WHERE,
        got=type(thing).__name__,
        allowed="optimizers, torch.optim.swa_utils.AveragedModel, kk.torch.Masks, handles of kk.torch.attach",
    )


def _optimizer(optimizer: torch.optim.Optimizer, move: Move) -> Commit:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise Unsupported(
            "the history of LBFGS is not kept by parameter",
            where=WHERE,
            hint="make a new optimizer for the smaller network",
        )
    groups, state = [], {}
    for group in optimizer.param_groups:
        pairs = [(old, _successor(old, move)) for old in group["params"]]
        groups.append([new for _, new in pairs if new is not None])
        for old, new in pairs:
            name = move.name(old)
            if new is None or old not in optimizer.state:
                continue
            own = optimizer.state[old]
            state[new] = own if name is None else _moments(own, name, optimizer, move)
    if not any(move.name(old) for group in optimizer.param_groups for old in group["params"]):
        raise InvalidArgument(
            "the optimizer holds no parameter of the module",
            where=WHERE,
            got=type(optimizer).__name__,
            hint="pass the module whose parameters it was made with",
        )

    def commit() -> None:
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            for old, new in _gradients(group["params"], move):
                new.grad = move.cut(str(move.name(old)), old.grad, what="the gradient")
            group["params"] = parameters
        optimizer.state.clear()
        optimizer.state.update(state)

    return commit


def _successor(old: torch.Tensor, move: Move) -> torch.Tensor | None:
    """Return the parameter of the smaller network, None if it has none; one of anything else is returned itself."""
    name = move.name(old)
    return old if name is None else move.new.get(name)


def _gradients(parameters: Iterable[torch.Tensor], move: Move) -> Iterable[tuple[Any, Any]]:
    pairs = [(old, _successor(old, move)) for old in parameters]
    return [
        (old, new)
        for old, new in pairs
        if new is not None and old is not new and old.grad is not None
    ]


def _moments(
    own: Mapping[str, Any], name: str, optimizer: torch.optim.Optimizer, move: Move
) -> dict[str, Any]:
    kept = {}
    for key, value in own.items():
        if isinstance(value, torch.Tensor):
            what = f"{key!r} of {type(optimizer).__name__}"
            kept[key] = move.cut(name, value, what=what)
        elif isinstance(value, Mapping | list | tuple) and move.axes.get(name):
            raise Unsupported(
                f"{key!r} of {type(optimizer).__name__} is no tensor, so it cannot be cut along",
                where=f"{WHERE}: {name}",
                got=type(value).__name__,
                hint="make a new optimizer for the smaller network",
            )
        else:
            kept[key] = value
    return kept


def _average(thing: Any, move: Move) -> Commit:
    """Return what replaces the module of an average of weights by a copy of the smaller network with its own values.

    What the shrink added to a tensor (a folded constant) is added to its average as well.
    """
    inner = unwrapped(thing.module)
    averages = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    _check_average(averages, move)
    device = next(iter(averages.values())).device
    small = copied(move.after).to(device)
    for name, tensor in {**dict(small.named_parameters()), **dict(small.named_buffers())}.items():
        if name not in averages or name not in move.old:
            continue
        axes = move.axes.get(name, {})
        average = chosen(averages[name], axes)
        if tensor.is_floating_point():
            average = average + (tensor - chosen(move.old[name], axes).to(device))
        tensor.copy_(average)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(averages[name].requires_grad)
    small.train(inner.training)

    def commit() -> None:
        thing.module = small

    return commit


def _check_average(averages: Mapping[str, torch.Tensor], move: Move) -> None:
    shared = [name for name in move.old if name in averages]
    if not shared:
        raise InvalidArgument(
            "the average is of another module", where=WHERE, got="no tensor of its names"
        )
    for name in shared:
        average, old = averages[name], move.old[name]
        if average.shape != old.shape or average.dtype != old.dtype:
            raise InvalidArgument(
                "the average is of another module",
                where=f"{WHERE}: {name}",
                got=f"{average.dtype} {tuple(average.shape)}",
                allowed=f"{old.dtype} {tuple(old.shape)}",
            )
