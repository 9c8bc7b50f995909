"""The published rules, one after the other, in plain Python: what they do to a series of norms.

Each follows the code of its authors step by step, the defects included, and knows nothing of the
package. A limit of infinity means that the step is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch


def autoclip(norms: Iterable[float], percentile: float) -> list[float]:
    """Follow ``pseeth/autoclip`` (autoclip.py): the percentile of all norms, this one included."""
    history, limits = [], []
    for norm in norms:
        history.append(norm)
        limits.append(float(np.percentile(history, percentile)))
    return limits


class ZClip:
    """Follow ``bluorion-com/ZClip`` (zclip.py) without max_grad_norm.

    `to`: ``"adaptive"`` for mode zscore with adaptive_scaling, ``"mean"`` with mean, ``"threshold"`` for mode
    percentile, which compares with ``mean + z * sd`` and knows no eps.
    """

    def __init__(
        self,
        *,
        z: float,
        alpha: float,
        warmup: int,
        clip_factor: float = 1.0,
        eps: float = 1e-6,
        to: str = "adaptive",
        skip_update_on_spike: bool = False,
    ) -> None:
        self.z, self.alpha, self.warmup, self.clip_factor = z, alpha, warmup, clip_factor
        self.eps, self.to, self.skips = eps, to, skip_update_on_spike
        self.buffer: list[float] = []
        self.mean = self.var = math.nan

    def limit(self, norm: float) -> float:
        if len(self.buffer) < self.warmup:
            self.buffer.append(norm)
            if len(self.buffer) == self.warmup:
                self.mean = sum(self.buffer) / self.warmup
                self.var = sum((x - self.mean) ** 2 for x in self.buffer) / self.warmup
            return math.inf
        sd = self.var**0.5
        score = (norm - self.mean) / (sd + self.eps)
        limit = math.inf
        if self.to == "threshold" and norm > self.mean + self.z * sd:
            limit = self.mean + self.z * sd
        elif self.to != "threshold" and score > self.z:
            tight = (self.mean + self.z * sd / (score / self.z)) * self.clip_factor
            limit = self.mean if self.to == "mean" else tight
        if self.skips and limit < math.inf:
            return limit
        learned = norm if limit == math.inf else limit
        self.mean = self.alpha * self.mean + (1 - self.alpha) * learned
        self.var = self.alpha * self.var + (1 - self.alpha) * (learned - self.mean) ** 2
        return limit


class AdaGC:
    """Follow ``lishuai-97/AdaGC`` (the class in megatron-gpt2.patch), on the norms of tensors."""

    def __init__(
        self, *, ratio: float, beta: float, limit: float, warmup: int, eps: float = 1e-6
    ) -> None:
        self.ratio, self.beta, self.limit, self.warmup, self.eps = ratio, beta, limit, warmup, eps
        self.steps = 0
        self.usual: dict[int, float] = {}

    def clipped(self, norms: Sequence[float]) -> list[float]:
        """Return the norms after the step's clipping."""
        self.steps += 1
        if self.steps <= self.warmup:
            return self._globally(norms)
        after = []
        for place, norm in enumerate(norms):
            usual = self.usual.setdefault(place, norm)
            kept = norm
            if norm > self.ratio * usual:
                kept = norm * (self.ratio * usual) / (norm + self.eps)
                norm = self.ratio * usual
            self.usual[place] = usual * self.beta + norm * (1.0 - self.beta)
            after.append(kept)
        return after

    def _globally(self, norms: Sequence[float]) -> list[float]:
        coefficient = self.limit / (math.sqrt(sum(norm**2 for norm in norms)) + self.eps)
        after = [norm * min(1.0, coefficient) for norm in norms]
        for place, norm in enumerate(after):
            self.usual[place] = min(self.usual.get(place, norm), norm)
        return after


def adagc_of_pytorch_optimizer(norm: float, limit: float) -> float:
    """Return a norm after a warm-up step of ``kozistr/pytorch_optimizer``: it divides by the square."""
    return norm * min(limit / norm**2, 1.0)


def skip_step(
    norms: Sequence[float], *, window: int, sigma: float, mended: bool = False
) -> list[bool]:
    """Follow OLMo-core's ``SkipStepOptimizer``, as far as it looks at gradient norms.

    `mended`: skipped norms do not stay in the window, and small ones are no spikes.
    """
    held: list[float] = []
    skipped = []
    for norm in norms:
        held = [*held, norm][-(window + 1) :]
        if len(held) < max(20, window // 2):
            skipped.append(False)
            continue
        before = np.array(held[:-1])
        with np.errstate(divide="ignore", invalid="ignore"):
            score = (norm - before.mean()) / before.std(ddof=1)
        skipped.append(not (score if mended else abs(score)) <= sigma)
        if mended and skipped[-1]:
            held.pop()
    return skipped


class SPAM:
    """Follow ``TianjinYellow/SPAM-Optimizer`` between two momentum resets, on one tensor."""

    def __init__(self, *, threshold: float, beta: float, warmup: int) -> None:
        self.threshold, self.beta, self.warmup = threshold, beta, warmup
        self.steps = 0
        self.second: np.ndarray | None = None

    def clipped(self, gradient: np.ndarray) -> np.ndarray:
        """Return the gradient as Adam gets it."""
        gradient = gradient.copy()
        second = np.zeros_like(gradient) if self.second is None else self.second
        self.steps += 1
        if self.steps >= self.warmup:
            spikes = gradient**2 > self.threshold * second
            gradient[spikes] = np.sign(gradient[spikes]) * np.sqrt(second[spikes] * self.threshold)
        self.second = self.beta * second + (1 - self.beta) * gradient**2
        return gradient


def stable_adamw(gradients: Iterable[np.ndarray], *, beta: float) -> list[float]:
    """Return what algorithm 2 of Wortsman et al. 2023 divides each learning rate by, its eps being 0."""
    second, divisors = 0.0, []
    for step, gradient in enumerate(gradients, 1):
        share = beta * (1 - beta ** (step - 1)) / (1 - beta**step)
        second = share * second + (1 - share) * gradient**2
        divisors.append(max(1.0, math.sqrt(float(np.mean(gradient**2 / second)))))
    return divisors


def rolling_quantile(
    norms: Sequence[float], *, quantile: float, window: int, warmup: int
) -> list[float]:
    """Return the quantiles of the last norms before each step; infinity while there are too few."""
    return [
        float(np.quantile(norms[max(0, step - window) : step], quantile))
        if step >= warmup
        else math.inf
        for step in range(len(norms))
    ]


def ema_ratio(norms: Iterable[float], *, ratio: float, beta: float, clipped: bool) -> list[float]:
    """Return ``ratio`` times the bias-corrected mean (as Adam corrects) before each step."""
    mean, limits = 0.0, []
    for step, norm in enumerate(norms):
        limit = ratio * mean / (1 - beta**step) if step else math.inf
        mean = beta * mean + (1 - beta) * (min(norm, limit) if clipped else norm)
        limits.append(limit)
    return limits


class TimmUtils:
    """Follow ``timm.utils`` (clip_grad.py, agc.py), written from its formulas."""

    @staticmethod
    def dispatch_clip_grad(
        parameters: Iterable[torch.Tensor], value: float, *, mode: str, norm_type: float = 2.0
    ) -> None:
        """Clip by a mode: norm, value or agc."""
        kept = [parameter for parameter in parameters if parameter.grad is not None]
        if mode == "norm":
            torch.nn.utils.clip_grad_norm_(kept, value, norm_type=norm_type)
        elif mode == "value":
            torch.nn.utils.clip_grad_value_(kept, value)
        else:
            TimmUtils.adaptive_clip_grad(kept, value, norm_type=norm_type)

    @staticmethod
    def adaptive_clip_grad(
        parameters: torch.Tensor | Iterable[torch.Tensor],
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        norm_type: float = 2.0,
    ) -> None:
        """Clip by AGC."""
        many = [parameters] if isinstance(parameters, torch.Tensor) else parameters
        for parameter in many:
            _agc_(parameter, clip_factor, eps, norm_type)


class TimmModels:
    """Follow ``timm.models``, as far as clipping goes."""

    @staticmethod
    def model_parameters(
        model: torch.nn.Module, exclude_head: bool = False
    ) -> list[torch.nn.Parameter]:
        """Return the parameters, without the last two if so wished."""
        return [*model.parameters()][: -2 if exclude_head else None]


def _agc_(parameter: torch.Tensor, factor: float, eps: float, order: float) -> None:
    gradient = parameter.grad
    assert gradient is not None
    most = _unit_norms(parameter.detach(), order).clamp_(min=eps) * factor
    size = _unit_norms(gradient, order)
    clipped = gradient * (most / size.clamp(min=1e-6))
    gradient.copy_(torch.where(size < most, gradient, clipped))


def _unit_norms(tensor: torch.Tensor, order: float) -> torch.Tensor:
    if tensor.dim() < 2:
        return tensor.norm(order)
    return tensor.norm(order, dim=tuple(range(1, tensor.dim())), keepdim=True)
