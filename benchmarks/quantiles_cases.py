"""Laws whose conditional quantiles are known, after the paper's simulations, and real tables where they are at hand.

Y = location(X) + scale(X) * error with X uniform on the unit cube, so that the quantile at a level is
location(X) + scale(X) * (the error's quantile). Eight features: coefficients are drawn once, some of them zero.
"""

import csv
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Law:
    """A model to draw from."""

    name: str
    n_features: int
    location: Callable[[Array], Array]
    scale: Callable[[Array], Array]
    error: Any  # a frozen distribution of scipy

    def draw(self, n: int, random: np.random.Generator) -> tuple[Array, Array]:
        """Return features (n, d) and targets (n,)."""
        X = random.random((n, self.n_features))
        return X, self.location(X) + self.scale(X) * self.error.rvs(n, random_state=random)

    def quantiles(self, X: Array) -> Array:
        """Return the true quantiles at `LEVELS`, (n, 5)."""
        return self.location(X)[:, None] + self.scale(X)[:, None] * self.error.ppf(LEVELS)


def laws() -> list[Law]:
    """Return six laws of one feature and three of eight."""
    from scipy.stats import norm, t  # noqa: PLC0415

    random = np.random.default_rng(2022)
    a, b = (-random.integers(0, 3, 8) * random.standard_normal(8) for _ in range(2))

    def one(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda X: f(X[:, 0])

    def additive(X: Array) -> Array:
        return 3 * X[:, 0] + 4 * (X[:, 1] - 0.5) ** 2 + 2 * np.sin(np.pi * X[:, 2]) - 5 * np.abs(X[:, 3] - 0.5)

    def even(x: Array) -> Array:
        return np.ones_like(x)

    return [
        Law("linear, t(2)", 1, one(lambda x: 2 * x), one(even), t(2)),
        Law("wave, sine", 1, one(lambda x: 2 * x * np.sin(4 * np.pi * x)), one(lambda x: np.sin(np.pi * x)), norm()),
        Law("triangle, exp", 1, one(lambda x: 4 - 4 * np.abs(x - 0.5)), one(lambda x: np.exp(2 * x - 1)), norm()),
        Law("exp, normal", 1, one(lambda x: np.exp(2 * x)), one(even), norm()),
        Law("rising, t(3)", 1, one(lambda x: 2 * np.pi * x + np.sin(2 * np.pi * x)), one(even), t(3)),
        Law("constant, cross", 1, one(even), one(lambda x: np.sin(0.9 * np.pi * x)), norm()),
        Law("single index of 8, t(3)", 8, lambda X: np.exp(0.1 * X @ a), lambda X: 0.5 * even(X[:, 0]), t(3)),
        Law("additive of 8, sine", 8, additive, lambda X: np.abs(np.sin(np.pi * X @ b)), norm()),
        Law("linear of 8, exp", 8, lambda X: 2 * X @ a, lambda X: np.exp(0.1 * (X @ b - 0.5)), norm()),
    ]


def tables(skipped: dict[str, str]) -> Iterator[tuple[str, Array, Array]]:
    """Yield real tables: name, features, target. `skipped` takes what is not there."""
    from sklearn.datasets import load_diabetes  # noqa: PLC0415

    yield ("diabetes", *load_diabetes(return_X_y=True))
    found = importlib.util.find_spec("particles")  # it carries the files; nothing of it is run
    if found is None or not found.submodule_search_locations:
        skipped["concrete, Boston"] = "the package `particles`, which carries the files, is not installed"
        return
    folder = Path(found.submodule_search_locations[0]) / "datasets"
    for name, file in (("concrete", "concrete.csv"), ("Boston", "boston_house_prices.csv")):
        rows = list(csv.reader((folder / file).read_text(encoding="utf-8").splitlines()))
        numeric = [row for row in rows if row and all(_is_number(v) for v in row)]
        table = np.array(numeric, np.float64)
        yield name, table[:, :-1], table[:, -1]


def _is_number(text: str) -> bool:
    return text.strip().lstrip("-").replace(".", "", 1).replace("e-", "", 1).isdigit()
