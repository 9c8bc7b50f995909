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
from karikomi.keras.quantization.at_rate import round_at_rate_
from karikomi.keras.quantization.eligible import eligible
from karikomi.keras.quantization.output_units import output_units
from karikomi.quantize import Coded
from karikomi.quantize.every_tensor import Codes, Eligible, vector_codes
from karikomi.quantize.method import Method
from karikomi.select import NOT_SELECTED, select

WHERE = "keras.quantize_"


def quantize_(
    model: Any,
    *,
    bits: int | None = None,
    entries: int | None = None,
    rate: float | None = None,
    method: Any = None,
    data: Iterable[Any] | None = None,
    group: int | None = None,
    symmetric: bool = True,
    range: str = "max",
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Codes:
    """Round the variables of a built model to grids in place, and return path -> codes and grid.

    Exactly one of three sizes. `bits` (2..16): a uniform grid per output unit, ``w = scale * round(w / scale)``.
    `entries`: a codebook of so many non-zero values per variable by 1-D k-means (weight sharing). `rate`: so many bits
    per number in an entropy coder of order 0, tables included, in the mean of all that is coded; each weight has one
    step, ``factor / sqrt(curvature)``, and the factor is searched; it is met within 2 %.

    Any model or layer on any backend, functional, subclassed or nested. Every variable is quantized, one that layers
    share once: the kernels of Dense, EinsumDense (and so of attention), convolutions of every kind and recurrent
    cells, embeddings, and matrices of more than 256 entries of layers that are not known. Biases, gains of norms, other
    vectors and the statistics of batch norms get a grid that costs no accuracy: 16 bits a variable, for a `rate` 8;
    variances equal ratios. What stays (integers, statistics of ``Normalization``, layers that Keras has quantized) is
    in the result's ``left_alone`` with the reason. Zeros, as pruning makes them, stay exact zeros. `only` and
    `exclude` (globs over paths) select. Variables keep their dtype, and a compiled model stays compiled. `kk.save`
    then stores codes instead of floats, and ``kk.load(path, into=model)`` fills a model with the same values.

    `method`: a registered quantizer, by name or as an object: ``"uniform"``, ``"kmeans"``, and with `data` ``"gptq"``
    and others that compensate the errors layer by layer, in the order of the layers: kernels of Dense, EinsumDense,
    convolutions and recurrent layers; ``notes`` of the result has what they cannot compensate. By default
    ``"kmeans"`` for `entries`, ``"gptq"`` for a `rate` with data, else ``"uniform"``. `data`: batches ``(inputs,
    targets)`` or inputs, that can be read again: some hundred examples in random order, as the model is used. For the
    curvature of a `rate` the change of the outputs counts; `seed` is for its noise. `group`, `symmetric`, `range`: see
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
    sizes = {"bits": bits, "entries": entries, "rate": rate}
    chosen = Method.of(method, sizes, options, data=data is not None, where=WHERE)
    if data is not None:
        check_data(data, where=WHERE)
    items = weights_of(model, where=WHERE)
    named = dict(zip(names_of([item.variable for item in items]), items, strict=True))
    found = _checked(eligible(named))
    names = select(found.all, only=only, exclude=exclude, where=WHERE)
    coarse = chosen.rate is not None
    coded = {n: _vector(found, n, coarse=coarse) for n in names if n not in found.weights}
    weights = {name: found.weights[name] for name in names if name in found.weights}
    with _restored_after_an_error([found.all[name] for name in names]):
        for name, tensor in coded.items():
            codes.assign(named[name].variable, tensor)
        done, notes = _rounded(model, weights, coded, chosen, data, seed=seed, progress=progress)
    coded |= done
    for name in names:
        codes.put(named[name].variable, coded[name])
    unselected = {name: NOT_SELECTED for name in found.all if name not in coded}
    ordered = {name: coded[name] for name in named if name in coded}
    return Codes(ordered, {**found.left_alone, **unselected}, notes)


def _checked(found: Eligible[Weight]) -> Eligible[Weight]:
    if not found.all:
        reasons = [f"{name}: {reason}" for name, reason in found.left_alone.items()]
        raise Unsupported(
            "nothing of this can be quantized", where=WHERE, got="; ".join(reasons[:3])
        )
    return found


def _rounded(
    model: Any,
    weights: Mapping[str, Weight],
    vectors: Mapping[str, Coded],
    method: Method,
    data: Iterable[Any] | None,
    *,
    seed: int,
    progress: bool,
) -> tuple[dict[str, Coded], dict[str, str]]:
    """Round the weights, in place where layers are rounded in order; return their codes and notes."""
    compensates = method.quantizer if method.compensates else None
    if not weights:
        return {}, {}
    if method.rate is not None:
        options: dict[str, Any] = {"seed": seed, "progress": progress, "where": WHERE}
        return round_at_rate_(model, weights, vectors, method.rate, compensates, data, **options)
    nearest = {name: _nearest(method, name, item) for name, item in weights.items()}
    if compensates is None or data is None:
        return nearest, {}
    return compensated.round_(
        model, weights, nearest, compensates, data, progress=progress, where=WHERE
    )


def _nearest(method: Method, name: str, weight: Weight) -> Coded:
    array = codes.as_floats(on_host(weight.variable))
    return method.quantizer.quantize(array, method.size, units=output_units(weight), name=name)


def _vector(found: Eligible[Weight], name: str, *, coarse: bool) -> Coded:
    array = codes.as_floats(on_host(found.all[name].variable))
    return vector_codes(array, variances=name in found.variances, coarse=coarse, name=name)


@contextmanager
def _restored_after_an_error(weights: Sequence[Weight]) -> Iterator[None]:
    before = [on_host(item.variable).copy() for item in weights]
    try:
        yield
    except BaseException:
        for item, values in zip(weights, before, strict=True):
            item.variable.assign(values)
        raise
