"""Choose hyper-parameters: try many settings a little, train only those whose loss has the right shape.

How to choose: `SmoothieSearchCV` for a scikit-learn estimator, `SmoothieSampler` for anything that Optuna can run,
`smoothness` for the number behind both. `hessian_norm` and `directional_curvature` measure any loss, differentiable or
not. All need scikit-learn or Optuna, which load on first touch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from planish.tune.curvature import directional_curvature, hessian_norm
from planish.tune.learners import smoothness

if TYPE_CHECKING:
    from planish.tune.search_cv import SmoothieSearchCV
    from planish.tune.smoothie import SmoothieSampler

__all__ = ["SmoothieSampler", "SmoothieSearchCV", "directional_curvature", "hessian_norm", "smoothness"]

_HOSTED = {"SmoothieSampler": "planish.tune.smoothie", "SmoothieSearchCV": "planish.tune.search_cv"}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: any public name)
    if name in _HOSTED:
        return getattr(importlib.import_module(_HOSTED[name]), name)
    raise AttributeError(f"module 'planish.tune' has no attribute {name!r}")
