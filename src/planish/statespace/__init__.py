"""Smooth a time series: hidden states of non-linear models, and their parameters, given all that was seen.

How to choose: `kalman` for `LinearGaussian` and `forward_backward` for `FiniteHMM` are exact. For any other model with
densities, `paris` (or `Paris`, as data come in) smooths sums over time in one pass, `parisian_gibbs` does it with a
bias that shrinks geometrically and a standard error, and `fit_mle` learns parameters. `particle_filter` filters.
"""

from planish.statespace.finite import FiniteHMM, FiniteSmoothing, forward_backward
from planish.statespace.gaussian import KalmanResult, kalman
from planish.statespace.interop import FromParticles, ParticlesModel
from planish.statespace.learning import FitResult, Score, estimate_score, fit_mle
from planish.statespace.models import LinearGaussian, StateSpaceModel, StochasticVolatility, simulate
from planish.statespace.networks import ChaoticRNN
from planish.statespace.online import Paris, SmoothingResult, ffbs, paris
from planish.statespace.particles import FilterResult, particle_filter
from planish.statespace.ppg import GibbsResult, ParisianGibbs, parisian_gibbs

__all__ = [
    "ChaoticRNN",
    "FilterResult",
    "FiniteHMM",
    "FiniteSmoothing",
    "FitResult",
    "FromParticles",
    "GibbsResult",
    "KalmanResult",
    "LinearGaussian",
    "Paris",
    "ParisianGibbs",
    "ParticlesModel",
    "Score",
    "SmoothingResult",
    "StateSpaceModel",
    "StochasticVolatility",
    "estimate_score",
    "ffbs",
    "fit_mle",
    "forward_backward",
    "kalman",
    "paris",
    "parisian_gibbs",
    "particle_filter",
    "simulate",
]
