"""Optimize functions whose curvature grows, or whose Hessian is only approximately known.

How to choose: `minimize_gns` for a function of up to a few thousand variables, `GradNormNewton` for the same on the
parameters of a module: nothing to tune. `NormalizedGD` for large models and for losses that plain gradient descent
leaves at once; with `lr="auto"` where `GeneralizedSmoothness` is known or measured. `Spider` where gradients are noisy.
All but the first are optimizers of torch. On data whose single records must not show: `make_private_mngp` for a
module, `MNGPClassifier` for a table; `calibrate_noise`, `privacy_spent` and `audit_epsilon` keep it honest.
"""

import importlib
from typing import TYPE_CHECKING, Any

from planish.optim.audit import audit_epsilon
from planish.optim.generalized import GeneralizedSmoothness
from planish.optim.gradient_normalized import gamma_estimate
from planish.optim.minimize import minimize_gns
from planish.optim.newton import GradNormNewton
from planish.optim.noise import calibrate_noise, privacy_spent
from planish.optim.normalized import NormalizedGD
from planish.optim.problems import PenalizedDRO, PhaseRetrieval
from planish.optim.regularized import LowRank
from planish.optim.spider import Spider
from planish.optim.structured import Composite, LogSumExp, PowerNorm, gram

if TYPE_CHECKING:
    from planish.optim.private import MNGPOptimizer, PrivacyLossAccountant, make_private_mngp
    from planish.optim.private_classifier import MNGPClassifier

__all__ = [
    "Composite",
    "GeneralizedSmoothness",
    "GradNormNewton",
    "LogSumExp",
    "LowRank",
    "MNGPClassifier",
    "MNGPOptimizer",
    "NormalizedGD",
    "PenalizedDRO",
    "PhaseRetrieval",
    "PowerNorm",
    "PrivacyLossAccountant",
    "Spider",
    "audit_epsilon",
    "calibrate_noise",
    "gamma_estimate",
    "gram",
    "make_private_mngp",
    "minimize_gns",
    "privacy_spent",
]

_PRIVATE = ("MNGPOptimizer", "PrivacyLossAccountant", "make_private_mngp")


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: what needs Opacus or scikit-learn loads on first touch)
    if name in _PRIVATE:
        return getattr(importlib.import_module("planish.optim.private"), name)
    if name == "MNGPClassifier":
        return importlib.import_module("planish.optim.private_classifier").MNGPClassifier
    raise AttributeError(f"module 'planish.optim' has no attribute {name!r}")
