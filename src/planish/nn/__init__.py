"""Layers: activations that are smooth where ReLU has a corner.

How to choose: `SAU` with a width of 0.1 to 1 where derivatives of the network matter, or to train smooth and deploy an
exact Leaky ReLU (`WidthSchedule`, `to_leaky_relu`); `ReQU` where a derivative enters the loss and the network is
shallow; `SMU` and `SMU1` for the sibling formulas; `smooth_piecewise` for other functions with corners.
`replace_activations` puts any of them into a model that exists.
"""

from planish.nn.leaky import SAU, sau
from planish.nn.maximum import SMU, SMU1, smu, smu1
from planish.nn.models import WidthSchedule, param_groups, replace_activations, to_leaky_relu
from planish.nn.piecewise import smooth_piecewise
from planish.nn.squared import ReQU, requ

__all__ = [
    "SAU",
    "SMU",
    "SMU1",
    "ReQU",
    "WidthSchedule",
    "param_groups",
    "replace_activations",
    "requ",
    "sau",
    "smooth_piecewise",
    "smu",
    "smu1",
    "to_leaky_relu",
]
