"""A callback and a mixin for the Trainer of Hugging Face transformers.

The callback clips; the mixin overrides methods of the Trainer, which a callback cannot, to log the true norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from karikomi.errors import Unavailable, Unsupported
from karikomi.plugins.json_state import from_json, to_json
from karikomi.plugins.trainer_handle import Attaching, Options, curves, joined

if TYPE_CHECKING:
    from karikomi.torch import Handle

_KEPT = "karikomi"


class TransformersCallback(Attaching):
    """Clip, bound and prune in a transformers Trainer: `kk.torch.attach` when the training begins.

    ::

        arguments = TrainingArguments(..., max_grad_norm=0)
        callback = kk.plugins.TransformersCallback(clip=kk.clip.ZClip())
        Trainer(model, arguments, ..., callbacks=[callback]).train()
        print(callback.handle.last)

    Takes the options of `kk.torch.attach` (`clip`, `update`, `bound`, `prune`, `nonfinite`, `stop_after`,
    `record`). The state goes into ``trainer_state.json`` of every checkpoint, and
    ``train(resume_from_checkpoint=...)`` continues bit for bit, with any value of
    ``restore_callback_states_from_checkpoint``; a training without it starts with fresh statistics. ``handle``
    stays readable after the training; copies and pickles have none.

    Without `clip` and `update` (such as the class itself among the callbacks, which the Trainer instantiates
    without options) it measures and skips bad steps, and the Trainer may clip by ``max_grad_norm``: its clip
    is first, so the measured norm is the clipped one, and pruned weights are still in the Trainer's norm.

    With ``max_grad_norm=0`` the Trainer measures and logs a ``grad_norm`` of its own before the step, which
    costs a pass (not with `TransformersMixin`). Measuring sets all gradients to NaN if that norm is not
    finite, clipping if it is NaN: bad steps are still skipped, but all tensors are named.

    The Trainer does not notify callbacks of an exception, and the hooks stay attached: call
    ``callback.detach()`` in a ``finally``, or use `TransformersMixin`; the next ``train()`` with this callback
    detaches them too.

    Raises `Unavailable` without transformers, and `InvalidArgument` for options that do not exist. When the
    training begins, raises `Unsupported` if there is a `clip` or `update` and ``max_grad_norm`` is not 0 (it is 1
    by default), for DeepSpeed and FSDP1, and the errors of `kk.torch.attach`; warns if a checkpoint has no
    state of this callback.
    """

    def __new__(cls, **options: Any) -> TransformersCallback:
        """Create a callback of a subclass of transformers' own, or return the one of this subclass."""
        made = cls.__dict__.get("_made")
        if made is None:
            # A class for each callback: on resume the Trainer calls the class to create a callback from
            # JSON, which cannot contain rules and recorders; it gets the same callback again.
            subclass = joined(cls, _hosts())
            made = object.__new__(subclass)
            subclass._made = made  # pyright: ignore[reportAttributeAccessIssue]
        return made

    def __init__(self, **options: Unpack[Options]) -> None:
        if "handle" in self.__dict__:
            return
        super().__init__(**options)
        self.handle: Handle | None = None
        """The handle of the last training."""

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **more: Any,
    ) -> None:
        """Attach, and continue from the checkpoint if there is one."""
        if self._clips and args.max_grad_norm:
            raise Unsupported(
                f"the Trainer clips as well, to max_grad_norm={args.max_grad_norm} (1.0 by default)",
                where=type(self).__name__,
                hint="TrainingArguments(..., max_grad_norm=0), or leave out clip= and update=",
            )
        self.detach()
        self.handle = self._attach(optimizer, model)
        if state.global_step > 0:
            self._resume(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Detach the hooks."""
        self.detach()

    def detach(self) -> None:
        """Detach the hooks, if they are attached."""
        if self.handle is not None:
            self.handle.detach()

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer writes into a checkpoint."""
        kept = {} if self.handle is None else {_KEPT: to_json(self.handle.state_dict())}
        return {"args": {}, "attributes": {}, **kept}

    def _apart(self) -> dict[str, Any]:
        return self.__dict__ | {"handle": None}

    def _resume(self, state: Any) -> None:
        stored = (state.stateful_callbacks or {}).get(type(self).__name__, {})
        if _KEPT not in stored:
            self._warn_of_no_state()
        elif self.handle is not None:
            self.handle.load_state_dict(from_json(stored[_KEPT]))


class TransformersMixin:
    """A transformers Trainer that logs the norm measured by `TransformersCallback`.

    ::

        class MyTrainer(kk.plugins.TransformersMixin, Trainer): ...

        arguments = TrainingArguments(..., max_grad_norm=0)
        callback = kk.plugins.TransformersCallback(clip=kk.clip.ZClip())
        MyTrainer(model, arguments, ..., callbacks=[callback]).train()

    List it before the Trainer in the bases; it needs a `TransformersCallback` among the callbacks. ``grad_norm``
    in the logs is the norm before the clip of the last step, by the callback or by the Trainer, and
    ``karikomi/factor``, ``karikomi/clipped`` and ``karikomi/skipped`` are logged with it. The Trainer's
    pass over the gradients that only measures is skipped. The hooks are detached after an exception too.

    Raises `Unsupported` when the training begins without such a callback, and for a class that lists the
    Trainer first, which would hide the methods of the mixin.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        before = cls.__mro__[: cls.__mro__.index(TransformersMixin)]
        others = [base for base in before if not issubclass(base, TransformersMixin)]
        if any(hasattr(base, "train") for base in others):
            raise Unsupported(
                "the mixin is listed after the Trainer",
                where=cls.__name__,
                hint=f"class {cls.__name__}(kk.plugins.TransformersMixin, Trainer)",
            )

    def train(self, *args: Any, **more: Any) -> Any:
        """Train as the Trainer does, and detach the hooks afterwards."""
        callback = self._callback()
        if callback is None:
            raise Unsupported(
                "there is no callback that clips",
                where=type(self).__name__,
                hint="callbacks=[kk.plugins.TransformersCallback(clip=...)]",
            )
        try:
            return super().train(*args, **more)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            callback.detach()

    def log(self, logs: dict[str, float], *args: Any, **more: Any) -> None:
        """Log as the Trainer does, with the true norm of a training step."""
        handle = getattr(self._callback(), "handle", None)
        if "loss" in logs and handle is not None and handle.last is not None:
            # If the Trainer clips, this is its norm before the clip, and `pre` the norm after it.
            logs.setdefault("grad_norm", handle.last.pre)
            logs.update(curves(handle))
        super().log(logs, *args, **more)  # pyright: ignore[reportAttributeAccessIssue]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Skip the measurement: the norm comes from the step, or from the Trainer's own clip."""
        if grad_norm is None:
            return None
        return super()._get_grad_norm(model, grad_norm)  # pyright: ignore[reportAttributeAccessIssue]

    def _callback(self) -> TransformersCallback | None:
        callbacks = self.callback_handler.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        return next((item for item in callbacks if isinstance(item, TransformersCallback)), None)


def _hosts() -> tuple[type, ...]:
    try:
        from transformers.trainer_callback import (  # pyright: ignore[reportMissingImports]
            ExportableState,
            TrainerCallback,
        )
    except ImportError as error:
        raise Unavailable(
            f"transformers is not installed ({error})", hint="pip install transformers[torch]"
        ) from error
    return TrainerCallback, ExportableState
