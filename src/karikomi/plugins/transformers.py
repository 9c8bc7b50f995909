"""A callback and a mixin for the Trainer of Hugging Face transformers.

The callback does the work; the mixin is what a callback cannot be: a Trainer that logs the true norm.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Unpack

from karikomi.errors import Unavailable, Unsupported
from karikomi.plugins.attaching import Attaching, Options, curves, joined
from karikomi.plugins.json_state import from_json, to_json

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
    ``train(resume_from_checkpoint=...)`` goes on bit for bit, whatever
    ``restore_callback_states_from_checkpoint`` says; a training without it starts afresh. ``handle`` stays
    readable after the training; a copy and a pickle have none.

    Without `clip` and `update` (such as the class itself among the callbacks, which the Trainer makes without
    options) it measures and skips bad steps, and the Trainer may clip by ``max_grad_norm``: it
    goes first, so what is measured is what it left, and pruned weights are still in its norm.

    With ``max_grad_norm=0`` the Trainer measures and logs a ``grad_norm`` of its own before the step, which
    costs a pass (not with `TransformersMixin`). Measuring makes NaN of all gradients if that norm is not
    finite, clipping if it is NaN: bad steps are still skipped, but every tensor is named.

    The Trainer tells callbacks nothing of an exception, and the hooks stay on: call ``callback.detach()`` in
    a ``finally``, or use `TransformersMixin`, which does; the next ``train()`` with this callback does too.

    Raises `Unavailable` without transformers, and `InvalidArgument` for options that do not exist. When the
    training begins, raises `Unsupported` if there is a `clip` or `update` and ``max_grad_norm`` is not 0 (it is 1
    by default), for DeepSpeed and FSDP1, and for what `kk.torch.attach` refuses; warns if a checkpoint has no
    state of this callback.
    """

    def __new__(cls, **options: Any) -> TransformersCallback:
        """Make the callback one of transformers, or return the one that the class was made for."""
        made = cls.__dict__.get("_made")
        if made is None:
            # A class for each callback: on resume the Trainer calls it, to replace the callback
            # by one made of JSON, which rules and recorders are not; it gets the same one again.
            own = joined(cls, _hosts())
            made = object.__new__(own)
            own._made = made  # pyright: ignore[reportAttributeAccessIssue]
        return made

    def __init__(self, **options: Unpack[Options]) -> None:
        if "handle" in self.__dict__:
            return
        super().__init__(**options)
        self.handle: Handle | None = None
        """Of the last training."""

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
        """Take the hooks off."""
        self.detach()

    def detach(self) -> None:
        """Take the hooks off, if they are on."""
        if self.handle is not None:
            self.handle.detach()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into a checkpoint."""
        kept = {} if self.handle is None else {_KEPT: to_json(self.handle.state_dict())}
        return {"args": {}, "attributes": {}, **kept}

    def _apart(self) -> dict[str, Any]:
        return self.__dict__ | {"handle": None}

    def _resume(self, state: Any) -> None:
        stored = (state.stateful_callbacks or {}).get(type(self).__name__, {})
        if _KEPT not in stored:
            warnings.warn(
                "karikomi: the checkpoint has no state of this callback, so its statistics and steps start "
                "afresh",
                stacklevel=2,
            )
        elif self.handle is not None:
            self.handle.load_state_dict(from_json(stored[_KEPT]))


class TransformersMixin:
    """A transformers Trainer that logs the norm which `TransformersCallback` measured.

    ::

        class MyTrainer(kk.plugins.TransformersMixin, Trainer): ...

        arguments = TrainingArguments(..., max_grad_norm=0)
        callback = kk.plugins.TransformersCallback(clip=kk.clip.ZClip())
        MyTrainer(model, arguments, ..., callbacks=[callback]).train()

    Stands before the Trainer, and needs a `TransformersCallback` among its callbacks. ``grad_norm`` in the logs
    is the norm before the clip of the last step, by whichever of the two clips, and ``karikomi/factor``,
    ``karikomi/clipped`` and ``karikomi/skipped`` stand beside it, wherever the Trainer reports to. The Trainer's
    pass over the gradients that only measures is left out. The hooks are taken off after an exception too.

    Raises `Unsupported` when the training begins without such a callback, and for a class that names the
    Trainer first, whose own methods would then be found.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        before = cls.__mro__[: cls.__mro__.index(TransformersMixin)]
        if any(
            hasattr(previous, "train") and not issubclass(previous, TransformersMixin)
            for previous in before
        ):
            raise Unsupported(
                "the mixin stands behind the Trainer",
                where=cls.__name__,
                hint=f"class {cls.__name__}(kk.plugins.TransformersMixin, Trainer)",
            )

    def train(self, *args: Any, **more: Any) -> Any:
        """Train as the Trainer does, and leave no hooks behind."""
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
        """Log as the Trainer does, and of a training step the true norm."""
        callback = self._callback()
        handle = None if callback is None else callback.handle
        if "loss" in logs and handle is not None and handle.last is not None:
            # Where the Trainer clips it has put its own norm there, and `pre` is what it left.
            logs.setdefault("grad_norm", handle.last.pre)
            logs.update(curves(handle))
        super().log(logs, *args, **more)  # pyright: ignore[reportAttributeAccessIssue]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Measure nothing: the norm is known after the step, or by the Trainer's own clip."""
        if grad_norm is None:
            return None
        return super()._get_grad_norm(model, grad_norm)  # pyright: ignore[reportAttributeAccessIssue]

    def _callback(self) -> TransformersCallback | None:
        callbacks = self.callback_handler.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        return next(
            (callback for callback in callbacks if isinstance(callback, TransformersCallback)), None
        )


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
