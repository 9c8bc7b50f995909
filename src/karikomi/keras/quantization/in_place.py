"""Quantize the weights of a Keras model in place, and keep the codes for the packed file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.errors import Unsupported
from karikomi.keras.arrays.variables import names_of, on_host
from karikomi.keras.layers import codes
from karikomi.keras.layers.unit_axes import weights_of
from karikomi.keras.quantization.output_units import output_units, why_not
from karikomi.quantize import Coded, quantizer_for
from karikomi.select import NOT_SELECTED, select

WHERE = "keras.quantize_"


class Codes(dict[str, Coded]):
    """Path of a variable -> codes and grid; `left_alone`: path -> why a variable stays as it is."""

    def __init__(self, coded: Mapping[str, Coded], left_alone: Mapping[str, str]) -> None:
        super().__init__(coded)
        self.left_alone = dict(left_alone)


def quantize_(
    model: Any,
    *,
    bits: int | None = None,
    entries: int | None = None,
    method: str | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Codes:
    """Round the weights of a built model to a grid in place, and return path -> codes and grid.

    `bits` (2..16): a symmetric uniform grid per output unit, ``w = scale * round(w / scale)``.
    `entries`: a codebook of so many non-zero values per variable by 1-D k-means (weight sharing). Exactly
    one of the two. `method`: the name of a registered quantizer, by default ``"uniform"`` for `bits` and
    ``"kmeans"`` for `entries`. Zeros stay exact zeros, so masks of pruning hold.

    Any model or layer on any backend: the kernels of Dense, EinsumDense (and so of attention), of
    convolutions of every kind and of recurrent cells, embeddings, and matrices of unknown layers (with one scale) that
    `only` and `exclude` (globs over paths) leave; a variable that layers share once. The result's
    ``left_alone`` has the reasons for all other variables: biases, normalisations, statistics.
    Variables keep their dtype, and a compiled model stays compiled. `kk.save` then stores the
    codes instead of floats, and ``kk.load(path, into=model)`` fills a model with the same values. Prune and train
    first: a changed weight has no code.

    Raises `InvalidArgument` for a model that is not built, for both or none of the two, or a method that takes the
    other one, `UnknownName` for an unknown method or glob, `Unsupported` where nothing can be quantized, `NonFinite`
    naming a variable; the model is then as before.

    >>> import keras, numpy as np
    >>> head = keras.layers.Dense(2, name="head")
    >>> model = keras.Sequential([keras.Input((4,)), head], name="net")
    >>> coded = quantize_(model, bits=8)
    >>> list(coded), coded.left_alone
    (['net/head/kernel'], {'net/head/bias': 'a bias'})
    >>> bool(np.array_equal(keras.ops.convert_to_numpy(head.kernel), coded["net/head/kernel"].decode()))
    True

    Source: per-channel symmetric grids as in ONNX Runtime and LiteRT; codebooks after Han, Mao and Dally
    2016. Deviation: zero is a code of its own, so that pruned weights survive.
    """
    quantize = quantizer_for(method, bits=bits, entries=entries, where=WHERE)
    found = weights_of(model, where=WHERE)
    named = dict(zip(names_of([item.variable for item in found]), found, strict=True))
    left_alone = {name: reason for name, item in named.items() if (reason := why_not(item))}
    chosen = [name for name in named if name not in left_alone]
    if not chosen:
        got = "; ".join(f"{name}: {reason}" for name, reason in list(left_alone.items())[:3])
        raise Unsupported("nothing of this can be quantized", where=WHERE, got=got)
    coded: dict[str, Coded] = {}
    for name in select(chosen, only=only, exclude=exclude, where=WHERE):
        array = codes.as_floats(on_host(named[name].variable))
        coded[name] = quantize(array, units=output_units(named[name]), name=name)
    for name, tensor in coded.items():
        codes.put(named[name].variable, tensor)
    return Codes(coded, left_alone | {name: NOT_SELECTED for name in chosen if name not in coded})
