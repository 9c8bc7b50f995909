"""Where a product with a stored weight can be re-fitted, and to what."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from karikomi.torch.compensation.side_by_side import Lane
from karikomi.torch.labelling.label_run import Call, call_of, layer_of, name_of, shape_of
from karikomi.torch.tracing.weight_reads import Reading
from karikomi.torch.tracing.windows import window_of


@dataclass(frozen=True, slots=True)
class Consumer:
    """A layer that is a product of its inputs with a weight; `turned`: its rows are along axis 1, as in ``addmm``."""

    call: Call
    inputs: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    turned: bool = False

    @property
    def layer(self) -> str:
        """The name of its layer, of a computed weight in the outermost forward that of the node."""
        if self.weight.op == "get_attr":
            return str(self.weight.target).removesuffix(".weight")
        return layer_of(self.call.node) or self.call.node.name

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a view of the weight as (rows, kernel positions, inputs)."""
        return weight.t() if self.turned else weight.movedim(1, -1)


def consumers_of(graph: fx.GraphModule) -> dict[str, Consumer]:
    """Return node -> product with a weight that does not depend on the inputs of the network."""
    found = {}
    constant: set[fx.Node] = set()
    for node in graph.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and constant.issuperset(sources)):
            constant.add(node)
            continue
        call = call_of(node)
        if call.name.startswith(("linear", "conv")) and not call.name.endswith("norm"):
            product = Consumer(call, call["input"], call["weight"], call["bias"])
        elif call.name in ("matmul", "mm") and len(shape_of(node.args[1].meta["val"])) == 2:
            product = Consumer(call, node.args[0], node.args[1], None, turned=True)
        elif call.name == "addmm" and call["beta"] == call["alpha"] == 1:
            product = Consumer(call, call["mat1"], call["mat2"], call["self"], turned=True)
        else:
            continue
        if product.weight in constant and product.inputs not in constant:
            found[node.name] = product
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """A product that can be re-fitted.

    `weight`, `bias`: stored tensors. `mean`: that of the `norm` that follows, which takes a constant with the
    other sign where there is no bias. `added`: the node that is added to the result.
    """

    product: Consumer
    weight: str
    bias: str | None = None
    mean: str | None = None
    norm: fx.Node | None = None
    added: str | None = None

    @property
    def name(self) -> str:
        """The name of the node."""
        return self.product.call.node.name

    def reading(self, lane: Lane, weight: torch.Tensor) -> Reading:
        """Return the product as it reads the smaller network's values of a lane."""
        call = self.product.call
        inputs = lane.small[self.product.inputs.name]
        window = None
        if call.name.startswith("conv"):
            options = {key: call[key] for key in ("stride", "padding", "dilation")}
            groups = inputs.shape[_channels(inputs, weight)] // weight.shape[1]
            window = window_of(
                weight, lane.dense[self.name], transposed=False, groups=groups, **options
            )
        return Reading(name=self.weight, weight=weight, inputs=inputs, outputs=None, window=window)

    def target(self, lane: Lane, scale: torch.Tensor | None) -> torch.Tensor:
        """Return the dense outputs that stay, less what the other summand lacks; `scale`: of the norm between."""
        found = lane.kept(self.name)
        if self.added is None:
            return found
        lost = lane.kept(self.added) - lane.small[self.added]
        return found + (lost if scale is None else lost * scale)


def _channels(inputs: torch.Tensor, weight: torch.Tensor) -> int:
    return inputs.dim() - weight.dim() + 1


def place_of(product: Consumer, known: Collection[str], readers: dict[str, int]) -> Place | str:
    """Return where a product can be re-fitted, or why it cannot.

    `known`: the nodes that run before it. `readers`: stored tensor -> how many nodes read it.
    """
    call = product.call
    if "transpose" in call.name:
        return "a transposed convolution is not re-fitted"
    if product.weight.op != "get_attr":
        return "its weight is computed"
    weight = str(product.weight.target)
    if readers[weight] > 1:
        return "several operations read its weight"
    bias = mean = norm = None
    if product.bias is not None:
        bias = str(product.bias.target) if product.bias.op == "get_attr" else None
        if bias is None or readers[bias] > 1:
            return "several operations read its bias, or it is computed"
    node = call.node
    follower = _only_user(node)
    if follower is not None and name_of(follower) == "batch_norm":
        given = call_of(follower)
        statistic = given["running_mean"]
        if statistic is not None and not given["training"] and readers[str(statistic.target)] == 1:
            norm = follower
            mean = str(statistic.target) if bias is None else None
            node = follower
    return Place(product, weight, bias, mean, norm, _summand(node, known))


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _summand(node: fx.Node, known: Collection[str]) -> str | None:
    """Return the node that is added to this one, through dropout, if it is known by then and of the same shape."""
    user = _only_user(node)
    while user is not None and name_of(user) == "dropout":
        node, user = user, _only_user(user)
    if user is None or name_of(user) != "add" or len(user.all_input_nodes) != 2:
        return None
    if call_of(user)["alpha"] != 1:
        return None
    (other,) = (source for source in user.all_input_nodes if source is not node)
    shapes = [getattr(source.meta.get("val"), "shape", None) for source in (node, other)]
    return other.name if other.name in known and shapes[0] == shapes[1] else None
