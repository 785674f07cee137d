"""The equations of smoothness: each score by its definition, each estimate by a Hessian in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from planish.tune import directional_curvature, hessian_norm, smoothness
from planish.tune.learners import gaussian_curvature
from planish.tune.ranking import combined, rank_correlation, ranked

linear_model = pytest.importorskip("sklearn.linear_model")
naive_bayes = pytest.importorskip("sklearn.naive_bayes")
neural_network = pytest.importorskip("sklearn.neural_network")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(rows: int = 60, dims: int = 4, classes: int = 2, seed: int = 0):
    random = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    return random.normal(size=(rows, dims)) + y[:, None] * 0.7, y


def symmetric(n: int, seed: int) -> torch.Tensor:
    a = torch.randn(n, n, dtype=torch.float64, generator=generator(seed))
    return a + a.T


@pytest.mark.parametrize("n", [1, 2, 30, 120])
@pytest.mark.parametrize("seed", [0, 1])
def test_hessian_norm_of_a_quadratic_is_that_of_its_matrix(n, seed):
    matrix = symmetric(n, seed)
    x = torch.randn(n, dtype=torch.float64, generator=generator(9), requires_grad=True)
    found = hessian_norm(lambda: x @ matrix @ x / 2, [x], tolerance=1e-8)
    assert found == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-7)


def test_hessian_norm_over_several_parameters_is_that_of_the_whole_matrix():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64, generator=generator()), torch.arange(20) % 2
    names = [name for name, _ in net.named_parameters()]

    def loss(*parameters):
        out = torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x,))
        return nn.functional.cross_entropy(out, y)

    blocks = torch.autograd.functional.hessian(loss, tuple(net.parameters()))
    sizes = [p.numel() for p in net.parameters()]
    whole = torch.cat([torch.cat([b.reshape(m, n) for b, n in zip(row, sizes, strict=True)], 1)
                       for row, m in zip(blocks, sizes, strict=True)])  # fmt: skip
    expected = float(torch.linalg.eigvalsh(whole).abs().max())
    assert smoothness(net, x, y, method="hessian") == pytest.approx(expected, rel=1e-3)
    found = hessian_norm(lambda: nn.functional.cross_entropy(net(x), y), net.parameters(), tolerance=1e-8)
    assert found == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_hessian_in_closed_form_and_within_its_bound(classes):
    X, y = table(classes=classes)
    model = linear_model.LogisticRegression().fit(X, y)
    p = model.predict_proba(X)
    if classes == 2:
        whole = (X * (p[:, :1] * p[:, 1:])).T @ X / len(X)
    else:
        spread = [np.diag(q) - np.outer(q, q) for q in p]
        whole = sum(np.kron(s, np.outer(x, x)) for s, x in zip(spread, X, strict=True)) / len(X)
    found = smoothness(model, X, y, method="hessian")
    assert found == pytest.approx(np.linalg.eigvalsh(whole).max(), rel=1e-5)
    assert found <= np.linalg.eigvalsh(X.T @ X).max() / ((4 if classes == 2 else 2) * len(X)) * (1 + 1e-9)  # Boehning


def test_a_linear_loss_has_no_curvature():
    x = torch.ones(3, requires_grad=True)
    assert hessian_norm(lambda: 2 * x.sum(), [x]) == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_second_differences_of_a_quadratic_are_exact(seed):
    matrix, points = symmetric(5, seed), torch.randn(7, 5, dtype=torch.float64, generator=generator(seed))
    found = directional_curvature(lambda x: (x @ matrix * x).sum(1) / 2, points, generator=generator(3))
    v = torch.randn(7, 5, dtype=torch.float64, generator=generator(3))
    v = v / v.norm(dim=1, keepdim=True)
    assert found == pytest.approx(float((v @ matrix * v).sum(1).abs().mean()), rel=1e-6)


def test_a_quadratic_decision_has_its_own_bend():
    X = torch.randn(50, 3, dtype=torch.float64, generator=generator())
    assert smoothness(SumOfSquares(), X, method="directional") == pytest.approx(2.0, rel=1e-6)


def test_the_log_density_of_a_module_is_what_bends():
    """Logits (0, c x^2 / 2) in one dimension: log p(1) = -log(1 + exp(-c x^2 / 2)), by its second derivative."""

    class Bowl(SumOfSquares):
        def forward(self, x):
            return torch.cat([torch.zeros_like(x), 1.5 * x**2], 1)

    X = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1)
    at = X.clone().requires_grad_(True)
    slope = torch.autograd.grad(nn.functional.logsigmoid(1.5 * at**2).sum(), at, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), at)[0]
    assert smoothness(Bowl(), X, method="directional") == pytest.approx(float(bend.abs().mean()), rel=1e-4)


class SumOfSquares(nn.Module):
    """One output, the sum of squares: its bend along every unit direction is 2."""

    def __init__(self):
        super().__init__()
        self.like = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return (x * x).sum(1, keepdim=True)


def test_logistic_score_by_hand_and_its_scaling():
    X, y = np.array([[1.0, 2.0], [0.0, 2.0], [4.0, 0.0]]), np.array([0, 1, 1])
    model = linear_model.LogisticRegression().fit(X, y)
    model.coef_ = np.array([[3.0, 4.0]])
    assert smoothness(model, X) == pytest.approx((2 - 1) / (2 * 3) * math.sqrt(1 + 4 + 4 + 16) / 5)
    assert smoothness(model, 7 * X) == pytest.approx(7 * smoothness(model, X))
    model.coef_ = np.zeros((1, 2))
    assert smoothness(model, X) == 0.0


def kronecker(spread, added):
    """The tensor of the authors' program, with Z Z' divided by m."""
    d = len(spread)
    sigma = spread + added * np.eye(d)
    a = np.linalg.inv(sigma)
    g = -a @ (spread + sigma / 2) @ a
    eye = np.zeros((d, d, d, d))
    for i in range(d):
        for j in range(d):
            eye[i, j, i, j] = 1
    return a @ eye @ g - a @ eye @ a / 2 + g @ eye @ a


@pytest.mark.parametrize("added", [0.0, 0.3])
@pytest.mark.parametrize("dims", [2, 4])
def test_gaussian_score_is_that_of_the_tensor(added, dims):
    random = np.random.default_rng(dims)
    z = random.normal(size=(30, dims))
    spread = z.T @ z / 30
    found = gaussian_curvature(spread, added)
    assert found == pytest.approx(np.linalg.norm(kronecker(spread, added)), rel=1e-10)


def test_gaussian_score_is_seven_hessians_of_the_likelihood():
    """At Sigma = Z Z'/m it is proportional to the Hessian, by Sigma, of the mean log-density."""
    X, y = table(dims=2)
    centred = X.copy()
    for label in (0, 1):
        centred[y == label] -= centred[y == label].mean(0)
    spread = torch.from_numpy(centred.T @ centred / len(X))

    def density(sigma):
        return -(torch.logdet(sigma) + torch.trace(torch.linalg.solve(sigma, spread))) / 2

    whole = torch.autograd.functional.hessian(density, spread.clone())
    model = naive_bayes.GaussianNB(var_smoothing=0.0).fit(X, y)
    assert smoothness(model, X, y) == pytest.approx(-7 * float(whole.norm()), rel=1e-8)


def test_a_singular_covariance_says_nothing():
    X, y = table()
    X[:, 1] = X[:, 0]
    assert smoothness(naive_bayes.GaussianNB(var_smoothing=0.0).fit(X, y), X, y) == 0.0
    assert smoothness(naive_bayes.GaussianNB(var_smoothing=0.1).fit(X, y), X, y) < 0


@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic", "identity"])
def test_last_layer_by_its_definition_and_the_same_for_both_kinds_of_net(activation):
    X, y = table(rows=50)
    model = neural_network.MLPClassifier((6, 5), activation=activation, max_iter=5, random_state=0)
    with pytest.warns(Warning, match="converge"):
        model.fit(X, y)
    act = {"relu": lambda v: np.maximum(v, 0), "tanh": np.tanh, "logistic": lambda v: 1 / (1 + np.exp(-v)),
           "identity": lambda v: v}[activation]  # fmt: skip
    a = X
    for weight, bias in zip(model.coefs_[:-1], model.intercepts_[:-1], strict=True):
        a = act(a @ weight + bias)
    parts = [np.linalg.norm(part) / math.sqrt(len(part)) for part in (a[:16], a[16:32], a[32:48], a[48:])]
    expected = max(parts) / np.linalg.norm(model.coefs_[-1])
    assert smoothness(model, X, y, batch_size=16) == pytest.approx(expected, rel=1e-10)

    torch_act = {"relu": nn.ReLU, "tanh": nn.Tanh, "logistic": nn.Sigmoid, "identity": nn.Identity}[activation]
    layers = [nn.Linear(4, 6), torch_act(), nn.Linear(6, 5), torch_act(), nn.Linear(5, 1)]
    twin = nn.Sequential(*layers).double()
    with torch.no_grad():
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for layer, weight, bias in zip(linears, model.coefs_, model.intercepts_, strict=True):
            layer.weight.copy_(torch.from_numpy(weight.T))
            layer.bias.copy_(torch.from_numpy(bias))
    assert smoothness(twin, X, y, batch_size=16) == pytest.approx(expected, rel=1e-10)
    assert smoothness(twin, X, y.astype(float), batch_size=16) == pytest.approx(max(parts), rel=1e-10)  # regression


def test_a_dead_net_scores_zero():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(net[0].bias, -100.0)
    assert smoothness(net, torch.zeros(5, 3), torch.arange(5) % 2) == 0.0


def test_scoring_leaves_the_net_as_it_was():
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    X, y = torch.randn(9, 3, generator=generator()), torch.arange(9) % 2
    before = {name: value.clone() for name, value in net.state_dict().items()}
    scores = {smoothness(net, X, y) for _ in range(3)}
    assert len(scores) == 1  # dropout is off
    assert net.training and all(m.training for m in net)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_same_seed_gives_the_same_bits():
    X, y = table(rows=300)
    model = linear_model.LogisticRegression().fit(X, y)
    scores = [smoothness(model, X, y, method="directional", generator=generator(s)) for s in (1, 1, 2)]
    assert scores[0] == scores[1] != scores[2]


def test_ranking():
    nan = math.nan
    scores = [0.0, 3.0, nan, -1.0, 3.0, 2.0, math.inf]
    assert ranked(scores, "largest") == [1, 4, 5, 3, 0]
    assert ranked(scores, "smallest") == [3, 5, 1, 4, 0]
    assert ranked([0.0, 0.0, 0.0], "largest") == [0, 1, 2]
    # ranks 1.5 + 3, 1.5 + 2, 3 + 1: the second by a half
    assert combined([5.0, 5.0, 1.0], [0.1, 0.2, 0.3], "largest") == [1, 2, 0]
    assert combined([0.0, 0.0, 0.0], [0.1, 0.3, 0.2], "largest") == [1, 2, 0]
    assert combined([2.0, nan, 1.0], [nan, 0.3, 0.2], "smallest") == [2]
    assert combined([2.0, 1.0], [nan, nan], "smallest") == [1, 0]


def test_rank_correlation_is_spearmans():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for size in (2, 5, 40):
        a, b = random.integers(0, 6, (2, size)).astype(float).tolist()
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0])) and math.isnan(rank_correlation([1.0], [1.0]))
