"""Quantization while training: every parameter is rounded in the forward pass, and its step is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from karikomi.errors import InvalidArgument, NonFinite, Unsupported, check
from karikomi.quantize import Coded, OutputUnits
from karikomi.quantize.every_tensor import Codes
from karikomi.select import select
from karikomi.torch.internals import flatten_plainly_
from karikomi.torch.modules import codes as stored_codes
from karikomi.torch.modules.parameters import by_any_name, check_names, check_values, unwrapped
from karikomi.torch.modules.parametrized import computed_from, own_class_, with_adapters
from karikomi.torch.quantization.learned_steps import LearnedGrid
from karikomi.torch.quantization.output_units import output_units

WHERE = "torch.quantized_training"
MOST_BITS = 8


@dataclass(frozen=True, slots=True)
class CodedSize:
    """The size of a module's codes: parameter name -> bits, and how many codes are not zero.

    Bits are those of a static coder per tensor, without its table and the file around it.
    """

    bits: dict[str, float]
    nonzero: dict[str, int]
    elements: int

    @property
    def total(self) -> float:
        """The bits of all tensors."""
        return sum(self.bits.values())

    def __str__(self) -> str:
        """Return the totals in a line."""
        per_weight = self.total / max(self.elements, 1)
        return (
            f"{self.total / 8:,.0f} bytes, {per_weight:.3f} bits per weight, "
            f"{sum(self.nonzero.values()):,} of {self.elements:,} not zero"
        )


class QuantizedTraining:
    """What `quantized_training` returns: the bits of the codes, the codes, and the end of it."""

    def __init__(self, model: nn.Module, left_alone: Mapping[str, str]) -> None:
        self.left_alone = dict(left_alone)
        """Parameter name -> why it stays as it is."""
        self._model = model
        self._entries()

    def on(self, copy: nn.Module) -> QuantizedTraining:
        """Return the same for a deep copy of the module, such as an average of its weights."""
        return QuantizedTraining(copy, self.left_alone)

    def steps(self) -> list[nn.Parameter]:
        """Return the parameters of the grids' steps, for a parameter group of their own."""
        return [grid.offset for _, grid, _ in self._entries()]

    def bits(self) -> torch.Tensor:
        """Return the bits of all codes, 0-d and differentiable, as a term of the loss."""
        return torch.stack([grid.bits_of(weight) for _, grid, weight in self._entries()]).sum()

    def size(self) -> CodedSize:
        """Return the bits of each tensor's codes now; waits for the device."""
        sizes = {name: grid.size_of(weight) for name, grid, weight in self._entries()}
        return CodedSize(
            {name: size for name, (size, _) in sizes.items()},
            {name: nonzero for name, (_, nonzero) in sizes.items()},
            sum(weight.numel() for _, _, weight in self._entries()),
        )

    def hold_zeros_(self) -> None:
        """Keep what is zero now at zero, for the last part of a training."""
        for _, grid, weight in self._entries():
            grid.hold_zeros_(weight)

    def codes(self) -> Codes:
        """Return parameter name -> codes and grid as they are now; raises `NonFinite` naming a tensor."""
        return Codes(
            {n: grid.coded(weight, n) for n, grid, weight in self._entries()}, self.left_alone
        )

    @torch.no_grad()
    def finish_(self) -> Codes:
        """Make the rounded values the module's plain parameters, and return the codes, which `kk.save` stores."""
        coded = self.codes()
        for layer, leaf in list(_places(self._model)):
            own_class_(layer)
            parametrize.remove_parametrizations(layer, leaf, leave_parametrized=True)
        parameters = dict(unwrapped(self._model).named_parameters())
        for name, tensor in coded.items():
            parameters[name].copy_(stored_codes.decoded(tensor, parameters[name].dtype))
        stored_codes.add_(unwrapped(self._model), coded)
        return coded

    def _entries(self) -> list[tuple[str, LearnedGrid, torch.Tensor]]:
        """Return name, grid and latent weight of each parameter; raises `InvalidArgument` where there is none."""
        # Looked up each time: a state dict that is assigned replaces parameters.
        found = list(_found(self._model))
        if not found:
            raise InvalidArgument(
                "this module is not in quantized training",
                where=WHERE,
                got=type(self._model).__name__,
                hint="a copy made before quantized_training, or after finish_()?",
            )
        return found


def quantized_training(
    model: nn.Module,
    *,
    bits: int = 4,
    vectors: int = 8,
    per: str = "tensor",
    masks: Mapping[str, torch.Tensor] | None = None,
    codes: Mapping[str, Coded] | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> QuantizedTraining:
    """Round the parameters of a module in every forward pass from now on, and learn the steps of their grids.

    ``w' = s clamp(round(w / s), -Q, Q)`` with ``Q = 2**(bits - 1) - 1``; ``s`` starts at ``2 mean|w| / sqrt(Q)``.
    Gradients pass the rounding unchanged where ``|w / s| <= Q``; those of a step are scaled by ``1 / sqrt(n Q)``,
    ``n`` weights a step. The loop stays as it was; make the optimizer afterwards, so that it holds the steps too, or
    add `QuantizedTraining.steps`. ``loss + strength * training.bits()`` is entropy-penalised training: the
    codes take fewer bits, most of them by becoming zero. `QuantizedTraining.finish_` ends it; `kk.save` then stores
    codes.

    `bits` (2..8): of tensors with two or more axes. `vectors` (2..8): of biases, gains and the like. `per`: a step per
    ``"tensor"`` or per output ``"unit"`` (of vectors always one). `masks`: parameter name -> true where kept, as
    `kk.torch.prune_` returns; masked weights stay zero. `codes`: parameter name -> codes to begin at, such as
    `kk.torch.quantize_` of a copy returns, those of what takes no part left out: steps are theirs, and each weight is
    moved to within 0.45 of a step of its code, and no further, so that the codes are as given and those change first
    that were nearest to another. `only`, `exclude`: globs over parameter names. All floating parameters take part;
    ``left_alone`` has the reasons for the others. Tied weights share grid and codes.
    Checkpoints (the state dict has weights and steps) and deep copies work as usual; `QuantizedTraining.on` is for
    the copy. Schedules and bounds of `attach` leave parameters in this state alone: prune before, or by the bits.

    Raises `InvalidArgument` for an argument out of range, and for codes of another shape, of another grid than that of
    `per`, or of more than `bits`, `Unsupported` where nothing can be quantized, `UnknownName`
    for a mask of no parameter, `NonFinite` naming a tensor.

    >>> import torch, karikomi as kk
    >>> model = torch.nn.Linear(4, 2)
    >>> training = quantized_training(model, bits=3)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    >>> loss = model(torch.ones(1, 4)).square().sum() + 1e-3 * training.bits()
    >>> loss.backward()
    >>> optimizer.step()
    >>> coded = training.finish_()
    >>> sorted(coded), bool(torch.equal(model.weight, torch.from_numpy(coded["weight"].decode())))
    (['bias', 'weight'], True)

    Source: Esser et al. 2020, "Learned Step Size Quantization"; Oktay et al. 2019 (arXiv 1906.06624) for the penalty.
    Deviations: the logarithm of a step is trained, the range is symmetric, and the density of the codes is their
    smoothed histogram at each step instead of a trained network.
    """
    for name, width in (("bits", bits), ("vectors", vectors)):
        good = type(width) is int and 2 <= width <= MOST_BITS
        check(WHERE, (good, f"{name} out of range", width, f"an integer in 2..{MOST_BITS}"))
    check(WHERE, (per in ("tensor", "unit"), "per is unknown", per, "'tensor' or 'unit'"))
    inner = unwrapped(model)
    check_values(dict(inner.named_parameters()), where=WHERE)
    weights, left_alone = _trainable(inner)
    units, given = output_units(inner), _checked_masks(masks or {}, inner)
    only, exclude = (by_any_name(inner, patterns) for patterns in (only, exclude))
    chosen = select(weights, only=only, exclude=exclude, where=WHERE) if weights else []
    if not chosen:
        raise Unsupported(
            "nothing of this can be quantized",
            where=WHERE,
            got="; ".join(f"{n}: {why}" for n, why in list(left_alone.items())[:3])
            or "a module without parameters",
        )
    for name in chosen:
        if not bool(weights[name].isfinite().all()):
            raise NonFinite("a weight is NaN or infinite", where=name)
    begun = _begun(codes or {}, inner, weights)
    grids = {}
    for name in chosen:
        weight = weights[name]
        matrix = weight.ndim > 1
        of = units.get(name, OutputUnits()) if matrix and per == "unit" else OutputUnits()
        grids[name] = LearnedGrid(weight, bits if matrix else vectors, of, given.get(id(weight)))
        if name in begun:
            grids[name].check_codes(begun[name], weight, f"{WHERE}: {name}")
    for name, grid in grids.items():
        if name in begun:
            grid.begin_(weights[name], begun[name])
        _register_(inner, weights[name], grid)
    unselected = {name: "not selected" for name in weights if name not in chosen}
    return QuantizedTraining(model, {**left_alone, **unselected})


def _begun(
    codes: Mapping[str, Coded], module: nn.Module, weights: Mapping[str, torch.Tensor]
) -> dict[str, Coded]:
    """Return the codes of weights by the names that these have here; raises `UnknownName` for no tensor's.

    Statistics of norms have codes too, and go on being measured.
    """
    every: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    every |= dict(module.named_buffers())
    check_names(codes, every, where=WHERE)
    named = {id(weight): name for name, weight in weights.items()}
    found = {named.get(id(every[name])): coded for name, coded in codes.items()}
    return {name: coded for name, coded in found.items() if name is not None}


def _trainable(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the parameters that can be rounded while training, and why the others cannot."""
    reasons = {**with_adapters(module), **computed_from(module)}
    weights = {}
    for name, parameter in module.named_parameters():
        if name in reasons:
            continue
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            reasons[name] = f"its dtype is {parameter.dtype}"
        elif parameter.layout != torch.strided or hasattr(parameter, "to_local"):
            reasons[name] = "it is sparse or sharded"
        elif not parameter.numel():
            reasons[name] = "it is empty"
        else:
            weights[name] = parameter
    return weights, reasons


def _checked_masks(masks: Mapping[str, torch.Tensor], module: nn.Module) -> dict[int, torch.Tensor]:
    """Return the masks by the identities of their parameters."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    check_names(masks, parameters, where=f"{WHERE}(masks)")
    found = {}
    for name, mask in masks.items():
        parameter = parameters[name]
        good = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
        check(name, (good, "a mask is a boolean tensor", getattr(mask, "dtype", None), "bool"))
        same = mask.shape == parameter.shape
        got, allowed = tuple(mask.shape), tuple(parameter.shape)
        check(name, (same, "the mask has another shape than its parameter", got, allowed))
        found[id(parameter)] = mask.to(parameter.device, copy=True)
    return found


def _register_(module: nn.Module, weight: torch.Tensor, grid: LearnedGrid) -> None:
    """Parametrize a parameter in all layers that own it (tied weights), by one grid."""
    places = [
        (layer, leaf)
        for layer in module.modules()
        for leaf, own in layer.named_parameters(recurse=False, remove_duplicate=False)
        if own is weight
    ]
    for layer, leaf in places:
        own_class_(layer)
        parametrize.register_parametrization(layer, leaf, grid, unsafe=True)
    for layer in {id(layer): layer for layer, _ in places}.values():
        if isinstance(layer, nn.RNNBase) and len(layer.parametrizations) == 1:  # type: ignore[arg-type]
            layer.register_forward_hook(flatten_plainly_)
            flatten_plainly_(layer)


def learned_places(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield the ordinary name, the name of the chain, and the latent weight of all that is rounded.

    Tied ones come under each of their names.
    """
    for prefix, layer in module.named_modules(remove_duplicate=False):
        chains: Any = layer.parametrizations if parametrize.is_parametrized(layer) else {}
        dot = "." if prefix else ""
        for leaf, chain in chains.items():
            if isinstance(chain[0], LearnedGrid):
                yield (
                    f"{prefix}{dot}{leaf}",
                    f"{prefix}{dot}parametrizations.{leaf}",
                    chain.original,
                )


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the layers and the names of their parameters that have a learned grid."""
    for layer in unwrapped(module).modules():
        if parametrize.is_parametrized(layer):
            chains: Any = layer.parametrizations
            for leaf, chain in list(chains.items()):
                if isinstance(chain[0], LearnedGrid):
                    yield layer, leaf


def _found(module: nn.Module) -> Iterator[tuple[str, LearnedGrid, torch.Tensor]]:
    """Yield the name, grid and latent weight of each parameter in training, a tied one once."""
    inner = unwrapped(module)
    prefixes = {id(layer): prefix for prefix, layer in inner.named_modules()}
    seen: set[int] = set()
    for layer, leaf in _places(inner):
        chains: Any = layer.parametrizations
        grid, weight, prefix = chains[leaf][0], chains[leaf].original, prefixes[id(layer)]
        if id(grid) not in seen:
            seen.add(id(grid))
            yield f"{prefix}.{leaf}" if prefix else leaf, grid, weight
