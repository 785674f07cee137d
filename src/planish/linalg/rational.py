"""Numbers behind the approximations of sqrt(1 - z): Taylor's series, Pade's quotient in three forms, and their errors.

With lambda = 1 - z, s = sqrt(lambda) and N = 2 m + 1, the diagonal Pade quotient of degree m is Gragg's

    r_m(lambda) = s ((1 + s)^N + (1 - s)^N) / ((1 + s)^N - (1 - s)^N)

so its relative error is exactly 2 q / (1 - q) with q = ((1 - s) / (1 + s))^N, on the whole half line, and the same
for lambda and 1 / lambda. Its reciprocal is a sum of positive terms,

    1 / r_m(lambda) = (1 + 2 sum_i 1 / (sin^2 phi_i + cos^2 phi_i lambda)) / N,   phi_i = (2 i + 1) pi / 2 N

which needs no products of matrices and cancels no digits; lambda / r_m(lambda) is as good a root as r_m, and exact
at 0. As one quotient of polynomials in lambda,

    r_m = P / Q,   P = sum_j C(N, 2 j) lambda^j,   Q = sum_j C(N, 2 j + 1) lambda^j

it takes one inverse in place of m; coefficients are positive, so nothing cancels, and what rounding costs is the
condition of Q (or of P, for the inverse root), Q(high) / Q(low) on a spectrum within [low, high].
"""

import functools
import math
from fractions import Fraction

Pairs = list[tuple[float, float]]


def taylor(degree: int, *, inverse: bool = False) -> list[float]:
    """Return the coefficients of (1 - z)^(1/2), or of (1 - z)^(-1/2), from z^0 to z^degree.

    Example:
        >>> taylor(4)
        [1.0, -0.5, -0.125, -0.0625, -0.0390625]
    """
    found = [1.0]
    for k in range(1, degree + 1):
        found.append(found[-1] * (k - (0.5 if inverse else 1.5)) / k)
    return found


def pade(order: int) -> tuple[list[float], list[float]]:
    """Return p and q, the coefficients in z of the quotient of degree `order`: sqrt(1 - z) ~ p(z) / q(z).

    Example:
        >>> pade(1)
        ([1.0, -0.75], [1.0, -0.25])
    """
    n = 2 * order + 1
    found = []
    for first in (0, 1):
        powers = [math.comb(n, 2 * j + first) for j in range(order + 1)]  # of lambda
        in_z = [sum(c * math.comb(j, k) * (-1) ** k for j, c in enumerate(powers)) for k in range(order + 1)]
        found.append([float(Fraction(c, 4**order)) for c in in_z])
    return found[0], found[1]


def quotient(order: int) -> tuple[list[float], list[float]]:
    """Return the coefficients of P and Q in lambda, divided by 4^order.

    Example:
        >>> quotient(1)
        ([0.25, 0.75], [0.75, 0.25])
    """
    n = 2 * order + 1
    p, q = ([math.comb(n, 2 * j + odd) / 4**order for j in range(order + 1)] for odd in (0, 1))
    return p, q


def fractions(order: int) -> Pairs:
    """Return (alpha, beta) of sqrt(1 - z) ~ 1 - sum of alpha z / (1 - beta z), the quotient in partial fractions."""
    n = 2 * order + 1
    angles = [math.pi * j / n for j in range(1, order + 1)]
    return [(2 / n * math.sin(angle) ** 2, math.cos(angle) ** 2) for angle in angles]


def shifts(order: int) -> Pairs:
    """Return (sin^2 phi, cos^2 phi) of the reciprocal's partial fractions."""
    angles = [(2 * i + 1) * math.pi / (4 * order + 2) for i in range(order)]
    return [(math.sin(angle) ** 2, math.cos(angle) ** 2) for angle in angles]


def reach(order: int, steps: int, tolerance: float) -> float:
    """Return the least eigenvalue x for which the quotient is off by no more than `tolerance`, on all of [x, 1 / x].

    A step of the iteration multiplies exponents: after `steps` of them q has the exponent (2 order + 1)^steps.

    Example:
        >>> round(reach(5, 1, 1e-2), 4), round(reach(5, 2, 1e-5), 4)
        (0.0559, 0.0025)
    """
    q = (tolerance / (2 + tolerance)) ** (1 / (2 * order + 1) ** steps)
    return float(((1 - q) / (1 + q)) ** 2)


@functools.lru_cache(maxsize=64)
def interval(order: int, tolerance: float, eps: float, *, inverse: bool) -> tuple[float, float] | None:
    """Return [low, high] within which one quotient P / Q, computed to `eps`, is off by no more than `tolerance`.

    Four fifths of the tolerance are the approximation's, whose reach is [low, 1 / low]. A fifth is for rounding, which
    may end the interval sooner: ten eps times the condition of what is inverted, P for the inverse root. None if that
    leaves no interval around 1.

    Example:
        >>> low, high = interval(5, 1e-2, 1e-7, inverse=False)
        >>> round(low, 3), round(high, 1)
        (0.061, 4.0)
    """
    low = reach(order, 1, 0.8 * tolerance)
    inverted = quotient(order)[0 if inverse else 1]

    def at(x: float) -> float:
        return sum(c * x**j for j, c in enumerate(inverted))

    high, beyond = 1.0, 1 / low
    if 10 * eps * at(high) / at(low) > 0.2 * tolerance:
        return None
    for _ in range(50):
        middle = (high + beyond) / 2
        high, beyond = (middle, beyond) if 10 * eps * at(middle) / at(low) <= 0.2 * tolerance else (high, middle)
    return low, high
