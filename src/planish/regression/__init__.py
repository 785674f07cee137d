"""Learn a whole conditional distribution: every quantile of a target, as one network that does not cross itself.

How to choose: `QuantileProcessRegressor` for all levels at once, as scikit-learn has it; `QuantileFanDisplay` draws
what it learnt. `PinballLoss` and `NonCrossingPenalty` (`pinball_loss`, `noncrossing_penalty` as functions) put the
same objective into a network of your own. The estimator needs scikit-learn, which loads on first touch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from planish.regression.display import QuantileFanDisplay
from planish.regression.losses import NonCrossingPenalty, PinballLoss, noncrossing_penalty, pinball_loss

if TYPE_CHECKING:
    from planish.regression.quantile_process import QuantileProcessRegressor

__all__ = [
    "NonCrossingPenalty",
    "PinballLoss",
    "QuantileFanDisplay",
    "QuantileProcessRegressor",
    "noncrossing_penalty",
    "pinball_loss",
]

_HOSTED = {"QuantileProcessRegressor": "planish.regression.quantile_process"}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: any public name)
    if name in _HOSTED:
        return getattr(importlib.import_module(_HOSTED[name]), name)
    raise AttributeError(f"module 'planish.regression' has no attribute {name!r}")
