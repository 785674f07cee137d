r"""m-NGP: private training by gradients divided by max{1, norm}, without a Lipschitz constant.

Noisy gradient descent must know how much one sample can move the mean gradient. Plain gradient perturbation takes a
bound G of all gradients, which for most losses nobody knows. Here each sample's gradient is divided by its norm where
that exceeds 1, so that no sample moves the sum by more than 1, whatever the loss:

    w <- w - eta (1/n sum_i g_i / max{1, |g_i|} + b),        b ~ N(0, sigma^2)

================  ==================================  ==========================================
paper             here                                range
================  ==================================  ==========================================
eta               ``lr`` of the wrapped optimizer     > 0
max{1, .}         ``threshold``                       > 0; 1
sigma n           ``noise_multiplier``                by `calibrate_noise`, not by the paper's
                                                      c T log(1/delta) / (n eps)^2 with unknown c
T                 ``epochs`` times batches            >= 1
================  ==================================  ==========================================

Not new as a mechanism: with threshold 1 it is per-sample clipping at 1, to the last digit. The paper's contribution is
the analysis: under the Polyak-Lojasiewicz condition, an excess risk of order sqrt(p) / (n eps) without a bound on
gradients.
Differs from the paper: noise by exact accounting; Poisson samples of batches; a sample whose gradient is not finite
counts as 0.
When to use: a model of torch on data whose single records must not show. See ``docs/jobs/private.md``.

Reference:
    Kang, Liu, Li and Wang, Sharper Utility Bounds for Differentially Private Models, 2022.
    https://arxiv.org/abs/2204.10536
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from planish._support import bad, require, warn_once
from planish.optim.noise import calibrate_noise, check_budget, privacy_spent
from planish.optim.per_sample import Normalizer, bound, check_normalizer, factors
from planish.optim.privacy_loss import Adjacency

_opacus = require("opacus", "opacus", "MNGPOptimizer")
_accounting = require("opacus.accountants", "opacus", "MNGPOptimizer")
_dp = require("opacus.optimizers.optimizer", "opacus", "MNGPOptimizer")
_samplers = require("opacus.data_loader", "opacus", "MNGPOptimizer")
_validators = require("opacus.validators", "opacus", "MNGPOptimizer")


class PrivacyLossAccountant(_accounting.IAccountant):  # type: ignore[misc, name-defined]
    """Keep account of noisy sums by `privacy_spent`, in Opacus' form.

    Args:
        adjacency: As for `calibrate_noise`. Default "add_remove".

    Example:
        >>> accountant = PrivacyLossAccountant()
        >>> accountant.step(noise_multiplier=26.379, sample_rate=1.0)
        >>> round(accountant.get_epsilon(1e-5), 3), len(accountant)
        (0.118, 1)
    """

    def __init__(self, adjacency: Adjacency = "add_remove") -> None:
        super().__init__()
        self.adjacency = adjacency

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Count one sum.

        Args:
            noise_multiplier: Its noise.
            sample_rate: Its sample rate.
        """
        last = self.history[-1] if self.history else (None, None, 0)
        if last[:2] == (noise_multiplier, sample_rate):
            self.history[-1] = (noise_multiplier, sample_rate, last[2] + 1)
        else:
            self.history.append((noise_multiplier, sample_rate, 1))

    def get_epsilon(self, delta: float, **_: object) -> float:
        """Return what was spent.

        Args:
            delta: As for `privacy_spent`.
        """
        return privacy_spent(self.history, delta, adjacency=self.adjacency)

    def __len__(self) -> int:
        return sum(steps for _, _, steps in self.history)

    @classmethod
    def mechanism(cls) -> str:
        """Return the name of the kind of account."""
        return "privacy-loss"


class MNGPOptimizer(_dp.DPOptimizer):  # type: ignore[misc, name-defined]
    """Wrap an optimizer of torch: normalize per-sample gradients, sum them, add noise, then let it step.

    Opacus' `DPOptimizer` in all but how a sample is scaled; `grad_sample` must be there, as `GradSampleModule` puts it.
    Use `make_private_mngp` unless you keep account yourself. The norm is that of all parameters together, in float64.

    Args:
        optimizer: What steps along the noisy mean.
        noise_multiplier: Standard deviation of the noise on the sum, over the largest norm of a scaled gradient, >= 0;
            0 is not private.
        expected_batch_size: What a mean's sum is divided by: the expected size, never the drawn one; > 0.
        loss_reduction: "mean" or "sum", as the loss does. Default "mean".
        normalizer: "max1", g / max(threshold, |g|), of norm at most 1; "clip", g min(1, threshold / |g|); "nsgd",
            g / (threshold + |g|); "auto", threshold g / (0.01 + |g|). Default "max1".
        threshold: See there, > 0. Default 1.
        generator: Source of the noise; default torch's global one. A known one is for tests: who knows it knows the
            noise.
        secure_mode: Opacus' defence against attacks on floating point. Default False.

    Attributes:
        nonfinite_samples: How many samples counted as 0. This depends on the data: for debugging, not for publishing.
        accountant: What counts the steps, or None; `make_private_mngp` sets it.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = MNGPOptimizer(torch.optim.SGD([w], 1.0), noise_multiplier=0.0, expected_batch_size=2)
        >>> w.grad_sample = torch.tensor([[30.0, 40.0], [0.0, 0.5]])
        >>> optimizer.step()
        >>> [round(x, 3) for x in w.tolist()]  # minus the mean of (0.6, 0.8) and (0, 0.5)
        [-0.3, -0.65]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        expected_batch_size: int | float | None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        normalizer: Normalizer = "max1",
        threshold: float = 1.0,
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
    ) -> None:
        where = "MNGPOptimizer"
        check_normalizer(where, normalizer, threshold)
        if not noise_multiplier >= 0:
            raise bad(where, "noise_multiplier", "a float >= 0", noise_multiplier)
        if expected_batch_size is not None and not expected_batch_size > 0:
            raise bad(where, "expected_batch_size", "> 0", expected_batch_size)
        self.normalizer, self.threshold = normalizer, threshold
        self.nonfinite_samples, self.accountant = 0, None
        super().__init__(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=bound(normalizer, threshold),
            expected_batch_size=expected_batch_size, loss_reduction=loss_reduction, generator=generator,
            secure_mode=secure_mode,
        )  # fmt: skip

    def clip_and_accumulate(self) -> None:
        """Scale each sample's gradient and add the sum to `summed_grad`.

        Raises:
            ValueError: `grad_sample` holds several backward passes, in which a sample may count several times.
        """
        if self.accumulated_iterations > 1:
            raise bad(
                "MNGPOptimizer.step",
                "grad_sample",
                "of one backward pass; to split batches use Opacus' BatchMemoryManager",
                f"{self.accumulated_iterations} passes",
            )
        samples = [self._get_flat_grad_sample(p) for p in self.params]
        device = samples[0].device
        norms = torch.stack(
            [
                torch.linalg.vector_norm(g.reshape(len(g), math.prod(g.shape[1:])), dim=1, dtype=torch.float64).to(
                    device
                )
                for g in samples
            ],
            dim=1,
        ).norm(dim=1)
        factor = factors(norms, self.normalizer, self.threshold)
        finite = norms.isfinite()
        self.nonfinite_samples += int((~finite).sum())
        for p, g in zip(self.params, samples, strict=True):
            _dp._check_processed_flag(p.grad_sample)
            keep = finite.to(g.device).view(-1, *[1] * (g.dim() - 1))
            kept = torch.where(keep, g, 0.0).to(p.dtype)  # 0 times NaN is not 0
            total = torch.einsum("i,i...", factor.to(p.device, p.dtype), kept)
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total
            _dp._mark_as_processed(p.grad_sample)

    def get_epsilon(self, delta: float) -> float:
        """Return what the steps so far have cost.

        Args:
            delta: In (0, 1).

        Raises:
            ValueError: Nothing keeps account.
        """
        if self.accountant is None:
            raise bad("MNGPOptimizer.get_epsilon", "accountant", "there: use make_private_mngp", None)
        return float(self.accountant.get_epsilon(delta))

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, and `privacy`: what was spent, so that a resumed run counts on."""
        state = dict(self.original_optimizer.state_dict())
        if self.accountant is not None:
            state["privacy"] = dict(self.accountant.state_dict())
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state; noise goes on from the generator as it is, never from an old state of it.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: What was spent is missing, or was counted by another accountant.
        """
        rest = {k: v for k, v in state_dict.items() if k != "privacy"}
        if self.accountant is not None:
            if "privacy" not in state_dict:
                raise bad("MNGPOptimizer.load_state_dict", "state_dict", "with what was spent, `privacy`", sorted(rest))
            self.accountant.load_state_dict(state_dict["privacy"])
        self.original_optimizer.load_state_dict(rest)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def make_private_mngp(
    module: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    *,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    target_delta: float | None = None,
    epochs: int | None = None,
    poisson_sampling: bool = True,
    accountant: Literal["exact", "prv", "rdp"] = "exact",
    adjacency: Adjacency = "add_remove",
    normalizer: Normalizer = "max1",
    threshold: float = 1.0,
    loss_reduction: Literal["mean", "sum"] = "mean",
    generator: torch.Generator | None = None,
    secure_mode: bool = False,
) -> tuple[nn.Module, MNGPOptimizer, DataLoader[Any]]:
    """Make training private: per-sample gradients, normalized and noised, on batches of which each is drawn at random.

    Either `target_epsilon` with `target_delta` and `epochs`, or `noise_multiplier`. Afterwards
    `optimizer.get_epsilon(delta)` says what was spent. The number of samples and the loss are taken as public; what
    looks at the data elsewhere (standardization, choosing settings) is not covered.

    Args:
        module: Trained as it is; its parameters get hooks. No layer may mix samples (batch norm does).
        optimizer: Over the module's parameters.
        data_loader: Over a map-style data set; its number of batches gives the sample rate.
        target_epsilon: Budget, > 0.
        noise_multiplier: Noise, > 0, instead; see `calibrate_noise`.
        target_delta: In (0, 1); below 1 / (number of samples), or it warns.
        epochs: Passes over the data that the budget is for, >= 1.
        poisson_sampling: Draw each sample by itself. False is for a loader of one batch with all data: no account
            covers shuffled batches. Default True.
        accountant: What calibrates and keeps account, see `calibrate_noise`. Default "exact".
        adjacency: See `calibrate_noise`.
        normalizer: See `MNGPOptimizer`.
        threshold: See `MNGPOptimizer`.
        loss_reduction: See `MNGPOptimizer`.
        generator: Source of noise and of batches, for tests.
        secure_mode: See `MNGPOptimizer`.

    Returns:
        The wrapped module, the wrapped optimizer and the loader to train with.

    Raises:
        ValueError: An argument is out of range, or a layer mixes samples.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(200, 3), torch.randint(2, (200,)))
        >>> model, loader = torch.nn.Linear(3, 2), torch.utils.data.DataLoader(data, batch_size=50)
        >>> model, optimizer, loader = make_private_mngp(
        ...     model, torch.optim.SGD(model.parameters(), 0.5), loader, target_epsilon=2.0, target_delta=1e-4, epochs=2
        ... )
        >>> for x, y in [batch for _ in range(2) for batch in loader]:
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     _ = optimizer.step()
        >>> 1.98 < optimizer.get_epsilon(1e-4) <= 2.0
        True
    """
    where = "make_private_mngp"
    check_normalizer(where, normalizer, threshold)
    if (target_epsilon is None) == (noise_multiplier is None):
        raise bad(where, "target_epsilon", "given, or else `noise_multiplier`, not both", target_epsilon)
    faults = _validators.ModuleValidator.validate(module, strict=False)
    if faults:
        raise bad(
            where, "module", "of layers that keep samples apart", "; ".join(str(f).split("\n")[0] for f in faults)
        )
    size = _size(where, data_loader)
    if target_delta is not None and not target_delta < 1 / size:
        warn_once(f"{where}: `target_delta` should be below 1 / {size} samples; got {target_delta:.4g}.")
    if not poisson_sampling and len(data_loader) > 1:
        raise bad(where, "poisson_sampling", "True, or the loader of one batch", f"{len(data_loader)} batches")
    loader: DataLoader[Any] = data_loader
    if poisson_sampling:
        loader = _samplers.DPDataLoader.from_data_loader(data_loader, generator=generator)
    rate = 1 / len(data_loader)
    if noise_multiplier is None:
        if target_delta is None or epochs is None:
            name = "target_delta" if target_delta is None else "epochs"
            raise bad(where, name, "given with `target_epsilon`", None)
        if not isinstance(epochs, int) or epochs < 1:
            raise bad(where, "epochs", "an integer >= 1", epochs)
        noise_multiplier = calibrate_noise(
            target_epsilon or 0.0, target_delta, epochs * len(loader), rate, adjacency=adjacency, accountant=accountant
        )
    elif not noise_multiplier > 0:
        raise bad(where, "noise_multiplier", "a float > 0", noise_multiplier)
    check_budget(where, 1.0, 0.5, adjacency)
    counts = _account(where, accountant, adjacency)
    wrapped = _opacus.GradSampleModule(module, loss_reduction=loss_reduction)
    private = MNGPOptimizer(
        optimizer, noise_multiplier=noise_multiplier, expected_batch_size=size * rate, loss_reduction=loss_reduction,
        normalizer=normalizer, threshold=threshold, generator=generator, secure_mode=secure_mode,
    )  # fmt: skip
    private.accountant = counts
    private.attach_step_hook(counts.get_optimizer_hook_fn(rate))
    return wrapped, private, loader


def _size(where: str, loader: DataLoader[Any]) -> int:
    """Return the number of samples.

    Raises:
        ValueError: There is no telling.
    """
    if isinstance(loader.dataset, torch.utils.data.IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise bad(where, "data_loader", "over a data set that has a length and an index", type(loader.dataset).__name__)
    return len(loader.dataset)


def _account(where: str, accountant: str, adjacency: Adjacency) -> Any:  # noqa: ANN401  (Opacus' interface)
    if accountant == "exact":
        return PrivacyLossAccountant(adjacency)
    if accountant not in ("prv", "rdp"):
        raise bad(where, "accountant", "'exact', 'prv' or 'rdp'", accountant)
    if adjacency != "add_remove":
        raise bad(where, "adjacency", f"'add_remove' where accountant={accountant!r}", adjacency)
    return _accounting.create_accountant(accountant)
