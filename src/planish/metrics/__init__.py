"""Is it calibrated? A predictor is, when among the cases to which it gives 0.8, eight in ten come true.

How to choose: `smooth_ece` is one number without a bin width to tune, `reliability_curve` says where the error lies,
`plot_reliability` draws it. All take `(y_true, y_prob)`, as scikit-learn does.
"""

from planish.metrics.reliability import ReliabilityCurve, plot_reliability, reliability_curve
from planish.metrics.smooth_ece import smooth_ece

__all__ = ["ReliabilityCurve", "plot_reliability", "reliability_curve", "smooth_ece"]
