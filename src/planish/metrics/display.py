"""The reliability diagram: what came true against what was predicted, and how sure of it one may be."""

from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from planish._support import bad, require
from planish.metrics import reflected
from planish.metrics.assessment import CalibrationAssessment, assess_calibration
from planish.metrics.samples import Label, Multiclass, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_MARGIN = "planish: density of predictions"  # how a second display on the same axes finds the margin of the first


class SmoothCalibrationDisplay:
    """Draw a reliability diagram, with the methods and attributes of scikit-learn's `CalibrationDisplay`.

    The line is as thick as the data are dense; the coloured band is its bootstrap band, and the grey one around the
    diagonal is where the line of a calibrated predictor would lie. The margin above shows the density of predictions.
    Use `from_predictions` or `from_estimator`. No global setting of matplotlib is touched.

    Args:
        assessment: What to draw; see `assess_calibration`.
        estimator_name: What the legend calls the predictor; default none.
        pos_label: The label that counted as 1, for the axes' titles; default none.

    Attributes:
        assessment: What is drawn.
        prob_true: The curve: see `SmoothCalibrationCurve`; likewise `prob_pred`, `density` and `bandwidth`.
        ece: The smooth calibration error; `ece_ci` its interval, `floor` and `p_value` beside it.
        line_: The curve's line, once drawn; likewise `ax_` and `figure_`.

    Example:
        >>> y, f = [0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8]
        >>> display = SmoothCalibrationDisplay.from_predictions(y, f, n_bootstrap=0, n_null=0, name="net")
        >>> display.ax_.get_xlabel(), display.line_.get_label()
        ('Predicted probability', 'net: smECE 0.1311')
    """

    line_: "Line2D"
    ax_: "Axes"
    figure_: "Figure"

    def __init__(
        self, assessment: CalibrationAssessment, *, estimator_name: str | None = None, pos_label: Label | None = None
    ) -> None:
        self.assessment, self.estimator_name, self.pos_label = assessment, estimator_name, pos_label
        self.prob_true, self.prob_pred, self.density, self.bandwidth = assessment.curve
        self.ece, self.ece_ci = assessment.ece, (assessment.low, assessment.high)
        self.floor, self.p_value = assessment.floor, assessment.p_value

    @classmethod
    def from_predictions(
        cls,
        y_true: Values,
        y_prob: Values,
        *,
        sample_weight: Values | None = None,
        bandwidth: float | Literal["auto"] = "auto",
        pos_label: Label | None = None,
        multiclass: Multiclass = "top_label",
        groups: Values | None = None,
        n_bootstrap: int = 200,
        n_null: int = 200,
        confidence: float = 0.95,
        n_grid: int = reflected.GRID,
        generator: torch.Generator | None = None,
        name: str | None = None,
        ref_line: bool = True,
        ax: "Axes | None" = None,
        **kwargs: Any,  # noqa: ANN401  (matplotlib's)
    ) -> "SmoothCalibrationDisplay":
        """Assess predictions and draw what was found.

        Args:
            y_true: See `assess_calibration`; likewise all others up to `generator`.
            y_prob: Predicted probabilities.
            sample_weight: Weights.
            bandwidth: Width of the kernel.
            pos_label: The label that counts as 1.
            multiclass: Only "top_label" will do.
            groups: What is resampled together.
            n_bootstrap: Resamples for interval and band; 0 for none.
            n_null: Draws for the floor and its grey band; 0 for none.
            confidence: Level of the bands.
            n_grid: Cells of the grid.
            generator: Source of draws.
            name: What the legend calls the predictor.
            ref_line: Whether to draw the diagonal; default True.
            ax: Where to draw; default a new figure.
            **kwargs: Passed to the line, as in `Axes.plot`.

        Returns:
            The display.

        Raises:
            ValueError: See `assess_calibration`.
            MissingExtra: matplotlib is not installed.
        """
        found = assess_calibration(
            y_true, y_prob, sample_weight=sample_weight, bandwidth=bandwidth, pos_label=pos_label,
            multiclass=multiclass, groups=groups, n_bootstrap=n_bootstrap, n_null=n_null, confidence=confidence,
            n_grid=n_grid, generator=generator,
        )  # fmt: skip
        return cls(found, estimator_name=name, pos_label=pos_label).plot(ax=ax, ref_line=ref_line, **kwargs)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,  # noqa: ANN401  (whoever has predict_proba)
        X: Any,  # noqa: ANN401
        y: Values,
        *,
        pos_label: Label | None = None,
        name: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> "SmoothCalibrationDisplay":
        """Let a fitted classifier predict, then do as `from_predictions`.

        Args:
            estimator: It has `predict_proba` and `classes_`; of more than two classes the most probable is scored.
            X: What it predicts from.
            y: Outcomes.
            pos_label: The class whose probability is assessed, of two; default the second of `classes_`.
            name: What the legend calls it; default its class.
            **kwargs: See `from_predictions`.

        Returns:
            The display.

        Raises:
            TypeError: It has no `predict_proba`.
            ValueError: See `assess_calibration`; or `y` has a class that it does not know.
        """
        if not hasattr(estimator, "predict_proba") or not hasattr(estimator, "classes_"):
            raise TypeError(
                "from_estimator: `estimator` must be a fitted classifier with predict_proba; "
                f"got a {type(estimator).__name__}."
            )
        classes, labels = np.asarray(estimator.classes_), np.asarray(y)
        known = np.isin(labels, classes)
        if not known.all():
            raise bad("from_estimator", "y", f"classes in {classes.tolist()}", labels[~known][0])
        prob = np.asarray(estimator.predict_proba(X))
        name = type(estimator).__name__ if name is None else name
        if len(classes) > 2:
            if pos_label is not None:
                raise bad("from_estimator", "pos_label", "None where there are more than two classes", pos_label)
            return cls.from_predictions(np.searchsorted(classes, labels), prob, name=name, **kwargs)
        pos_label = classes[-1] if pos_label is None else pos_label
        if pos_label not in classes:
            raise bad("from_estimator", "pos_label", f"one of {classes.tolist()}", pos_label)
        outcome = labels == pos_label
        display = cls.from_predictions(
            outcome, prob[:, int(np.flatnonzero(classes == pos_label)[0])], name=name, **kwargs
        )
        display.pos_label = pos_label
        display._titles()
        return display

    def plot(
        self,
        *,
        ax: "Axes | None" = None,
        name: str | None = None,
        ref_line: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> "SmoothCalibrationDisplay":
        """Draw it.

        Args:
            ax: Where; default a new figure. Several displays may share one.
            name: What the legend calls the predictor; default `estimator_name`.
            ref_line: Whether to draw the diagonal.
            **kwargs: Passed to the line.

        Returns:
            Itself.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        if ax is None:
            figure = require("matplotlib.figure", "plot", "SmoothCalibrationDisplay")
            ax = figure.Figure(figsize=(4.6, 5.1), layout="constrained").add_subplot()
        first = not any(child.get_label() == _MARGIN for child in ax.child_axes)
        found, x, y = self.assessment, self.prob_pred, self.prob_true
        if ref_line and first:
            ax.plot([0, 1], [0, 1], color="0.55", linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
        label = f"smECE {self.ece:.4f}"
        name = self.estimator_name if name is None else name
        (self.line_,) = ax.plot(
            x, y, **{"linewidth": 1.0, "label": f"{name + ': ' if name else ''}{label}", "zorder": 3, **kwargs}
        )
        color = self.line_.get_color()
        if found.null_band is not None:
            p = f"p = {self.p_value:.3f}" if self.p_value >= 0.001 else "p < 0.001"
            text = f"a calibrated one: {self.floor:.4f} ({p})"
            ax.fill_between(x, *found.null_band, color="0.5", alpha=0.22, linewidth=0, zorder=1, label=text)
        if found.band is not None:
            ax.fill_between(x, *found.band, color=color, alpha=0.2, linewidth=0, zorder=2)
        weight = np.sqrt(self.density / self.density.max())
        ends = np.stack([np.stack([x[:-1], y[:-1]], 1), np.stack([x[1:], y[1:]], 1)], 1)
        lines = require("matplotlib.collections", "plot", "SmoothCalibrationDisplay").LineCollection
        ax.add_collection(
            lines(ends, linewidths=1 + 3.5 * (weight[1:] + weight[:-1]) / 2, colors=color, capstyle="round", zorder=3)
        )
        margin = self._margin(ax, color)
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.legend(
            loc="upper left" if margin.get_gid() == "upper left" else "lower right", frameon=False, fontsize="small"
        )
        self.ax_, self.figure_ = ax, cast("Figure", ax.get_figure())
        self._titles()
        return self

    def _titles(self) -> None:
        of = "" if self.pos_label is None else f" of {self.pos_label}"
        self.ax_.set(xlabel=f"Predicted probability{of}", ylabel=f"Observed frequency{of}")

    def _low_right(self) -> bool:
        """Tell whether the curve lies below the diagonal, so that the upper left corner is free."""
        gap = np.nan_to_num((self.prob_true - self.prob_pred) * self.density)
        return float(gap.sum()) <= 0

    def _margin(self, ax: "Axes", color: Any) -> "Axes":  # noqa: ANN401
        margin = cast("Axes | None", next((m for m in ax.child_axes if m.get_label() == _MARGIN), None))
        if margin is None:
            margin = ax.inset_axes((0, 1.01, 1, 0.11), label=_MARGIN)
            margin.set(xlim=(0, 1), xticks=[], yticks=[])
            margin.patch.set_alpha(0)
            margin.set_gid("upper left" if self._low_right() else "lower right")  # where the legend goes
            for side in ("left", "right", "top"):
                margin.spines[side].set_visible(False)
        height = self.density / self.density.max()
        margin.fill_between(self.prob_pred, height, color=color, alpha=0.35, linewidth=0)
        margin.plot(self.prob_pred, height, color=color, linewidth=0.8)
        margin.set_ylim(0, 1.05)
        return margin
