"""m-NGP as a scikit-learn classifier: linear, private, with per-sample norms in closed form."""

import math
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from planish._support import bad, require, warn_once
from planish.optim.noise import Accountant, calibrate_noise, check_budget
from planish.optim.per_sample import Normalizer, bound, check_normalizer, factors
from planish.optim.privacy_loss import Adjacency

base = require("sklearn.base", "sklearn", "MNGPClassifier")
multiclass = require("sklearn.utils.multiclass", "sklearn", "MNGPClassifier")
validation = require("sklearn.utils.validation", "sklearn", "MNGPClassifier")
available_if = require("sklearn.utils.metaestimators", "sklearn", "MNGPClassifier").available_if
check_random_state = require("sklearn.utils", "sklearn", "MNGPClassifier").check_random_state

Array = npt.NDArray[Any]
Loss = Literal["logistic", "hinge", "huber"]
_FAST, _HALF_WIDTH = 0.2, 0.5  # rate of the threshold's quantile rule; half width of the hinge's rounded corner


def _is_logistic(self: Any) -> bool:  # noqa: ANN401
    return bool(self.loss == "logistic")


class MNGPClassifier(base.ClassifierMixin, base.BaseEstimator):  # type: ignore[misc, name-defined]
    """Fit a linear classifier by noisy gradient descent such that no single sample shows in it.

    A sample's gradient is its residual times its features, so its norm is a product of two norms and no per-sample
    gradient is ever formed. Private are the samples; taken as public are their number, the features' number and the
    set of classes. Neither scaling features by the data nor choosing settings by the data is covered by epsilon.

    Args:
        epsilon: Privacy budget of one fit, > 0. Default 1.
        delta: In (0, 1), below 1/n or it warns; None for n^-1.1. Default None.
        loss: "logistic" (softmax for several classes), "hinge", or "huber" (hinge with a rounded corner); the latter
            two one class against the rest. Default "logistic".
        n_steps: Steps, >= 1: more are noisier each. Default 50.
        learning_rate: Step, > 0. Default 1.
        batch_size: Expected size of a Poisson batch; None for all data. Default None.
        l2: Ridge on the coefficients, >= 0: free of noise. Default 0.
        average: Return the mean of the last half of the iterates: costs no privacy. Default False.
        fit_intercept: Whether there is an intercept; it counts as a feature of value 1. Default True.
        normalizer: See `MNGPOptimizer`. Default "max1".
        threshold: See `MNGPOptimizer`; or "median", which follows the median of the norms privately, at no more than
            3.3 % more noise, counted (for "max1" and "clip"). Default 1.
        adjacency: See `calibrate_noise`. Default "add_remove".
        accountant: See `calibrate_noise`. Default "exact".
        random_state: For tests: who knows it knows the noise. Default None.

    Attributes:
        coef_: Coefficients, one row a class, or one row for two classes.
        intercept_: Intercepts.
        classes_: Classes, sorted.
        noise_multiplier_: Noise on the sum, over the largest norm of a scaled gradient.
        delta_: The delta used.
        threshold_: The last threshold.
        n_iter_: Steps taken.

    Example:
        >>> random = np.random.default_rng(0)
        >>> X = random.normal(size=(2000, 3))
        >>> y = X[:, 0] > X[:, 1]
        >>> model = MNGPClassifier(epsilon=0.5, random_state=0).fit(X, y)
        >>> bool(model.score(X, y) > 0.9)
        True
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        delta: float | None = None,
        *,
        loss: Loss = "logistic",
        n_steps: int = 50,
        learning_rate: float = 1.0,
        batch_size: int | None = None,
        l2: float = 0.0,
        average: bool = False,
        fit_intercept: bool = True,
        normalizer: Normalizer = "max1",
        threshold: float | Literal["median"] = 1.0,
        adjacency: Adjacency = "add_remove",
        accountant: Accountant = "exact",
        random_state: Any = None,  # noqa: ANN401  (scikit-learn's)
    ) -> None:
        self.epsilon = epsilon
        self.delta = delta
        self.loss = loss
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.l2 = l2
        self.average = average
        self.fit_intercept = fit_intercept
        self.normalizer = normalizer
        self.threshold = threshold
        self.adjacency = adjacency
        self.accountant = accountant
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "MNGPClassifier":  # noqa: ANN401  (array-likes)
        """Spend the budget on these data.

        Args:
            X: Features, (n, d), finite. Rows far longer than 1 / |residual| are shortened: scale features, by public
                numbers.
            y: Classes, at least two of them.

        Returns:
            Itself.

        Raises:
            ValueError: An argument is out of range, or there is one class.
        """
        where = "MNGPClassifier.fit"
        X, y = validation.validate_data(self, X, y, dtype=np.float64)
        multiclass.check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise bad(where, "y", "of at least two classes", f"one class, {self.classes_[0]!r}")
        n = len(X)
        self._check(where, n)
        rate = 1.0 if self.batch_size is None else self.batch_size / n
        self.delta_ = float(n**-1.1 if self.delta is None else self.delta)
        z = self.noise_multiplier_ = calibrate_noise(
            self.epsilon, self.delta_, self.n_steps, rate, adjacency=self.adjacency, accountant=self.accountant
        )
        random = check_random_state(self.random_state)
        rows = np.hstack([X, np.ones((n, 1))]) if self.fit_intercept else X
        lengths = np.linalg.norm(rows, axis=1)
        width = 1 if len(self.classes_) == 2 else len(self.classes_)
        targets = index[:, None].astype(float) if width == 1 else np.eye(width)[index]
        W = np.zeros((rows.shape[1], width))
        free = np.ones((rows.shape[1], 1))
        if self.fit_intercept:
            free[-1] = 0.0
        follow = self.threshold == "median"
        tau, total, kept = 1.0 if follow else float(self.threshold), np.zeros_like(W), 0
        size = rate * n
        # Two queries a step, of noise z_sum and 2 sigma in units of what a sample moves: z^-2 = z_sum^-2 + (2 sigma)^-2
        sigma = max(size / 20, 2 * z)
        z_sum = (z**-2 - (2 * sigma) ** -2) ** -0.5 if follow else z
        for step in range(self.n_steps):
            drawn = slice(None) if rate == 1 else random.random_sample(n) < rate
            a, length = rows[drawn], lengths[drawn]
            residual = self._residual(a @ W, targets[drawn])
            norms = length * (np.abs(residual[:, 0]) if width == 1 else np.linalg.norm(residual, axis=1))
            factor = factors(torch.from_numpy(norms), self.normalizer, tau).numpy()
            summed = a.T @ np.where(np.isfinite(norms)[:, None], residual * factor[:, None], 0.0)
            summed += random.normal(scale=z_sum * bound(self.normalizer, tau), size=W.shape)
            W = W - self.learning_rate * (summed / size + self.l2 * free * W)
            if follow:  # a sample moves the count of (below) - 1/2 by half a unit
                below = float((norms <= tau).sum()) - len(norms) / 2 + random.normal(scale=sigma)
                tau *= math.exp(-_FAST * min(max(below / size, -1.0), 1.0))
            if 2 * step >= self.n_steps - 1:
                total, kept = total + W, kept + 1
        W = total / kept if self.average else W
        self.threshold_, self.n_iter_ = tau, self.n_steps
        self.coef_ = W[:-1].T if self.fit_intercept else W.T
        self.intercept_ = W[-1] if self.fit_intercept else np.zeros(width)
        return self

    def _check(self, where: str, n: int) -> None:
        """Refuse settings that are out of range.

        Raises:
            ValueError: One is.
        """
        threshold = 1.0 if self.threshold == "median" else self.threshold
        check_normalizer(where, self.normalizer, threshold)
        check_budget(where, self.epsilon, 0.5 if self.delta is None else self.delta, self.adjacency)
        if self.threshold == "median" and self.normalizer not in ("max1", "clip"):
            raise bad(where, "threshold", f"a float > 0 where normalizer={self.normalizer!r}", self.threshold)
        if self.loss not in get_args(Loss):
            raise bad(where, "loss", "'logistic', 'hinge' or 'huber'", self.loss)
        if not 0 < self.learning_rate < math.inf:
            raise bad(where, "learning_rate", "a finite float > 0", self.learning_rate)
        if not 0 <= self.l2 < math.inf:
            raise bad(where, "l2", "a finite float >= 0", self.l2)
        if self.batch_size is not None and not 1 <= self.batch_size <= n:
            raise bad(where, "batch_size", f"in [1, {n}] or None", self.batch_size)
        if self.delta is not None and not self.delta < 1 / n:
            warn_once(f"{where}: `delta` should be below 1 / {n} samples; got {self.delta:.4g}.")

    def _residual(self, scores: Array, targets: Array) -> Array:
        """Return the loss's derivative in the scores; targets are 0 or 1."""
        if self.loss == "logistic":
            if scores.shape[1] == 1:
                return np.asarray(0.5 * (1 + np.tanh(scores / 2)) - targets)
            shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
            return np.asarray(shifted / shifted.sum(axis=1, keepdims=True) - targets)
        sign = 2 * targets - 1
        short = 1 - sign * scores  # of a margin of 1
        if self.loss == "hinge":
            return np.where(short > 0, -sign, 0.0)
        return np.asarray(-sign * np.clip((short + _HALF_WIDTH) / (2 * _HALF_WIDTH), 0, 1))

    def decision_function(self, X: Any) -> Array:  # noqa: ANN401
        """Return scores, one a class, or for two classes that of the second.

        Args:
            X: Features.
        """
        validation.check_is_fitted(self)
        X = validation.validate_data(self, X, reset=False, dtype=np.float64)
        scores = X @ self.coef_.T + self.intercept_
        return np.asarray(scores[:, 0] if scores.shape[1] == 1 else scores)

    def predict(self, X: Any) -> Array:  # noqa: ANN401
        """Return the class of the largest score.

        Args:
            X: Features.
        """
        scores = self.decision_function(X)
        index = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        return np.asarray(self.classes_[index])

    @available_if(_is_logistic)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Array:  # noqa: ANN401
        """Return probabilities, one column a class; there for the logistic loss.

        Args:
            X: Features.
        """
        scores = self.decision_function(X)
        if scores.ndim == 1:
            second = 0.5 * (1 + np.tanh(scores / 2))
            return np.stack([1 - second, second], axis=1)
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))

    def __sklearn_tags__(self) -> Any:  # noqa: ANN401  (scikit-learn's own)
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # on the few samples of its checks the noise is most of it
        return tags
