"""Fill the gaps of a table of sensors, as scikit-learn has it: `GraphSignalImputer`."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish._support import PlanishWarning, bad, require
from planish.graphs.adjacency import as_adjacency, degrees, knn_graph, laplacian
from planish.graphs.masks import hide
from planish.graphs.prior import SmoothnessPrior, find_period, learn_prior
from planish.graphs.recovery import graph_trss, interpolate_neighbours
from planish.graphs.selection import blend_weight, split
from planish.graphs.sobolev import LaplacianPower
from planish.graphs.time import interpolate_time
from planish.graphs.timegnn import TimeGNNTraining, fit_timegnn

_base = require("sklearn.base", "sklearn", "planish.graphs.GraphSignalImputer")
_validation = require("sklearn.utils.validation", "sklearn", "planish.graphs.GraphSignalImputer")

__all__ = ["GraphSignalImputer"]

logger = logging.getLogger("planish")
_WHERE = "GraphSignalImputer"
_METHODS = ("auto", "prior", "graphtrss", "timegnn", "tikhonov", "neighbours", "linear")
_NEAR = 1e-6  # precision of fills
_ALPHAS = tuple(10.0 ** (e / 2) for e in range(1, -9, -1))
Array = npt.NDArray[np.float64]


class GraphSignalImputer(_base.TransformerMixin, _base.BaseEstimator):  # type: ignore[misc, name-defined]
    """Fill what sensors of a graph did not see; NaN is a gap, and what was seen stays as it is.

    Args:
        method: "auto" (default): GraphTRSS, blended with the learned prior or the network as far as samples hidden from
            all of them support it, up to that one alone. "prior", a smoothness prior learned on hidden samples;
            "graphtrss"; "timegnn"; "tikhonov"; "neighbours" and "linear": interpolation over the graph and in time.
        graph: Adjacency, (N, N), dense or sparse; or coordinates, (N, d) with d other than N, which are joined to
            their nearest neighbours.
        axis: The axis of X along which the nodes lie: 1 (default, a row a time, as scikit-learn has it) or 0.
        k: Neighbours of coordinates, >= 1; default 10, at most N - 1.
        alpha: Weight of smoothness, >= 0; "auto" (default) chooses among ten by hidden samples.
        epsilon: > 0; default 0.05.
        beta: > 0; default 1.
        period: Length of a season in time steps, above 2; "auto" (default) takes one that stands out and helps on
            hidden samples; None is none. For the learned prior.
        hidden_fraction: Of the samples, hidden for choices, in (0, 1); default 0.2. The final fill sees all of them.
        training: `TimeGNNTraining`; None is its defaults.
        network: Whether "auto" tries the network too, which takes most of the time; default False.
        verbose: Whether to show progress.
        random_state: Seed of what is hidden and of the network; default 0.

    Attributes:
        filled_: The table of `fit`, without gaps.
        method_: The method that filled it; "blend" is one of GraphTRSS and another.
        weight_: Share of the other in [0, 1]; 0 is GraphTRSS alone. For "auto".
        alpha_: The weight of smoothness in GraphTRSS or Tikhonov's recovery.
        prior_: The learned prior, or None.
        hidden_errors_: Root mean square error on hidden samples of each method tried; the final fill sees these too.
            For "auto" they are samples on which nothing but `weight_` was chosen.

    Raises:
        ValueError: An argument is out of range, or table and graph do not fit.
        MissingExtra: scikit-learn is not installed.

    Example:
        >>> import numpy as np
        >>> t = np.arange(40.0)
        >>> table = np.stack([np.sin(t / 4), np.sin(t / 4) + 0.1, np.sin(t / 4 + 0.1)], 1)  # a row a time
        >>> gaps = table.copy()
        >>> gaps[5:9, 0] = gaps[20:22, 1] = np.nan
        >>> imputer = GraphSignalImputer("graphtrss", graph=np.ones((3, 3)), alpha=1e-3)
        >>> bool(np.abs(imputer.fit_transform(gaps) - table).max() < 0.15)
        True
    """

    def __init__(
        self,
        method: Literal["auto", "prior", "graphtrss", "timegnn", "tikhonov", "neighbours", "linear"] = "auto",
        *,
        graph: Any = None,  # noqa: ANN401
        axis: Literal[0, 1] = 1,
        k: int = 10,
        alpha: int | float | Literal["auto"] = "auto",
        epsilon: int | float = 0.05,
        beta: int | float = 1.0,
        period: int | float | Literal["auto"] | None = "auto",
        hidden_fraction: int | float = 0.2,
        training: TimeGNNTraining | None = None,
        network: bool = False,
        verbose: bool = False,
        random_state: int = 0,
    ) -> None:
        self.method = method
        self.graph = graph
        self.axis = axis
        self.k = k
        self.alpha = alpha
        self.epsilon = epsilon
        self.beta = beta
        self.period = period
        self.hidden_fraction = hidden_fraction
        self.training = training
        self.network = network
        self.verbose = verbose
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "GraphSignalImputer":  # noqa: ANN401
        """Choose, learn and fill.

        Args:
            X: The table, gaps as NaN.
            y: Not used.

        Returns:
            The imputer itself.
        """
        self._check()
        x, mask = self._read(X)
        self._build(len(x), x.dtype)
        for i in (~mask.any(1)).nonzero()[:3, 0].tolist():
            warnings.warn(f"{_WHERE}: node {i} was never observed; its neighbours say all.", PlanishWarning, 2)
        self.prior_: SmoothnessPrior | None = None
        self.hidden_errors_: dict[str, float] = {}
        self._network_fill: Tensor | None = None
        self.alpha_ = 1e-3 if self.alpha == "auto" else float(self.alpha)
        self.method_: str = "graphtrss" if self.method == "auto" else self.method
        self.weight_, self._other = 0.0, str(self.method)
        with _shown(self.verbose) as progress:
            if self.method not in {"neighbours", "linear"}:
                self._choose(x, mask, progress)
        if self._other == "timegnn" and self.method_ != "graphtrss":
            self._network_fill = self._train(x, mask, None, self.best_epoch_)
        self.filled_ = self._write(self._fill(x, mask), x, mask)
        self._fitted = (x, mask)
        return self

    def transform(self, X: Any) -> Array:  # noqa: ANN401
        """Fill a table of the same nodes with what was chosen: that of `fit`, or one of other times.

        Args:
            X: The table, gaps as NaN. A network fills only the table that it was trained on.

        Returns:
            The table without gaps; what was observed is as it was.
        """
        _validation.check_is_fitted(self, "filled_")
        x, mask = self._read(X)
        old, seen = self._fitted
        if x.shape == old.shape and bool((mask == seen).all()) and bool((x == old).all()):
            return self.filled_.copy()
        if len(x) != len(old):
            raise bad(f"{_WHERE}.transform", "X", f"of {len(old)} nodes along axis {self.axis}", tuple(np.shape(X)))
        if self._network_fill is not None:
            raise bad(f"{_WHERE}.transform", "X", "the table of `fit`: a network fills no other", tuple(np.shape(X)))
        return self._write(self._fill(x, mask), x, mask)

    def score(self, X: Any, y: Any = None) -> float:  # noqa: ANN401
        """Return minus the root mean square error where `fit` saw a gap and X has a value.

        Args:
            X: The true table.
            y: Not used.
        """
        _validation.check_is_fitted(self, "filled_")
        x, mask = self._read(X)
        old, seen = self._fitted
        if x.shape != old.shape or not bool((mask & ~seen).any()):
            raise bad(f"{_WHERE}.score", "X", "the table of `fit` with values where that had gaps", tuple(np.shape(X)))
        filled = torch.as_tensor(self.filled_ if self.axis == 0 else self.filled_.T)
        return -float((filled - x)[mask & ~seen].square().mean().sqrt())

    def _check(self) -> None:
        if self.method not in _METHODS:
            raise bad(_WHERE, "method", f"one of {', '.join(_METHODS)}", self.method)
        if self.graph is None:
            raise bad(_WHERE, "graph", "an adjacency, or coordinates", None)
        if self.axis not in {0, 1}:
            raise bad(_WHERE, "axis", "0 or 1, the axis of the nodes", self.axis)
        if self.alpha != "auto" and not (isinstance(self.alpha, int | float) and 0 <= self.alpha < math.inf):
            raise bad(_WHERE, "alpha", "'auto' or a float >= 0", self.alpha)
        if not 0 < self.epsilon < math.inf:
            raise bad(_WHERE, "epsilon", "a float above 0", self.epsilon)
        if not 0 < self.hidden_fraction < 1:
            raise bad(_WHERE, "hidden_fraction", "a float in (0, 1)", self.hidden_fraction)
        if self.period not in {"auto", None} and not (isinstance(self.period, int | float) and self.period > 2):
            raise bad(_WHERE, "period", "'auto', None or a float above 2", self.period)

    def _read(self, X: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Return the table with a row a node, zeros in gaps, and where it has values."""
        table = np.asarray(X, np.float64)
        if table.ndim != 2:
            raise bad(_WHERE, "X", "a table of two axes", tuple(table.shape))
        if np.isinf(table).any():
            raise bad(_WHERE, "X", "finite or NaN", "infinity")
        x = torch.tensor(table if self.axis == 0 else table.T).contiguous()
        mask = ~x.isnan()
        if x.shape[1] < 2 or int(mask.sum()) < 2:
            raise bad(_WHERE, "X", "of two times and two values at least", tuple(table.shape))
        return torch.where(mask, x, 0.0), mask

    def _build(self, n: int, dtype: torch.dtype) -> None:
        shape = tuple(self.graph.shape) if hasattr(self.graph, "shape") else np.shape(self.graph)
        if len(shape) != 2 or shape[0] != n:
            raise bad(_WHERE, "graph", f"({n}, {n}), or coordinates of the {n} nodes along axis {self.axis}", shape)
        if shape[1] == n:
            self._w = as_adjacency(self.graph, _WHERE, dtype=dtype)
        else:
            self._w = knn_graph(torch.as_tensor(np.asarray(self.graph, np.float64)), min(self.k, n - 1)).to(dtype)
        self._power = LaplacianPower(laplacian(self._w), self.epsilon, self.beta)
        if not bool((degrees(self._w) > 0).all()):
            logger.info("%s: some nodes have no neighbours; each is smoothed in time alone.", _WHERE)

    def _choose(self, x: Tensor, mask: Tensor, progress: Callable[[str, int], None]) -> None:
        """Find alpha, prior and epochs on hidden samples and, for "auto", what to make of them on others."""
        generator = torch.Generator().manual_seed(self.random_state)
        hidden = hide(mask, self.hidden_fraction, generator=generator)
        inside = mask & ~hidden
        solve, first = (self._tikhonov, "tikhonov") if self.method == "tikhonov" else (self._graphtrss, "graphtrss")
        best, since, fill = math.inf, 0, x
        for i, alpha in enumerate(_ALPHAS if self.alpha == "auto" else (self.alpha_,)):
            progress("alpha", i)
            guess = solve(x, inside, alpha)
            error = float((guess - x)[hidden].square().mean())
            since += 1
            if error < best:
                best, self.alpha_, fill, since = error, alpha, guess, 0
            if since == 2:
                break
        others: dict[str, Tensor] = {}
        if self.method in {"auto", "prior"} and self._power.has_basis:
            start = self._seasoned(x, inside, hidden, fill)
            self.prior_, others["prior"] = learn_prior(
                x, mask, self._power, hidden=hidden, start=start, progress=lambda i, _: progress("prior", i)
            )
        elif self.method == "prior":
            raise bad(_WHERE, "graph", "of at most 1,500 nodes for a learned prior", len(x))
        if self.method == "timegnn" or (self.method == "auto" and self.network):
            others["timegnn"] = self._train(x, mask, hidden, None, lambda i, _: progress("timegnn", i))
        for name, guess in ({first: fill} | others).items():
            self.hidden_errors_[name] = float((guess - x)[hidden].square().mean().sqrt())
        if self.method == "auto" and others:
            parts = split(inside, max(2, round(1 / self.hidden_fraction) - 1), generator=generator)
            self._weigh(x, mask, parts, list(others), progress)

    def _weigh(
        self, x: Tensor, mask: Tensor, parts: list[Tensor], others: list[str], progress: Callable[[str, int], None]
    ) -> None:
        """Find how much of another method to take, on samples on which none was chosen: a part hidden at a time."""
        errors: dict[str, list[Tensor]] = {name: [] for name in ("graphtrss", *others)}
        where = []
        for i, part in enumerate(parts):
            progress("parts", i)
            where.append(part.nonzero())
            for name, held in errors.items():
                if name == "timegnn":
                    fill = self._train(x, mask & ~part, None, self.best_epoch_)
                else:
                    fill = self._fill_by(name, x, mask & ~part)
                held.append((fill - x)[part])
        missed = {name: torch.cat(held) for name, held in errors.items()}
        self.hidden_errors_ = {name: float(miss.square().mean().sqrt()) for name, miss in missed.items()}
        self._other = min(others, key=lambda name: self.hidden_errors_[name])
        nodes, times = torch.cat(where).unbind(1)
        self.weight_ = blend_weight(missed["graphtrss"], missed[self._other], nodes, times)
        self.method_ = {0.0: "graphtrss", 1.0: self._other}.get(self.weight_, "blend")

    def _seasoned(self, x: Tensor, inside: Tensor, hidden: Tensor, fill: Tensor) -> SmoothnessPrior:
        """Return where a prior starts: with a season, if that is asked for or helps."""
        plain = SmoothnessPrior(max(self.alpha_, 1e-6), float(self.epsilon), float(self.beta))
        period = find_period(fill) if self.period == "auto" else self.period
        if period is None:
            return plain
        season = SmoothnessPrior(plain.alpha, plain.epsilon, plain.beta, periods=(float(period),))
        if self.period != "auto":
            return season
        miss = [
            float((prior.fill(x, inside, self._power, tol=_NEAR) - x)[hidden].square().mean())
            for prior in (plain, season)
        ]
        return season if miss[1] < miss[0] else plain

    def _train(
        self,
        x: Tensor,
        mask: Tensor,
        hidden: Tensor | None,
        epochs: int | None,
        progress: Callable[[int, float], None] | None = None,
    ) -> Tensor:
        training = self.training or TimeGNNTraining()
        fit = fit_timegnn(
            x, mask, self._power, alpha=self.alpha_, hidden=hidden, training=training, stop_after=epochs,
            generator=torch.Generator().manual_seed(self.random_state), progress=progress,
        )  # fmt: skip
        if hidden is not None:
            self.best_epoch_ = fit.best_epoch
        return fit.fill.to(x)

    def _graphtrss(self, x: Tensor, mask: Tensor, alpha: float) -> Tensor:
        return graph_trss(x, mask, self._power, alpha=alpha, tol=_NEAR)

    def _tikhonov(self, x: Tensor, mask: Tensor, alpha: float) -> Tensor:
        return graph_trss(x, mask, self._power, alpha=0.0, spatial=alpha, temporal=alpha, tol=_NEAR, max_iter=20000)

    def _fill(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.method_ != "blend":
            return self._fill_by(self.method_, x, mask)
        return torch.lerp(self._graphtrss(x, mask, self.alpha_), self._fill_by(self._other, x, mask), self.weight_)

    def _fill_by(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        if name == "timegnn" and self._network_fill is not None:
            return self._network_fill
        if name == "prior" and self.prior_ is not None:
            return self.prior_.fill(x, mask, self._power, tol=_NEAR)
        if name == "graphtrss":
            return self._graphtrss(x, mask, self.alpha_)
        if name == "tikhonov":
            return self._tikhonov(x, mask, self.alpha_)
        return interpolate_neighbours(x, mask, self._w) if name == "neighbours" else interpolate_time(x, mask)

    def _write(self, fill: Tensor, x: Tensor, mask: Tensor) -> Array:
        whole: Array = torch.where(mask, x, fill).numpy()
        return whole if self.axis == 0 else np.ascontiguousarray(whole.T)


@contextmanager
def _shown(verbose: bool) -> Iterator[Callable[[str, int], None]]:
    """Show what is being chosen, and how far that is, on the error stream."""
    if not verbose:
        yield lambda name, i: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("alpha", total=None)
        yield lambda name, i: bar.update(task, completed=i, description=f"{name} {i}")
