"""A callback for Lightning's Trainer, of either of its two packages.

`lightning.pytorch` and `pytorch_lightning` have a `Callback` each, and do not accept each other's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Unpack

from karikomi.errors import InvalidArgument, Unavailable, Unsupported
from karikomi.plugins.scalars import PREFIX
from karikomi.plugins.trainer_handle import Attaching, Options, curves, flattened, joined

if TYPE_CHECKING:
    from karikomi.torch import Handle

_NAME = "LightningCallback"
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_OF_THE_MODULE = {"log", "log_dict"}  # its methods, which Lightning sets on all callbacks
_FLATTENED = {"FSDPStrategy", "XLAFSDPStrategy"}


class LightningCallback(Attaching):
    """Clip, bound and prune in a Lightning Trainer: `kk.torch.attach` at the right moments.

    ::

        import lightning.pytorch as pl          # or: import pytorch_lightning as pl

        callback = kk.plugins.LightningCallback(clip=kk.clip.ZClip())
        pl.Trainer(callbacks=[callback]).fit(module, data)
        print(callback.handle.last)

    Takes the options of `kk.torch.attach` (`clip`, `update`, `bound`, `prune`, `nonfinite`, `stop_after`,
    `record`), and attaches when a fit starts, after the optimizers are made. `optimizers`: which of the
    module's optimizers, by index; several in a sequence step together and share a joint norm. By default
    each optimizer has a handle of its own, as in the manual optimisation of a GAN. The state is stored
    in Lightning's checkpoints, and a fit that is resumed from one continues bit for bit; a fit without one
    starts with fresh statistics. ``karikomi/norm``, ``karikomi/factor``, ``karikomi/clipped`` and
    ``karikomi/skipped`` (``karikomi/0/norm`` ... with several handles) are logged every ``log_every_n_steps``
    like the module's own values, and can be monitored. ``handles`` stay readable after the fit, in the process
    that trained; copies and pickles (``strategy="ddp_spawn"``) have none.

    Masks also hold in what Lightning's own averages validate, save and leave at the end (`WeightAveraging`,
    `EMAWeightAveraging`, `StochasticWeightAveraging`), wherever they are in the list of callbacks.

    Without `clip` and `update` it measures and skips bad steps, and the Trainer may clip: its clip is
    first, so the measured norm is the clipped one, and pruned weights are still in the Trainer's norm. A NaN in
    a gradient then makes that norm, and so all gradients, NaN: the step is still skipped, but all tensors are
    named. Clipping by value makes infinite entries finite, and such a step is taken.

    Raises `Unavailable` if neither `lightning.pytorch` nor `pytorch_lightning` has been imported (if both have
    been, the callback is one of either); `InvalidArgument` for options that do not exist. When a fit starts,
    raises `Unsupported` if there is a `clip` or `update` and ``Trainer(gradient_clip_val=)`` or
    ``configure_gradient_clipping`` would clip as well, for FSDP1 and DeepSpeed, without an optimizer, and
    the errors of `kk.torch.attach`; warns if the checkpoint has no state of this callback.

    A module that calls ``self.clip_gradients`` by hand clips as well, which is not detected.
    """

    def __new__(cls, **options: Any) -> LightningCallback:
        """Create a callback of a subclass of the trainer's own."""
        hosts = _hosts()
        return object.__new__(cls if issubclass(cls, hosts) else _joined_once(cls, hosts))

    def __init__(
        self, *, optimizers: int | Sequence[int] | None = None, **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        self.handles: list[Handle] = []
        """Handles of the last fit: one per optimizer, or one for all that were chosen."""
        self._chosen = optimizers
        self._saved: list[dict[str, Any]] | None = None
        self._logged: list[int] = []
        self._fitting = self._restored = False

    @property
    def handle(self) -> Handle | None:
        """The first handle, and the only one without several optimizers."""
        return self.handles[0] if self.handles else None

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint, which depends on `optimizers`."""
        name = type(self).__qualname__
        return name if self._chosen is None else f"{name}(optimizers={self._chosen})"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raise `Unsupported` early for an unsupported strategy or a second clip."""
        self._saved = None
        if stage == "fit":
            _check_strategy(trainer)
            if self._clips:
                _check_clipping(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers, which exist from here on."""
        self._detach()
        self.handles = []
        for group in _groups(trainer.optimizers, self._chosen):
            self.handles.append(self._attach(group, pl_module))
        self._logged = [0] * len(self.handles)
        self._check_saved()
        self._fitting, self._restored = True, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue from the checkpoint, when other callbacks have given the optimizers their parameters."""
        self._restore()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Warn if the fit continues from a checkpoint without the statistics."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            self._warn_of_no_state()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any, **more: Any) -> None:
        """Log the last step, at the steps that the trainer logs."""
        # As in Lightning's own monitors; reading numbers may wait for a device.
        if trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._curves())

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Mask averaged weights, which are validated in place of the module's."""
        self._mask(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Mask averaged weights, and those of the module if another callback has written them."""
        self._mask(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Mask averaged weights before or after they become those of the module."""
        self._mask(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach the hooks; weights that other callbacks have written since are masked again."""
        if self._fitting and not self._restored:
            self._restore()  # a checkpoint of a fit that was complete
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach the hooks: Lightning does not call `teardown` after an exception."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all handles; there are none before the first fit."""
        return {"handles": [handle.state_dict() for handle in self.handles]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the state until there are handles to load it into."""
        self._saved = state_dict["handles"]
        # Some strategies restore after the fit has started, and tuners during it.
        if self._fitting:
            self._restore()

    def _apart(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in _OF_THE_MODULE}
        return kept | {"handles": [], "_logged": [], "_fitting": False}

    def _check_saved(self) -> None:
        if self._saved and len(self._saved) != len(self.handles):
            raise Unsupported(
                "the checkpoint is of another number of optimizers",
                where=type(self).__name__,
                got=len(self._saved),
                allowed=len(self.handles),
            )

    def _restore(self) -> None:
        self._restored = True
        if not self._saved:
            return
        self._check_saved()
        for handle, state in zip(self.handles, self._saved, strict=True):
            handle.load_state_dict(state)
        self._logged = [handle.steps for handle in self.handles]

    def _curves(self) -> dict[str, float]:
        logged = {}
        for place, handle in enumerate(self.handles):
            if handle.steps == self._logged[place]:
                continue
            self._logged[place] = handle.steps
            prefix = f"{PREFIX}{place}/" if len(self.handles) > 1 else PREFIX
            logged |= {prefix + name.removeprefix(PREFIX): n for name, n in curves(handle).items()}
        return logged

    def _mask(self, trainer: Any, pl_module: Any) -> None:
        if not self._fitting:
            return
        for handle in self.handles:
            if handle.masks is None:
                continue
            for module in (pl_module, *_averages(trainer)):
                handle.masks.apply_(module)

    def _detach(self) -> None:
        self._fitting = False
        for handle in self.handles:
            handle.detach()


def _hosts() -> tuple[type, ...]:
    callbacks = [getattr(sys.modules.get(name), "Callback", None) for name in _PACKAGES]
    hosts = tuple(callback for callback in callbacks if callback is not None)
    if not hosts:
        raise Unavailable(
            "no Lightning has been imported, and its two packages have different callbacks",
            where=_NAME,
            hint=f"import {' or '.join(_PACKAGES)} first, the package of your Trainer",
        )
    return hosts


@cache
def _joined_once(cls: type, hosts: tuple[type, ...]) -> type:
    # Lightning compares types: a module's callbacks replace those of the trainer of the same type.
    return joined(cls, hosts)


def _averages(trainer: Any) -> list[Any]:
    """Return the averaged modules of Lightning's own callbacks (`WeightAveraging`, `StochasticWeightAveraging`)."""
    found = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [module for module in found if module is not None]


def _check_clipping(trainer: Any, module: Any) -> None:
    if trainer.gradient_clip_val:
        raise Unsupported(
            f"the Trainer clips as well, to gradient_clip_val={trainer.gradient_clip_val}",
            where=_NAME,
            hint="omit gradient_clip_val=, or this callback's clip= and update=",
        )
    name = "configure_gradient_clipping"
    owner = next((kind for kind in type(module).__mro__ if name in kind.__dict__), None)
    if owner is not None and not owner.__module__.startswith(_PACKAGES):
        raise Unsupported(
            f"{type(module).__name__}.{name} would clip as well",
            where=_NAME,
            hint="remove it; to read gradients, use on_before_optimizer_step",
        )


def _check_strategy(trainer: Any) -> None:
    strategies = {item.__name__ for item in type(trainer.strategy).__mro__}
    if strategies & _FLATTENED:
        raise flattened(_NAME)
    if "DeepSpeedStrategy" in strategies:
        raise Unsupported(
            "DeepSpeed's engine does not expose the gradients, so no rule can be applied",
            where=_NAME,
            hint="use its gradient_clipping setting, or train with DDP or FSDP2 (ModelParallelStrategy)",
        )


def _groups(optimizers: Sequence[Any], chosen: int | Sequence[int] | None) -> list[list[Any]]:
    """Return the optimizers of each handle."""
    # Lightning's placeholder for None.
    if not optimizers or type(optimizers[0]).__name__ == "_MockOptimizer":
        raise Unsupported("configure_optimizers returned no optimizer", where=_NAME)
    if chosen is None:
        return [[optimizer] for optimizer in optimizers]
    places = [chosen] if isinstance(chosen, int) else list(chosen)
    for place in places:
        if place not in range(len(optimizers)):
            raise InvalidArgument(
                "there is no such optimizer",
                where=f"{_NAME}(optimizers)",
                got=repr(place),
                allowed=f"0 to {len(optimizers) - 1}",
            )
    return [[optimizers[place] for place in places]]
