"""Find masked weights that something other than the optimizer's step has written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from torch import nn

from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.pruning.masks import Masks


class MaskCheck:
    """Whether the masks of a handle hold in its model; the first time that they do not, it warns.

    The model is also checked when its ``state_dict`` is made, and when it is copied or pickled, which is how it
    is saved.
    """

    def __init__(self, model: nn.Module, masks: Callable[[], Masks | None]) -> None:
        self._model, self._masks = model, masks
        self._warned = False
        self._hook: Any = None

    def begin(self) -> None:
        """Check whenever the model is saved, from now on."""
        if self._hook is None:
            hook = _BeforeSave(self.warn)
            self._hook = unwrapped(self._model).register_state_dict_pre_hook(hook)

    def sparsity(self) -> float:
        """Return the share of the weights with a mask that are masked and zero."""
        masks = self._masks()
        if masks is None:
            return 0.0
        counts, written = masks.counts(), self._written(masks)
        self._warn(written)
        removed = sum(count for count, _ in counts.values()) - sum(written.values())
        return removed / max(sum(size for _, size in counts.values()), 1)

    def warn(self) -> None:
        """Warn if masked weights are not zero, unless that was done before."""
        masks = self._masks()
        if masks is not None and not self._warned:
            self._warn(self._written(masks))

    def end(self) -> None:
        """Stop checking; set masked weights that were written to zero, with a warning."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        masks = self._masks()
        if masks is None or not (written := self._written(masks)):
            return
        masks.apply_(self._model)
        warnings.warn(f"karikomi: {_found(written)}; they are masked again now", stacklevel=3)

    def _written(self, masks: Masks) -> dict[str, int]:
        return masks.not_zero(self._model)

    def _warn(self, written: dict[str, int]) -> None:
        if not written or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"karikomi: {_found(written)}. The next step masks them again; until then "
            "handle.masks.apply_(model) does, and so for averaged copies of the model",
            stacklevel=4,
        )


class _BeforeSave:
    """A hook of one model: copies of the model, also pickled ones, have one that does nothing.

    A model that is copied or pickled as a whole is checked too: its hooks are reduced then, and no state dict is made.
    """

    def __init__(self, check: Callable[[], None] | None = None) -> None:
        self._check = None if check is None else WeakMethod(check)

    def __call__(self, *arguments: Any) -> None:
        check = None if self._check is None else self._check()
        if check is not None:
            check()

    def __reduce__(self) -> tuple[type[_BeforeSave], tuple[()]]:
        self()
        return _BeforeSave, ()


def _found(written: dict[str, int]) -> str:
    names = ", ".join([*list(written)[:3], *(["..."] if len(written) > 3 else [])])
    return (
        f"{sum(written.values()):,} masked weight(s) of {names} are not zero: something other than the "
        "optimizer's step has written them, such as a loaded checkpoint, an average of weights, or a wrapper "
        "of the optimizer"
    )
