"""Sums over entries of which some went, and which were not zero where the weights of these were.

Removing equals zeroing weights where what is summed is then zero (``relu(0)``); a sum of ``exp`` or ``sigmoid``
still counts one or a half for each of them. Those sums change as statistics do, and are named beside them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from karikomi.shrink.label_planes import Labelled
from karikomi.torch.labelling.label_run import Propagated
from karikomi.torch.modules.deep_copies import undisturbed


@torch.no_grad()
def changed_sums(
    graph: fx.GraphModule, found: Propagated, kept: np.ndarray, inputs: tuple[Any, ...]
) -> dict[str, str]:
    """Return node -> place of the sums that lose entries which zeros in the weights would not make zero."""
    roots, gone = found.classes.roots, ~kept
    stored = {
        node.name
        for node in graph.graph.nodes
        if any(source.op == "get_attr" for source in node.all_input_nodes)
    }
    ended: dict[str, np.ndarray] = {}
    for name, _, labels in found.ends:
        # A stored operand is zero where entries went.
        if name not in stored and gone[labels].any():
            own = ended.setdefault(name, np.zeros(len(kept), bool))
            own[roots[labels[gone[labels]]]] = True
    if not ended:
        return {}
    run = _Zeroed(graph, found, gone[roots], ended)
    with undisturbed(graph):
        run.run(*inputs)
    return {name: site for name, site, _ in found.ends if name in run.changed}


class _Zeroed(fx.Interpreter):
    """Runs the original with zeros in place of the entries of weights that went; notes which sums see others there.

    `gone`, `ended`: a boolean per class, and the same for each sum of the classes that end there.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        found: Propagated,
        gone: np.ndarray,
        ended: dict[str, np.ndarray],
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.changed: set[str] = set()
        self._values, self._roots = found.values, found.classes.roots
        self._gone, self._ended = gone, ended

    def run_node(self, n: fx.Node) -> Any:
        ended = self._ended.get(n.name)
        if ended is not None and all(self._counts(s, ended) for s in n.all_input_nodes):
            self.changed.add(n.name)
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, torch.Tensor):
            return torch.where(self._at(n, self._gone), torch.zeros_like(result), result)
        return result

    def _counts(self, node: fx.Node, ended: np.ndarray) -> bool:
        """Return whether an operand has entries there that are not zero; of one that has none, True."""
        value = self.env[node]
        if not isinstance(value, torch.Tensor):
            return True
        places = self._at(node, ended).to(value.device).expand(value.shape)
        return not bool(places.any()) or bool((value[places] != 0).any())

    def _at(self, node: fx.Node, chosen: np.ndarray) -> torch.Tensor:
        """Return where a value has labels of these classes, in a shape that is broadcast to its own."""
        labelled = self._values[node.name]
        found = np.zeros((), bool)
        for plane in labelled.planes if isinstance(labelled, Labelled) else ():
            found = found | chosen[self._roots[plane]]
        return torch.from_numpy(np.asarray(found))
