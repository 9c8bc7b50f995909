"""Numbers in the code of a class that are in the way of a smaller module, and the units that they count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from torch import fx, nn

from karikomi.shrink.label_planes import Labelled
from karikomi.torch.exporting.rewriting import Changed, Rewritten
from karikomi.torch.labelling.label_run import Propagated
from karikomi.torch.shrinking.module_form import GUESSES, attributes_of


def counted(
    module: nn.Module, graph: fx.GraphModule, found: Propagated, done: Rewritten, kept: np.ndarray
) -> dict[int, str]:
    """Return class -> the number that counts it, for each axis of which `done` removes some.

    Numbers that attributes of the module state are left out, unless there are no others.
    """
    unstated = _classes(graph, found, _unstated(module, done.changed), kept)
    return unstated or _classes(graph, found, done.changed, kept)


def _unstated(module: nn.Module, changed: Iterable[Changed]) -> list[Changed]:
    """Return the numbers that are in no attribute of their module, or in one that would need two values."""
    together, values = defaultdict(list), defaultdict(set)
    for change in changed:
        together[change.node, change.argument].append(change)
        for name in attributes_of(module, change, GUESSES[-1]):
            values[change.path, name].add(repr(change.after))

    def is_stated(change: Changed) -> bool:
        names = attributes_of(module, change, GUESSES[-1])
        return any(len(values[change.path, name]) == 1 for name in names)

    found: list[Changed] = []
    for own in together.values():
        whole = [change for change in own if isinstance(change.before, list)]
        parts = [change for change in own if not isinstance(change.before, list)]
        if not any(map(is_stated, whole)) and not (parts and all(map(is_stated, parts))):
            found += own
    return found


def _classes(
    graph: fx.GraphModule, found: Propagated, changed: Iterable[Changed], kept: np.ndarray
) -> dict[int, str]:
    """Return the classes of each axis of which some went, of what operators with these numbers take and give."""
    nodes = {node.name: node for node in graph.graph.nodes}
    classes: dict[int, str] = {}
    for change in changed:
        node = nodes[change.node]
        for name in (node.name, *(source.name for source in node.all_input_nodes)):
            value = found.values[name]
            for part in value if isinstance(value, list) else [value]:
                planes = part.planes if isinstance(part, Labelled) else ()
                for labels in (plane for plane in planes if not kept[plane].all()):
                    why = f"a number in the code counts them: {change.site}"
                    classes |= dict.fromkeys(np.unique(found.classes.roots[labels]).tolist(), why)
    return classes
