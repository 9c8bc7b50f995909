"""The module without the layers of some branches, where its code allows that: others stand in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from karikomi.shrink.cuts import Removed
from karikomi.torch.exporting.proof import TOLERANCE, apart
from karikomi.torch.exporting.residual_branches import Branch
from karikomi.torch.modules.deep_copies import copied, undisturbed
from karikomi.torch.modules.kept_units import RemovedLayer, put_
from karikomi.torch.shrinking.costs import parameters_of
from karikomi.torch.tracing.batches import leaves


def without_their_layers(
    module: nn.Module,
    graph: fx.GraphModule,
    small: fx.GraphModule,
    gone: Sequence[Branch],
    ends: Mapping[str, torch.Tensor],
    inputs: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[nn.Module | None, dict[str, Removed]]:
    """Return a copy of the module without the layers of some branches, and which; None if its code does not allow it.

    The outermost modules of a branch are replaced, or else the innermost.
    """
    if not gone:
        return copied(module), {}
    with undisturbed(small):
        expected = leaves(small(*inputs, **options))
    outputs = _outputs_of(module, inputs, options)
    for outermost in (True, False):
        layers = {}
        for branch in gone:
            layers |= _stand_ins(module, graph, branch, ends[branch.end], outputs, outermost)
        other = copied(module)
        put_(other, {path: copied(layer) for path, layer in layers.items()})
        modes = [part.training for part in other.modules()]
        if _agrees(other.eval(), expected, inputs, options) and _as_small(other, small):
            for part, mode in zip(other.modules(), modes, strict=True):
                part.training = mode
            return other, {
                path: Removed(
                    None if layer.value is None else tuple(layer.value.shape), layer.outputs
                )
                for path, layer in layers.items()
            }
    return None, {}


def _as_small(module: nn.Module, graph: fx.GraphModule) -> bool:
    return parameters_of(module) == parameters_of(graph)


def _agrees(
    module: nn.Module,
    expected: list[torch.Tensor],
    inputs: tuple[Any, ...],
    options: dict[str, Any],
) -> bool:
    try:
        with undisturbed(module):
            got = leaves(module(*inputs, **options))
        return max(map(apart, expected, got), default=0.0) <= TOLERANCE
    except Exception:
        # Any error of the user's forward has one meaning here: its code needs the layers.
        return False


def _outputs_of(
    module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, int]:
    """Return path -> how many outputs a module has, 0 for a tensor by itself."""
    twin = copied(module).eval()
    found: dict[str, int] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(layer: nn.Module, args: Any, result: Any) -> None:
            found[path] = len(result) if isinstance(result, tuple | list) else 0

        return note

    for path, part in twin.named_modules():
        part.register_forward_hook(hook(path))
    twin(*inputs, **options)
    return found


def _stand_ins(
    module: nn.Module,
    graph: fx.GraphModule,
    branch: Branch,
    constant: torch.Tensor,
    outputs: Mapping[str, int],
    outermost: bool,
) -> dict[str, RemovedLayer]:
    """Return path -> what stands in the place of the modules of a branch; the last one returns its constant."""
    own, inside, outside = set(branch.nodes), dict[str, None](), set[str]()
    for node in graph.graph.nodes:
        paths = _paths(node)
        if node.name in own:
            inside |= dict.fromkeys(paths)
        else:
            outside.update(paths)
    whole = [path for path in inside if path and path not in outside]
    if outermost:
        chosen = [p for p in whole if not any(p.startswith(f"{q}.") for q in whole)]
    else:
        chosen = [p for p in whole if not any(q.startswith(f"{p}.") for q in whole)]
    last = [p for node in graph.graph.nodes if node.name == branch.end for p in _paths(node)]
    ending = next((path for path in chosen if path in last), None)
    if ending is None:
        return {}
    found = {path: RemovedLayer() for path in chosen}
    found[ending] = RemovedLayer(constant, outputs.get(ending, 0))
    return found


def _paths(node: fx.Node) -> list[str]:
    if node.op != "call_function":
        return []
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [str(path).partition("@")[0] for path, _ in stack]
