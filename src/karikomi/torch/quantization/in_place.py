"""Quantize the tensors of a torch module in place, and keep the codes for the packed file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.quantize.every_tensor import Codes, Eligible
from karikomi.select import NOT_SELECTED, select
from karikomi.torch.facts.gradients import Loss
from karikomi.torch.modules import codes
from karikomi.torch.modules.parameters import by_any_name, check_values, unwrapped
from karikomi.torch.quantization.eligible import eligible
from karikomi.torch.quantization.rounding import Request, Rounding
from karikomi.torch.tracing.restoring import restored_unless_kept

WHERE = "torch.quantize_"


@torch.no_grad()
def quantize_(
    module: nn.Module,
    *,
    bits: int | float | None = None,
    entries: int | None = None,
    rate: float | None = None,
    method: Any = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    group: int | None = None,
    symmetric: bool = True,
    range: str = "max",
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Codes:
    """Round the tensors of a module to grids in place, and return name -> codes and grid.

    Exactly one of three sizes. `bits` (2..16): a uniform grid per output unit, ``w = scale * round(w / scale)``; with
    `data` also a float such as 4.5, the mean width of weights whose tensors have 2 to 8 bits each, by curvature.
    `entries`: a codebook of so many non-zero values per tensor by 1-D k-means (weight sharing). `rate`: so many bits
    per number in an entropy coder of order 0, tables included, in the mean of all that is coded; each weight tensor
    has one step, ``factor / sqrt(curvature)``, and the factor is searched; it is met within 2 %.

    Every tensor is quantized: weights of Linear, Conv, transposed and grouped ones, embeddings, recurrent and
    attention kernels, parameters of no known layer, and what a layer computes its weight from (``weight_norm``,
    ``spectral_norm``). Biases, gains of norms, other vectors and the statistics of batch norms get a grid that costs no
    accuracy: 16 bits a tensor, for a `rate` 8; variances equal ratios. Integer buffers and what no rule is known for
    stay; the result's ``left_alone`` names them. Zeros, as pruning makes them, stay exact zeros. `only` and `exclude`
    (globs) select. `kk.save` then stores codes instead of floats, and `kk.load` gives float32 arrays.

    `method`: a registered quantizer, by name or as an object: ``"uniform"``, ``"kmeans"``, and with `data` ``"gptq"``,
    ``"cerwu"`` and ``"adaround"``, which compensate the errors layer by layer; by default ``"kmeans"`` for `entries`,
    ``"gptq"`` for a `rate` with data, else ``"uniform"``. `data`: batches of inputs, ``(inputs, targets)`` or inputs
    alone, read several times: some hundred examples in random order, as the network is used; for ``"kmeans"`` they
    weigh the weights. `loss`: ``(outputs, targets) -> a mean``, for these and for the steps of a `rate`; by default
    the change of the outputs counts, and with cross-entropy and no targets labels are drawn from the network. `seed`
    is for these. `group`: so many consecutive weights of a unit have a scale of their own. `symmetric`: no zero point.
    `range`: "max", "percentile" or "mse", see `kk.quantize.UniformQuantizer`. `progress`: bars on a terminal.

    Prune, shrink and fold first: a changed weight has no code. An output unit of a grouped transposed convolution is
    one output channel of one group. After an error, all tensors are as before.

    Raises `InvalidArgument` for no or several sizes and for options that the method does not take, `UnknownName` for an
    unknown method, `Unsupported` where nothing can be quantized or a rate is out of reach, `NonFinite` naming a tensor.

    >>> import torch, karikomi as kk
    >>> layer = torch.nn.Linear(4, 2)
    >>> coded = quantize_(layer, bits=8)
    >>> list(coded), bool(torch.equal(layer.weight, torch.from_numpy(coded["weight"].decode())))
    (['weight', 'bias'], True)

    Source: per-channel symmetric grids as in ONNX Runtime and LiteRT; codebooks after Han, Mao and Dally 2016; the
    steps of a rate in `karikomi.quantize.steps`. Deviation: zero is a code of its own, so that pruned weights survive.
    """
    inner = unwrapped(module)
    options = {"group": group, "symmetric": symmetric, "range": range}
    request = Request.of(
        bits=bits,
        entries=entries,
        rate=rate,
        method=method,
        data=data,
        options=options,
        where=WHERE,
    )
    check_values(dict(inner.named_parameters()), where=WHERE)
    found = eligible(inner)
    _check_some(found)
    chosen = select(
        found.all,
        only=by_any_name(module, only),
        exclude=by_any_name(module, exclude),
        where=WHERE,
    )
    tensors = {name: found.all[name] for name in chosen}
    with restored_unless_kept(lambda: tensors) as snapshot:
        rounding = Rounding(
            inner, found, tensors, snapshot.copies, request, loss=loss, seed=seed, progress=progress
        )
        coded = rounding.run_()
        snapshot.keep()
    codes.add_(inner, coded)
    unselected = {name: NOT_SELECTED for name in found.all if name not in coded}
    ordered = {name: coded[name] for name in chosen}
    return Codes(ordered, {**found.left_alone, **unselected}, rounding.notes)


def _check_some(found: Eligible[torch.Tensor]) -> None:
    if not found.all:
        raise Unsupported(
            "nothing of this can be quantized",
            where=WHERE,
            got="; ".join(f"{n}: {why}" for n, why in list(found.left_alone.items())[:3])
            or "a module without parameters",
            allowed="floating parameters with values",
        )
