"""Quantize the weights of a Keras model in place, and keep the codes for the packed file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from karikomi.errors import Unsupported
from karikomi.keras.arrays.variables import names_of, on_host
from karikomi.keras.facts.layer_calls import check_data
from karikomi.keras.layers import codes
from karikomi.keras.layers.unit_axes import Weight, weights_of
from karikomi.keras.quantization import compensated
from karikomi.keras.quantization.eligible import Eligible, eligible
from karikomi.keras.quantization.output_units import output_units
from karikomi.quantize import Coded, octaves, uniform
from karikomi.quantize.method import Method
from karikomi.select import NOT_SELECTED, select

WHERE = "keras.quantize_"
VECTOR_BITS, PER_OCTAVE = 16, 64


class Codes(dict[str, Coded]):
    """Path of a variable -> codes and grid; `left_alone`: path -> why a variable stays as it is.

    `notes`: path -> why a weight was rounded to the nearest values by a method that compensates, or with more damping.
    """

    def __init__(
        self,
        coded: Mapping[str, Coded],
        left_alone: Mapping[str, str],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(coded)
        self.left_alone = dict(left_alone)
        self.notes = dict(notes or {})


def quantize_(
    model: Any,
    *,
    bits: int | None = None,
    entries: int | None = None,
    method: Any = None,
    data: Iterable[Any] | None = None,
    group: int | None = None,
    symmetric: bool = True,
    range: str = "max",
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    progress: bool = True,
) -> Codes:
    """Round the variables of a built model to grids in place, and return path -> codes and grid.

    Exactly one of two sizes. `bits` (2..16): a uniform grid per output unit, ``w = scale * round(w / scale)``.
    `entries`: a codebook of so many non-zero values per variable by 1-D k-means (weight sharing).

    Any model or layer on any backend, functional, subclassed or nested. Every variable is quantized, one that layers
    share once: the kernels of Dense, EinsumDense (and so of attention), convolutions of every kind and recurrent
    cells, embeddings, and matrices of more than 256 entries of layers that are not known. Biases, gains of norms, other
    vectors and the statistics of batch norms get a grid that costs no accuracy: 16 bits a variable; variances equal
    ratios. What stays (integers, statistics of ``Normalization``, layers that Keras has quantized) is in the result's
    ``left_alone`` with the reason. Zeros, as pruning makes them, stay exact zeros. `only` and `exclude` (globs over
    paths) select. Variables keep their dtype, and a compiled model stays compiled. `kk.save` then stores codes
    instead of floats, and ``kk.load(path, into=model)`` fills a model with the same values.

    `method`: a registered quantizer, by name or as an object: ``"uniform"``, ``"kmeans"``, and with `data` ``"gptq"``
    and others that compensate the errors layer by layer, in the order of the layers: kernels of Dense, EinsumDense,
    convolutions and recurrent layers; ``notes`` of the result has what they cannot compensate. By default
    ``"kmeans"`` for `entries`, else ``"uniform"``. `data`: batches ``(inputs, targets)`` or inputs, that can be read
    again: some hundred examples in random order, as the model is used. `group`, `symmetric`, `range`: see
    `kk.quantize.UniformQuantizer`.

    Prune, shrink and train first: a changed weight has no code. After an error, the model is as before.

    Raises `InvalidArgument` for a model that is not built, for both or none of the sizes, and for options that the
    method does not take, `UnknownName` for an unknown method or glob, `Unsupported` where nothing can be
    quantized, `NonFinite` naming a variable.

    >>> import keras, numpy as np
    >>> head = keras.layers.Dense(2, name="head")
    >>> model = keras.Sequential([keras.Input((4,)), head], name="net")
    >>> coded = quantize_(model, bits=8)
    >>> {path: tensor.grid.bits for path, tensor in coded.items()}
    {'net/head/kernel': 8, 'net/head/bias': 16}
    >>> bool(np.array_equal(keras.ops.convert_to_numpy(head.kernel), coded["net/head/kernel"].decode()))
    True

    Source: per-channel symmetric grids as in ONNX Runtime and LiteRT; codebooks after Han, Mao and Dally 2016; GPTQ
    after Frantar et al. 2023. Deviation: zero is a code of its own, so that pruned weights survive.
    """
    options = {"group": group, "symmetric": symmetric, "range": range}
    sizes = {"bits": bits, "entries": entries}
    chosen = Method.of(method, sizes, options, data=data is not None, where=WHERE)
    if data is not None:
        check_data(data, where=WHERE)
    items = weights_of(model, where=WHERE)
    named = dict(zip(names_of([item.variable for item in items]), items, strict=True))
    found = _checked(eligible(named))
    names = select(found.all, only=only, exclude=exclude, where=WHERE)
    coded = {name: _vector(found, name) for name in names if name not in found.weights}
    weights = {name: found.weights[name] for name in names if name in found.weights}
    coded |= {name: _nearest(chosen, name, item) for name, item in weights.items()}
    notes: dict[str, str] = {}
    with _restored_after_an_error([found.all[name] for name in names]):
        for name in names:
            if name not in weights or not chosen.compensates:
                codes.assign(named[name].variable, coded[name])
        if chosen.compensates and weights:
            nearest = {name: coded[name] for name in weights}
            done, notes = compensated.round_(
                model,
                weights,
                nearest,
                chosen.quantizer,
                data or (),
                progress=progress,
                where=WHERE,
            )
            coded |= done
    for name in names:
        codes.put(named[name].variable, coded[name])
    unselected = {name: NOT_SELECTED for name in found.all if name not in coded}
    ordered = {name: coded[name] for name in named if name in coded}
    return Codes(ordered, {**found.left_alone, **unselected}, notes)


def _checked(found: Eligible) -> Eligible:
    if not found.all:
        reasons = [f"{name}: {reason}" for name, reason in found.left_alone.items()]
        raise Unsupported(
            "nothing of this can be quantized", where=WHERE, got="; ".join(reasons[:3])
        )
    return found


def _nearest(method: Method, name: str, weight: Weight) -> Coded:
    array = codes.as_floats(on_host(weight.variable))
    return method.quantizer.quantize(array, method.size, units=output_units(weight), name=name)


def _vector(found: Eligible, name: str) -> Coded:
    array = codes.as_floats(on_host(found.all[name].variable))
    if name in found.variances:
        return octaves(array, per_octave=PER_OCTAVE, name=name)
    return uniform(array, bits=VECTOR_BITS, axis=None, name=name)


@contextmanager
def _restored_after_an_error(weights: Sequence[Weight]) -> Iterator[None]:
    before = [on_host(item.variable).copy() for item in weights]
    try:
        yield
    except BaseException:
        for item, values in zip(weights, before, strict=True):
            item.variable.assign(values)
        raise
