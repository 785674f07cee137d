"""The rivals of the quantile benchmark, each with its own knobs chosen on a fifth of the rows and fitted again on all.

A rival takes training rows, their targets, test rows and a seed, and returns quantiles at `LEVELS` on the test rows.
"""

import numpy as np

from benchmarks.quantiles_cases import LEVELS, Array

T = np.array(LEVELS)


def pinball(y: Array, curves: Array) -> float:
    """Return the mean pinball loss over rows and levels."""
    z = y[:, None] - curves
    return float(np.maximum(T * z, (T - 1) * z).mean())


def split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to fit and the fifth to choose by."""
    order = np.random.default_rng(seed).permutation(n)
    return order[n // 5 :], order[: n // 5]


def forest(X: Array, y: Array, X_test: Array, seed: int) -> Array:
    """Quantile regression forest; the size of leaves is chosen."""
    from quantile_forest import RandomForestQuantileRegressor  # noqa: PLC0415

    fit, choose = split(len(y), seed)

    def grown(leaf: int, rows: np.ndarray) -> RandomForestQuantileRegressor:
        made = RandomForestQuantileRegressor(n_estimators=200, min_samples_leaf=leaf, random_state=seed)
        return made.fit(X[rows], y[rows])

    leaves = (5, 10, 20, 40)
    losses = [pinball(y[choose], grown(leaf, fit).predict(X[choose], quantiles=list(LEVELS))) for leaf in leaves]
    best = grown(leaves[int(np.argmin(losses))], np.arange(len(y)))
    return np.asarray(best.predict(X_test, quantiles=list(LEVELS)), np.float64)


def boosting(X: Array, y: Array, X_test: Array, seed: int) -> Array:
    """Gradient boosting by histograms, a model a level; leaves of a tree are chosen, and trees for each level."""
    from sklearn.ensemble import HistGradientBoostingRegressor  # noqa: PLC0415

    fit, choose = split(len(y), seed)

    def grown(level: float, leaves: int, trees: int, rows: np.ndarray) -> HistGradientBoostingRegressor:
        made = HistGradientBoostingRegressor(
            loss="quantile", quantile=level, max_leaf_nodes=leaves, max_iter=trees, early_stopping=False,
            random_state=seed,
        )  # fmt: skip
        return made.fit(X[rows], y[rows])

    tried = []
    for leaves in (3, 8):
        found = []
        for level in LEVELS:
            stages = np.array(list(grown(level, leaves, 150, fit).staged_predict(X[choose])))
            z = y[choose] - stages
            losses = np.maximum(level * z, (level - 1) * z).mean(1)
            found.append((float(losses.min()), int(losses.argmin()) + 1))
        tried.append((sum(loss for loss, _ in found), leaves, [trees for _, trees in found]))
    _, leaves, trees = min(tried)
    everything = np.arange(len(y))
    return np.stack(
        [grown(level, leaves, n, everything).predict(X_test) for level, n in zip(LEVELS, trees, strict=True)], 1
    )


def _kernel_fit(Z: Array, y: Array, ridge: float, level: float, start: Array | None) -> Array:
    """Minimise mean pinball(y - Z w) + ridge |w|^2, the last entry free, by majorising with parabolas."""
    n, k = Z.shape
    w = np.linalg.lstsq(Z, y, rcond=None)[0] if start is None else start
    weight = np.full(k, ridge)
    weight[-1] = 1e-12
    for i in range(25):
        near = 10.0 ** -(1 + i / 8)  # from 1e-1 down to 1e-4 of the target's spread
        curve = 1 / (2 * (near + np.abs(y - Z @ w)))
        left = (Z * curve[:, None]).T @ Z / n + 2 * np.diag(weight)
        w = np.linalg.solve(left, Z.T @ (curve * y + level - 0.5) / n)
    return w


def kernel(X: Array, y: Array, X_test: Array, seed: int) -> Array:
    """Kernel quantile regression, a Gaussian kernel and a model a level; width and ridge are chosen for all levels."""
    centre, spread = X.mean(0), X.std(0)
    A, B = (X - centre) / spread, (X_test - centre) / spread
    middle, scale = float(np.median(y)), float(np.subtract(*np.quantile(y, [0.75, 0.25])))
    target = (y - middle) / scale
    fit, choose = split(len(y), seed)

    def square(P: Array, Q: Array) -> Array:
        return np.maximum((P**2).sum(1)[:, None] + (Q**2).sum(1) - 2 * P @ Q.T, 0)

    usual = float(np.median(square(A, A)[np.triu_indices(len(A), 1)]))

    def features(rows: np.ndarray, width: float) -> tuple[Array, Array]:
        """Return the basis (r, k) that spans all but a trace of the kernel of some rows, and how to reach it."""
        values, vectors = np.linalg.eigh(np.exp(-square(A[rows], A[rows]) / (2 * usual * width**2)))
        kept = np.flatnonzero(values > 1e-7 * values[-1])[-128:]
        return vectors[:, kept], values[kept]

    def mapped(P: Array, rows: np.ndarray, width: float, basis: tuple[Array, Array]) -> Array:
        found = np.exp(-square(P, A[rows]) / (2 * usual * width**2)) @ basis[0] / np.sqrt(basis[1])
        return np.column_stack([found, np.ones(len(P))])

    ridges = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    tried = []
    for width in (0.2, 0.5, 1.0, 2.0):
        basis = features(fit, width)
        Z, Z_choose = mapped(A[fit], fit, width, basis), mapped(A[choose], fit, width, basis)
        starts: list[Array | None] = [None] * len(LEVELS)
        for ridge in ridges:
            found = [_kernel_fit(Z, target[fit], ridge, q, w) for q, w in zip(LEVELS, starts, strict=True)]
            starts = list(found)
            tried.append((pinball(target[choose], Z_choose @ np.stack(found, 1)), width, ridge))
    _, width, ridge = min(tried)
    everything = np.arange(len(y))
    basis = features(everything, width)
    Z = mapped(A, everything, width, basis)
    w = np.stack([_kernel_fit(Z, target, ridge, q, None) for q in LEVELS], 1)
    return mapped(B, everything, width, basis) @ w * scale + middle
