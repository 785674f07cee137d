"""How sure is a calibration error: its interval, and what a calibrated predictor would show on the same predictions.

A smooth calibration error is never negative, so noise adds to it: about 0.3 n^(-1/3) for n samples of a calibrated
predictor. Two test sets of different size can therefore not be compared by the number alone. The floor is found by
drawing outcomes that make the predictor calibrated, y ~ Bernoulli(f), and scoring those in the same way, bandwidth and
all; the share of such draws that score no less than the data is the p-value of "it is calibrated". What is left when
the floor is taken off, as variances are, hardly depends on the number of samples; the bootstrap's interval is of that.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from planish._support import bad
from planish.metrics import reflected
from planish.metrics.curve import SmoothCalibrationCurve, at, curve_of, spectra
from planish.metrics.reflected import Array
from planish.metrics.samples import (
    Label,
    Multiclass,
    Samples,
    Values,
    check_bandwidth,
    check_grid,
    check_samples,
    one,
)
from planish.metrics.score import of_spectrum


@dataclass(frozen=True)
class CalibrationAssessment:
    """What is known of a predictor's calibration.

    Attributes:
        ece: The smooth calibration error.
        low: Lower end of the bootstrap interval of `excess`; NaN without a bootstrap or draws, as `high`.
        high: Upper end.
        floor: Mean error of a calibrated predictor on these predictions; NaN without draws, as the next two.
        threshold: What the error of a calibrated predictor exceeds in a share 1 - `confidence` of draws.
        p_value: Share of calibrated draws whose error is no less, the data counted as one of them.
        confidence: Level of interval, threshold and bands.
        curve: The calibration curve.
        band: Lower and upper ends of the curve's pointwise bootstrap band; None without a bootstrap.
        null_band: The same for a calibrated predictor, around the diagonal; None without draws.

    Example:
        >>> found = CalibrationAssessment(0.05, 0.03, 0.06, 0.03, 0.04, 0.005, 0.95, curve=None)
        >>> round(found.excess, 6)
        0.04
    """

    ece: float
    low: float
    high: float
    floor: float
    threshold: float
    p_value: float
    confidence: float
    curve: SmoothCalibrationCurve
    band: tuple[Array, Array] | None = None
    null_band: tuple[Array, Array] | None = None

    @property
    def excess(self) -> float:
        """The error beyond the floor, sqrt(max(0, ece^2 - floor^2)): comparable across numbers of samples."""
        return math.sqrt(max(0.0, self.ece**2 - self.floor**2)) if not self.ece <= self.floor else 0.0

    def __str__(self) -> str:
        """Return the figures in one line."""
        text = f"smECE {self.ece:.4f}"
        if not math.isnan(self.floor):
            text += f" (if calibrated {self.floor:.4f}, p = {self.p_value:.2g}); beyond noise {self.excess:.4f}"
        if not math.isnan(self.low):
            text += f" [{self.low:.4f}, {self.high:.4f}]"
        return text


def assess_calibration(
    y_true: Values,
    y_prob: Values,
    *,
    sample_weight: Values | None = None,
    bandwidth: float | Literal["auto"] = "auto",
    pos_label: Label | None = None,
    multiclass: Multiclass = "top_label",
    groups: Values | None = None,
    n_bootstrap: int = 200,
    n_null: int = 200,
    confidence: float = 0.95,
    n_points: int = 257,
    n_grid: int = reflected.GRID,
    generator: torch.Generator | None = None,
) -> CalibrationAssessment:
    """Measure a calibration error with its interval, its floor and its p-value.

    Args:
        y_true: See `smooth_ece`.
        y_prob: See `smooth_ece`.
        sample_weight: See `smooth_ece`.
        bandwidth: See `smooth_ece`; where it is "auto" every resample finds its own, while bands keep the data's.
        pos_label: See `smooth_ece`.
        multiclass: See `smooth_ece`; only "top_label" will do.
        groups: A number a sample; samples with the same one are resampled together (windows of a text, patients).
        n_bootstrap: Resamples for interval and band, >= 0; default 200.
        n_null: Draws of calibrated outcomes for floor and p-value, >= 0; default 200.
        confidence: Level, in (0, 1); default 0.95.
        n_points: Points of the curve, at least 2; default 257.
        n_grid: See `smooth_ece`.
        generator: Source of draws, on the processor; default a fixed one, so that the same call gives the same bits.

    Returns:
        The assessment.

    Raises:
        ValueError: See `smooth_ece`; or a count, the level or `groups` is not what it must be.

    Example:
        >>> f = torch.linspace(0.01, 0.99, 500, dtype=torch.float64)
        >>> y = torch.rand(500, generator=torch.Generator().manual_seed(0)) < f**3
        >>> found = assess_calibration(y, f, n_bootstrap=20, n_null=50)
        >>> bool(found.floor < found.threshold < found.low < found.high), round(found.p_value, 3)
        (True, 0.02)
    """
    where = "assess_calibration"
    width, cells = check_bandwidth(where, bandwidth), check_grid(where, n_grid)
    for name, count, least in (("n_bootstrap", n_bootstrap, 0), ("n_null", n_null, 0), ("n_points", n_points, 2)):
        if count < least:
            raise bad(where, name, f"an int >= {least}", count)
    if not 0 < confidence < 1:
        raise bad(where, "confidence", "a float in (0, 1)", confidence)
    problems = check_samples(where, y_true, y_prob, sample_weight, pos_label=pos_label, multiclass=multiclass)
    samples = one(problems, where)
    member = None if groups is None else _members(where, groups, len(samples.f))
    samples = Samples(samples.y.detach().double(), samples.f.detach().double(), samples.w)
    curve = curve_of(samples, width, center=True, points=np.linspace(0, 1, n_points), cells=cells)
    ece = of_spectrum(spectra(samples, cells)[0], width)[0]
    generator = generator or torch.Generator().manual_seed(0)
    score = _Score(width, curve, len(samples.f), ((1 - confidence) / 2, (1 + confidence) / 2), cells)
    low = high = floor = threshold = p_value = math.nan
    band = null_band = None
    if n_null:
        errors, null_band = score(calibrated(samples, generator) for _ in range(n_null))
        floor, threshold = float(errors.mean()), float(np.quantile(errors, confidence))
        p_value = (1 + int((errors >= ece).sum())) / (1 + n_null)
    if n_bootstrap:
        errors, band = score(resample(samples, member, generator) for _ in range(n_bootstrap))
        # a resample has the data's noise and as much again: twice the variance, a floor 2^(1/3) times as high
        beyond = np.sqrt(np.maximum(0, errors**2 - 2 ** (2 / 3) * floor**2))
        low, high = (float(end) for end in np.quantile(beyond, score.tails))
    return CalibrationAssessment(ece, low, high, floor, threshold, p_value, confidence, curve, band, null_band)


def resample(samples: Samples, member: Tensor | None, generator: torch.Generator) -> Samples:
    """Draw samples, or whole groups of them, with replacement: as weights, so that nothing is copied."""
    units = len(samples.f) if member is None else int(member.max()) + 1
    drawn = torch.randint(units, (units,), generator=generator)
    counts = torch.bincount(drawn, minlength=units).double()
    counts = (counts if member is None else counts[member]).to(samples.f.device)
    weights = counts if samples.w is None else counts * samples.w
    return samples._replace(w=weights) if bool(weights.any()) else resample(samples, member, generator)


def calibrated(samples: Samples, generator: torch.Generator) -> Samples:
    """Draw outcomes of which the predictions are the true probabilities."""
    even = torch.rand(len(samples.f), generator=generator, dtype=torch.float64).to(samples.f.device)
    return samples._replace(y=even < samples.f)


@dataclass(frozen=True)
class _Score:
    """Scores many variants of the same samples: their errors, and the band of their curves."""

    width: float | None
    curve: SmoothCalibrationCurve
    n: int
    tails: tuple[float, float]
    cells: int

    def __call__(self, variants: Iterable[Samples]) -> tuple[Array, tuple[Array, Array]]:
        kept = reflected.modes(self.curve.bandwidth, self.cells + 1)
        errors, spectrums = [], []
        for variant in variants:
            c = spectra(variant, self.cells)
            errors.append(of_spectrum(c[0], self.width)[0])
            spectrums.append(c[:, :kept])
        residual, density = np.moveaxis(at(np.stack(spectrums), self.curve.bandwidth, self.curve.prob_pred), 1, 0)
        fits = self.curve.prob_pred - np.divide(
            residual, density, out=np.zeros_like(density), where=density * self.n > 1e-3
        )
        low, high = np.quantile(fits.clip(0, 1), self.tails, axis=0)
        unknown = np.isnan(self.curve.prob_true)
        low[unknown] = high[unknown] = np.nan
        return np.array(errors), (low, high)


def _members(where: str, groups: Values, n: int) -> Tensor:
    array = groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if array.shape != (n,):
        raise bad(where, "groups", "one value a sample", f"shape {array.shape} for {n} samples")
    return torch.from_numpy(np.unique(array, return_inverse=True)[1])
