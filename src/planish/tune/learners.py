r"""Smoothness of the loss of a learner, as its paper defines it learner by learner.

==================  ====================  ==================================================================
method              learner               S (m rows, k classes, Frobenius norms)
==================  ====================  ==================================================================
``last_layer``      feed-forward nets     max over batches of ||A_b|| / sqrt(rows of b), divided by ||W||;
                                          A_b enters the last linear layer, W is its weight. Not divided for
                                          regression
``logistic``        logistic regression   (k - 1) / (k m) ||X|| / ||W||
``gaussian_nb``     Gaussian naive Bayes  -||A (x) G - A (x) A / 2 + G (x) A||,  A = Sigma^-1,
                                          G = -A (Z Z'/m + Sigma / 2) A,  Z the class-centred columns
``directional``     anything that scores  mean |f(x + ev) + f(x - ev) - 2 f(x)| / e^2,  f = log p(class 1)
``hessian``         nets and logistic     largest |eigenvalue| of the Hessian of the mean loss
==================  ====================  ==================================================================

The first two are quotients of data and weights: large means inputs of good scale and small weights. The paper's text
asks for smooth losses, its programs keep the largest of these two scores; so does `KEEP`, which is what works.

Differs from the paper: norms of batches are divided by the root of their rows, so that batch sizes may differ;
the covariance is one of means on both sides, takes the smoothing of variances along, and the Kronecker products are
never formed; second differences take e = 1e-3, since at 1e-6 they are rounding noise, and p is not below 1e-12.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad, require
from planish.tune.curvature import directional_curvature, hessian_norm
from planish.tune.ranking import Keep

Method = Literal["last_layer", "logistic", "gaussian_nb", "directional", "hessian"]
Array = npt.NDArray[Any]

KEEP: dict[str, Keep] = {
    "last_layer": "largest",
    "logistic": "largest",
    "gaussian_nb": "largest",  # S is minus a norm there: the smoothest
    "directional": "smallest",
    "hessian": "smallest",
}
"""Which end of each score the authors' programs keep."""

_FLOOR = float(np.log(1e-12))  # trees give probabilities of exactly 0


def smoothness(
    model: Any,  # noqa: ANN401  (a module, or any estimator)
    X: Any,  # noqa: ANN401  (array, tensor or sparse matrix)
    y: Any = None,  # noqa: ANN401
    *,
    method: Method | Literal["auto"] = "auto",
    batch_size: int = 128,
    generator: torch.Generator | None = None,
) -> float:
    """Return the smoothness score of a fitted model on its training data.

    Args:
        model: A `torch.nn.Module` that gives logits (or, for a float `y`, predictions), or a fitted scikit-learn
            estimator; pipelines are scored at their last step, so give that and the transformed data.
        X: What the model was trained on, one row a sample.
        y: Its labels; floats mean regression for a module. `logistic` and `directional` do without.
        method: Which score; "auto" takes the paper's own for the kind of model.
        batch_size: Rows of a batch for `last_layer`, >= 1. Default 128, as in the paper.
        generator: Source of rows and directions for `directional`, and of the start for `hessian`; default a fixed one.

    Returns:
        The score. Scores of different methods, learners or widths of last layer cannot be compared.

    Raises:
        ValueError: The method is unknown or does not fit the model, or `batch_size` is below 1.
        MissingExtra: An estimator came and scikit-learn is not installed.
        NotConverged: The largest eigenvalue was not found (`hessian` only).

    Example:
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.ones_(net.weight)
        >>> smoothness(net, torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
        2.5
    """
    if batch_size < 1:
        raise bad("smoothness", "batch_size", "an int >= 1", batch_size)
    chosen = method_of(model) if method == "auto" else method
    if chosen not in KEEP:
        raise bad("smoothness", "method", f"auto or one of {', '.join(KEEP)}", method)
    rows = _matrix(X)
    if chosen == "last_layer":
        return _last_layer(model, rows, y, batch_size)
    if chosen == "logistic":
        return _logistic(model, rows)
    if chosen == "gaussian_nb":
        return _gaussian_nb(model, rows, y)
    if chosen == "directional":
        return _directional(model, rows, generator)
    return _hessian(model, rows, y, generator)


def method_of(model: Any) -> Method:  # noqa: ANN401
    """Return the paper's score for a kind of model."""
    if isinstance(model, nn.Module):
        return "last_layer"
    if _is_a(model, "sklearn.neural_network", "MLPClassifier", "MLPRegressor"):
        return "last_layer"
    if _is_a(model, "sklearn.linear_model", "LogisticRegression"):
        return "logistic"
    if _is_a(model, "sklearn.naive_bayes", "GaussianNB"):
        return "gaussian_nb"
    return "directional"


def _is_a(model: Any, module: str, *names: str) -> bool:  # noqa: ANN401
    there = require(module, "sklearn", "smoothness of an estimator")
    return isinstance(model, tuple(getattr(there, name) for name in names))


def _refuse(model: Any, method: str, what: str) -> ValueError:  # noqa: ANN401
    return bad("smoothness", "model", f"{what} for method={method!r}", type(model).__name__)


def _matrix(X: Any) -> Float[Tensor, "rows dims"]:  # noqa: ANN401
    if isinstance(X, Tensor):
        rows = X.detach()
    else:
        rows = torch.from_numpy(np.asarray(X.toarray() if hasattr(X, "toarray") else X, dtype=np.float64).copy())
    if rows.ndim < 2 or not rows.numel():
        raise bad("smoothness", "X", "at least one row of at least one column", tuple(rows.shape))
    return rows


def _last_layer(model: Any, rows: Tensor, y: Any, batch_size: int) -> float:  # noqa: ANN401
    net, regression = _as_module(model, "last_layer"), _is_float(model, y)
    like = next(net.parameters(), torch.zeros(()))
    seen: list[tuple[nn.Linear, Tensor]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
        for m in net.modules()
        if isinstance(m, nn.Linear)
    ]
    training = net.training
    net.eval()
    size = 0.0
    try:
        with torch.no_grad():
            for batch in rows.split(batch_size):
                seen.clear()
                net(batch.to(like.device, like.dtype))
                if not seen:
                    raise _refuse(model, "last_layer", "a net with a linear layer")
                size = max(size, float(seen[-1][1].double().norm()) / len(batch) ** 0.5)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    if regression:
        return size
    weight = float(seen[-1][0].weight.detach().double().norm())
    return size / weight if weight > 0 else 0.0


def _logistic(model: Any, rows: Tensor) -> float:  # noqa: ANN401
    if not hasattr(model, "coef_") or not hasattr(model, "classes_"):
        raise _refuse(model, "logistic", "a fitted linear classifier")
    k, weight = len(model.classes_), float(np.linalg.norm(model.coef_))
    return (k - 1) / (k * len(rows)) * float(rows.double().norm()) / weight if weight > 0 else 0.0


def _gaussian_nb(model: Any, rows: Tensor, y: Any) -> float:  # noqa: ANN401
    if y is None:
        raise bad("smoothness", "y", "the labels, one a row, for method='gaussian_nb'", y)
    x, labels = rows.double().cpu().numpy(), np.asarray(y).ravel()
    centred = x.copy()
    for label in np.unique(labels):
        centred[labels == label] -= centred[labels == label].mean(0)
    spread = centred.T @ centred / len(x)
    return -gaussian_curvature(spread, float(getattr(model, "var_smoothing", 0.0)) * float(x.var(0).max()))


def gaussian_curvature(spread: Array, added: float = 0.0) -> float:
    """Return ||A (x) G - A (x) A / 2 + G (x) A|| for Sigma = spread + added * I; 0 where Sigma is singular.

    Inner products of Kronecker products are products of inner products: no array of d^4 numbers is made.
    """
    sigma = spread + added * np.eye(len(spread))
    values = np.linalg.eigvalsh(sigma)
    if values[0] <= len(sigma) * np.finfo(np.float64).eps * max(values[-1], 0):
        return 0.0
    a = np.linalg.inv(sigma)
    g = -a @ (spread + sigma / 2) @ a
    terms = ((1.0, a, g), (-0.5, a, a), (1.0, g, a))
    square = sum(c * e * float((p * r).sum() * (q * s).sum()) for c, p, q in terms for e, r, s in terms)
    return float(np.sqrt(max(square, 0.0)))


def _directional(model: Any, rows: Tensor, generator: torch.Generator | None) -> float:  # noqa: ANN401
    generator = generator or torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(rows), generator=generator)[: max(100, len(rows) // 10)]
    return directional_curvature(_output(model), rows[chosen.to(rows.device)], generator=generator)


def _output(model: Any) -> Callable[[Tensor], Tensor]:  # noqa: ANN401
    """Return the function of rows whose bends are measured: log p(class 1), a decision, or a prediction."""
    if isinstance(model, nn.Module):
        like = next(model.parameters(), torch.zeros(()))

        def logits(x: Tensor) -> Tensor:
            with torch.no_grad():
                out: Tensor = model(x.to(like.device, like.dtype)).double()
            if out.ndim == 1 or out.shape[1] == 1:
                return out.reshape(len(x))
            return torch.log_softmax(out, 1)[:, 1].clamp_min(_FLOOR)

        return logits
    names = ("predict_log_proba", "decision_function", "predict")
    name = next((name for name in names if hasattr(model, name)), None)
    if name is None:
        raise _refuse(model, "directional", "an estimator that predicts")
    call = getattr(model, name)

    def score(x: Tensor) -> Tensor:
        with np.errstate(divide="ignore"):  # trees take the logarithm of 0
            out = np.asarray(call(x.cpu().numpy()))
        if out.dtype.kind not in "fiu":
            raise _refuse(model, "directional", "an estimator whose outputs are numbers")
        column = torch.from_numpy(out.astype(np.float64)).reshape(len(x), -1)
        value = column[:, min(1, column.shape[1] - 1)]
        return value.clamp_min(_FLOOR) if name == "predict_log_proba" else value

    return score


def _hessian(model: Any, rows: Tensor, y: Any, generator: torch.Generator | None) -> float:  # noqa: ANN401
    if y is None:
        raise bad("smoothness", "y", "the labels, one a row, for method='hessian'", y)
    net = _as_module(model, "hessian")
    like = next(net.parameters(), torch.zeros(()))
    x = rows.to(like.device, like.dtype)
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if _is_float(model, y):
        target = torch.from_numpy(labels.reshape(len(x), -1)).to(like)
        return hessian_norm(
            lambda: nn.functional.mse_loss(net(x).reshape(len(x), -1), target), net.parameters(), generator=generator
        )
    codes = torch.from_numpy(np.searchsorted(np.unique(labels), labels.ravel())).to(like.device)

    def loss() -> Tensor:
        out = net(x)
        if out.ndim == 1 or out.shape[1] == 1:
            return nn.functional.binary_cross_entropy_with_logits(out.reshape(-1), codes.to(out))
        return nn.functional.cross_entropy(out, codes)

    return hessian_norm(loss, net.parameters(), generator=generator)


def _is_float(model: Any, y: Any) -> bool:  # noqa: ANN401
    """Whether this is regression."""
    if not isinstance(model, nn.Module):
        return not hasattr(model, "classes_")
    if isinstance(y, Tensor):
        return y.is_floating_point()
    return y is not None and np.asarray(y).dtype.kind == "f"


def _as_module(model: Any, method: str) -> nn.Module:  # noqa: ANN401
    """Return a net of torch that computes what the model does; a fitted estimator's has its weights, in float64."""
    if isinstance(model, nn.Module):
        return model
    if hasattr(model, "coefs_"):  # scikit-learn's nets
        acts = {"relu": nn.ReLU, "tanh": nn.Tanh, "logistic": nn.Sigmoid, "identity": nn.Identity}
        layers: list[nn.Module] = []
        for weight, bias in zip(model.coefs_, model.intercepts_, strict=True):
            layers += [_linear(weight.T, bias), acts[model.activation]()]
        return nn.Sequential(*layers[:-1])
    if method == "hessian" and hasattr(model, "coef_") and hasattr(model, "classes_"):
        return _linear(model.coef_, None, offset=model.intercept_)
    raise _refuse(model, method, "a torch module, or a fitted net of scikit-learn")


class _Offset(nn.Module):
    """A linear map of which only the weight is a parameter, as in the paper."""

    def __init__(self, weight: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.get_buffer("offset"))


def _linear(weight: Array, bias: Array | None, *, offset: Array | None = None) -> nn.Module:
    matrix = torch.from_numpy(np.array(weight, dtype=np.float64))
    if offset is not None:
        return _Offset(matrix, torch.from_numpy(np.array(offset, dtype=np.float64)).expand(len(matrix)).clone())
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(matrix)
        layer.bias.copy_(torch.from_numpy(np.array(bias, dtype=np.float64)))
    return layer
