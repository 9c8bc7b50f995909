"""Each private member of a framework that is gone is one sentence with its name and the version."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _python_dispatch

from karikomi.errors import Unsupported
from karikomi.torch import internals

NOTHING: Any = SimpleNamespace()
OptimizedModule = type("OptimizedModule", (), {})

# Function -> the member's name, where it is taken away (or nowhere), and the call.
TORCH: dict[str, tuple[str, Any, Callable[[], object]]] = {
    "in_backward": ("_current_graph_task_id", torch._C, internals.in_backward),
    "version_of": ("_version", None, lambda: internals.version_of(NOTHING)),
    "norms_at_once": (
        "_foreach_norm",
        torch,
        lambda: internals.norms_at_once([torch.ones(2)], torch.float32),
    ),
    "multiply_all_": (
        "_foreach_mul_",
        torch,
        lambda: internals.multiply_all_([torch.ones(2)], 0.5),
    ),
    "registered": (
        "_parameters",
        None,
        lambda: internals.registered(SimpleNamespace(modules=lambda: [NOTHING])),  # type: ignore[arg-type]
    ),
    "uncompiled": ("_orig_mod", None, lambda: internals.uncompiled(OptimizedModule())),
    "batch_norm_type": ("_BatchNorm", nn.modules.batchnorm, internals.batch_norm_type),
    "open_at_one": ("_config", torch.fx.experimental, internals.open_at_one),
    "flattened": ("_pytree", torch.utils, lambda: internals.flattened([1])),
    "unflattened": (
        "_pytree",
        torch.utils,
        lambda: internals.unflattened([1], internals.flattened([1])[1]),
    ),
    "norm_type": ("_NormBase", nn.modules.batchnorm, internals.norm_type),
    "dispatch_mode": ("TorchDispatchMode", _python_dispatch, internals.dispatch_mode),
    "flatten_plainly_": (
        "_flat_weights_names",
        None,
        lambda: internals.flatten_plainly_(nn.Identity()),  # type: ignore[arg-type]
    ),
}
# Without the member: no operator of torch; not folded into the step; traced by Dynamo; no step is found to be running.
ELSEWHERE = {"schema_of", "takes_grad_scale", "opaque", "StepCalls", "within_step", "still_scaled"}


def public(module: ModuleType) -> set[str]:
    """Return the names of the functions and classes that a module defines for others."""
    return {
        name
        for name, thing in vars(module).items()
        if (inspect.isfunction(thing) or inspect.isclass(thing))
        and thing.__module__ == module.__name__
        and not name.startswith("_")
    }


def test_every_function_is_covered() -> None:
    assert public(internals) == TORCH.keys() | ELSEWHERE


@pytest.mark.parametrize("name", TORCH)
def test_a_missing_member_of_torch_is_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, owner, call = TORCH[name]
    if owner is not None:
        call()
        monkeypatch.delattr(owner, member)
    expected = rf"^karikomi.torch.internals: torch 2\.\S+ has no \S+\.{member}, used to "
    with pytest.raises(Unsupported, match=expected):
        call()


def test_a_scaler_without_states_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    failures: list[str] = []

    def before(*_: Any) -> None:
        states = scaler.__dict__.pop("_per_optimizer_states")
        try:
            internals.still_scaled([optimizer])
        except Unsupported as error:
            failures.append(str(error))
        scaler.__dict__["_per_optimizer_states"] = states

    optimizer.register_step_pre_hook(before)
    calls = internals.StepCalls()
    calls.record_scalers()
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    calls.release()
    assert len(failures) == 1 and "has no GradScaler._per_optimizer_states, used to" in failures[0]


def test_a_compiled_module_is_unwrapped() -> None:
    module = nn.Linear(1, 1)
    assert internals.uncompiled(module) is module
    assert internals.uncompiled(torch.compile(module, backend="eager")) is module


def test_fused_optimizers_take_a_scale() -> None:
    parameter = nn.Parameter(torch.ones(1))
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
        assert internals.takes_grad_scale(kind([parameter], fused=True))
        assert not internals.takes_grad_scale(kind([parameter], foreach=True))


def keras_cases(own: Any) -> dict[str, tuple[str, Callable[[], object]]]:
    """Return function -> the member's name, and the call on an object that lacks it."""
    return {
        "all_layers": ("_flatten_layers", lambda: own.all_layers(NOTHING)),
        "child_layers": ("_flatten_layers", lambda: own.child_layers(NOTHING)),
        "stored_value": ("_value", lambda: own.stored_value(NOTHING)),
        "learning_rate_of": ("_learning_rate", lambda: own.learning_rate_of(NOTHING)),
        "apply_count": ("_iterations", lambda: own.apply_count(NOTHING)),
        "trained_variables": ("_trainable_variables", lambda: own.trained_variables(NOTHING)),
        "place_of": ("_get_variable_index", lambda: own.place_of(NOTHING, None)),
        "check_known": ("_check_variables_are_known", lambda: own.check_known(NOTHING, [])),
        "accumulated_gradients": (
            "_accumulated_gradients",
            lambda: own.accumulated_gradients(NOTHING),
        ),
        "moments_of": ("_trainable_variables", lambda: list(own.moments_of(NOTHING, 1))),
        "build_from_spec": ("_symbolic_build", lambda: own.build_from_spec(NOTHING, None)),
        "nodes_of": ("_nodes_by_depth", lambda: own.nodes_of(NOTHING)),
    }


def test_missing_members_of_keras_are_one_sentence() -> None:
    keras = pytest.importorskip("keras")
    from karikomi.keras import internals as own

    cases = keras_cases(own)
    # Without the member: the public kernel, no layout, no saved configuration.
    elsewhere = {"kernel_of", "layout_of", "set_saved_optimizer", "needs_merge_call"}
    # Classes of Keras' own modules, which are found below.
    elsewhere |= {"graph_of", "trusted_functions", "without_autocast"}
    assert public(own) == cases.keys() | elsewhere
    for member, call in cases.values():
        expected = rf"^karikomi.keras.internals: keras {keras.__version__} has no \S+\.{member}, "
        with pytest.raises(Unsupported, match=expected):
            call()


def test_members_of_keras_are_found() -> None:
    keras = pytest.importorskip("keras")
    from karikomi.keras import internals as own

    dense = keras.layers.Dense(1)
    model = keras.Sequential([keras.Input((2,)), dense])
    optimizer = keras.optimizers.Adam(gradient_accumulation_steps=2)
    optimizer.build(model.trainable_variables)
    with own.without_autocast():
        pass
    assert own.all_layers(model)[0] is model and dense in own.child_layers(model)
    assert own.kernel_of(dense) is model.trainable_variables[0]
    assert [node.operation for node in own.nodes_of(own.graph_of(model))] == [dense]
    assert own.graph_of(dense) is None
    with own.trusted_functions():
        assert keras.saving.serialize_keras_object(dense)["class_name"] == "Dense"
    assert own.stored_value(dense.bias) is not None
    assert int(keras.ops.convert_to_numpy(own.apply_count(optimizer))) == 0
    assert own.trained_variables(optimizer) == model.trainable_variables
    assert own.place_of(optimizer, dense.bias) == 1
    assert len(own.accumulated_gradients(optimizer)) == 2
    assert len(list(own.moments_of(optimizer, 2))) == 3  # accumulated gradients and two moments
    with pytest.raises(ValueError, match="Unknown variable"):
        own.check_known(optimizer, [keras.Variable([1.0])])


def test_a_missing_member_of_tensorflow_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    tf = pytest.importorskip("tensorflow")
    from karikomi.keras import internals as own

    assert own.needs_merge_call() in (True, False)
    monkeypatch.delattr(tf.__internal__.distribute, "strategy_supports_no_merge_call")
    expected = r"tensorflow \S+ has no \S+strategy_supports_no_merge_call, used to branch"
    with pytest.raises(Unsupported, match=expected):
        own.needs_merge_call()
