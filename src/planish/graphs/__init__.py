"""Signals on graphs: fill the gaps of sensors that know each other.

How to choose: `GraphSignalImputer` for a table with gaps, as scikit-learn has it. Under it: `graph_trss`, which asks
changes to be smooth over the graph, `learn_prior`, which learns from hidden samples what smooth means, `fit_timegnn`, a
network, and plain interpolation. `laplacian` and `knn_graph` make graphs; `SobolevLoss`, `ChebCascadeConv`, `TimeGNN`
and `ChebNet` go into models of your own, with graphs as PyTorch Geometric has them. The imputer needs scikit-learn,
which loads on first touch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from planish.graphs.adjacency import as_adjacency, knn_graph, laplacian, to_edges
from planish.graphs.chebconv import ChebCascadeConv, ChebNet
from planish.graphs.masks import forecast_mask, hide, random_mask, snapshot_mask
from planish.graphs.prior import SmoothnessPrior, find_period, learn_prior
from planish.graphs.recovery import graph_trss, interpolate_neighbours, tikhonov
from planish.graphs.sobolev import LaplacianPower, SobolevLoss, sobolev_loss
from planish.graphs.time import interpolate_time, temporal_difference
from planish.graphs.timegnn import TimeGNN, TimeGNNFit, TimeGNNTraining, fit_timegnn

if TYPE_CHECKING:
    from planish.graphs.imputer import GraphSignalImputer

__all__ = [
    "ChebCascadeConv",
    "ChebNet",
    "GraphSignalImputer",
    "LaplacianPower",
    "SmoothnessPrior",
    "SobolevLoss",
    "TimeGNN",
    "TimeGNNFit",
    "TimeGNNTraining",
    "as_adjacency",
    "find_period",
    "fit_timegnn",
    "forecast_mask",
    "graph_trss",
    "hide",
    "interpolate_neighbours",
    "interpolate_time",
    "knn_graph",
    "laplacian",
    "learn_prior",
    "random_mask",
    "snapshot_mask",
    "sobolev_loss",
    "temporal_difference",
    "tikhonov",
    "to_edges",
]

_HOSTED = {"GraphSignalImputer": "planish.graphs.imputer"}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: any public name)
    if name in _HOSTED:
        return getattr(importlib.import_module(_HOSTED[name]), name)
    raise AttributeError(f"module 'planish.graphs' has no attribute {name!r}")
