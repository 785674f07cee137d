"""Is it calibrated? A predictor is, when among the cases to which it gives 0.8, eight in ten come true.

How to choose: `smooth_ece` is one number without a bin width to tune, `SmoothECE` the same for predictions in batches;
`assess_calibration` adds its interval, and the floor that a calibrated predictor would show;
`smooth_calibration_curve` says where the error lies, `SmoothCalibrationDisplay` draws it, and `SmoothRecalibrator`
takes it away. Arrays come in scikit-learn's order, `(y_true, y_prob)`; the metric takes `(preds, target)`, as
torchmetrics does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from planish.metrics.assessment import CalibrationAssessment, assess_calibration
from planish.metrics.curve import SmoothCalibrationCurve, smooth_calibration_curve
from planish.metrics.display import SmoothCalibrationDisplay
from planish.metrics.score import smooth_ece
from planish.metrics.streaming import SmoothECE

if TYPE_CHECKING:
    from planish.metrics.recalibration import SmoothRecalibrator

__all__ = [
    "CalibrationAssessment",
    "SmoothCalibrationCurve",
    "SmoothCalibrationDisplay",
    "SmoothECE",
    "SmoothRecalibrator",
    "assess_calibration",
    "smooth_calibration_curve",
    "smooth_ece",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: what needs scikit-learn loads on first touch)
    if name == "SmoothRecalibrator":
        return importlib.import_module("planish.metrics.recalibration").SmoothRecalibrator
    raise AttributeError(f"module 'planish.metrics' has no attribute {name!r}")
