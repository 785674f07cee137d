"""How many queries a stationary point costs at least: the bounds, with their constants.

    derivatives up to order p       delta L_p^(1/p) eps^(-(1 + p) / p)
    stochastic gradients            delta L sigma^2 eps^-4
    ... smooth in mean square       delta L sigma eps^-3

A quantum computer that queries in superposition needs as many, up to constants: there is no speed-up to be had. The
number printed is the floor that the chain of `ZeroChain` proves for classical methods, with its honest and tiny
constants; for quantum ones it is the same construction, whose constants the paper does not state.
"""

import math
from dataclasses import dataclass
from typing import Literal

from planish._support import bad
from planish.complexity.instances import SMOOTHNESS, chain_length

Setting = Literal["order_p", "stochastic", "mean_squared_smooth"]

_FORMULAS = {
    "order_p": "delta * L_p^(1/p) * eps^(-(1 + p)/p)",
    "stochastic": "delta * L * sigma^2 * eps^(-4)",
    "mean_squared_smooth": "delta * L * sigma * eps^(-3)",
}
_ENTRY = 23.0  # bound on an entry of the chain's gradient
_MEAN_SQUARED = 328.0  # of the smooth stochastic oracle, times q^(-1/2)


@dataclass(frozen=True)
class QueryLowerBound:
    """A lower bound on the queries that any method needs.

    Attributes:
        queries: The proved floor, >= 0; 0 where the constants leave no room for a chain.
        asymptotic: The formula without its constant.
        length: Doors of the chain that proves it.
        success: Probability that a query shows the next door; 1 for exact oracles.
        dimension: Enough variables for the proof that holds for randomised methods; `length` if zero-respecting.
        exponent: Power of 1 / eps.
        formula: The formula in words.
        matched_by: A classical method with this rate.
        speed_up: What a quantum computer changes.

    Example:
        >>> query_lower_bound(1e-3).exponent
        2.0
    """

    queries: int
    asymptotic: float
    length: int
    success: int | float
    dimension: int
    exponent: int | float
    formula: str
    matched_by: str
    speed_up: str = "none"


def query_lower_bound(
    eps: int | float,
    setting: Setting = "order_p",
    *,
    order: int = 1,
    delta: int | float = 1.0,
    lipschitz: int | float = 1.0,
    sigma: int | float = 1.0,
    model: Literal["zero_respecting", "classical", "quantum"] = "classical",
) -> QueryLowerBound:
    """Return how many queries finding a point with gradient norm <= eps takes at least, on the worst function.

    Args:
        eps: Wanted gradient norm, > 0.
        setting: "order_p" (exact derivatives up to `order`), "stochastic" (unbiased gradients of variance sigma^2) or
            "mean_squared_smooth" (these, with E|g(x) - g(y)|^2 <= lipschitz^2 |x - y|^2).
        order: p, 1 to 4; only for "order_p"; default 1.
        delta: Bound on f(x_0) - inf f, > 0; default 1.
        lipschitz: Constant of the derivative of that order, > 0; default 1.
        sigma: Standard deviation of stochastic gradients, > 0; default 1.
        model: "zero_respecting" (methods that stay in the span of what they were told), "classical" (any, randomised
            too) or "quantum" (queries in superposition: the same rate).

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> bound = query_lower_bound(1e-4, model="quantum")
        >>> bound.queries, bound.speed_up
        (13437, 'none')
    """
    if setting not in _FORMULAS:
        raise bad("query_lower_bound", "setting", f"one of {', '.join(_FORMULAS)}", setting)
    if model not in {"zero_respecting", "classical", "quantum"}:
        raise bad("query_lower_bound", "model", "'zero_respecting', 'classical' or 'quantum'", model)
    if not 0 < sigma < math.inf:
        raise bad("query_lower_bound", "sigma", "above 0", sigma)
    if setting != "order_p" and order != 1:
        raise bad("query_lower_bound", "order", "1 for stochastic gradients", order)
    hidden = model != "zero_respecting"
    if setting == "order_p":
        success, smooth, exponent = 1.0, lipschitz, (1 + order) / order
        asymptotic = delta * lipschitz ** (1 / order) * eps**-exponent if eps > 0 else math.inf
        matched = {1: "gradient descent", 2: "cubic-regularised Newton"}.get(order, f"order-{order} regularised Taylor")
    else:
        # The kept-back entry is at most 23 gradient lengths of 2 eps: this q uses up the whole variance.
        success = min(1.0, (2 * _ENTRY * eps / sigma) ** 2) if eps > 0 else 1.0
        mean_squared = setting == "mean_squared_smooth"
        smooth = lipschitz * SMOOTHNESS[1] * math.sqrt(success) / _MEAN_SQUARED if mean_squared else lipschitz
        exponent = 3.0 if mean_squared else 4.0
        asymptotic = delta * lipschitz * sigma ** (1 if mean_squared else 2) * eps**-exponent if eps > 0 else math.inf
        matched = "SPIDER" if mean_squared else "stochastic gradient descent"
        hidden = True  # randomness of the oracle: an expected gradient above eps needs slopes of 2 eps
    length = chain_length(eps, order=order, delta=delta, lipschitz=smooth, hidden=hidden)
    # With probability 1/2 at least (T - log 2) / (2 q) stochastic queries are needed; exact ones open a door each.
    queries = length if success == 1.0 else max(0, math.floor((length - math.log(2)) / (2 * success)))
    wide = math.ceil(52 * 230**2 * length**2 * math.log(4 * length**2)) if length > 1 else length
    return QueryLowerBound(
        queries,
        asymptotic,
        length,
        success,
        length if model == "zero_respecting" else wide,
        exponent,
        _FORMULAS[setting],
        matched,
    )
