"""The fan of quantile curves: how the whole distribution of the target moves with one feature."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from planish._support import bad, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["QuantileFanDisplay"]

Array = npt.NDArray[np.float64]
_LEVELS = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975)
_COLOR = "tab:blue"


class QuantileFanDisplay:
    """Draw quantile curves against one feature, as a median line in rings that pale towards the tails.

    Levels are paired from the outside in: each pair bounds a central interval. Use
    `from_estimator`; the constructor takes curves from anywhere. No global setting of matplotlib is touched.

    Args:
        x: Values of the feature, (n,), rising.
        curves: Quantiles, (n, m).
        levels: Their levels, (m,), rising, in (0, 1).
        feature_name: What the axis says; default "x".
        target_name: Likewise; default "y".
        points: Observations to draw beneath, x and y; default none.

    Attributes:
        line_: The line of the middle level, once drawn, None where the number of levels is even.
        bands_: The rings between levels, outermost first, each of one or two parts.
        ax_: The axes; likewise `figure_`.

    Raises:
        ValueError: Shapes do not fit, or levels do not rise within (0, 1).

    Example:
        >>> import numpy as np
        >>> x = np.linspace(0, 1, 50)
        >>> curves = np.stack([x - 1, x, x + 1], 1)
        >>> display = QuantileFanDisplay(x, curves, [0.1, 0.5, 0.9]).plot()
        >>> display.ax_.get_legend_handles_labels()[1]
        ['80 %', 'median']
    """

    line_: "Line2D | None"
    bands_: list[Any]
    ax_: "Axes"
    figure_: "Figure"

    def __init__(
        self,
        x: Any,  # noqa: ANN401
        curves: Any,  # noqa: ANN401
        levels: Sequence[float],
        *,
        feature_name: str = "x",
        target_name: str = "y",
        points: tuple[Any, Any] | None = None,
    ) -> None:
        self.x, self.curves = np.asarray(x, np.float64), np.asarray(curves, np.float64)
        self.levels = np.asarray(levels, np.float64)
        inside = self.levels.ndim == 1 and len(self.levels) and 0 < self.levels[0] and self.levels[-1] < 1
        if not inside or (np.diff(self.levels) <= 0).any():
            raise bad("QuantileFanDisplay", "levels", "rising within (0, 1)", levels)
        if self.curves.shape != (len(self.x), len(self.levels)):
            allowed = f"of shape {(len(self.x), len(self.levels))}"
            raise bad("QuantileFanDisplay", "curves", allowed, self.curves.shape)
        self.feature_name, self.target_name, self.points = feature_name, target_name, points

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,  # noqa: ANN401  (whoever predicts quantiles)
        X: Any,  # noqa: ANN401
        y: Any = None,  # noqa: ANN401
        *,
        feature: int = 0,
        quantiles: Sequence[float] = _LEVELS,
        n_grid: int = 200,
        feature_name: str | None = None,
        target_name: str = "y",
        ax: "Axes | None" = None,
    ) -> "QuantileFanDisplay":
        """Let a fitted estimator predict along one feature, the others at their medians, and draw it.

        Args:
            estimator: It has `predict(X, quantiles=...)`, as `QuantileProcessRegressor` and quantile forests do.
            X: Features, (n, d): the range of the one and the medians of the others.
            y: Targets, (n,), drawn as points; default none.
            feature: The column that varies; default 0.
            quantiles: Levels, rising; default nine from 0.025 to 0.975.
            n_grid: Points of each curve, >= 2; default 200.
            feature_name: What the axis says; default the name that the estimator was fitted with, else the number.
            target_name: Likewise; default "y".
            ax: Where to draw; default a new figure.

        Returns:
            The display.

        Raises:
            ValueError: There is no such feature, or fewer than two points.
            MissingExtra: matplotlib is not installed.
        """
        names = [str(c) for c in X.columns] if hasattr(X, "columns") else None
        rows = np.asarray(X, np.float64)
        if not 0 <= feature < rows.shape[1]:
            raise bad("from_estimator", "feature", f"in [0, {rows.shape[1]})", feature)
        if n_grid < 2:
            raise bad("from_estimator", "n_grid", "an int >= 2", n_grid)
        grid = np.tile(np.median(rows, 0), (n_grid, 1))
        grid[:, feature] = np.linspace(rows[:, feature].min(), rows[:, feature].max(), n_grid)
        asked: Any = grid if names is None else type(X)(grid, columns=X.columns)
        curves = estimator.predict(asked, quantiles=list(quantiles))
        if feature_name is None:
            feature_name = names[feature] if names else f"feature {feature}"
        points = None if y is None else (rows[:, feature], np.asarray(y, np.float64).ravel())
        made = cls(
            grid[:, feature], curves, quantiles, feature_name=feature_name, target_name=target_name, points=points
        )
        return made.plot(ax=ax)

    def plot(self, *, ax: "Axes | None" = None, color: Any = _COLOR) -> "QuantileFanDisplay":  # noqa: ANN401
        """Draw it.

        Args:
            ax: Where; default a new figure.
            color: Of lines and bands.

        Returns:
            Itself.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        if ax is None:
            figure = require("matplotlib.figure", "plot", "QuantileFanDisplay")
            ax = figure.Figure(figsize=(6.4, 4.2), layout="constrained").add_subplot()
        m, self.bands_, self.line_ = len(self.levels), [], None
        for i in range(m // 2):
            low, high = self.levels[i], self.levels[m - 1 - i]
            label = f"{100 * (high - low):.3g} %" if np.isclose(low + high, 1) else f"{low:.3g} to {high:.3g}"
            look = {"color": color, "alpha": 0.12 + 0.5 * i / (m // 2), "linewidth": 0, "zorder": 1.5}
            # Rings, not bands one upon the other: tints do not add up, and the legend shows them as they are.
            pairs = [(i, i + 1), (m - 2 - i, m - 1 - i)] if i < m // 2 - 1 else [(i, m - 1 - i)]
            self.bands_.append(
                [
                    ax.fill_between(
                        self.x, self.curves[:, a], self.curves[:, b], label=label if n == 0 else None, **look
                    )
                    for n, (a, b) in enumerate(pairs)
                ]
            )
        if self.points is not None:
            many = len(self.points[0])
            ax.scatter(*self.points, s=7, color="0.15", alpha=min(0.6, max(0.06, 150 / many)), linewidths=0, zorder=2)
        if m % 2:
            middle, curve = self.levels[m // 2], self.curves[:, m // 2]
            label = "median" if middle == 0.5 else f"level {middle:.3g}"
            ax.plot(self.x, curve, color="white", linewidth=3.6, zorder=3)
            (self.line_,) = ax.plot(self.x, curve, color=color, linewidth=1.8, label=label, zorder=3)
        ax.set(xlabel=self.feature_name, ylabel=self.target_name, xlim=(self.x[0], self.x[-1]))
        ax.legend(frameon=False, fontsize="small")
        self.ax_, self.figure_ = ax, cast("Figure", ax.get_figure())
        return self
