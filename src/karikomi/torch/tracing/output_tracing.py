"""Find the normalisation and the activation that directly follow a layer.

Tensors are followed from call to call, so functional activations are found as modules are. An addition
(a shortcut), a product or a change of shape ends the trail: what follows mixes the layer's units with others. A view
that leaves the last axis, the units of a linear layer, does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from karikomi.torch.internals import version_of

NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu rrelu prelu elu selu celu gelu silu mish sigmoid logsigmoid log_sigmoid"
    " tanh softplus softsign hardtanh hardsigmoid hardswish hardshrink softshrink tanhshrink"
    " threshold clamp clamp_min clip".split()
)
# In eval mode these change no value.
_CARRIED = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
    " contiguous clone to float double half bfloat16 type detach".split()
)


_VIEWS = frozenset({"view", "reshape", "flatten", "unflatten"})


@dataclass(frozen=True, slots=True)
class Path:
    """Origin of an output: the `use`-th reading of a weight; `axis` is that of its units."""

    name: str
    use: int
    axis: int


@dataclass(frozen=True, slots=True)
class Followed:
    """A tensor on a path, by weak reference, so that tracing keeps no tensor alive; `version` of its values."""

    path: Path
    tensor: weakref.ref[torch.Tensor]
    version: int


@dataclass(slots=True)
class Trail:
    """Follows outputs through norms and activations, for one run of a network at a time.

    `scales`: id of a parameter -> its name. `on_values`: called with each output of a path, the last
    time with the outputs of its units: after the norm and the activation, if any.
    `norms`: weight name -> the scales of the norms that follow it, None for a norm without a scale.
    `units`: weight name -> number of its output units.
    """

    scales: Mapping[int, str]
    on_values: Callable[[Path, torch.Tensor], None] | None = None
    norms: dict[str, set[str | None]] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    _open: dict[int, Followed] = field(default_factory=dict)
    _uses: dict[str, int] = field(default_factory=dict)

    def start(self, name: str, axis: int, outputs: torch.Tensor) -> None:
        """Begin to follow the outputs of a weight, with its units along an axis."""
        self.units[name] = outputs.shape[axis]
        self._uses[name] = use = self._uses.get(name, -1) + 1
        self._put(Path(name, use, axis), outputs, emit=True)

    def before(self, args: tuple[Any, ...]) -> Followed | None:
        """Return the followed output that the first argument of a call is, if unchanged since."""
        tensor = args[0] if args else None
        found = self._open.get(id(tensor))
        if not isinstance(tensor, torch.Tensor) or found is None or found.tensor() is not tensor:
            return None
        return found if found.version == version_of(tensor) else None

    def after(self, followed: Followed, called: str, kwargs: Mapping[str, Any], out: Any) -> None:
        """Follow the result of a call on a followed output."""
        path, called = followed.path, called.strip("_")
        if not isinstance(out, torch.Tensor):
            return
        if called in NORMS:
            scale = self.scales.get(id(kwargs.get("weight")))
            self.norms.setdefault(path.name, set()).add(scale)
            self._put(path, out, emit=True)
        elif called in ACTIVATIONS:
            self._open.pop(id(followed.tensor()), None)
            if self.on_values:
                self.on_values(path, out)
        elif called in _CARRIED or (called in _VIEWS and _same_last(path, followed.tensor(), out)):
            self._put(path, out, emit=False)

    def end(self) -> None:
        """Drop the outputs of this run of the network."""
        self._open.clear()
        self._uses.clear()

    def _put(self, path: Path, tensor: torch.Tensor, *, emit: bool) -> None:
        if emit and self.on_values:
            self.on_values(path, tensor)
        self._open[id(tensor)] = Followed(path, weakref.ref(tensor), version_of(tensor))


def _same_last(path: Path, tensor: torch.Tensor | None, out: torch.Tensor) -> bool:
    """Return whether a view leaves the units where they are: along the last axis, as many as before."""
    return path.axis == -1 and tensor is not None and tensor.shape[-1:] == out.shape[-1:]


def scales_of(module: nn.Module) -> dict[int, str]:
    """Return id -> name of the parameters that may be the scale of a normalisation."""
    return {
        id(parameter): name for name, parameter in module.named_parameters() if parameter.dim() == 1
    }
