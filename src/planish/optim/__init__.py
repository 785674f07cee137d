"""Optimize functions whose curvature grows, or whose Hessian is only approximately known.

How to choose: `minimize_gns` for a function of up to a few thousand variables, `GradNormNewton` for the same on the
parameters of a module: nothing to tune. `NormalizedGD` for large models and for losses that plain gradient descent
leaves at once; with `lr="auto"` where `GeneralizedSmoothness` is known or measured. `Spider` where gradients are noisy.
All but the first are optimizers of torch.
"""

from planish.optim.generalized import GeneralizedSmoothness
from planish.optim.gradient_normalized import gamma_estimate
from planish.optim.minimize import minimize_gns
from planish.optim.newton import GradNormNewton
from planish.optim.normalized import NormalizedGD
from planish.optim.problems import PenalizedDRO, PhaseRetrieval
from planish.optim.regularized import LowRank
from planish.optim.spider import Spider
from planish.optim.structured import Composite, LogSumExp, PowerNorm, gram

__all__ = [
    "Composite",
    "GeneralizedSmoothness",
    "GradNormNewton",
    "LogSumExp",
    "LowRank",
    "NormalizedGD",
    "PenalizedDRO",
    "PhaseRetrieval",
    "PowerNorm",
    "Spider",
    "gamma_estimate",
    "gram",
    "minimize_gns",
]
