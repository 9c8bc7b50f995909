"""The rules against their published definitions, on a recorded series of more than 500 steps.

Where the published code is wrong, both behaviours are shown.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import karikomi as kk
from contract.deciding import judge
from contract.namespaces import INSTALLED, load_quietly
from karikomi.clip import histogram
from karikomi.rules import decide
from parity import norms as recorded
from parity import published

SERIES = recorded.joint()
TENSORS = recorded.load()
NAN = math.nan


def after(rule: Any, series: Any, facts: Any = None) -> np.ndarray:
    """Return the norms after each step; NaN for a step that is skipped."""
    series = np.asarray(series, dtype=np.float64).reshape(len(series), -1)
    state, rows = decide.begin(rule, series[0], xp=np), []
    present = np.full(series.shape[1], True)
    for norms in series:
        verdict, state = judge(rule, norms, state, present=present, xp=np, facts=facts)
        rows.append(
            np.full_like(norms, NAN) if verdict.skip else decide.norms_after(norms, verdict, xp=np)
        )
    return np.array(rows)


def clipped_to(limits: Any, series: Any = SERIES) -> np.ndarray:
    return np.minimum(series, limits).reshape(-1, 1)


def assert_same(found: np.ndarray, expected: np.ndarray, *, least: int, most: int) -> None:
    """Compare to 1e-6, after making sure that the series has at least so many clipped steps."""
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    clipped = int((expected < np.asarray(SERIES)[:, None] * (1 - 1e-9)).sum())
    assert least <= clipped <= most, clipped


def test_the_series_is_long_and_has_spikes() -> None:
    assert len(SERIES) >= 500 and np.isfinite(TENSORS).all() and (TENSORS > 0).all()
    assert SERIES.max() > 20 * np.median(SERIES)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 33.3, 50.0, 90.0, 99.9, 100.0])
def test_autoclip(percentile: float) -> None:
    limits = published.autoclip(SERIES, percentile)
    rule = kk.clip.AutoClip(percentile, window=len(SERIES))
    np.testing.assert_allclose(after(rule, SERIES), clipped_to(limits), rtol=1e-6)


@pytest.mark.parametrize("percentile", [0.0, 1.0, 10.0, 50.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("window", [1, 20, 300])
def test_autoclip_from_its_histogram_is_off_by_what_it_says(percentile: float, window: int) -> None:
    limits = np.array(published.autoclip(SERIES, percentile))
    found = after(kk.clip.AutoClip(percentile, window=window), SERIES)[:, 0]
    expected = clipped_to(limits)[:, 0]
    ratio = found / expected
    assert ratio[:window] == pytest.approx(1.0, rel=1e-9)
    assert 1 / histogram.ERROR <= ratio.min() and ratio.max() <= histogram.ERROR
    if percentile in (0.0, 100.0):
        assert ratio == pytest.approx(1.0, rel=1e-12)


def test_one_nan_ends_the_published_autoclip_and_not_ours() -> None:
    spoilt = [*SERIES[:40], NAN, *SERIES[40:80]]
    assert np.isnan(published.autoclip(spoilt, 10.0)[40:]).all()
    rule = kk.clip.AutoClip(10.0)
    found = after(rule, spoilt)
    assert np.isnan(found[40])
    assert np.delete(found, 40, axis=0).tobytes() == after(rule, SERIES[:80]).tobytes()


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("clip_factor", [1.0, 0.9])
@pytest.mark.parametrize(
    ("z", "alpha", "warmup"), [(2.5, 0.97, 25), (3.0, 0.9, 5), (4.0, 0.99, 100)]
)
def test_zclip(z: float, alpha: float, warmup: int, clip_factor: float, eps: float) -> None:
    options = {"alpha": alpha, "warmup": warmup, "clip_factor": clip_factor}
    # Its eps is a number in units of the norm: on norms of some thousands it is lost in rounding.
    series = SERIES * 4096.0
    peer = published.ZClip(z=z, eps=eps, **options)
    limits = [peer.limit(norm) for norm in series]
    found = after(kk.clip.ZClip(z, **options), series) / 4096.0
    assert_same(found, clipped_to(limits, series) / 4096.0, least=5, most=400)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("to", ["adaptive", "threshold", "mean"])
def test_the_modes_of_zclip(to: str, skips: bool) -> None:
    options = {"alpha": 0.97, "warmup": 25, "to": to, "skip_update_on_spike": skips}
    peer = published.ZClip(z=2.5, eps=0.0, **options)
    limits = [peer.limit(norm) for norm in SERIES]
    assert_same(
        after(kk.clip.ZClip(2.5, **options), SERIES), clipped_to(limits, SERIES), least=5, most=400
    )


def test_the_scale_of_the_loss_changes_the_published_zclip_and_not_ours() -> None:
    options = {"alpha": 0.97, "warmup": 25}
    small = 2.0**-30
    peer = published.ZClip(z=2.5, **options)
    assert all(peer.limit(norm) == math.inf for norm in SERIES * small)
    rule = kk.clip.ZClip(2.5, **options)
    assert (after(rule, SERIES * small) / small).tobytes() == after(rule, SERIES).tobytes()


def test_one_nan_ends_the_published_zclip_and_not_ours() -> None:
    peer = published.ZClip(z=2.5, alpha=0.97, warmup=25)
    for norm in [*SERIES[:100], NAN]:
        peer.limit(norm)
    assert peer.limit(51_297.0) == math.inf and math.isnan(peer.mean)
    rule = kk.clip.ZClip()
    found = after(rule, [*SERIES[:100], NAN, 51_297.0])
    assert found[-1] < 100.0
    assert found[-1] == after(rule, [*SERIES[:100], 51_297.0])[-1]


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize(
    ("ratio", "beta", "limit", "warmup"),
    [(1.05, 0.98, 1.0, 100), (1.04, 0.99, 1.0, 100), (2.0, 0.9, 0.5, 10), (1.0, 0.0, 100.0, 1)],
)
def test_adagc(ratio: float, beta: float, limit: float, warmup: int, eps: float) -> None:
    scale = 2.0**14 if eps else 1.0
    options = {"beta": beta, "limit": limit * scale, "warmup": warmup}
    peer = published.AdaGC(ratio=ratio, eps=eps, **options)
    expected = np.array([peer.clipped(list(norms)) for norms in TENSORS * scale]) / scale
    found = after(kk.clip.AdaGC(ratio, **options), TENSORS * scale) / scale
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert 100 <= int((expected < TENSORS * (1 - 1e-9)).sum()) < TENSORS.size


def test_the_warm_up_of_pytorch_optimizer_divides_by_the_square_and_ours_does_not() -> None:
    assert published.adagc_of_pytorch_optimizer(2.0, 1.0) == 0.5
    assert after(kk.clip.AdaGC(limit=1.0), [[2.0]]).tolist() == [[1.0]]


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize(("window", "warmup"), [(100, 20), (7, 1), (600, 600), (1, 1)])
def test_quantile(quantile: float, window: int, warmup: int) -> None:
    limits = published.rolling_quantile(
        list(SERIES), quantile=quantile, window=window, warmup=warmup
    )
    rule = kk.clip.Quantile(quantile, window=window, warmup=warmup)
    np.testing.assert_allclose(after(rule, SERIES), clipped_to(limits), rtol=1e-6)


@pytest.mark.parametrize("learn", ["clipped", "raw"])
@pytest.mark.parametrize(("ratio", "beta"), [(2.0, 0.99), (1.1, 0.5), (1.0, 0.0)])
def test_ema_ratio(ratio: float, beta: float, learn: str) -> None:
    limits = published.ema_ratio(SERIES, ratio=ratio, beta=beta, clipped=learn == "clipped")
    found = after(kk.clip.EMARatio(ratio, beta=beta, learn=learn), SERIES)
    assert_same(found, clipped_to(limits), least=5, most=len(SERIES))


def test_ema_ratio_per_tensor_is_the_same_for_each() -> None:
    rule = kk.clip.EMARatio(1.5, per="tensor")
    for place, series in enumerate(TENSORS.T):
        alone = after(kk.clip.EMARatio(1.5), series)
        assert after(rule, TENSORS)[:, place].tobytes() == alone[:, 0].tobytes()


@pytest.mark.parametrize(("sigma", "window"), [(2.0, 128), (6.0, 128), (1.0, 40)])
def test_skip_spikes(sigma: float, window: int) -> None:
    expected = published.skip_step(SERIES.tolist(), window=window, sigma=sigma, mended=True)
    warmup = max(20, window // 2) - 1  # there the norm that is judged counts as well
    rule = kk.clip.SkipSpikes(sigma, window=window, warmup=warmup, patience=10_000)
    found = np.isnan(after(rule, SERIES))[:, 0].tolist()
    assert found == expected and sum(found) > 3


def test_a_spike_hides_the_next_one_in_the_published_code_and_not_in_ours() -> None:
    series = np.exp(np.random.default_rng(0).normal(0.0, 0.1, 500))
    series[[200, 260]] = [20.0, 5.0]
    skipped = published.skip_step(series.tolist(), window=128, sigma=6.0)
    assert np.flatnonzero(skipped).tolist() == [200]
    found = np.isnan(after(kk.clip.SkipSpikes(), series))[:, 0]
    assert np.flatnonzero(found).tolist() == [200, 260]


def test_a_nan_skips_128_further_steps_of_the_published_code_and_none_of_ours() -> None:
    series = [1.0 + 0.1 * math.sin(step) for step in range(400)]
    series[150] = NAN
    skipped = published.skip_step(series, window=128, sigma=6.0)
    assert sum(skipped) == 129 and all(skipped[150:279])
    assert np.isnan(after(kk.clip.SkipSpikes(), series)).sum() == 1


def test_equal_norms_are_all_skipped_by_the_published_code_and_none_by_ours() -> None:
    skipped = published.skip_step([1.0] * 100, window=128, sigma=6.0)
    assert sum(skipped[63:]) > 30
    assert not np.isnan(after(kk.clip.SkipSpikes(), [0.1] * 100)).any()


def spam(rule: Any, gradients: np.ndarray, beta: float) -> np.ndarray:
    """Return gradients of one tensor as the rule clips them, v being the running mean of the result."""
    state, second, rows = rule.init(np.zeros(1), xp=np), np.zeros(gradients.shape[1]), []
    for step, gradient in enumerate(gradients):
        root = np.sqrt(second)
        largest = np.max(np.abs(gradient) / np.where(root > 0, root, np.inf))
        facts = {"step": np.array(float(step))}
        answer, state = rule.decide(
            np.array([largest]), state, present=np.array([True]), facts=facts, xp=np
        )
        bound = np.where(root > 0, root, np.inf) * answer.limit
        clipped = np.clip(gradient, -bound, bound)
        second = beta * second + (1 - beta) * clipped**2
        rows.append(clipped)
    return np.array(rows)


def noise(steps: int, size: int) -> np.ndarray:
    """Return gradients of a recorded size with heavy tails."""
    generator = np.random.default_rng(1)
    scale = np.resize(SERIES, steps)[:, None]
    return scale * generator.standard_t(1.5, (steps, size))


@pytest.mark.parametrize(("threshold", "beta", "warmup"), [(5000.0, 0.999, 20), (50.0, 0.9, 2)])
def test_spam(threshold: float, beta: float, warmup: int) -> None:
    gradients = noise(len(SERIES), 30)
    peer = published.SPAM(threshold=threshold, beta=beta, warmup=warmup)
    expected = np.array([peer.clipped(gradient) for gradient in gradients])
    rule = kk.clip.SPAM(threshold, warmup=warmup)
    found = spam(rule, gradients, beta)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found != gradients).sum() > 3


def test_a_late_entry_never_learns_in_the_published_spam_and_does_in_ours() -> None:
    gradients = noise(60, 4)
    gradients[:30, 2] = 0.0  # an embedding row, say, that no batch met before step 30
    peer = published.SPAM(threshold=5000.0, beta=0.999, warmup=20)
    expected = np.array([peer.clipped(gradient) for gradient in gradients])
    assert not expected[:, 2].any() and expected[:, [0, 1, 3]].all()
    found = spam(kk.clip.SPAM(), gradients, 0.999)
    assert found[30:, 2].all()
    np.testing.assert_allclose(np.delete(found, 2, axis=1), np.delete(expected, 2, axis=1), 1e-6)


def test_stable_adamw() -> None:
    gradients, beta = noise(len(SERIES), 12), 0.99
    divisors = published.stable_adamw(gradients, beta=beta)
    rule, second = kk.clip.StableAdamW(), np.zeros(12)
    for step, (gradient, divisor) in enumerate(zip(gradients, divisors, strict=True), 1):
        second = beta * second + (1 - beta) * gradient**2
        size = np.linalg.norm(gradient / np.sqrt(second / (1 - beta**step)))
        facts = {"step": np.array(0.0), "sizes": np.array([12.0])}
        answer, _ = rule.decide(np.array([size]), {}, present=np.array([True]), facts=facts, xp=np)
        assert answer.factor is not None
        assert answer.factor[0] == pytest.approx(1 / divisor, rel=1e-6)
    assert sum(divisor > 1 for divisor in divisors) > 50


@pytest.mark.parametrize("limit", [0.01, 0.16, 3.0])
def test_agc(limit: float) -> None:
    """The definition of Brock et al., on the series as gradients of units with weights of all sizes."""
    weights = np.array([2.0, 0.3, 1e-5, 0.0])
    allowed = limit * np.maximum(weights, 1e-3)
    expected = np.where(TENSORS > allowed, TENSORS * (allowed / TENSORS), TENSORS)
    found = after(kk.clip.AGC(limit), TENSORS, {"weights": weights})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_smooth_and_normalize() -> None:
    column = SERIES[:, None]
    found = after(kk.clip.Smooth(0.5), SERIES)
    np.testing.assert_allclose(found, column * 0.5 / (column + 0.5), rtol=1e-12)
    found = after(kk.clip.Normalize(0.5), SERIES)
    np.testing.assert_allclose(found, column * 0.5 / (column + 0.01), rtol=1e-12)
    each = after(kk.clip.Normalize(0.5, per="tensor"), TENSORS)
    np.testing.assert_allclose(each, TENSORS * 0.5 / (TENSORS + 0.01), rtol=1e-12)


if "jax" in INSTALLED:

    @pytest.mark.parametrize("limit", [0.01, 0.5])
    def test_agc_is_what_optax_does_to_dense_layers(limit: float) -> None:
        optax = load_quietly("optax")
        generator = np.random.default_rng(2)
        weights = generator.normal(size=(6, 5)).astype(np.float32) * [1.0, 0.1, 1e-5, 3.0, 0.0]
        gradient = generator.normal(size=(6, 5)).astype(np.float32)
        transform = optax.adaptive_grad_clip(limit)  # its units are columns: axis 0 is reduced
        updates = {"w": gradient}
        expected, _ = transform.update(
            updates, transform.init(updates), {"w": weights.astype(np.float32)}
        )
        sizes = np.linalg.norm(gradient.astype(np.float64), axis=0)
        facts = {"weights": np.linalg.norm(weights, axis=0)}
        found = after(kk.clip.AGC(limit), [sizes], facts)[0]
        np.testing.assert_allclose(
            np.linalg.norm(np.asarray(expected["w"]), axis=0), found, rtol=1e-5
        )

    @pytest.mark.parametrize("limit", [0.5, 1.0])
    def test_block_rms_is_what_optax_does(limit: float) -> None:
        optax = load_quietly("optax")
        update = np.random.default_rng(3).normal(size=(7, 3)).astype(np.float32)
        transform = optax.clip_by_block_rms(limit)
        expected, _ = transform.update([update], transform.init([update]))
        size = np.linalg.norm(update.astype(np.float64))
        found = after(kk.clip.BlockRMS(limit), [[size]], {"sizes": np.array([21.0])})
        np.testing.assert_allclose(found[0, 0], np.linalg.norm(expected[0]), rtol=1e-5)
