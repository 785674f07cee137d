"""Where a quantile process starts from: a linear location, and quantiles of what it leaves, the same for all rows.

Few rows of many features tell a network from noise late, and it has fitted some by then. Stopping early pulls towards
where training began, so it should begin at something sensible: y is b x + c + e, with quantiles of e that do not depend
on x. These are a Bernstein polynomial of the level whose coefficients, quantiles of the sample, rise: so does it. Both
are polynomials, which a ReQU network represents exactly; what is learnt is the same class of functions.
"""

import numpy as np
import numpy.typing as npt

from planish.regression.distribution import pinball, weighted_quantiles

Array = npt.NDArray[np.float64]
DEGREE = 32  # of the polynomial; even, so that one coefficient is the median
_RIDGES = (np.inf, 1.0, 0.1, 0.01, 0.001)  # infinite: no slope at all
_UNJUDGED = 0.01  # the ridge where no rows are held out
_ROUNDS = 12  # of weighted least squares
_LEVELS = (np.arange(20) + 0.5) / 20


def linear_median(x: Array, y: Array, weight: Array | None, ridge: float) -> Array:
    """Return slopes b that minimise mean |y - b x - c| + ridge |b|^2, nearly: least squares, weighted again and again.

    Args:
        x: Features, (n, d), of mean near 0 and deviation near 1.
        y: Targets, (n,), of deviation near 1.
        weight: Of rows, (n,), >= 0.
        ridge: Above 0.

    Returns:
        (d,).

    Example:
        >>> x = np.linspace(-1, 1, 9)[:, None]
        >>> y = 2 * x[:, 0]
        >>> y[0] = 1e3  # which least squares would follow
        >>> bool(abs(linear_median(x, y, None, 1e-4)[0] - 2) < 0.05)
        True
    """
    n, d = x.shape
    z = np.column_stack([x, np.ones(n)])
    shrink = np.diag(np.append(np.full(d, 2 * ridge), 1e-12))
    mass = np.ones(n) if weight is None else weight
    w = np.append(np.zeros(d), weighted_quantiles(y, weight, np.array([0.5])))
    for i in range(_ROUNDS):
        near = 10.0 ** -(i / 4)  # rows nearer than this count by their squares: from 1 down to about 1e-3
        curve = mass / (near + np.abs(y - z @ w))
        w = np.linalg.solve((z.T * curve) @ z / n + shrink, z.T @ (curve * y) / n)
    return np.asarray(w[:-1], np.float64)


def bernstein(level: Array, coefficients: Array) -> Array:
    """Return the Bernstein polynomial of some levels: the mean of coefficients at binomial places.

    Example:
        >>> bernstein(np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 4.0])).tolist()
        [0.0, 1.5, 4.0]
    """
    c = np.broadcast_to(coefficients[:, None], (len(coefficients), len(level)))
    while len(c) > 1:  # de Casteljau
        c = (1 - level) * c[:-1] + level * c[1:]
    return np.asarray(c[0], np.float64)


def _rise(rest: Array, weight: Array | None) -> Array:
    return weighted_quantiles(rest, weight, (np.arange(DEGREE + 1) + 0.5) / (DEGREE + 1))


def baseline(
    x: Array, y: Array, weight: Array | None, train: npt.NDArray[np.int64], held_out: npt.NDArray[np.int64] | None
) -> tuple[Array, Array]:
    """Return the start of one member from the rows that it learns from.

    Args:
        x: Standardised features, (n, d).
        y: Standardised targets, (n,).
        weight: Of rows.
        train: Rows to learn from.
        held_out: Rows by which the ridge is chosen.

    Returns:
        Slopes (d,), and coefficients of the rising polynomial, (DEGREE + 1,).
    """
    own = None if weight is None else weight[train]
    if own is not None and not own.any():
        own = None
    tried = []
    for ridge in _RIDGES if held_out is not None else (_UNJUDGED,):
        slopes = np.zeros(x.shape[1]) if np.isinf(ridge) else linear_median(x[train], y[train], own, ridge)
        rise = _rise(y[train] - x[train] @ slopes, own)
        loss = 0.0
        if held_out is not None:
            curves = (x[held_out] @ slopes)[:, None] + bernstein(_LEVELS, rise)
            losses = pinball(y[held_out], curves, _LEVELS)
            loss = float((losses if weight is None else losses * weight[held_out]).mean())
        tried.append((loss, slopes, rise))
    _, slopes, rise = min(tried, key=lambda one: one[0])
    return slopes, rise
