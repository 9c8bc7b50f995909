"""One kernel of a layer re-fitted: its dense outputs that stay, regressed on the inputs that are left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from karikomi.keras.labelling.kept import KeptWeights
from karikomi.keras.layers.codes import floats_of
from karikomi.keras.reconstruction.linear_reads import Letters
from karikomi.keras.reconstruction.weight_reads import ENTRIES, LayerCall, Reader
from karikomi.reconstruction.affine_fit import AffineFit
from karikomi.shrink.account import Refit
from karikomi.shrink.refit_outcome import is_kept, too_wide


@dataclass(frozen=True, slots=True)
class Side:
    """A layer of one of the two models, its call on all examples, and the kernel and bias there."""

    layer: Any
    call: LayerCall
    kernel: Any

    @property
    def bias(self) -> Any:
        """The bias whose entries are the rows of the kernel, in this order, or nothing."""
        if self.kernel.name == "depthwise_kernel" and hasattr(self.layer, "pointwise_kernel"):
            return None
        bias = getattr(self.layer, "bias", None)
        if isinstance(self.layer, keras.layers.EinsumDense) and bias is not None:
            equation, letters = self.layer.equation, Letters.of(self.layer.equation)
            axes = [n for n in equation.partition("->")[2] if n in (self.layer.bias_axes or "")]
            return bias if "".join(axes) == letters.groups + letters.units else None
        return bias


class KernelRefit:
    """A regression of the outputs of one kernel, over the examples."""

    def __init__(
        self, reader: Reader, dense: Side, small: Side, stays: KeptWeights, held: np.ndarray
    ) -> None:
        self._reader, self._dense, self._small, self._held = reader, dense, small, held
        self._before = reader.seen(dense.layer, dense.call)
        self._after = reader.seen(small.layer, small.call)
        self._wide = reader.matrix(dense.layer).of(floats_of(dense.kernel))
        self._matrix = reader.matrix(small.layer)
        self._rows = _kept_rows(stays, reader, dense, small)

    @property
    def why(self) -> str:
        """Why it is not tried, or nothing."""
        both = (self._small.kernel, self._small.bias)
        if any(getattr(variable, "constraint", None) is not None for variable in both):
            return "it has a constraint"
        return too_wide(self._matrix.of(floats_of(self._small.kernel)).shape[1])

    def changed(self, apart: Any) -> bool:
        """Return whether the inputs lack entries, or are others."""
        return apart(self._before, self._after)

    def run_(self, lost: np.ndarray | None, *, norm: Any) -> Refit:
        """Re-fit kernel and bias in place where it helps on what is held out.

        `lost`: (examples, positions, rows), added to the targets. `norm`: the batch normalisation whose mean takes the
        constants with the other sign where there is no bias.
        """
        bias, mean = self._small.bias, None
        if bias is None and norm is not None:
            mean = norm.moving_mean
        rows = self._matrix.of(floats_of(self._small.kernel))
        constants = np.zeros(len(rows)) if bias is None else floats_of(bias).reshape(-1)
        fit, judge = AffineFit(), AffineFit()
        for part, sums in ((~self._held, fit), (self._held, judge)):
            self._add(sums, np.flatnonzero(part), constants, lost)
        free = bias is not None or mean is not None
        new, shifts = fit.solved(rows, free=free, where=self._small.layer.path)
        before, after = judge.error(rows, constants), judge.error(new, shifts)
        if not is_kept(before, after):
            return Refit(before, after)
        _assign(self._small.kernel, self._matrix.restored(new, tuple(self._small.kernel.shape)))
        if bias is not None:
            _assign(bias, shifts.reshape(tuple(bias.shape)))
        elif mean is not None:
            _assign(mean, floats_of(mean) - shifts)
        return Refit(before, after, kept=True)

    def _add(
        self, sums: AffineFit, places: np.ndarray, constants: np.ndarray, lost: np.ndarray | None
    ) -> None:
        for some in np.array_split(places, max(self._parts(len(places)), 1)):
            if not len(some):
                continue
            blocks = [
                np.concatenate(list(self._reader.blocks(side.layer, values[some])), axis=1)
                for side, values in ((self._dense, self._before), (self._small, self._after))
            ]
            dense, small = blocks
            groups, count, _ = small.shape
            weights = self._wide.reshape(len(dense), -1, dense.shape[2]).astype(dense.dtype)
            outputs = np.moveaxis(dense @ weights.swapaxes(1, 2), 0, 1).reshape(count, -1)
            targets = outputs[:, self._rows] + constants
            if lost is not None:
                targets = targets + lost[some].reshape(targets.shape)
            sums.add(small, np.moveaxis(targets.reshape(count, groups, -1), 1, 0))

    def _parts(self, examples: int) -> int:
        """Return in how many parts the examples are read, so that the patches of one fit in memory."""
        entries = math.prod(self._before.shape[1:]) * math.prod(
            getattr(self._dense.layer, "kernel_size", (1,))
        )
        return math.ceil(examples * entries / ENTRIES)


def _kept_rows(stays: KeptWeights, reader: Reader, dense: Side, small: Side) -> np.ndarray:
    """Return the number of the dense row for each row that stays."""
    shape = tuple(map(int, dense.kernel.shape))
    matrix = reader.matrix(dense.layer)
    height = matrix.of(np.empty(shape)).shape[0]
    numbers = np.broadcast_to(np.arange(height)[:, None], (height, math.prod(shape) // height))
    left = stays.cut(dense.kernel, matrix.restored(numbers, shape))
    return reader.matrix(small.layer).of(left)[:, 0]


def _assign(variable: Any, values: np.ndarray) -> None:
    variable.assign(values)
