"""Dead units of any graph: which classes can go without a change of the outputs, and where their constants go.

Measured on a working copy of the exported graph, in which the units that went are zero: so a round sees what
the one before made dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from karikomi.shrink import UnitFacts, plan
from karikomi.shrink.label_planes import Labelled
from karikomi.shrink.unit_groups import Group, groups_of, kept_of
from karikomi.torch.exporting.rewriting import owner_of
from karikomi.torch.labelling.label_run import (
    Call,
    Propagated,
    call_of,
    layer_of,
    name_of,
    shape_of,
)
from karikomi.torch.modules.deep_copies import undisturbed

EVEN = 1e-6
"""Of the largest magnitude: how far the outputs of a constant unit may be apart from place to place."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product with a stored weight: its rows are the units that it makes, its columns those that it reads."""

    call: Call
    rows: int
    columns: int
    value: str = "input"

    @property
    def weight(self) -> fx.Node:
        """The weight: stored, or computed of stored tensors (of a mask, say)."""
        return self.call["weight"]

    @property
    def layer(self) -> str:
        """The name of its layer."""
        stored = self.weight.op == "get_attr"
        return (
            str(self.weight.target).removesuffix(".weight") if stored else layer_of(self.call.node)
        )


def products_of(graph: fx.GraphModule) -> list[Product]:
    """Return the products of activations with weights that do not depend on the inputs, in order."""
    found = []
    steady: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op in ("get_attr", "call_function") and steady.issuperset(node.all_input_nodes):
            steady.add(node)
        name = name_of(node) if node.op == "call_function" else ""
        if not name.startswith(("linear", "conv")) or name.endswith("norm"):
            continue
        call = call_of(node)
        if call.arguments.get("weight") in steady:
            over = "transpose" in name
            grouped = call.arguments.get("groups", 1) != 1
            if not (over and grouped):
                found.append(Product(call, rows=int(over), columns=int(not over)))
    return found


@dataclass(slots=True)
class DeadUnits:
    """The search for dead units in a graph, whose labels were propagated with `exact`."""

    graph: fx.GraphModule
    found: Propagated
    inputs: Sequence[tuple[Any, ...]]
    groups: list[Group] = field(init=False)
    products: list[Product] = field(init=False)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups = groups_of(self.found.classes)
        self.products = products_of(self.graph)

    @torch.no_grad()
    def kept(self) -> np.ndarray:
        """Return a boolean per label: whether it stays; constants are added to the biases of the graph."""
        gone: list[np.ndarray] = [np.zeros(0, int)]
        while True:
            left = np.setdiff1d(self._units(), np.concatenate(gone))
            facts = self._facts(left)
            decided = plan({name: units for name, (units, _) in facts.items()})
            self.left_alone = decided.left_alone
            if not decided.removed:
                return kept_of(self.found.classes, gone)
            for name, (_, ids) in facts.items():
                self._fold_(ids[decided.folded[name]])
                gone.append(np.delete(ids, decided.kept[name]))
            self._zero_(kept_of(self.found.classes, gone))

    def _units(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, int), *(group.units for group in self.groups)])

    def _facts(self, left: np.ndarray) -> dict[str, tuple[UnitFacts, np.ndarray]]:
        size = len(self.found.classes.roots)
        made, lives = np.zeros(size, bool), np.zeros(size, bool)
        read = np.zeros(size, bool)
        obstacles: dict[int, str] = {}
        weights = self._weights()
        for product in self.products:
            weight = weights[product.weight.name]
            rows = self._along(product.weight, product.rows)
            alive = (weight != 0).movedim(product.rows, 0).flatten(1).any(1).numpy()
            alive = alive & _scaled(self.graph, product, len(rows))
            made[rows] = True
            lives[rows[alive]] = True
            self._read(product, weight, read, obstacles)
        for node, value in self._ends().items():
            read[np.unique(value)] = True
            for root in np.unique(value).tolist():
                obstacles.setdefault(root, f"{node} reads it")
        self._others(lives)
        constants = self._constants()
        dead = made & ~lives
        found = {}
        for group in self.groups:
            ids = group.units[np.isin(group.units, left)]
            if len(ids):
                name = self._name(group)
                found[name] = (self._of_group(ids, dead, read, constants, obstacles), ids)
        return found

    def _of_group(
        self,
        ids: np.ndarray,
        dead: np.ndarray,
        read: np.ndarray,
        constants: np.ndarray,
        obstacles: dict[int, str],
    ) -> UnitFacts:
        stuck = [obstacles[root] for root in ids[dead[ids]].tolist() if root in obstacles]
        return UnitFacts(
            incoming_zero=dead[ids],
            outgoing_zero=~read[ids],
            constants=constants[ids],
            obstacle=stuck[0] if stuck else None,
        )

    def _name(self, group: Group) -> str:
        for product in self.products:
            if np.isin(self._along(product.weight, product.rows), group.units).any():
                return product.layer
        return group.name

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of all products as they are now."""
        names = {product.weight.name for product in self.products}
        found: dict[str, torch.Tensor] = {}
        _Watching(self.graph, names, found).run(*self.inputs[0])
        return found

    def _others(self, lives: np.ndarray) -> None:
        """Mark units that also come from stored tensors of two or more axes that are no such weights (embeddings)."""
        weights = {product.weight for product in self.products}
        behind = set(weights)
        for node in reversed(self.graph.graph.nodes):
            behind.update(node.all_input_nodes if node in behind else ())
        for node in self.graph.graph.nodes:
            value = self.found.values[node.name]
            if node.op != "get_attr" or node in behind or not isinstance(value, Labelled):
                continue
            if not value.shape:
                continue
            tensor = _tensor(self.graph, str(node.target))
            for axis in range(tensor.dim()) if tensor.dim() > 1 else ():
                used = (tensor != 0).movedim(axis, 0).flatten(1).any(1).numpy()
                lives[self._along(node, axis)[used]] = True
        lives[0] = False

    def _along(self, node: fx.Node, axis: int) -> np.ndarray:
        """Return the classes along an axis of what a node returns, 0 where it has none."""
        value = self.found.values[node.name]
        assert isinstance(value, Labelled)  # noqa: S101
        size = value.shape[axis]
        for plane in value.planes:
            if plane.shape[axis] > 1:
                return self.found.classes.roots[np.moveaxis(plane, axis, 0).reshape(size, -1)[:, 0]]
        return np.zeros(size, int)

    def _read(
        self, product: Product, weight: torch.Tensor, read: np.ndarray, obstacles: dict[int, str]
    ) -> None:
        columns = self._along(product.weight, product.columns)
        used = (weight != 0).movedim(product.columns, 0).flatten(1).any(1).numpy()
        groups = product.call.arguments.get("groups", 1)
        if groups > 1:
            # Each column is read in every group, by rows of that group alone.
            columns = self._channels(product)
            used = np.ones(len(columns), bool)
        read[columns[used]] = True
        reason = _obstacle(product)
        if groups > 1:
            reason = f"{product.layer} is grouped"
        if reason:
            for root in np.unique(columns).tolist():
                obstacles.setdefault(root, reason)

    def _channels(self, product: Product) -> np.ndarray:
        """Return the classes of the input of a product along its axis of channels or features."""
        return self._along(product.call[product.value], _input_axis(product))

    def _ends(self) -> dict[str, np.ndarray]:
        """Return the classes that end in other operators than products with stored weights, by place."""
        known = {product.call.node.name for product in self.products}
        return {
            site: self.found.classes.roots[labels]
            for name, site, labels in self.found.ends
            if name not in known
        }

    def _constants(self) -> np.ndarray:
        """Return class -> the largest magnitude that is read of it, NaN if it differs from place to place."""
        size = len(self.found.classes.roots)
        seen = self._observed()
        largest = np.zeros(size)
        for product in self.products:
            low, high = seen[product.call.node.name]
            ids = self._channels(product)
            scale = np.maximum(np.abs(low), np.abs(high))
            even = high - low <= EVEN * scale
            values = np.where(even, scale, np.nan)
            with np.errstate(invalid="ignore"):
                np.maximum.at(largest, ids, values)
        return largest

    def _observed(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return product -> the smallest and the largest of each of its inputs over all runs."""
        axes = {p.call.node.name: (p.call[p.value].name, _input_axis(p)) for p in self.products}
        seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for inputs in self.inputs:
            watched: dict[str, torch.Tensor] = {}
            _Watching(self.graph, {source for source, _ in axes.values()}, watched).run(*inputs)
            for name, (source, axis) in axes.items():
                rows = watched[source].movedim(axis, 0).flatten(1).double()
                low, high = rows.amin(1).numpy(), rows.amax(1).numpy()
                if name in seen:
                    low, high = np.minimum(low, seen[name][0]), np.maximum(high, seen[name][1])
                seen[name] = low, high
        return seen

    def _fold_(self, units: np.ndarray) -> None:
        """Add what constant units contribute to the biases of what reads them, in float64."""
        if not len(units):
            return
        seen, weights = self._observed(), self._weights()
        for product in self.products:
            chosen = np.isin(self._channels(product), units)
            if not chosen.any() or product.call["bias"] is None:
                continue
            weight = weights[product.weight.name].double()
            weight = weight.movedim((product.rows, product.columns), (0, 1))
            weight = weight.reshape(*weight.shape[:2], -1).sum(2)
            low, high = seen[product.call.node.name]
            values = torch.from_numpy(((low + high) / 2)[chosen])
            bias = _tensor(self.graph, str(product.call["bias"].target))
            bias.copy_(bias.double() + weight[:, torch.from_numpy(chosen)] @ values)

    def _zero_(self, kept: np.ndarray) -> None:
        for node in self.graph.graph.nodes:
            value = self.found.values[node.name]
            if node.op != "get_attr" or not isinstance(value, Labelled):
                continue
            for plane in value.planes:
                stays = torch.from_numpy(kept[self.found.classes.roots[plane]])
                tensor = _tensor(self.graph, str(node.target))
                tensor.mul_(stays.to(tensor.dtype))


class _Watching(fx.Interpreter):
    """Runs a graph and keeps the results of some nodes."""

    def __init__(
        self, module: fx.GraphModule, names: set[str], kept: dict[str, torch.Tensor]
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._names, self._kept = names, kept

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._names:
            self._kept[n.name] = result
        return result

    def run(self, *args: Any, **options: Any) -> Any:
        with undisturbed(self.module):
            return super().run(*args, **options)


def _input_axis(product: Product) -> int:
    shape = shape_of(product.call[product.value].meta["val"])
    if product.call.name == "linear":
        return len(shape) - 1
    weight = shape_of(product.call["weight"].meta["val"])
    return len(shape) - len(weight) + 1


def _tensor(graph: fx.GraphModule, name: str) -> torch.Tensor:
    owner, leaf = owner_of(graph, name)
    return getattr(owner, leaf).detach()


def _scaled(graph: fx.GraphModule, product: Product, rows: int) -> np.ndarray:
    """Return which rows a batch norm that directly follows multiplies by something."""
    users = list(product.call.node.users)
    if len(users) != 1 or users[0].op != "call_function" or name_of(users[0]) != "batch_norm":
        return np.ones(rows, bool)
    gain = call_of(users[0])["weight"]
    return np.ones(rows, bool) if gain is None else (_tensor(graph, str(gain.target)) != 0).numpy()


def _obstacle(product: Product) -> str | None:
    call = product.call
    if call["bias"] is None:
        return f"{product.layer} has no bias to take a constant"
    if call["bias"].op != "get_attr":
        return f"{product.layer} has a bias that is computed"
    if call.name == "linear":
        return None
    padding = call["padding"]
    kernel = shape_of(call["weight"].meta["val"])[2:]
    pads = max(kernel) > 1 if padding == "same" else padding != "valid" and any(_each(padding))
    if pads or "transpose" in call.name:
        return f"{product.layer} pads with zeros, where a constant would differ"
    return None


def _each(padding: Any) -> list[int]:
    return list(padding) if isinstance(padding, list | tuple) else [padding]
