"""The smaller network as its exported graph: a module that needs none of the original code, and can be trained."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx

from karikomi.torch.labelling.label_run import call_of, name_of, with_arguments
from karikomi.torch.modules.kept_units import recall, remember_

# What evaluation mode writes into the graph, by operator and argument.
_MODES = {
    "dropout": "train",
    "feature_dropout": "train",
    "alpha_dropout": "train",
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
    "lstm": "train",
    "gru": "train",
    "rnn_tanh": "train",
    "rnn_relu": "train",
}


class GraphForm(fx.GraphModule):
    """An exported graph whose dropout and batch norms follow ``train()`` and ``eval()``.

    A norm without running statistics uses those of the batch in both modes. What else the forward does in
    training only is not in the graph.
    """

    def train(self, mode: bool = True) -> GraphForm:
        """Set the mode of dropout, recurrent layers and batch norms."""
        changed = False
        for node in self.graph.nodes:
            name = name_of(node) if node.op == "call_function" else ""
            if name not in _MODES:
                continue
            call = call_of(node)
            if name.endswith("norm") and call.arguments.get("running_mean") is None:
                continue
            if call[_MODES[name]] is not mode:
                with_arguments(node, {_MODES[name]: mode})
                changed = True
        if changed:
            self.recompile()
        self.training = mode
        return self

    def eval(self) -> GraphForm:
        """Set evaluation mode."""
        return self.train(False)

    def __deepcopy__(self, memo: Any) -> fx.GraphModule:
        with warnings.catch_warnings():
            # torch 2.13 copies a kind of specification that it has deprecated itself.
            warnings.simplefilter("ignore", FutureWarning)
            other: Any = super().__deepcopy__(memo)
        form = graph_form(other, training=self.training)
        if (cuts := recall(self)) is not None:
            remember_(form, cuts)
        return form


def graph_form(graph: fx.GraphModule, *, training: bool) -> GraphForm:
    """Return a graph module as one that can be trained."""
    form = GraphForm(graph, graph.graph)
    return form.train(training)
