"""What JaxPruner's updaters compute, in plain NumPy, under their names: it does not run with today's JAX.

Read from its code of 2024 (algorithms/, mask_calculator.py, sparsity_distributions.py); sums of ties by index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class NByM:
    """The n largest of every m along an axis."""

    n: int
    m: int
    axis: int = -1

    def mask(self, scores: np.ndarray, sparsity: float) -> np.ndarray:
        turned = np.swapaxes(scores, self.axis, -1)
        groups = turned.reshape(-1, self.m)
        kept = groups.argsort(1).argsort(1) >= self.m - self.n
        return np.swapaxes(kept.reshape(turned.shape), self.axis, -1)


@dataclass(frozen=True)
class Block:
    """Blocks of a matrix by their mean or largest score."""

    block_shape: tuple[int, int]
    use_avg_pooling: bool = True

    def mask(self, scores: np.ndarray, sparsity: float) -> np.ndarray:
        high, wide = self.block_shape
        parts = scores.reshape(scores.shape[0] // high, high, scores.shape[1] // wide, wide)
        pooled = parts.mean((1, 3)) if self.use_avg_pooling else parts.max((1, 3))
        return top(pooled, sparsity).repeat(high, 0).repeat(wide, 1)


def top(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Return the mask of the largest scores, one at least."""
    kept = scores.size if sparsity == 0 else max(round(scores.size * (1 - sparsity)), 1)
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores, axis=None, kind="stable")[:kept]] = True
    return mask.reshape(scores.shape)


def uniform(
    params: Arrays,
    sparsity: float = 0.0,
    filter_fn: Callable[..., bool] = lambda name, leaf: True,
    custom_sparsity_map: Mapping[str, float] = {},  # noqa: B006
) -> dict[str, float | None]:
    """Return the same share for each, ``None`` for what is not pruned."""
    shares = {n: sparsity if filter_fn(n, w) else None for n, w in params.items()}
    return shares | dict(custom_sparsity_map)


def erk(params: Arrays, sparsity: float) -> dict[str, float | None]:
    return get_sparsities_erdos_renyi({n: w.shape for n, w in params.items()}, sparsity)


def get_sparsities_erdos_renyi(
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float,
    *,
    erk_power_scale: float = 1.0,
    include_kernel: bool = True,
    custom_sparsity_map: Mapping[str, float] = {},  # noqa: B006
) -> dict[str, float | None]:
    """Return the shares of the published solution: what would be denser than dense leaves the equation."""
    dense: set[str] = set()
    while True:
        raw, divisor, stays = {}, 0.0, 0.0
        for name, shape in shapes.items():
            size = math.prod(shape)
            zeros = math.floor(sparsity * size)
            if name in dense:
                stays -= zeros
            elif name not in custom_sparsity_map:
                stays += size - zeros
                sides = shape if include_kernel else shape[-2:]
                power = erk_power_scale if include_kernel else 1.0
                raw[name] = (sum(sides) / math.prod(sides)) ** power
                divisor += raw[name] * size
        eps = stays / divisor
        if max(raw.values()) * eps <= 1.0:
            shares = {name: 1.0 - eps * ratio for name, ratio in raw.items()}
            return shares | dict.fromkeys(dense, 0.0) | dict(custom_sparsity_map)
        dense |= {name for name, ratio in raw.items() if ratio == max(raw.values())}


def cosine_decay_schedule(value: float, steps: int) -> Callable[[int], float]:
    return lambda step: value / 2.0 * (1.0 + math.cos(math.pi * min(step, steps) / steps))


class MagnitudePruning:
    """An updater; the others differ in their scores and in what a step does to masks."""

    def __init__(
        self,
        *,
        sparsity_distribution_fn: Callable[[Arrays], Any] = uniform,
        sparsity_type: NByM | Block | None = None,
        drop_fraction_fn: Callable[[int], float] = lambda step: 0.3,
        use_packed_masks: bool = False,
    ) -> None:
        self.shares, self.type, self.drop = (
            sparsity_distribution_fn,
            sparsity_type,
            drop_fraction_fn,
        )

    def calculate_scores(self, params: Arrays, grads: Arrays | None = None) -> Arrays:
        return {name: np.abs(weight) for name, weight in params.items()}

    def create_masks(self, scores: Arrays, shares: Mapping[str, float | None]) -> dict[str, Any]:
        by = self.type.mask if self.type else top
        return {
            n: None if shares[n] is None else by(s, shares[n] or 0.0) for n, s in scores.items()
        }

    def instant_sparsify(self, params: Arrays, grads: Arrays | None = None) -> Any:
        masks = self.create_masks(self.calculate_scores(params, grads), self.shares(params))
        return self.apply_masks(params, masks), masks

    def apply_masks(self, params: Arrays, masks: Any, is_packed: bool = False) -> Arrays:
        if is_packed:
            bits = {n: np.unpackbits(m)[: params[n].size] for n, m in masks.items()}
            masks = {n: m.reshape(params[n].shape) for n, m in bits.items()}
        return {n: w if masks[n] is None else w * masks[n] for n, w in params.items()}

    def pre_forward_update(self, params: Arrays, state: Any) -> Arrays:
        return self.instant_sparsify(params)[0]

    def wrap_optax(self, tx: Any) -> Any:
        made = lambda params: SimpleNamespace(masks=self.instant_sparsify(params)[1])  # noqa: E731
        return SimpleNamespace(init=made)

    def update_state(self, state: Any, params: Arrays, grads: Arrays) -> Any:
        """Return the state after weights have moved: the smallest go, the best of the others come."""
        masks = {}
        for name, mask in state.masks.items():
            leaves = int(mask.sum()) - round(mask.sum() * (1 - self.drop(state.count)))
            order = np.argsort(np.where(mask, np.abs(params[name]), np.inf), axis=None)
            kept = mask.copy()
            kept.reshape(-1)[order[:leaves]] = False
            worth = np.where(kept, -np.inf, self.grown(grads[name]))
            kept.reshape(-1)[np.argsort(-worth, axis=None, kind="stable")[:leaves]] = True
            masks[name] = kept
        return SimpleNamespace(masks=masks)

    def grown(self, slope: np.ndarray) -> np.ndarray:
        return np.abs(slope)


class RandomPruning(MagnitudePruning):
    def calculate_scores(self, params: Arrays, grads: Arrays | None = None) -> Arrays:
        random = np.random.default_rng(8)
        return {name: random.random(weight.shape) for name, weight in params.items()}

    def grown(self, slope: np.ndarray) -> np.ndarray:
        return np.random.default_rng(9).random(slope.shape)


class SaliencyPruning(MagnitudePruning):
    def calculate_scores(self, params: Arrays, grads: Arrays | None = None) -> Arrays:
        assert grads is not None
        return {name: np.abs(weight * grads[name]) for name, weight in params.items()}


class GlobalMagnitudePruning(MagnitudePruning):
    """One threshold for all, but for those with a share of their own."""

    def __init__(
        self,
        *,
        sparsity: float = 0.0,
        use_normalization: bool = True,
        custom_sparsity_map: Mapping[str, float] = {},  # noqa: B006
    ) -> None:
        super().__init__(sparsity_distribution_fn=lambda params: dict(custom_sparsity_map))
        self.sparsity, self.normal = sparsity, use_normalization

    def create_masks(self, scores: Arrays, shares: Mapping[str, float | None]) -> dict[str, Any]:
        own = {n: top(scores[n], share or 0.0) for n, share in shares.items()}
        order = sorted(scores.keys() - own.keys())
        parts = [scores[n] / (np.linalg.norm(scores[n]) if self.normal else 1.0) for n in order]
        mask = top(np.concatenate([part.reshape(-1) for part in parts]), self.sparsity)
        cut = np.split(mask, np.cumsum([part.size for part in parts])[:-1])
        return own | {n: m.reshape(scores[n].shape) for n, m in zip(order, cut, strict=True)}


class GlobalSaliencyPruning(GlobalMagnitudePruning, SaliencyPruning): ...


class NoPruning(MagnitudePruning):
    def instant_sparsify(self, params: Arrays, grads: Arrays | None = None) -> Any:
        return params, dict.fromkeys(params)


class StaticRandomSparse(RandomPruning): ...


class SteMagnitudePruning(MagnitudePruning): ...


class SteRandomPruning(RandomPruning): ...


class RigL(MagnitudePruning): ...


class SET(RandomPruning): ...


def summarize_sparsity(params: Arrays) -> dict[str, float]:
    kept = sum(int(np.count_nonzero(weight)) for weight in params.values())
    return {"_total_sparsity": 1.0 - kept / sum(weight.size for weight in params.values())}
