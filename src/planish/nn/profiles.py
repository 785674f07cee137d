"""The kernels that smooth: positive, even, of total mass one, with a first moment.

A kernel enters only through its upper tail. With U distributed as the kernel and u >= 0:

    pdf(u)      density                       sf(u) = P(U > u)                 tail(u) = E[(U - u)_+]
    gap(u) = tail(u) + u sf(u)                tail' = -sf,   sf' = -pdf,       gap' = -u pdf

No formula here subtracts nearly equal numbers, except the Gaussian, where what is lost is below the rounding of what
it is added to. All take u = |x| / width, are made of plain torch operations, and can be differentiated as often as the
kernel allows.

================  ==================================  =======================================
kernel            density                             of the smoothed unit
================  ==================================  =======================================
gaussian          exp(-u^2/2) / sqrt(2 pi)            the paper's; analytic
logistic          e^-u / (1 + e^-u)^2                 softplus at slope 0; analytic
laplace           e^-u / 2                            two continuous derivatives
uniform           1/2 on [-1, 1]                      exact beyond the width; quickest
triangular        1 - u on [-1, 1]                    exact beyond the width
epanechnikov      3/4 (1 - u^2) on [-1, 1]            exact beyond the width
student           (1 + u^2)^(-3/2) / 2                SMU-1: algebraic, tails fall slowly
================  ==================================  =======================================
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from planish._support import bad

Kernel = Literal["gaussian", "logistic", "laplace", "uniform", "triangular", "epanechnikov", "student"]
_Curve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Profile:
    """One kernel: `pdf`, `sf`, `tail` and `gap` on u >= 0; beyond `reach` its tail counts as nothing."""

    pdf: _Curve
    sf: _Curve
    tail: _Curve
    gap: _Curve
    peak: float  # tail(0), the largest distance from Leaky ReLU at slope 0 and width 1
    reach: float


def _normal(u: Tensor) -> Tensor:
    return torch.exp(u * u * -0.5) * (1 / math.sqrt(2 * math.pi))


def _normal_sf(u: Tensor) -> Tensor:
    return 0.5 - 0.5 * torch.erf(u * math.sqrt(0.5))  # compilers vectorise erf, and not erfc


def _decay(u: Tensor) -> Tensor:
    return 0.5 * torch.exp(-u)


def _inside(u: Tensor) -> Tensor:
    return (1 - u).clamp_min(0)


def _radius(u: Tensor) -> Tensor:
    return torch.sqrt(1 + u * u)


PROFILES: dict[str, Profile] = {
    "gaussian": Profile(
        _normal, _normal_sf, lambda u: _normal(u) - u * _normal_sf(u), _normal, 1 / math.sqrt(2 * math.pi), 39.0
    ),
    "logistic": Profile(
        lambda u: torch.sigmoid(-u) * torch.sigmoid(u),
        lambda u: torch.sigmoid(-u),
        lambda u: torch.log1p(torch.exp(-u)),
        lambda u: torch.log1p(torch.exp(-u)) + u * torch.sigmoid(-u),
        math.log(2),
        800.0,
    ),
    "laplace": Profile(_decay, _decay, _decay, lambda u: _decay(u) * (1 + u), 0.5, 800.0),
    "uniform": Profile(
        lambda u: torch.where(u <= 1, 0.5, torch.zeros_like(u)),
        lambda u: _inside(u) / 2,
        lambda u: _inside(u) ** 2 / 4,
        lambda u: _inside(u) * (1 + u) / 4,
        0.25,
        2.0,
    ),
    "triangular": Profile(
        _inside,
        lambda u: _inside(u) ** 2 / 2,
        lambda u: _inside(u) ** 3 / 6,
        lambda u: _inside(u) ** 2 * (1 + 2 * u) / 6,
        1 / 6,
        2.0,
    ),
    "epanechnikov": Profile(
        lambda u: _inside(u) * (1 + u) * 0.75,
        lambda u: _inside(u) ** 2 * (2 + u) / 4,
        lambda u: _inside(u) ** 3 * (3 + u) / 16,
        lambda u: (_inside(u) * (1 + u)) ** 2 * (3 / 16),
        3 / 16,
        2.0,
    ),
    "student": Profile(
        lambda u: 0.5 / _radius(u) ** 3,
        lambda u: 0.5 / (_radius(u) * (_radius(u) + u)),
        lambda u: 0.5 / (_radius(u) + u),
        lambda u: 0.5 / _radius(u),
        0.5,
        1e12,
    ),
}


def check_kernel(where: str, kernel: str) -> Profile:
    """Return the kernel of that name, or refuse: one without a first moment (Cauchy's) would diverge."""
    if kernel not in PROFILES:
        raise bad(where, "kernel", f"one of {', '.join(PROFILES)}", kernel)
    return PROFILES[kernel]
