r"""The non-crossing quantile process: one ReQU network for all conditional quantiles, as a scikit-learn regressor.

Let Y = f(X, U) with U uniform on (0, 1) and f rising in u: then f(x, level) is the quantile of Y at that level, given
x. A network of (x, level) is trained on the pinball loss rho at random levels, and is charged for falling:

    R(f) = mean_i [ rho_{xi_i}(Y_i - f(X_i, xi_i)) + lambda max(0, -d f(X_i, xi_i) / d level) ]                 (1)

    rho_u(z) = z (u - 1[z < 0]),        ReQU(z) = max(0, z)^2

ReQU makes the derivative continuous in the weights, so that the penalty has something to pull on.

================  ===============================  =================================================
paper             here                             shape, range, default
================  ===============================  =================================================
tau, xi           level, ``quantiles``             (0, 1)
lambda            ``penalty``                      >= 0; log n
width, depth      ``hidden_layer_sizes``           (64, 64, 64) a member; the paper (128, 128, 128)
law of xi         ``level_law``                    uniform, or Beta(a, b)
================  ===============================  =================================================

Differs from the paper: levels are drawn anew at every step (`resample_levels`), several a sample and stratified, where
the paper draws one a sample for good; the penalty then looks at fresh levels between samples, not at samples only;
training begins at a linear median (`start`), not at random; the result is the mean of several members, each stopped
early on rows of its own; weights are averaged over steps. Each can be turned off: see
`docs/papers/quantile_process.md`.
When to use: smooth dependence on few to some tens of features, and a need for many levels, intervals or samples. Trees
do better where the target jumps.

Reference:
    Shen, Jiao, Lin, Horowitz and Huang, Estimation of Non-Crossing Quantile Regression Process with Deep ReQU Neural
    Networks, 2022. https://arxiv.org/abs/2207.10442
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from planish._support import PlanishWarning, bad, require
from planish.regression.baseline import baseline
from planish.regression.distribution import ConditionalDistribution, weighted_quantiles
from planish.regression.network import ACTIVATIONS, Network, ProcessNetwork, RisingNetwork
from planish.regression.training import Data, Settings, Training

_why = "planish.regression.QuantileProcessRegressor"
_base = require("sklearn.base", "sklearn", _why)
_utils = require("sklearn.utils", "sklearn", _why)
_validation = require("sklearn.utils.validation", "sklearn", _why)

__all__ = ["QuantileProcessRegressor"]

logger = logging.getLogger("planish")
Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
_WHERE = "QuantileProcessRegressor"
_CHUNK = 2**22  # numbers in the widest activation of one pass of predict
_MAD = 1.4826  # makes the median absolute deviation of a Gaussian its standard deviation


class QuantileProcessRegressor(ConditionalDistribution, _base.RegressorMixin, _base.BaseEstimator):  # type: ignore[misc, name-defined]
    """Learn all conditional quantiles of a target at once, as one network of features and level.

    Args:
        hidden_layer_sizes: Widths of each member's hidden layers, >= 1; default (64, 64, 64).
        n_members: Networks whose quantiles are averaged, >= 1; default 5, which with `validation_fraction` 0.2 lets
            every row be learnt from. 1 is the paper.
        activation: "requ" (default), "relu" or "tanh".
        monotone: "penalty" (default); "none"; or "hard": a network whose quantiles cannot cross, being the integral of
            a positive density.
        start: "linear" (default): the network is zero at first, and is added to a linear median of the member's rows
            and to the quantiles of its residuals, or to one number in their place: both are trained, and rows held out
            say which is kept (with `early_stopping`; else, and with "hard", the first). "random" is the paper.
        penalty: lambda, >= 0; "auto" (default) is log n, the paper's. Read where `monotone` is "penalty".
        level_law: "uniform" (default), or (a, b) of a Beta law from which levels are drawn; below 1 favours tails.
        level_input: What the network sees: "level" (default), or "logit", the level and its logit, for heavy tails.
        resample_levels: Whether to draw levels at every step (default) or once a sample, the paper's way.
        n_levels: Levels drawn a sample and step, >= 1; default 2. One where levels are not drawn anew.
        learning_rate_init: Adam's, > 0; default 1e-3.
        max_iter: Most epochs, >= 1; default 500.
        batch_size: Samples a step; "auto" (default) is min(256, n).
        average: Decay of the running average of weights that is kept and judged, in [0, 1); default 0.99, 0 is none.
        early_stopping: Whether to hold rows out and keep the best epoch. Otherwise the last one is kept.
        validation_fraction: Part of the rows held out by each member, in (0, 1); default 0.2.
        n_iter_no_change: Epochs without a better loss of any member before training ends, >= 1; default 50.
        standardize: Whether to centre and scale features, and the target by its median and median deviation.
        extrapolation: "clip" (default) holds features within the range of training: outside it ReQU grows like
            x^(2^layers). "warn" lets them go, and says so.
        dtype: Of training, "float32" (default) or "float64"; answers are computed in float64.
        device: "auto" (default, a GPU if there is one) or whatever `torch.device` takes.
        verbose: Whether to show progress.
        random_state: Seed; the same one gives the same bits.

    Attributes:
        network_: The trained members.
        n_iter_: Epochs done; `best_iter_` the last one that was kept by a member.
        loss_curve_: Mean pinball loss of every epoch, standardised.
        validation_curve_: Pairs of epoch and integrated pinball loss on held-out rows.
        penalty_: lambda as it was used.

    Raises:
        ValueError: An argument is out of range, or the data are not finite.
        MissingExtra: scikit-learn is not installed.

    Example:
        >>> import numpy as np
        >>> random = np.random.default_rng(0)
        >>> X = random.random((200, 1))
        >>> y = X[:, 0] + X[:, 0] * random.random(200)  # given x, uniform on (x, 2 x)
        >>> model = QuantileProcessRegressor((16, 16), learning_rate_init=0.01, max_iter=200, random_state=0).fit(X, y)
        >>> curves = model.predict([[0.4], [0.8]], quantiles=[0.1, 0.5, 0.9])
        >>> bool(np.abs(curves - [[0.44, 0.6, 0.76], [0.88, 1.2, 1.52]]).max() < 0.15)
        True
        >>> model.crossing_rate(X)
        0.0
    """

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (64, 64, 64),
        *,
        n_members: int = 5,
        activation: Literal["requ", "relu", "tanh"] = "requ",
        monotone: Literal["penalty", "hard", "none"] = "penalty",
        start: Literal["linear", "random"] = "linear",
        penalty: float | Literal["auto"] = "auto",
        level_law: Literal["uniform"] | tuple[float, float] = "uniform",
        level_input: Literal["level", "logit"] = "level",
        resample_levels: bool = True,
        n_levels: int = 2,
        learning_rate_init: float = 1e-3,
        max_iter: int = 500,
        batch_size: int | Literal["auto"] = "auto",
        average: float = 0.99,
        early_stopping: bool = True,
        validation_fraction: float = 0.2,
        n_iter_no_change: int = 50,
        standardize: bool = True,
        extrapolation: Literal["clip", "warn"] = "clip",
        dtype: Literal["float32", "float64"] = "float32",
        device: str = "auto",
        verbose: bool = False,
        random_state: Any = None,  # noqa: ANN401
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.n_members = n_members
        self.activation = activation
        self.monotone = monotone
        self.start = start
        self.penalty = penalty
        self.level_law = level_law
        self.level_input = level_input
        self.resample_levels = resample_levels
        self.n_levels = n_levels
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.average = average
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.standardize = standardize
        self.extrapolation = extrapolation
        self.dtype = dtype
        self.device = device
        self.verbose = verbose
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "QuantileProcessRegressor":  # noqa: ANN401
        """Train, from the start.

        Args:
            X: Features, (n, d), n >= 2.
            y: Targets, (n,).
            sample_weight: Weights, (n,), >= 0 and not all 0.

        Returns:
            The estimator itself.
        """
        self._check()
        X, y = _validation.validate_data(
            self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2 if self.early_stopping else 1
        )
        y = np.asarray(y, np.float64)
        weight = None
        if sample_weight is not None:
            weight = _validation._check_sample_weight(sample_weight, X, dtype=np.float64)
            if (weight < 0).any() or not weight.any():
                raise bad(f"{_WHERE}.fit", "sample_weight", ">= 0, and positive somewhere", float(weight.min()))
            weight = weight / weight.mean()
        self._range = X.min(0), X.max(0)
        self._scale(X, y, weight)
        seed = int(_utils.check_random_state(self.random_state).randint(2**31))
        generator = torch.Generator().manual_seed(seed)
        n = len(X)
        kind, device = self._kind(), self._device()
        self.penalty_ = 0.0
        if self.monotone == "penalty":
            self.penalty_ = math.log(n) if self.penalty == "auto" else float(self.penalty)
        X, y = (X - self.X_offset_) / self.X_scale_, (y - self.y_offset_) / self.y_scale_
        twice = self.start == "linear" and self.monotone != "hard" and self.early_stopping
        self.network_ = self._build(X.shape[1], self.n_members * (2 if twice else 1), generator)
        train, held_out = self._split(n, generator)
        if twice and held_out is not None:
            train, held_out = train.repeat(2, 1), held_out.repeat(2, 1)
        if self.start == "linear":
            self._begin(X, y, weight, train.numpy(), None if held_out is None else held_out.numpy(), twice)
        self.network_.to(device)
        data = Data(
            torch.tensor(X, dtype=kind, device=device),
            torch.tensor(y, dtype=kind, device=device),
            None if weight is None else torch.tensor(weight, dtype=kind, device=device),
            train.to(device),
            None if held_out is None else held_out.to(device),
        )
        settings = Settings(
            penalty=self.penalty_,
            levels=None if self.level_law == "uniform" else self.level_law,
            resample=self.resample_levels,
            n_levels=self.n_levels,
            learning_rate=self.learning_rate_init,
            max_epochs=self.max_iter,
            batch_size=min(256, n) if self.batch_size == "auto" else self.batch_size,
            patience=self.n_iter_no_change if self.early_stopping else None,
            average=self.average,
        )
        with _shown(self.verbose, self.max_iter) as progress:
            training = Training(self.network_, data, settings, generator)
            history = training.run(progress)
        if twice:
            first, second = training.best.chunk(2)
            m = torch.arange(self.n_members)
            self.network_.keep(torch.where(first <= second, m, m + self.n_members).to(device))
        self.network_.double()  # answers depend on how many rows are asked at once by float64's rounding only
        logger.info("%s: %d epochs, best %d", _WHERE, len(history.loss), history.best_epoch)
        self.n_iter_, self.best_iter_ = len(history.loss), history.best_epoch
        self.loss_curve_, self.validation_curve_ = history.loss, history.validation
        return self

    def _check(self) -> None:
        sizes = tuple(self.hidden_layer_sizes)
        if not sizes or any(not isinstance(w, int | np.integer) or w < 1 for w in sizes):
            raise bad(_WHERE, "hidden_layer_sizes", "at least one int >= 1", self.hidden_layer_sizes)
        for name, allowed in (
            ("activation", ACTIVATIONS), ("monotone", ("penalty", "hard", "none")), ("start", ("linear", "random")),
            ("level_input", ("level", "logit")),
            ("extrapolation", ("clip", "warn")), ("dtype", ("float32", "float64")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise bad(_WHERE, name, f"one of {', '.join(allowed)}", getattr(self, name))
        for name in ("n_members", "n_levels", "max_iter", "n_iter_no_change"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise bad(_WHERE, name, "an int >= 1", value)
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int | np.integer) or self.batch_size < 1):
            raise bad(_WHERE, "batch_size", "'auto' or an int >= 1", self.batch_size)
        if self.penalty != "auto" and not (_is_real(self.penalty) and 0 <= self.penalty < math.inf):
            raise bad(_WHERE, "penalty", "'auto' or a float >= 0", self.penalty)
        if not (_is_real(self.learning_rate_init) and 0 < self.learning_rate_init < math.inf):
            raise bad(_WHERE, "learning_rate_init", "a float > 0", self.learning_rate_init)
        if not (_is_real(self.average) and 0 <= self.average < 1):
            raise bad(_WHERE, "average", "a float in [0, 1)", self.average)
        if not (_is_real(self.validation_fraction) and 0 < self.validation_fraction < 1):
            raise bad(_WHERE, "validation_fraction", "a float in (0, 1)", self.validation_fraction)
        law = self.level_law
        if law != "uniform" and not (
            isinstance(law, tuple) and len(law) == 2 and all(_is_real(v) and v > 0 for v in law)
        ):
            raise bad(_WHERE, "level_law", "'uniform' or a pair of floats > 0", law)

    def _kind(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def _begin(self, X: Array, y: Array, weight: Array | None, train: Rows, held_out: Rows | None, twice: bool) -> None:
        """Let each member start from a fit to its rows; of `twice` as many the second half without the spread."""
        n = self.n_members
        judges = [None] * n if held_out is None else list(held_out[:n])
        found = [baseline(X, y, weight, *rows) for rows in zip(train[:n], judges, strict=True)]
        slopes, rise = (np.stack(part) for part in zip(*found, strict=True))
        if twice:
            level = np.broadcast_to(rise[:, rise.shape[1] // 2, None], rise.shape)
            slopes, rise = np.concatenate([slopes, slopes]), np.concatenate([rise, level])
        self.network_.start_from(torch.from_numpy(slopes), torch.from_numpy(rise))

    def _build(self, n_features: int, n_members: int, generator: torch.Generator) -> Network:
        shape = n_features, tuple(self.hidden_layer_sizes)
        of: dict[str, Any] = {"activation": self.activation, "n_members": n_members, "dtype": self._kind()}
        if self.monotone == "hard":
            return RisingNetwork(*shape, generator=generator, **of)
        return ProcessNetwork(*shape, encoding=self.level_input, generator=generator, **of)

    def _scale(self, X: Array, y: Array, weight: Array | None) -> None:
        d = X.shape[1]
        self.X_offset_, self.X_scale_ = np.zeros(d), np.ones(d)
        self.y_offset_, self.y_scale_ = 0.0, 1.0
        if not self.standardize:
            return
        self.X_offset_ = np.average(X, axis=0, weights=weight)
        deviation = np.sqrt(np.average((X - self.X_offset_) ** 2, axis=0, weights=weight))
        self.X_scale_ = np.where(deviation > 0, deviation, 1.0)
        median = float(weighted_quantiles(y, weight, np.array([0.5]))[0])
        away = np.abs(y - median)
        spread = _MAD * float(weighted_quantiles(away, weight, np.array([0.5]))[0])
        if not spread > 0:  # more than half of the targets are equal
            spread = float(np.sqrt(np.average(away**2, weights=weight)))
        self.y_offset_, self.y_scale_ = median, spread if spread > 0 else 1.0

    def _split(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the rows that each member learns from, and those it is judged on: others for each."""
        order = torch.randperm(n, generator=generator)
        if not self.early_stopping:
            return order.expand(self.n_members, -1), None
        held = min(max(1, round(self.validation_fraction * n)), n - 1)
        turned = torch.stack([order.roll(-i * held) for i in range(self.n_members)])
        return turned[:, held:], turned[:, :held]

    def _curves(self, X: Any, levels: Array, *, slopes: bool = False) -> Array:  # noqa: ANN401
        """Return quantiles of levels (m,), the same for all rows, or (n, m); or their derivatives by the level."""
        _validation.check_is_fitted(self, "network_")
        X = _validation.validate_data(self, X, dtype=np.float64, reset=False)
        low, high = self._range
        if self.extrapolation == "clip":
            X = np.clip(X, low, high)
        elif outside := int(((X < low) | (X > high)).any(1).sum()):
            warnings.warn(
                f"{_WHERE}: {outside} of {len(X)} rows lie outside the range of training; there the network means "
                "nothing. extrapolation='clip' holds them at its edge.",
                PlanishWarning,
                stacklevel=3,
            )
        weights, kind = self.network_.weights[0], torch.float64
        x = torch.tensor((X - self.X_offset_) / self.X_scale_, dtype=kind)
        level = torch.tensor(np.broadcast_to(levels, (len(X), levels.shape[-1])), dtype=kind)
        rows = max(1, _CHUNK // (level.shape[1] * len(weights) * max(self.hidden_layer_sizes)))
        out = []
        with torch.no_grad():
            for xs, ts in zip(x.split(rows), level.split(rows), strict=True):
                xs, ts = xs[None].to(weights.device), ts[None].to(weights.device)  # noqa: PLW2901
                found = self.network_.with_slope(xs, ts)[1] if slopes else self.network_(xs, ts)
                out.append(found.mean(0).cpu())
        curves = torch.cat(out).numpy() * self.y_scale_
        return curves if slopes else curves + self.y_offset_


@contextmanager
def _shown(verbose: bool, epochs: int) -> Iterator[Callable[[int, float], None] | None]:
    """Show a bar with the loss and the time left, on the error stream, while training goes on."""
    if not verbose:
        yield None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("loss", total=epochs)
        yield lambda epoch, loss: bar.update(task, completed=epoch, description=f"loss {loss:.4f}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
