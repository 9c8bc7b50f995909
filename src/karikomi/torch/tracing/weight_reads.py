"""Record which linear maps and convolutions read a weight, with their inputs and outputs.

Function calls are intercepted instead of modules: so a weight is found wherever a linear map or a
convolution reads it, in a layer, in a user's forward or in attention, once or several times.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from karikomi.torch.tracing.batches import leaves
from karikomi.torch.tracing.output_tracing import Trail
from karikomi.torch.tracing.recurrent_reads import CELLS, LAYERS, recurrent_inputs
from karikomi.torch.tracing.windows import TURNED, Window, window_of

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONV[:5], "output_padding", "groups", "dilation")
_SECOND = {"addmm": 2, "matmul": 1, "__matmul__": 1, "mm": 1}
"""Products whose weight is (inputs, units) -> its place among their arguments."""
_LAYERS = {
    "linear": _CONV[:3],
    **{f"conv{axes}d": _CONV for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": _TRANSPOSED for axes in (1, 2, 3)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A linear map, or a convolution if there is a `window`, by the weight `name`.

    `inputs`, `outputs`: in torch's layout; outputs are None if they cannot be observed. Of a product with a weight
    (inputs, units) they are (samples, features), and its window is `TURNED`.
    `part`: (index, count) of the equal blocks of rows that read these inputs (attention stacks three).
    """

    name: str
    weight: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor | None
    window: Window | None = None
    part: tuple[int, int] = (0, 1)


class WeightReadHooks(TorchFunctionMode):
    """Calls `on_read` for each reading of one of the weights while it is entered.

    `trail`: follows the outputs. `recurrent`: the kernels of recurrent layers are read too, by each step's inputs.
    `strays`: weight name -> another function that read it.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        on_read: Sequence[Callable[[Reading], None]],
        trail: Trail | None = None,
        *,
        recurrent: bool = False,
    ) -> None:
        super().__init__()
        self.strays: dict[str, str] = {}
        self._names = {id(weight): name for name, weight in weights.items()}
        self._on_read = on_read
        self._trail = trail
        self._recurrent = CELLS | LAYERS if recurrent else frozenset()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call, and report a reading of a weight."""
        kwargs = kwargs or {}
        called = getattr(func, "__name__", "")
        # Before the call: an operation in place would change the input's version.
        followed = self._trail.before(args) if self._trail else None
        result = func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            self._attention(func, args, kwargs, result)
        elif called in _LAYERS and isinstance(result, torch.Tensor):
            given = {**dict(zip(_LAYERS[called], args, strict=False)), **kwargs}
            self._layer(called, given, result)
        elif called in _SECOND and self._turned(called, args, kwargs, result):
            pass
        elif called in self._recurrent:
            self._recurring(func, called, args, kwargs)
        else:
            self._stray(called, args, kwargs, result)
        if self._trail and followed:
            self._trail.after(followed, called, kwargs, result)
        return result

    def _layer(self, called: str, given: dict[str, Any], result: torch.Tensor) -> None:
        weight = given["weight"]
        name = self._names.get(id(weight))
        if name is None:
            return
        window = None
        if called != "linear":
            geometry = {key: given[key] for key in given.keys() & {*_CONV[3:]}}
            transposed = called.startswith("conv_transpose")
            window = window_of(weight, result, transposed=transposed, **geometry)
        self._report(
            Reading(name=name, weight=weight, inputs=given["input"], outputs=result, window=window)
        )

    def _turned(self, called: str, args: tuple[Any, ...], kwargs: Any, result: Any) -> bool:
        """Report a product with a weight of shape (inputs, units), and return whether it is one."""
        place = _SECOND[called]
        weight: Any = args[place] if len(args) > place else None
        name = self._names.get(id(weight))
        scaled = any(kwargs.get(key, 1) != 1 for key in ("alpha", "beta"))
        if name is None or scaled or weight.dim() != 2:
            return False
        inputs = args[place - 1]
        rows = [part.reshape(-1, part.shape[-1]) for part in (inputs, result)]
        reading = Reading(name=name, weight=weight, inputs=rows[0], outputs=rows[1], window=TURNED)
        self._report(reading, result)
        return True

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for place, letter in enumerate(("query", "key", "value")):
            separate = given["use_separate_proj_weight"]
            weight = given[f"{letter[0]}_proj_weight" if separate else "in_proj_weight"]
            name = self._names.get(id(weight))
            if name is not None:
                part = (0, 1) if separate else (place, 3)
                self._report(
                    Reading(name=name, weight=weight, inputs=given[letter], outputs=None, part=part)
                )
        weight = given["out_proj_weight"]
        name = self._names.get(id(weight))
        if name is not None:
            # With an identity as its weight, the projection returns its inputs.
            given["out_proj_weight"] = torch.eye(
                len(weight), dtype=weight.dtype, device=weight.device
            )
            given["out_proj_bias"] = None
            inputs = func(*bound.args, **bound.kwargs)[0]
            self._report(Reading(name=name, weight=weight, inputs=inputs, outputs=result[0]))

    def _recurring(self, func: Any, called: str, args: tuple[Any, ...], kwargs: Any) -> None:
        weights = {id(tensor) for tensor in leaves(args)} & self._names.keys()
        for weight, inputs in recurrent_inputs(func, called, args, kwargs) if weights else ():
            name = self._names.get(id(weight))
            if name is not None:
                self._report(Reading(name=name, weight=weight, inputs=inputs, outputs=None))

    def _report(self, reading: Reading, result: torch.Tensor | None = None) -> None:
        """Report a reading; `result`: its outputs as the network has them, where they have another shape."""
        for on_read in self._on_read:
            on_read(reading)
        outputs = reading.outputs if result is None else result
        if self._trail and outputs is not None:
            axis = -1 - (len(reading.window.kernel) if reading.window else 0)
            self._trail.start(reading.name, axis, outputs)

    def _stray(self, called: str, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        for tensor in leaves((args, kwargs)):
            name = self._names.get(id(tensor))
            # Queries of a shape or a type are not readings.
            if name is not None and any(leaf is not tensor for leaf in leaves(result)):
                self.strays[name] = called
