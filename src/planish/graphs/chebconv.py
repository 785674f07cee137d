r"""Chebyshev convolutions on graphs, and the cascade of TimeGNN's layers.

    H' = sum_{rho=1}^{P} mu_rho sigma( sum_{k=0}^{rho-1} C_k(Lhat) H Theta_{rho,k} + b_rho )                     (1)

with Lhat = 2 L_sym / lambda_max - I, lambda_max taken as 2, so Lhat = -D^-1/2 W D^-1/2; C_k are Chebyshev polynomials
of the first kind, or Gegenbauer polynomials. Graphs come in PyTorch Geometric's convention, `edge_index` with
`edge_weight`, or as an adjacency in the place of `edge_index`, dense or sparse; that package is not needed.
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.graphs.adjacency import degrees, scaled_adjacency

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "elu": nn.functional.elu, "tanh": torch.tanh, "linear": lambda x: x,
}  # fmt: skip


def scaled_laplacian(edge_index: Tensor, edge_weight: Tensor | None, like: Float[Tensor, "N c"]) -> Tensor:
    """Return Lhat = -D^-1/2 W D^-1/2; a row of zeros for a node without neighbours."""
    n = len(like)
    if edge_index.is_floating_point():
        if edge_index.shape != (n, n):
            raise bad("ChebCascadeConv", "edge_index", f"edges, or an adjacency of {n} nodes", tuple(edge_index.shape))
        w = edge_index if edge_index.layout == torch.strided else edge_index.to_sparse_coo().coalesce()
    else:
        if edge_index.ndim != 2 or len(edge_index) != 2:
            raise bad("ChebCascadeConv", "edge_index", "of shape (2, edges)", tuple(edge_index.shape))
        weight = torch.ones(edge_index.shape[1]).to(like) if edge_weight is None else edge_weight
        apart = edge_index[0] != edge_index[1]
        # messages go from the first row to the second; rows of the matrix are targets
        at = edge_index[:, apart].flip(0)
        w = torch.sparse_coo_tensor(at, weight[apart], (n, n), check_invariants=True).coalesce()
        w = w.to_dense() if n * n <= 16 * max(1, edge_index.shape[1]) or n <= 256 else w
    w = w.to(like.dtype)
    return scaled_adjacency(w, degrees(w)) * -1.0


def polynomials(lhat: Tensor, h: Tensor, order: int, alpha: float | None) -> list[Tensor]:
    """Return C_k(Lhat) H for k below `order`: Chebyshev of the first kind if alpha is None, else Gegenbauer."""
    terms = [h]
    if order > 1:
        terms.append(lhat @ h * (1.0 if alpha is None else 2 * alpha))
    for k in range(2, order):
        ahead = lhat @ terms[-1]
        if alpha is None:
            terms.append(2 * ahead - terms[-2])
        else:
            terms.append((2 * (k + alpha - 1) * ahead - (k + 2 * alpha - 2) * terms[-2]) / k)
    return terms


class ChebCascadeConv(nn.Module):
    """A sum of Chebyshev convolutions of orders 1 to P, each with its own non-linearity and weight: (1).

    Args:
        in_channels: >= 1.
        out_channels: >= 1.
        order: P, >= 1.
        polynomial: "chebyshev" (default), or "gegenbauer" (GegenGNN; `alpha` 1 is Chebyshev's second kind).
        alpha: Of Gegenbauer's polynomials, > -1/2 and not 0; default 1.
        activation: "relu" (default, the paper's), "elu", "tanh" or "linear".
        dropout: In [0, 1), after the non-linearity, from torch's own generator; default 0.
        cascade: False leaves the convolution of order P alone, without non-linearity: a plain ChebConv.
        mixing: How mu starts: "normal" (default, the paper's) or "ones".
        basis: (r, out_channels): if given, weights act on r coefficients, and rows of the basis make channels of them.
        generator: Source of the first weights.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> layer = ChebCascadeConv(3, 2, order=2, generator=torch.Generator().manual_seed(0))
        >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> layer(torch.ones(3, 3), edge_index).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        order: int,
        *,
        polynomial: Literal["chebyshev", "gegenbauer"] = "chebyshev",
        alpha: int | float = 1.0,
        activation: str = "relu",
        dropout: int | float = 0.0,
        cascade: bool = True,
        mixing: Literal["normal", "ones"] = "normal",
        basis: Float[Tensor, "r out"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        where = "ChebCascadeConv"
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("order", order)):
            if not isinstance(value, int) or value < 1:
                raise bad(where, name, "an int >= 1", value)
        if polynomial not in {"chebyshev", "gegenbauer"}:
            raise bad(where, "polynomial", "'chebyshev' or 'gegenbauer'", polynomial)
        if polynomial == "gegenbauer" and (alpha <= -0.5 or alpha == 0):
            raise bad(where, "alpha", "above -1/2 and not 0", alpha)
        if activation not in ACTIVATIONS:
            raise bad(where, "activation", f"one of {', '.join(ACTIVATIONS)}", activation)
        if not 0 <= dropout < 1:
            raise bad(where, "dropout", "a float in [0, 1)", dropout)
        if mixing not in {"normal", "ones"}:
            raise bad(where, "mixing", "'normal' or 'ones'", mixing)
        self.in_channels, self.out_channels, self.order = in_channels, out_channels, order
        self.alpha = None if polynomial == "chebyshev" else float(alpha)
        self.activation, self.dropout, self.cascade, self.mixing = activation, float(dropout), cascade, mixing
        self.register_buffer("basis", basis)
        self.basis: Tensor | None
        wide = out_channels if basis is None else len(basis)
        orders = range(1, order + 1) if cascade else [order]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(rho, in_channels, wide)) for rho in orders)
        self.biases = nn.Parameter(torch.zeros(len(self.weights), out_channels))
        self.mix = nn.Parameter(torch.ones(len(self.weights)), requires_grad=cascade)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw Glorot weights, zero biases, and mu as `mixing` says."""
        with torch.no_grad():
            for weight in self.weights:
                bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
                weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
            self.biases.zero_()
            if self.cascade and self.mixing == "normal":
                self.mix.copy_(torch.randn(self.mix.shape, generator=generator))

    def forward(
        self, x: Float[Tensor, "N in"], edge_index: Tensor, edge_weight: Float[Tensor, "E"] | None = None
    ) -> Float[Tensor, "N out"]:
        """Return the new channels of each node.

        Args:
            x: Channels of each node.
            edge_index: (2, E), source above target, each edge in both directions; or the adjacency, floats (N, N).
            edge_weight: (E,); ones by default.
        """
        if x.ndim != 2 or x.shape[1] != self.in_channels:
            raise bad("ChebCascadeConv", "x", f"(nodes, {self.in_channels} channels)", tuple(x.shape))
        terms = polynomials(scaled_laplacian(edge_index, edge_weight, x), x, self.order, self.alpha)
        activation = ACTIVATIONS[self.activation] if self.cascade else ACTIVATIONS["linear"]
        total = torch.zeros(len(x), self.out_channels).to(x)
        for weight, bias, mu in zip(self.weights, self.biases, self.mix, strict=True):
            h = torch.cat(terms[: len(weight)], 1) @ weight.flatten(0, 1)
            h = activation((h if self.basis is None else h @ self.basis) + bias)
            total = total + mu * nn.functional.dropout(h, self.dropout, self.training)  # eq. (1)
        return total


class ChebNet(nn.Module):
    """Plain Chebyshev convolutions with ReLU between them: the baseline.

    Args:
        channels: Of the input, of each layer, of the output; two at least.
        order: Terms of each polynomial, >= 1; default 4.
        activation: Between layers; default "relu".
        generator: Source of the first weights.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> net = ChebNet((5, 8, 6), order=2, generator=torch.Generator().manual_seed(0))
        >>> net(torch.ones(3, 5), torch.ones(3, 3)).shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        order: int = 4,
        *,
        activation: str = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise bad("ChebNet", "channels", "at least two widths", channels)
        if activation not in ACTIVATIONS:
            raise bad("ChebNet", "activation", f"one of {', '.join(ACTIVATIONS)}", activation)
        self.activation = activation
        self.layers = nn.ModuleList(
            ChebCascadeConv(a, b, order, cascade=False, generator=generator) for a, b in itertools.pairwise(channels)
        )

    def forward(
        self, x: Float[Tensor, "N in"], edge_index: Tensor, edge_weight: Float[Tensor, "E"] | None = None
    ) -> Float[Tensor, "N out"]:
        """Return the output of each node; arguments as of `ChebCascadeConv`."""
        for i, layer in enumerate(self.layers):
            x = layer(ACTIVATIONS[self.activation](x) if i else x, edge_index, edge_weight)
        return x
