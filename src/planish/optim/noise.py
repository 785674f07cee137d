"""How much noise a privacy budget asks for, and what was spent."""

import math
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch

from planish._support import bad, require
from planish.optim.privacy_loss import Adjacency, Composed, History, compose, pairs

Accountant = Literal["exact", "prv", "rdp"]
_LEAST = 0.05


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the least delta of one Gaussian mechanism whose sensitivity is mu deviations of its noise."""
    ends = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
    first, second = torch.special.log_ndtr(ends).tolist()
    return math.exp(first) * -math.expm1(min(0.0, epsilon + second - first))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the least epsilon, >= 0, of one Gaussian mechanism; 0 for mu = 0."""
    if mu == 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
    return _bisect(lambda e: gaussian_delta(mu, e) <= delta, 0.0, high)


def calibrate_noise(
    epsilon: float,
    delta: float,
    steps: int,
    sample_rate: float = 1.0,
    *,
    adjacency: Adjacency = "add_remove",
    accountant: Accountant = "exact",
) -> float:
    """Return the least noise multiplier with which `steps` noisy sums are (epsilon, delta)-differentially private.

    It is the noise's standard deviation on the sum of per-sample gradients, in units of their largest possible norm:
    what Opacus calls `noise_multiplier`. Under "replace" a sum moves by twice that norm, which is counted here.

    Args:
        epsilon: Privacy budget, > 0.
        delta: Probability with which it may fail, in (0, 1); below 1 / (number of samples) to mean anything.
        steps: Number of sums, >= 1.
        sample_rate: Probability with which each sample is drawn, by itself, for a sum: in (0, 1]. Default 1, all data.
        adjacency: What may differ: one sample more or less ("add_remove"), or one other in its place ("replace").
        accountant: "exact" has a closed form at sample_rate 1, and else the distribution of the privacy loss, from
            above, within about 0.3 %; "prv" and "rdp" are Opacus' own, looser, for comparison, "add_remove" only.

    Returns:
        The multiplier, >= 0.05.

    Raises:
        ValueError: An argument is out of range.
        MissingExtra: "prv" or "rdp" without Opacus.

    Example:
        >>> round(calibrate_noise(1.0, 1e-5, steps=50), 2)
        26.38
        >>> round(calibrate_noise(1.0, 1e-5, steps=2000, sample_rate=0.01), 2)
        1.84
    """
    where = "calibrate_noise"
    check_budget(where, epsilon, delta, adjacency)
    _check_run(where, steps, sample_rate)
    if accountant not in get_args(Accountant):
        raise bad(where, "accountant", "'exact', 'prv' or 'rdp'", accountant)
    if accountant != "exact":
        if adjacency != "add_remove":
            raise bad(where, "adjacency", f"'add_remove' where accountant={accountant!r}", adjacency)
        finer = {"eps_error": min(0.01, epsilon / 100)} if accountant == "prv" else {}
        tools = require("opacus.accountants.utils", "opacus", f"calibrate_noise(accountant={accountant!r})")
        with warnings.catch_warnings():  # while it searches it meets noise for which its list of orders is too short
            warnings.filterwarnings("ignore", message="Optimal order is the|divide by zero")
            return float(
            tools.get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps,
                accountant=accountant, epsilon_tolerance=min(0.01, epsilon / 200), **finer,
            )
        )  # fmt: skip
    unit = 1.0 if adjacency == "add_remove" else 2.0
    whole = unit * math.sqrt(steps) / _bisect(lambda mu: gaussian_delta(mu, epsilon) > delta, 1e-9, 1e4, lower=True)
    if sample_rate == 1:
        return max(whole, _LEAST)

    def excess(z: float) -> float:
        """Return log(delta spent / delta)."""
        composed = [compose([(z, sample_rate, steps)], pair, delta) for pair in pairs(adjacency)]
        return math.log(max(c.delta(epsilon) for c in composed) / delta)

    return _root(excess, _LEAST, max(2 * _LEAST, 1.01 * whole))


def privacy_spent(history: History, delta: float, *, adjacency: Adjacency = "add_remove") -> float:
    """Return the epsilon that runs of noisy sums have cost together, from above.

    Args:
        history: Runs as (noise multiplier, sample rate, steps), as Opacus' accountants keep them; none cost nothing.
        delta: As for `calibrate_noise`.
        adjacency: As for `calibrate_noise`.

    Returns:
        Epsilon, >= 0; infinite where noise was below 0.05, or where delta is below what double precision tells apart.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> round(privacy_spent([(26.379, 1.0, 50)], 1e-5), 3)
        1.0
        >>> round(privacy_spent([(1.8433, 0.01, 1000), (1.8433, 0.01, 1000)], 1e-5), 2)
        1.0
    """
    where = "privacy_spent"
    check_budget(where, 1.0, delta, adjacency)
    runs = [(float(z), float(q), int(steps)) for z, q, steps in history if steps]
    for z, q, steps in runs:
        if not z >= 0:
            raise bad(where, "history", "noise multipliers >= 0", z)
        _check_run(where, steps, q)
    if not runs:
        return 0.0
    if min(z for z, _, _ in runs) < _LEAST:
        return math.inf
    unit = 1.0 if adjacency == "add_remove" else 2.0
    if all(q == 1 for _, q, _ in runs):
        return gaussian_epsilon(unit * math.sqrt(sum(steps / z**2 for z, _, steps in runs)), delta)
    return max(_epsilon(compose(runs, pair, delta), delta) for pair in pairs(adjacency))


def _epsilon(composed: Composed, delta: float) -> float:
    high = float(composed.losses[-1])
    if composed.delta(high) > delta:
        return math.inf
    if composed.delta(0.0) <= delta:
        return 0.0
    return _bisect(lambda e: composed.delta(e) <= delta, 0.0, high)


def _bisect(holds: Callable[[float], bool], low: float, high: float, *, lower: bool = False) -> float:
    """Return where `holds` becomes true, to float64: the first point found that does, or with `lower` does not."""
    for _ in range(200):
        middle = math.sqrt(low * high) if low > 0 else (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low if lower else high


def _root(excess: Callable[[float], float], least: float, high: float) -> float:
    """Return a z >= least with excess(z) in [-0.003, 0], by regula falsi (Illinois) in logarithms; it falls with z."""
    limit = 8 * high
    while (at_high := excess(high)) > 0:  # rounding, cut-offs and the grid count against us even at z = high
        if high > limit:
            raise bad("calibrate_noise", "delta", "large enough to be told from 0 in double precision", "less")
        high *= 1.5
    while (at_low := excess(low := high / 2)) <= 0:  # from above: little noise means a long grid
        if low <= least:
            return least
        high, at_high = low, at_low
    a, b = math.log(low), math.log(high)
    for _ in range(100):
        if at_high > -0.003 or b - a < 1e-6:
            break
        middle = a + (b - a) * at_low / (at_low - at_high)
        middle = min(max(middle, a + (b - a) / 50), b - (b - a) / 50)
        here = excess(math.exp(middle))
        if here > 0:
            a, at_low, at_high = middle, here, at_high / 2 if at_high < -0.006 else at_high
        else:
            b, at_high, at_low = middle, here, at_low / 2
    return math.exp(b)


def check_budget(where: str, epsilon: float, delta: float, adjacency: str) -> None:
    """Refuse a budget that is none.

    Raises:
        ValueError: It is none.
    """
    if not (isinstance(epsilon, int | float) and 0 < epsilon < math.inf):
        raise bad(where, "epsilon", "a finite float > 0", epsilon)
    if not (isinstance(delta, int | float) and 0 < delta < 1):
        raise bad(where, "delta", "a float in (0, 1)", delta)
    if adjacency not in get_args(Adjacency):
        raise bad(where, "adjacency", "'add_remove' or 'replace'", adjacency)


def _check_run(where: str, steps: int, sample_rate: float) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise bad(where, "steps", "an integer >= 1", steps)
    if not (isinstance(sample_rate, int | float) and 0 < sample_rate <= 1):
        raise bad(where, "sample_rate", "a float in (0, 1]", sample_rate)
