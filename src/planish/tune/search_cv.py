"""SMOOTHIE in the form of scikit-learn's searches: see `planish.tune.smoothie` for the method."""

import logging
import time
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from planish._support import PlanishWarning, bad, require
from planish.tune.learners import KEEP, Method, method_of, smoothness
from planish.tune.ranking import KEEPS, Keep, combined, rank_correlation, ranked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_why = "planish.tune.SmoothieSearchCV"
_base = require("sklearn.base", "sklearn", _why)
_search = require("sklearn.model_selection._search", "sklearn", _why)
_metrics = require("sklearn.metrics", "sklearn", _why)
_splitting = require("sklearn.utils.metaestimators", "sklearn", _why)
_validation = require("sklearn.utils.validation", "sklearn", _why)
_parallel = require("sklearn.utils.parallel", "sklearn", _why)
_pipeline = require("sklearn.pipeline", "sklearn", _why)
_exceptions = require("sklearn.exceptions", "sklearn", _why)

__all__ = ["SmoothieSearchCV"]

logger = logging.getLogger("planish")
RANKS = ("smoothness", "combined")


class SmoothieSearchCV(_search.BaseSearchCV):  # type: ignore[misc, name-defined]
    """Search at random, cross-validate only the candidates whose probes are the most promising.

    Every candidate is probed on the training part of the first split: nets are trained for `probe_epochs`, other
    learners in full. The finalists are then scored as `RandomizedSearchCV` does it. Probes save time where they are
    far cheaper than `cv` trainings; with `n_finalists=n_candidates` the result is that of `RandomizedSearchCV`.

    Args:
        estimator: The estimator; of a pipeline, the last step is the learner and sees transformed data.
        param_distributions: Lists or distributions to draw from, by name, as for `RandomizedSearchCV`; or a list of
            such dicts.
        n_candidates: Settings drawn and probed, >= 1; default 30, the paper's.
        n_finalists: Settings cross-validated, in [1, n_candidates]; default 5, the paper's.
        smoothness: "auto" takes the paper's score for the learner, else one of `planish.tune.smoothness`, or a
            callable `(fitted estimator, X, y) -> float`.
        keep: Whether "largest" or "smallest" scores go on; "auto" (default) takes what the paper's programs do, the
            largest for a callable.
        rank: "smoothness" (default) as in the paper; "combined" adds the rank of the probe's score on the other part
            of the first split.
        probe_epochs: Epochs of a net's probe, >= 1; default 1.
        scoring: As for `RandomizedSearchCV`.
        n_jobs: Processes, for probes too.
        refit: As for `RandomizedSearchCV`.
        cv: As for `RandomizedSearchCV`.
        verbose: As for `RandomizedSearchCV`.
        pre_dispatch: As for `RandomizedSearchCV`.
        random_state: Of the settings drawn.
        error_score: "raise", or the score of a training that fails. A probe that fails then loses its candidate.
        return_train_score: As for `RandomizedSearchCV`.

    Attributes:
        candidates_: What is known of every candidate: `params`, `smoothness`, `probe_score` (NaN unless combined),
            `probe_time` in seconds, and `is_finalist`.
        rank_correlation_: Spearman's correlation between smoothness, in the direction kept, and the score of the
            finalists. Few finalists make it a rough hint; near or below 0 the probes did not help.
        cv_results_: Of the finalists, in the order drawn; with `smoothness` and `probe_time`.

    Raises:
        ValueError: An argument is out of range, or every probe failed.
        MissingExtra: scikit-learn is not installed.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.linear_model import LogisticRegression
        >>> settings = {"C": [0.01, 0.1, 1.0, 10.0], "class_weight": [None, "balanced"]}
        >>> search = SmoothieSearchCV(
        ...     LogisticRegression(max_iter=1000), settings, n_candidates=6, n_finalists=2, random_state=0
        ... )
        >>> search.fit(*load_iris(return_X_y=True)).best_params_["C"]  # the largest scores: small weights
        0.01
        >>> int(search.candidates_["is_finalist"].sum()), len(search.cv_results_["params"])
        (2, 2)
    """

    def __init__(
        self,
        estimator: Any,  # noqa: ANN401
        param_distributions: "Mapping[str, Any] | Sequence[Mapping[str, Any]]",
        *,
        n_candidates: int = 30,
        n_finalists: int = 5,
        smoothness: "Method | Literal['auto'] | Callable[[Any, Any, Any], float]" = "auto",
        keep: Keep | Literal["auto"] = "auto",
        rank: Literal["smoothness", "combined"] = "smoothness",
        probe_epochs: int = 1,
        scoring: Any = None,  # noqa: ANN401
        n_jobs: int | None = None,
        refit: Any = True,  # noqa: ANN401
        cv: Any = None,  # noqa: ANN401
        verbose: int = 0,
        pre_dispatch: int | str = "2*n_jobs",
        random_state: Any = None,  # noqa: ANN401
        error_score: float | Literal["raise"] = np.nan,
        return_train_score: bool = False,
    ) -> None:
        self.param_distributions = param_distributions
        self.n_candidates = n_candidates
        self.n_finalists = n_finalists
        self.smoothness = smoothness
        self.keep = keep
        self.rank = rank
        self.probe_epochs = probe_epochs
        self.random_state = random_state
        super().__init__(
            estimator=estimator, scoring=scoring, n_jobs=n_jobs, refit=refit, cv=cv, verbose=verbose,
            pre_dispatch=pre_dispatch, error_score=error_score, return_train_score=return_train_score,
        )  # fmt: skip

    def fit(self, X: Any, y: Any = None, **params: Any) -> "SmoothieSearchCV":  # noqa: ANN401
        """Probe, cross-validate the finalists, and refit the best.

        Args:
            X: Training data, one row a sample.
            y: Targets.
            **params: Passed on as `RandomizedSearchCV` does.

        Returns:
            The search itself.
        """
        self._check()
        try:
            return super().fit(X, y, **params)  # type: ignore[no-any-return]
        finally:
            for name in ("_probe_data", "_probe_params"):
                self.__dict__.pop(name, None)

    def _check(self) -> None:
        where = "SmoothieSearchCV"
        if self.n_candidates < 1:
            raise bad(where, "n_candidates", "an int >= 1", self.n_candidates)
        if not 1 <= self.n_finalists <= self.n_candidates:
            allowed = f"an int in [1, n_candidates = {self.n_candidates}]"
            raise bad(where, "n_finalists", allowed, self.n_finalists)
        if not self.param_distributions:
            raise bad(where, "param_distributions", "at least one list or distribution", self.param_distributions)
        if not callable(self.smoothness) and self.smoothness not in {"auto", *KEEP}:
            raise bad(where, "smoothness", f"a callable, auto or one of {', '.join(KEEP)}", self.smoothness)
        if self.keep not in {"auto", *KEEPS}:
            raise bad(where, "keep", f"auto or one of {', '.join(KEEPS)}", self.keep)
        if self.rank not in RANKS:
            raise bad(where, "rank", f"one of {', '.join(RANKS)}", self.rank)
        if self.rank == "combined" and not (self.scoring is None or isinstance(self.scoring, str)):
            if not callable(self.scoring):
                raise bad(where, "scoring", "one score, not several, for rank='combined'", self.scoring)
        if self.probe_epochs < 1:
            raise bad(where, "probe_epochs", "an int >= 1", self.probe_epochs)

    # What `fit` of the base class knows and `_run_search` is not told.

    def _check_input_parameters(self, X: Any, y: Any, split_params: dict[str, Any]) -> None:  # noqa: ANN401
        super()._check_input_parameters(X, y, split_params)
        self._probe_data = (X, y, split_params)

    def _get_routed_params_for_fit(self, params: dict[str, Any]) -> Any:  # noqa: ANN401
        routed = super()._get_routed_params_for_fit(params)
        self._probe_params = routed.estimator.fit
        return routed

    def _run_search(self, evaluate_candidates: "Callable[..., Any]", *, callback_ctx: Any = None) -> None:  # noqa: ANN401
        X, y, split_params = self._probe_data
        train, test = next(iter(self._checked_cv_orig.split(X, y, **split_params)))
        drawn = list(
            _search.ParameterSampler(self.param_distributions, self.n_candidates, random_state=self.random_state)
        )
        scorer = _metrics.check_scoring(self.estimator, self.scoring) if self.rank == "combined" else None
        probe = _parallel.delayed(_probe)
        settings = (self.smoothness, self.probe_epochs, self.error_score == "raise", scorer)
        rows = _parallel.Parallel(n_jobs=self.n_jobs, pre_dispatch=self.pre_dispatch)(
            probe(_base.clone(self.estimator), params, X, y, train, test, self._probe_params, *settings)
            for params in drawn
        )
        scores, values, seconds, failures = (list(column) for column in zip(*rows, strict=True))
        keep = self._direction()
        order = combined(scores, values, keep) if self.rank == "combined" else ranked(scores, keep)
        failed = [failure for failure in failures if failure is not None]
        if not order:
            reason = failed[0] if failed else "no score is finite"
            raise ValueError(f"SmoothieSearchCV: all {len(drawn)} probes failed; the first said: {reason}")
        if failed:
            warnings.warn(
                f"SmoothieSearchCV: {len(failed)} of {len(drawn)} probes failed, their candidates are skipped; "
                f"the first said: {failed[0]}",
                PlanishWarning,
                stacklevel=2,
            )
        # All of them means all: then the result is that of RandomizedSearchCV, failures included.
        finalists = range(len(drawn)) if self.n_finalists >= len(drawn) else sorted(order[: self.n_finalists])
        chosen = set(finalists)
        self.candidates_ = {
            "params": drawn,
            "smoothness": np.array(scores),
            "probe_score": np.array(values),
            "probe_time": np.array(seconds),
            "is_finalist": np.array([i in chosen for i in range(len(drawn))]),
        }
        more = {"smoothness": [scores[i] for i in finalists], "probe_time": [seconds[i] for i in finalists]}
        results = evaluate_candidates([drawn[i] for i in finalists], more_results=more)
        self.rank_correlation_ = self._correlation(results, keep)

    def _direction(self) -> Keep:
        if self.keep != "auto":
            return self.keep
        if callable(self.smoothness):
            return "largest"
        return KEEP[method_of(_learner(self.estimator)) if self.smoothness == "auto" else self.smoothness]

    def _correlation(self, results: dict[str, Any], keep: Keep) -> float:
        name = f"mean_test_{self.refit}" if isinstance(self.refit, str) else "mean_test_score"
        if name not in results:
            return float("nan")
        sign = 1.0 if keep == "largest" else -1.0
        pairs = zip(results["smoothness"].tolist(), results[name].tolist(), strict=True)
        known = [(sign * s, value) for s, value in pairs if np.isfinite(s) and np.isfinite(value)]
        found = rank_correlation([s for s, _ in known], [value for _, value in known])
        if found <= 0:
            logger.info("SmoothieSearchCV: smoothness did not order the %d finalists (%.2f).", len(known), found)
        return found


def _learner(estimator: Any) -> Any:  # noqa: ANN401
    return estimator[-1] if isinstance(estimator, _pipeline.Pipeline) else estimator


def _probe(
    estimator: Any,  # noqa: ANN401
    params: dict[str, Any],
    X: Any,  # noqa: ANN401
    y: Any,  # noqa: ANN401
    train: Any,  # noqa: ANN401
    test: Any,  # noqa: ANN401
    fit_params: dict[str, Any],
    method: Any,  # noqa: ANN401
    epochs: int,
    strict: bool,
    scorer: Any,  # noqa: ANN401
) -> tuple[float, float, float, str | None]:
    """Return smoothness, score on the other part, seconds, and why it failed, if it did."""
    began = time.perf_counter()
    score = value = float("nan")
    failure = None
    try:
        estimator.set_params(**_base.clone(params, safe=False))
        last = _learner(estimator)
        if hasattr(last, "max_iter") and hasattr(last, "hidden_layer_sizes"):
            last.set_params(max_iter=epochs, early_stopping=False)
        X_train, y_train = _splitting._safe_split(estimator, X, y, train)
        here = _validation._check_method_params(X, params=fit_params, indices=train)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", _exceptions.ConvergenceWarning)  # a probe is meant to stop early
            estimator.fit(X_train, **here) if y is None else estimator.fit(X_train, y_train, **here)
        rows = X_train
        if last is not estimator and len(estimator) > 1:
            rows = estimator[:-1].transform(X_train)
        score = float(method(estimator, X_train, y_train) if callable(method) else _score(last, rows, y_train, method))
        if scorer is not None:
            X_test, y_test = _splitting._safe_split(estimator, X, y, test, train)
            value = float(scorer(estimator, X_test) if y is None else scorer(estimator, X_test, y_test))
    except Exception as error:
        if strict:
            raise
        failure = f"{type(error).__name__}: {error}"
    return score, value, time.perf_counter() - began, failure


def _score(last: Any, rows: Any, y: Any, method: Any) -> float:  # noqa: ANN401
    return smoothness(last, rows, y, method=method)
