"""The smooth calibration error of predictions that come in batches, on one device or on many."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.metrics import reflected
from planish.metrics.samples import Multiclass, Values, check_bandwidth, check_grid, check_samples
from planish.metrics.score import of_spectrum


class SmoothECE(nn.Module):
    """Accumulate predictions and compute `smooth_ece` of all of them, with the methods of a torchmetrics metric.

    The state is a sum over samples on a grid of fixed size: however the samples were split into batches and workers,
    the result is that of one call with all of them. Where `torch.distributed` is initialised, `compute` adds up
    the states of all ranks; elsewhere `merge_state` does. No torchmetrics is needed, and its classes are no base.

    Args:
        bandwidth: See `smooth_ece`.
        multiclass: See `smooth_ece`; "classwise" needs `n_classes`.
        n_classes: Number of columns for "classwise"; default None.
        n_grid: See `smooth_ece`.
        sync_on_compute: Whether `compute` adds up the ranks of `torch.distributed`; default True.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> metric = SmoothECE()
        >>> metric.update(torch.tensor([0.5, 0.5]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([0.5, 0.5]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 6)
        0.25
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    sums: Float[Tensor, "problems nodes"]
    total: Float[Tensor, ""]

    def __init__(
        self,
        *,
        bandwidth: float | Literal["auto"] = "auto",
        multiclass: Multiclass = "top_label",
        n_classes: int | None = None,
        n_grid: int = reflected.GRID,
        sync_on_compute: bool = True,
    ) -> None:
        super().__init__()
        where = "SmoothECE"
        self.bandwidth, self.multiclass = bandwidth, multiclass
        self.n_grid, self.sync_on_compute = check_grid(where, n_grid), sync_on_compute
        self._width = check_bandwidth(where, bandwidth)
        if multiclass not in ("top_label", "classwise"):
            raise bad(where, "multiclass", '"top_label" or "classwise"', multiclass)
        if (multiclass == "classwise") != (n_classes is not None) or (n_classes is not None and n_classes < 2):
            raise bad(where, "n_classes", 'an int >= 2 with multiclass="classwise", None otherwise', n_classes)
        problems = n_classes or 1
        self.register_buffer("sums", torch.zeros(problems, n_grid + 1, dtype=torch.float64))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, preds: Values, target: Values, sample_weight: Values | None = None) -> None:
        """Add a batch.

        Args:
            preds: Probabilities, as `y_prob` of `smooth_ece`.
            target: Outcomes, as its `y_true`.
            sample_weight: Weights; default ones.

        Raises:
            ValueError: The batch is not what `smooth_ece` takes, or has another number of classes.
        """
        problems = check_samples("SmoothECE.update", target, preds, sample_weight, multiclass=self.multiclass)
        if len(problems) != len(self.sums):
            raise bad("SmoothECE.update", "preds", f"of {len(self.sums)} classes, as before", len(problems))
        for row, samples in enumerate(problems):
            nodes = reflected.deposit(samples.f, samples.y, samples.w, cells=self.n_grid, mass=False)
            self.sums[row] += nodes[0].to(self.sums.device)
        self.total += problems[0].total

    @torch.no_grad()
    def compute(self) -> Float[Tensor, ""]:
        """Return the error of all that was added.

        Returns:
            The error in [0, 1].

        Raises:
            ValueError: Nothing was added.
        """
        state = torch.cat([self.sums.flatten(), self.total[None]])
        if self.sync_on_compute and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(state)
        total = float(state[-1])
        if not total > 0:
            raise ValueError("SmoothECE.compute: nothing was added; call `update` first.")
        spectra = reflected.coefficients(reflected.host(state[:-1].reshape(self.sums.shape))) / total
        found = [of_spectrum(c, self._width)[0] for c in spectra]
        return torch.tensor(sum(found) / len(found), dtype=torch.float64, device=self.sums.device)

    def forward(self, preds: Values, target: Values, sample_weight: Values | None = None) -> Float[Tensor, ""]:
        """Add a batch and return the error of that batch alone."""
        before = (self.sums, self.total)
        self.reset()
        try:
            self.update(preds, target, sample_weight)
            sync, self.sync_on_compute = self.sync_on_compute, False
            here = self.compute()
            self.sync_on_compute = sync
        finally:
            self.sums, self.total = self.sums + before[0], self.total + before[1]
        return here

    def reset(self) -> None:
        """Forget all that was added."""
        self.sums, self.total = torch.zeros_like(self.sums), torch.zeros_like(self.total)

    @torch.no_grad()
    def merge_state(self, others: "SmoothECE | Iterable[SmoothECE]") -> None:
        """Add what other metrics of the same settings have accumulated, on whatever device.

        Args:
            others: One metric or several; they stay as they are.

        Raises:
            ValueError: One has other settings.
        """
        for other in [others] if isinstance(others, SmoothECE) else others:
            if self._settings() != other._settings():
                raise bad("SmoothECE.merge_state", "others", f"metrics with {self._settings()}", other._settings())
            self.sums += other.sums.to(self.sums.device)
            self.total += other.total.to(self.total.device)

    def _settings(self) -> dict[str, Any]:
        classes = len(self.sums) if self.multiclass == "classwise" else None
        return {"bandwidth": self.bandwidth, "n_classes": classes, "n_grid": self.n_grid}

    def extra_repr(self) -> str:
        """Return the settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def _apply(self, fn: Any, recurse: bool = True) -> "SmoothECE":  # noqa: ANN401  (torch's signature)
        """Move, but stay in float64: `.half()` of the model that holds it must not round the sums."""
        moved = fn(self.sums)
        self.sums = self.sums.to(moved.device)
        self.total = self.total.to(moved.device)
        del recurse
        return self
