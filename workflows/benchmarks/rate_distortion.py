"""Rates at equal quality: interpolation of rate-distortion curves, and intervals over pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

Floats = NDArray[np.float64]
MIN_OVERLAP = 0.1  # of our range of quality; less says nothing about the range
RESAMPLES = 10000


@dataclass(frozen=True)
class Curve:
    """A codec on one picture: rates (bytes or bits a pixel) and quality, both ascending."""

    rate: Floats
    quality: Floats

    @classmethod
    def of(cls, points: list[tuple[float, float]]) -> Curve:
        """Curve through (rate, quality) points, more quality being better.

        Points that take more bytes for no more quality than another are dropped: nobody would
        use them, and without them both columns ascend. Infinite quality is dropped, too.
        """
        kept: list[tuple[float, float]] = []
        for rate, quality in sorted(points, key=lambda p: (p[0], -p[1])):
            if np.isfinite(quality) and (not kept or quality > kept[-1][1]):
                kept.append((rate, quality))
        array = np.array(kept, np.float64).reshape(-1, 2)
        return cls(array[:, 0], array[:, 1])

    def __bool__(self) -> bool:
        return len(self.rate) > 1

    def quality_at(self, rate: Floats) -> Floats:
        """Quality at rates, monotone (PCHIP) in the log of the rate; NaN outside the curve."""
        interpolate = PchipInterpolator(np.log(self.rate), self.quality, extrapolate=False)
        values: Floats = interpolate(np.log(rate))
        return values

    def mean_log_rate(self, low: float, high: float) -> float:
        """Mean of the log of the rate over a range of quality inside the curve."""
        # an end that was interpolated may lie outside by a rounding
        low, high = np.clip([low, high], self.quality[0], self.quality[-1])
        log_rate = PchipInterpolator(self.quality, np.log(self.rate), extrapolate=False)
        return float(log_rate.integrate(low, high)) / (high - low)


@dataclass(frozen=True)
class Ratio:
    """Rate of a peer over ours at equal quality on one picture.

    Attributes:
        log: mean of the log of the ratio.
        share: of our range of quality, the part that both curves cover (0..1).
    """

    log: float
    share: float


def rate_ratio(ours: Curve, peer: Curve, low: float, high: float) -> Ratio | None:
    """Compare a peer's rate with ours, as the Bjøntegaard rate does.

    The log ratio is averaged over the qualities that we reach between the rates `low` and `high`
    and that the peer reaches, too. Nothing is extrapolated.

    Returns:
        None where there is no such range, or one of less than a tenth of ours.
    """
    if not ours or not peer:
        return None
    ends = np.clip([low, high], ours.rate[0], ours.rate[-1])
    bottom, top = ours.quality_at(ends).tolist()
    start, stop = max(bottom, peer.quality[0]), min(top, peer.quality[-1])
    if top <= bottom or stop - start < MIN_OVERLAP * (top - bottom):
        return None
    log = peer.mean_log_rate(start, stop) - ours.mean_log_rate(start, stop)
    return Ratio(log, (stop - start) / (top - bottom))


@dataclass(frozen=True)
class Comparison:
    """A peer against ours over pictures.

    Attributes:
        ratio: geometric mean of the peer's bytes over ours; NaN if no picture could be compared.
        low, high: 95 % bootstrap interval over pictures; NaN with fewer than two.
        compared: pictures whose curves overlap.
        pictures: all of them.
        share: mean share of our range of quality that was compared.
    """

    ratio: float
    low: float
    high: float
    compared: int
    pictures: int
    share: float


def compare(ratios: list[Ratio | None], seed: int) -> Comparison:
    """Average over pictures; `seed` fixes the bootstrap."""
    logs = np.array([r.log for r in ratios if r is not None])
    if not len(logs):
        return Comparison(np.nan, np.nan, np.nan, 0, len(ratios), np.nan)
    low, high = bootstrap(logs, seed)
    share = float(np.mean([r.share for r in ratios if r is not None]))
    ratio = float(np.exp(logs.mean()))
    return Comparison(ratio, float(np.exp(low)), float(np.exp(high)), len(logs), len(ratios), share)


def bootstrap(values: Floats, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of values, resampled with replacement."""
    if len(values) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_share(parts: Floats, wholes: Floats, seed: int) -> tuple[float, float]:
    """95 % percentile interval of sum(parts) / sum(wholes), both resampled together."""
    if len(parts) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(parts), (RESAMPLES, len(parts)))
    low, high = np.percentile(parts[chosen].sum(1) / wholes[chosen].sum(1), [2.5, 97.5])
    return float(low), float(high)
