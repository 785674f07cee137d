r"""TimeGNN: recover time-varying signals on a graph with one cascade of Chebyshev convolutions.

Row i of the zero-filled, differenced samples Y D_h are the features of node i; the network returns all times of all
nodes at once. One graph, one network, one data set: it is trained on the samples themselves, with

    L = mean over samples of (X~ - X)^2 + lambda tr[(X~ D)' (L + epsilon I)^beta (X~ D)]                         (1)

================  ==============================  ====================================================
paper             here                            shape, range, default
================  ==============================  ====================================================
M                 ``n_steps``                     times
P                 ``order``                       >= 1; 4
mu_rho            ``mix``                         N(0, 1) in the paper, 1 here (`mixing`)
lambda            ``lam``                         >= 0; alpha of GraphTRSS over the number of samples
J                 ``mask``                        (N, M)
================  ==============================  ====================================================

Differs from the paper: as published it hardly trains. All features share the level of the data, so their rows are
nearly parallel, and rectified mixtures of one sign cannot give both signs. `preconditioned` turns features into the
eigenvectors of the graph and outputs into cosines in time, each scaled by the root of what (1) charges it, which is
what whitening the features does and more; data are centred node by node and scaled, mu starts at 1, ELU replaces ReLU.
The weights start where the network's output is GraphTRSS's fill (`start`), and the epoch is chosen on hidden samples.
Whitened rows of N features are an orthogonal matrix: they say which node is which, and no more. Validation samples are
hidden from the features too; in the published code they are not.
When to use: to compare, or inside a model of your own. For filling gaps `learn_prior` has eight parameters, not
millions; `docs/papers/timegnn.md` has the figures of both.

Reference:
    Castro-Correa, Giraldo, Mondal, Badiey, Bouwmans and Malliaros, Time-Varying Signals Recovery via Graph Neural
    Networks, ICASSP 2023. https://arxiv.org/abs/2302.11313
"""

import copy
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from planish._support import bad
from planish.graphs.chebconv import ChebCascadeConv
from planish.graphs.recovery import check_signals, first_guess, graph_trss, weights_of
from planish.graphs.sobolev import LaplacianPower, SobolevLoss
from planish.graphs.time import frequencies, from_cosines, temporal_difference

logger = logging.getLogger("planish")
_INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda v: v,
    "elu": lambda v: torch.where(v > 0, v, torch.log1p(v.clamp(-0.99, 0))),
    "tanh": lambda v: torch.atanh(v.clamp(-0.99, 0.99)),
}
_FLOOR = 0.01  # keeps the longest waves from drowning all others


class TimeGNN(nn.Module):
    """Cascades of Chebyshev convolutions, then linear layers without bias: from M - 1 differences to M times.

    Args:
        n_steps: M, >= 2.
        order: P of each cascade, >= 1; default 4.
        hidden_channels: Widths between cascades; default none, one cascade.
        decoder_channels: Widths of linear layers after the last cascade, before the times; default none. The first of
            them is the last cascade's width.
        in_channels: Default M - 1.
        activation: "relu" (default, the paper's), "elu", "tanh" or "linear".
        dropout: In [0, 1); default 0.
        mixing: How mu starts: "normal" (default, the paper's) or "ones".
        polynomial: "chebyshev" (default) or "gegenbauer".
        alpha: Of Gegenbauer's polynomials; default 1.
        basis: (r, M): if given, the last layer makes r coefficients, of which the basis makes times.
        generator: Source of the first weights.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> net = TimeGNN(6, order=2, hidden_channels=(4,), generator=torch.Generator().manual_seed(0))
        >>> net(torch.randn(3, 5), torch.ones(3, 3)).shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        n_steps: int,
        *,
        order: int = 4,
        hidden_channels: Sequence[int] = (),
        decoder_channels: Sequence[int] = (),
        in_channels: int | None = None,
        activation: str = "relu",
        dropout: int | float = 0.0,
        mixing: Literal["normal", "ones"] = "normal",
        polynomial: Literal["chebyshev", "gegenbauer"] = "chebyshev",
        alpha: int | float = 1.0,
        basis: Float[Tensor, "r M"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(n_steps, int) or n_steps < 2:
            raise bad("TimeGNN", "n_steps", "an int >= 2", n_steps)
        last = decoder_channels[0] if decoder_channels else n_steps
        widths = [n_steps - 1 if in_channels is None else in_channels, *hidden_channels, last]
        self.convolutions = nn.ModuleList(
            ChebCascadeConv(
                a, b, order, polynomial=polynomial, alpha=alpha, activation=activation, dropout=dropout, mixing=mixing,
                basis=basis if i == len(widths) - 2 and not decoder_channels else None, generator=generator,
            )
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )  # fmt: skip
        ends = [*decoder_channels, n_steps if basis is None else len(basis)] if decoder_channels else []
        self.decoder = nn.ParameterList()
        for a, b in itertools.pairwise(ends):
            bound = math.sqrt(6 / (a + b))
            self.decoder.append(nn.Parameter((2 * torch.rand((a, b), generator=generator) - 1) * bound))
        self.register_buffer("basis", basis if decoder_channels else None)
        self.basis: Tensor | None

    def forward(
        self, x: Float[Tensor, "N in"], edge_index: Tensor, edge_weight: Float[Tensor, "E"] | None = None
    ) -> Float[Tensor, "N M"]:
        """Return the signals; arguments as of `ChebCascadeConv`."""
        for layer in self.convolutions:
            x = layer(x, edge_index, edge_weight)
        for weight in self.decoder:
            x = x @ weight
        return x if self.basis is None else x @ self.basis


@dataclass(frozen=True)
class TimeGNNTraining:
    """How TimeGNN is trained.

    Attributes:
        epochs: >= 1; default 100. The paper's recipe has 5,000; from zero, 300 with a rate of 0.005 do.
        learning_rate: Adam's, > 0; default 5e-4, falling to 0 by a cosine. The paper's: about 0.026.
        weight_decay: >= 0; default 0; the paper's 1.7e-4.
        order: P; default 4.
        hidden_channels: Between cascades; default none.
        decoder_channels: Of linear layers at the end; default none.
        preconditioned: Eigenvectors of the graph as features, cosines in time as outputs; default True.
        standardized: Centre each node by its samples, scale all by one deviation; default True.
        activation: Default "elu"; the paper's "relu".
        mixing: Default "ones"; the paper's "normal".
        start: "graphtrss" (default): the output starts as GraphTRSS's fill, which needs preconditioning, one cascade
            and an activation that is no "relu"; or "zero" (nearly, with preconditioning) or random weights (without).
        schedule: "cosine" (default), or "plateau", the paper's: halved after 500 epochs without progress.

    Example:
        >>> TimeGNNTraining.published().activation
        'relu'
    """

    epochs: int = 100
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    order: int = 4
    hidden_channels: tuple[int, ...] = ()
    decoder_channels: tuple[int, ...] = ()
    preconditioned: bool = True
    standardized: bool = True
    activation: str = "elu"
    mixing: Literal["normal", "ones"] = "ones"
    start: Literal["graphtrss", "zero"] = "graphtrss"
    schedule: Literal["cosine", "plateau"] = "cosine"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise bad("TimeGNNTraining", "epochs", "an int >= 1", self.epochs)
        if not 0 < self.learning_rate < math.inf:
            raise bad("TimeGNNTraining", "learning_rate", "a float above 0", self.learning_rate)
        able = (
            self.preconditioned and self.activation in _INVERSES and not (self.hidden_channels or self.decoder_channels)
        )
        if self.start not in {"graphtrss", "zero"} or (self.start == "graphtrss" and not able):
            allowed = "'zero', or 'graphtrss' for one preconditioned cascade without ReLU"
            raise bad("TimeGNNTraining", "start", allowed, self.start)
        if self.schedule not in {"cosine", "plateau"}:
            raise bad("TimeGNNTraining", "schedule", "'cosine' or 'plateau'", self.schedule)

    @classmethod
    def published(cls, epochs: int = 5000) -> "TimeGNNTraining":
        """Return the recipe of the published code."""
        return cls(
            epochs=epochs, learning_rate=0.026, weight_decay=1.68e-4, preconditioned=False, standardized=False,
            activation="relu", mixing="normal", start="zero", schedule="plateau",
        )  # fmt: skip


@dataclass
class TimeGNNFit:
    """A trained network and what came of it.

    Attributes:
        fill: (N, M), the network's own values everywhere.
        net: The network, at its best epoch.
        loss: Of each epoch.
        validation: Root mean square error on hidden samples at each epoch; empty without any.
        best_epoch: From 1.

    Example:
        >>> TimeGNNFit(torch.zeros(1, 2), TimeGNN(2), [0.0], [], 1).best_epoch
        1
    """

    fill: Tensor
    net: TimeGNN
    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = 0


def _preconditioned(power: LaplacianPower, m: int) -> tuple[Tensor, Tensor]:
    """Return features (N, N) and a basis (M, M): eigenvectors and cosines over the root of what they are charged."""
    levels, vectors = power.basis()
    charge = (levels + power.epsilon) ** power.beta
    rows = vectors * (charge.mean() / (charge + _FLOOR * charge.mean())).sqrt()
    k = frequencies(m, levels)
    columns = from_cosines(torch.eye(m).to(levels)) / (k + _FLOOR)[:, None].sqrt()
    return 10.0 * rows, columns


def _aim(net: TimeGNN, target: Tensor, activation: str, features: Tensor) -> None:
    """Set the weights of one preconditioned cascade so that its output is the target: each order gives its share."""
    layer = net.convolutions[0]
    if not isinstance(layer, ChebCascadeConv) or layer.basis is None:
        raise TypeError("a preconditioned cascade has a basis")
    share = _INVERSES[activation](target.double() / len(layer.weights))
    theta = torch.linalg.solve(features.double(), torch.linalg.solve(layer.basis.double(), share, left=False))
    with torch.no_grad():
        for weight in layer.weights:
            weight.zero_()
            weight[0] = theta.to(weight)


def fit_timegnn(  # noqa: PLR0915
    x: Float[Tensor, "N M"],
    mask: Bool[Tensor, "N M"],
    smoothness: LaplacianPower,
    *,
    alpha: int | float = 1e-3,
    hidden: Bool[Tensor, "N M"] | None = None,
    training: TimeGNNTraining | None = None,
    stop_after: int | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> TimeGNNFit:
    """Train a TimeGNN on samples of one table, in float32.

    Args:
        x: Signals, one row a node; only entries of the mask are read.
        mask: Which entries are samples.
        smoothness: (L + epsilon I)^beta of the loss.
        alpha: lambda times the number of samples, >= 0; default 1e-3. The same number means the same as in GraphTRSS.
        hidden: Samples that the network does not see and is judged by: the best epoch is kept. None: the last is.
        training: How; default `TimeGNNTraining()`.
        stop_after: Epochs to do of those the schedule is made for, such as the best one found before; default all.
        generator: Source of the first weights.
        progress: Called with (epoch, loss).

    Raises:
        ValueError: An argument is out of range, or shapes do not fit.

    Example:
        >>> from planish.graphs import laplacian
        >>> power = LaplacianPower(laplacian(torch.ones(4, 4)))
        >>> x = torch.arange(12.0) + torch.zeros(4, 1)
        >>> mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.7
        >>> fit = fit_timegnn(x, mask, power, generator=torch.Generator().manual_seed(0))
        >>> float((fit.fill - x).abs().max()) < 1
        True
    """
    check_signals("fit_timegnn", x, mask, smoothness.n_nodes, alpha=alpha)
    training = TimeGNNTraining() if training is None else training
    inside = mask if hidden is None else mask & ~hidden
    x = x.float()
    w = weights_of(smoothness.laplacian.float())
    level, scale = torch.zeros(len(x), 1), torch.tensor(1.0)
    if training.standardized:
        level = first_guess(x, inside, w).mean(1, keepdim=True)
        scale = (x - level)[inside].square().mean().sqrt().clamp_min(1e-12)
    y = torch.where(inside, (x - level) / scale, 0.0)
    count = int(inside.sum())
    lam = float(alpha) / count
    features, basis = temporal_difference(y), None
    if training.preconditioned:
        features, basis = (part.float() for part in _preconditioned(smoothness, x.shape[1]))
    net = TimeGNN(
        x.shape[1], order=training.order, hidden_channels=training.hidden_channels,
        decoder_channels=training.decoder_channels, in_channels=features.shape[1], activation=training.activation,
        mixing=training.mixing, basis=basis, generator=generator,
    )  # fmt: skip
    if training.start == "graphtrss":
        first = graph_trss(x.to(smoothness.laplacian), inside, smoothness, alpha=alpha, tol=1e-7)
        _aim(net, (first - level) / scale, training.activation, features)
    elif training.preconditioned:
        with torch.no_grad():  # nearly zero signals: noise in a basis of long waves takes long to forget
            last = net.decoder[-1:] if training.decoder_channels else net.convolutions[-1].weights
            for weight in last:  # type: ignore[union-attr]
                weight.mul_(1e-2)
    charge = SobolevLoss(smoothness.laplacian.float(), epsilon=smoothness.epsilon, beta=smoothness.beta, lam=lam)
    optimizer = torch.optim.Adam(net.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=500, min_lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs)
    found, best, kept = TimeGNNFit(x, net), math.inf, None
    judged = None if hidden is None else hidden & mask
    epochs = min(training.epochs, stop_after or training.epochs)
    for epoch in range(1, epochs + 1):
        out = net(features, w)
        error = torch.where(inside, out - y, 0.0).square().sum() / count
        loss = error + charge(out)
        if judged is not None:
            miss = ((out.detach() * scale + level) - x)[judged]
            found.validation.append(float(miss.square().mean().sqrt()))
            if found.validation[-1] < best:
                best, found.best_epoch = found.validation[-1], epoch
                kept = copy.deepcopy(net.state_dict())
        found.loss.append(float(loss.detach()))
        if progress is not None:
            progress(epoch, found.loss[-1])
        if not math.isfinite(found.loss[-1]):
            logger.warning("fit_timegnn: the loss is not finite at epoch %d; the best epoch so far is kept.", epoch)
            break
        if epoch == epochs:
            break  # an epoch is what its loss is of: before the step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if training.schedule == "cosine":
            cosine.step()
        else:
            plateau.step(found.loss[-1])
    if kept is not None:
        net.load_state_dict(kept)
    else:
        found.best_epoch = len(found.loss)
    with torch.no_grad():
        found.fill = net(features, w) * scale + level
    return found
