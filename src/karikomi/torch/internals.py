"""Members private to torch, each behind one function; checked with torch 2.13.

A member that a later version lacks raises `Unsupported`, naming the member and the version.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from karikomi.errors import Unsupported

WHERE = "karikomi.torch.internals"

Function = TypeVar("Function", bound=Callable[..., Any])


def in_backward() -> bool:
    """Return whether this thread is within a backward pass."""
    use = "used to detect steps inside backward()"
    return _member(torch._C, "_current_graph_task_id", use)() != -1


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written in place."""
    return _member(tensor, "_version", "used to detect writes in place")


def opaque(function: Function) -> Function:
    """Return a function that Dynamo calls as it is in a compiled step, instead of tracing what it does.

    As ``torch.compiler.disable``, which imports Dynamo at once; this does with the first call, unless making an
    optimizer has done so before. Without the member the function is traced.
    """
    return getattr(torch, "_disable_dynamo", lambda item: item)(function)


def norms_at_once(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Return the Euclidean norm of each tensor, in one kernel on a device."""
    return _member(torch, "_foreach_norm", "used to measure gradients")(tensors, 2, dtype=dtype)


def multiply_all_(tensors: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply tensors in place, in one kernel on a device."""
    _member(torch, "_foreach_mul_", "used to scale gradients")(tensors, factor)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside of ``torch.compile``; any other module is returned as it is."""
    while "OptimizedModule" in {kind.__name__ for kind in type(module).__mro__}:
        module = _member(module, "_orig_mod", "used to unwrap compiled modules")
    return module


def registered(module: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Return each parameter and submodule of a module with the dict and the name that it is registered under.

    Comparing these is much faster than collecting the parameters again.
    """
    use = "used to detect layers that were replaced"
    return [
        (entries, name, item)
        for layer in module.modules()
        for entries in (_member(layer, "_parameters", use), _member(layer, "_modules", use))
        for name, item in entries.items()
    ]


def batch_norm_type() -> type[Any]:
    """Return the class of all batch normalisations, those of users among them."""
    return _member(nn.modules.batchnorm, "_BatchNorm", "used to find batch norms")


def norm_type() -> type[Any]:
    """Return the class of all batch and instance normalisations."""
    return _member(nn.modules.batchnorm, "_NormBase", "used to find normalisations")


def takes_grad_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the step of an optimizer divides gradients by ``grad_scale``.

    Without the member, as in an optimizer that became fused by loading a state, factors are not
    folded into the step but applied to the gradients.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


class _Call(NamedTuple):
    owner: type
    instance: Any


class _Recorded(NamedTuple):
    original: Callable[..., Any]
    wrapper: Callable[..., Any]
    users: set[int]


_running: ContextVar[tuple[_Call, ...]] = ContextVar("karikomi_running_steps", default=())
_recorded: dict[type, _Recorded] = {}


class StepCalls:
    """The calls of ``step`` that run now, of classes whose method is wrapped until `release`.

    A hook before a step cannot find an earlier step that raised, since no hook runs after it; a
    wrapper can. Only the methods of `GradScaler` and of parents of optimizer classes are wrapped.
    """

    def record_scalers(self) -> None:
        """Wrap the method of AMP scalers."""
        self._record(torch.amp.GradScaler)

    def record_parents(self, optimizer: torch.optim.Optimizer) -> None:
        """Wrap methods that run the hooks of an optimizer again when its class calls them."""
        for owner in _owners(optimizer)[1:]:
            # Set by torch as soon as there is an instance of the parent itself.
            if getattr(vars(owner)["step"], "hooked", False):
                self._record(owner)

    def release(self) -> None:
        """Put the methods back that nothing else records."""
        for owner, entry in list(_recorded.items()):
            entry.users.discard(id(self))
            if not entry.users:
                del _recorded[owner]
                if vars(owner)["step"] is entry.wrapper:
                    owner.step = entry.original  # type: ignore[attr-defined]

    def _record(self, owner: type) -> None:
        if owner not in _recorded:
            original = vars(owner)["step"]
            wrapper = _recording(owner, original)
            owner.step = wrapper  # type: ignore[attr-defined]
            _recorded[owner] = _Recorded(original, wrapper, set())
        _recorded[owner].users.add(id(self))


def within_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a recorded parent's ``step`` runs for an optimizer, as a part of its own."""
    own = _owners(optimizer)[0]
    return any(call.instance is optimizer and call.owner is not own for call in _running.get())


def still_scaled(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Return whether the AMP scaler that is stepping has not unscaled gradients of these yet."""
    running = [call.instance for call in reversed(_running.get())]
    for scaler in running:
        if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
            use = "used to detect gradients that are scaled"
            states = _member(scaler, "_per_optimizer_states", use)
            return any(states[id(item)]["stage"].name == "READY" for item in optimizers)
    return False


def _recording(owner: type, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _running.set((*_running.get(), _Call(owner, self)))
        try:
            return original(self, *args, **kwargs)
        finally:
            _running.reset(token)

    return step


def _owners(optimizer: torch.optim.Optimizer) -> list[type]:
    """Return the classes of an optimizer that define ``step``, its own first."""
    return [owner for owner in type(optimizer).__mro__ if "step" in vars(owner)]


def _member(owner: Any, name: str, use: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        owner_name = getattr(owner, "__name__", type(owner).__name__)
        raise Unsupported(
            f"torch {torch.__version__} has no {owner_name}.{name}, {use}",
            where=WHERE,
            hint="torch 2.13 has it",
        ) from None


def open_at_one() -> Any:
    """Return a context in which `torch.export` keeps an axis open although its size in the example is 1."""
    use = "used to export for batches of any size"
    config = _member(importlib.import_module("torch.fx.experimental"), "_config", use)
    _member(config, "backed_size_oblivious", use)
    return config.patch(backed_size_oblivious=True)


def schema_of(target: Any) -> Any:
    """Return the schema of an operator, or None for what is no operator."""
    return getattr(target, "_schema", None)


def dispatch_mode() -> Any:
    """Return the class of modes that see every operator with the tensors that it makes."""
    module = importlib.import_module("torch.utils._python_dispatch")
    return _member(module, "TorchDispatchMode", "used to count the bytes of a forward pass")


def flattened(values: Any) -> tuple[list[Any], Any]:
    """Return the leaves of nested tuples, lists and mappings, and their structure."""
    return _member(torch.utils, "_pytree", "used to walk through inputs").tree_flatten(values)


def unflattened(flat: list[Any], structure: Any) -> Any:
    """Return leaves in a structure that `flattened` found."""
    pytree = _member(torch.utils, "_pytree", "used to walk through inputs")
    return pytree.tree_unflatten(flat, structure)


def flatten_plainly_(layer: nn.RNNBase, *_: Any) -> None:
    """Let a recurrent layer hold parameters instead of what was computed from them: a hook after its forward.

    The layer lists its weights anew in a forward pass where they have changed; a computed tensor in this list
    cannot be copied.
    """
    chains = getattr(layer, "parametrizations", {})
    names = _member(layer, "_flat_weights_names", "used to list the weights of a recurrent layer")
    listed: Any = [
        chains[name].original if name in chains else getattr(layer, name, None) for name in names
    ]
    layer._flat_weights = listed
