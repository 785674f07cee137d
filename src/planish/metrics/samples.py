"""Outcomes, probabilities and weights: checked, in as few passes over them as it takes."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish._support import PlanishWarning, bad

Values = Tensor | npt.NDArray[Any] | Sequence[Any]
Label = int | float | str | bool
Multiclass = Literal["top_label", "classwise"]


class Samples(NamedTuple):
    """Outcomes y, probabilities f and weights w (None: equal ones), on one device."""

    y: Tensor
    f: Tensor
    w: Tensor | None

    @property
    def total(self) -> float:
        """The sum of the weights."""
        return float(len(self.f)) if self.w is None else float(self.w.detach().sum(dtype=torch.float64))


def check_bandwidth(where: str, bandwidth: float | str) -> float | None:
    """Return the bandwidth, None for "auto"; refuse what is outside (0, 1]."""
    if isinstance(bandwidth, str):
        if bandwidth != "auto":
            raise bad(where, "bandwidth", '"auto" or a float in (0, 1]', bandwidth)
        return None
    if not 0 < bandwidth <= 1:
        raise bad(where, "bandwidth", '"auto" or a float in (0, 1]', bandwidth)
    return float(bandwidth)


def check_grid(where: str, n_grid: int) -> int:
    """Refuse a number of cells that is no power of two, or out of range."""
    if n_grid not in [2**power for power in range(8, 21)]:
        raise bad(where, "n_grid", "a power of two in [256, 1048576]", n_grid)
    return n_grid


def check_samples(
    where: str,
    y_true: Values,
    y_prob: Values,
    sample_weight: Values | None = None,
    *,
    pos_label: Label | None = None,
    multiclass: str = "top_label",
) -> list[Samples]:
    """Return the samples of one binary problem, or of one a class (`classwise`), or refuse them."""
    if multiclass not in ("top_label", "classwise"):
        raise bad(where, "multiclass", '"top_label" or "classwise"', multiclass)
    f = _tensor(where, "y_prob", y_prob)
    f = f if f.is_floating_point() else f.double()
    labels = _labels(where, y_true, pos_label).to(f.device)
    if f.ndim not in (1, 2):
        raise bad(where, "y_prob", "a vector, or a matrix with a column a class", f"shape {tuple(f.shape)}")
    if labels.ndim != 1 or len(labels) != len(f):
        what = "a vector as long as `y_prob`" if f.ndim == 1 else "one class number a row of `y_prob`"
        raise bad(where, "y_true", what, f"shapes {tuple(labels.shape)} and {tuple(f.shape)}")
    if not f.numel():
        raise bad(where, "y_prob", "at least one probability", [])
    _within(where, "y_prob", f.flatten())
    w = None if sample_weight is None else _weights(where, sample_weight, len(f)).to(f.device)
    if f.ndim == 2:
        _classes(where, labels, f, pos_label)
        if multiclass == "classwise":
            return [Samples(labels == c, f[:, c].contiguous(), w) for c in range(f.shape[1])]
        top = f.max(1)
        return [Samples(top.indices == labels, top.values, w)]
    _within(where, "y_true", labels, " or a label for which `pos_label` is given")
    _warn_if_swapped(where, labels, f)
    return [Samples(labels, f, w)]


def one(samples: list[Samples], where: str) -> Samples:
    """Return the samples of the only problem there is."""
    if len(samples) != 1:
        raise bad(where, "multiclass", '"top_label": a curve shows one problem', "classwise")
    return samples[0]


def _tensor(where: str, name: str, values: Values) -> Tensor:
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise bad(where, name, "numbers", f"dtype {array.dtype}")
    if array.dtype.itemsize > 8 or array.dtype.byteorder not in "=|" or array.dtype == np.float16:
        array = array.astype(np.float64)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # what torch cannot share
    return torch.from_numpy(array)


def _labels(where: str, y_true: Values, pos_label: Label | None) -> Tensor:
    if pos_label is None:
        kind = "f" if isinstance(y_true, Tensor) else np.asarray(y_true).dtype.kind
        if kind not in "biuf":
            raise bad(where, "y_true", "numbers, or labels for which `pos_label` is given", f"dtype kind {kind!r}")
        return _tensor(where, "y_true", y_true)
    array = y_true.detach().cpu().numpy() if isinstance(y_true, Tensor) else np.asarray(y_true)
    found = np.unique(array)
    if len(found) > 2 or not (found == pos_label).any():
        raise bad(where, "pos_label", f"one of at most two labels in `y_true` ({found[:5].tolist()})", pos_label)
    return torch.from_numpy(array == pos_label)


def _classes(where: str, labels: Tensor, f: Tensor, pos_label: Label | None) -> None:
    if pos_label is not None:
        raise bad(where, "pos_label", "None where `y_prob` has a column a class", pos_label)
    rows = f.detach().sum(1, dtype=torch.float64)
    off = (rows - 1).abs() > (1e-6 if f.dtype == torch.float64 else 1e-3 if f.element_size() == 2 else 1e-5)
    if bool(off.any()):
        raise bad(where, "y_prob", "rows that sum to 1", f"{float(rows[off][0]):.6g} in row {int(off.nonzero()[0])}")
    wrong = (labels < 0) | (labels >= f.shape[1]) | (labels != labels.round() if labels.is_floating_point() else False)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        allowed = f"class numbers in [0, {f.shape[1] - 1}]"
        raise bad(where, "y_true", allowed, f"{float(labels[index]):.6g} at index {index}")


def _weights(where: str, sample_weight: Values, n: int) -> Tensor:
    w = _tensor(where, "sample_weight", sample_weight)
    w = w if w.is_floating_point() else w.double()
    allowed = "one finite weight >= 0 a sample, not all zero"
    if w.shape != (n,):
        raise bad(where, "sample_weight", allowed, f"shape {tuple(w.shape)} for {n} samples")
    if not bool(((w >= 0) & torch.isfinite(w)).all()) or not bool((w > 0).any()):
        raise bad(where, "sample_weight", allowed, f"least {float(w.min()):.6g}, sum {float(w.sum()):.6g}")
    return w


def _within(where: str, name: str, values: Tensor, more: str = "") -> None:
    if values.dtype == torch.bool:
        return
    least, most = values.detach().aminmax()  # both NaN if there is one
    if not (float(least) >= 0 and float(most) <= 1):
        index = int((~((values >= 0) & (values <= 1))).nonzero()[0])
        raise bad(where, name, f"in [0, 1]{more}", f"{float(values.detach()[index]):.6g} at index {index}")


def _warn_if_swapped(where: str, y: Tensor, f: Tensor) -> None:
    if not y.is_floating_point():
        return
    for some in (slice(100), slice(None)):  # rarely are a hundred probabilities all 0 or 1
        if bool(((f[some] != 0) & (f[some] != 1)).any()):
            return
    if bool(((y != 0) & (y != 1)).any()):
        warnings.warn(
            f"{where}: every probability is 0 or 1 and `y_true` is not: are the arguments swapped?",
            PlanishWarning,
            stacklevel=4,
        )
