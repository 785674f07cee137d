"""From a checked set of options to roots: look at the values, choose, compute, and hang the gradient on."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from planish._support import bad
from planish.linalg import iterations, rational
from planish.linalg.iterations import Pair
from planish.linalg.lyapunov import Steps, divided, in_full, negligible, solve
from planish.linalg.options import Options, Scale

_SMALL = (8, 32)  # sizes at which products were quicker than the decomposition, on a CPU, forward and backward
_FIRST = 16  # one in so many matrices of a batch is looked at first: where one is refused, most are
_SPARED = 1e-3  # of the precision of the root: what one quotient of polynomials may lose to rounding


def both(where: str, given: Tensor, chosen: Options, *, root: bool, inverse: bool) -> Pair:
    """Return the root and the inverse root, None where not asked for."""
    a, lost, even = _prepared(where, given, chosen)
    if chosen.method == "auto":
        chosen = _quickest(a, chosen, inverse)
    if not (even and chosen.method == "eigh"):  # whose gradient is even anyway
        a = (a + a.mH) / 2
    if chosen.method == "eigh":
        found = _decomposed(where, a, chosen, lost, root=root, inverse=inverse)
    else:
        found = _approximated(where, a, chosen, lost, root=root, inverse=inverse)
    return tuple(x if x is None else x.to(given.dtype) for x in found)  # type: ignore[return-value]


def _prepared(where: str, given: Tensor, chosen: Options) -> tuple[Tensor, float, bool]:
    """Return A fit for work, how far below zero an eigenvalue may lie, relative to the largest, and if A is even."""
    if given.ndim < 2 or given.shape[-1] != given.shape[-2] or 0 in given.shape:
        raise bad(where, "A", "square matrices, (*b, n, n), none of them empty", tuple(given.shape))
    if not (given.is_floating_point() or given.is_complex()):
        raise bad(where, "A", "of floats", given.dtype)
    if given.is_complex() and chosen.method not in ("auto", "eigh"):
        raise bad(where, "method", '"auto" or "eigh" for complex matrices', chosen.method)
    if chosen.backward == "autograd" and chosen.method in ("auto", "eigh"):
        raise bad(where, "backward", f'one of "auto", "eigh", "lyapunov" with method "{chosen.method}"', "autograd")
    if chosen.tolerance is not None and chosen.method != "auto":
        raise bad(where, "tolerance", 'None, unless `method` is "auto"', chosen.tolerance)
    if chosen.tolerance is not None and not chosen.check:
        raise bad(where, "tolerance", "None with `check=False`: it is kept by looking at values", chosen.tolerance)
    lost = min(negligible(given), 0.05)
    a = given.float() if given.dtype in (torch.float16, torch.bfloat16) else given
    even = False
    if chosen.check:
        # the largest entry of a semidefinite matrix is on its diagonal; an odd one has each entry with both signs
        odd = a.detach() - a.detach().mH
        apart = (odd.abs() if odd.is_complex() else odd).amax()
        even = bool(apart == 0)
        if (
            not even
            and not apart <= min(10 * negligible(given), 0.05) * a.detach().diagonal(dim1=-2, dim2=-1).abs().amax()
        ):
            # also where it is NaN
            if not torch.isfinite(given).all():
                raise _refused(where, "finite", "NaN or infinity")
            raise _refused(where, "symmetric", f"entries that differ by {apart.item():.3g}")
    if chosen.eps:
        a = a + chosen.eps * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return a, lost, even


def _refused(where: str, allowed: str, got: str) -> RuntimeError:
    error: RuntimeError = torch.linalg.LinAlgError(str(bad(where, "A", allowed, got)))  # type: ignore[attr-defined]
    return error


def _quickest(a: Tensor, chosen: Options, inverse: bool) -> Options:
    """Choose the quickest method that is certain to keep to the tolerance.

    On CPUs the decomposition won nearly everywhere when measured, backward included; small matrices in batches are the
    exception. Elsewhere products in batches are what the published measurements favour.
    """
    exact = replace(chosen, method="eigh")
    n, tolerance, on_cpu = a.shape[-1], chosen.tolerance, a.device.type == "cpu"
    if tolerance is None or a.is_complex() or n > (_SMALL[1] if on_cpu else 256) or (on_cpu and n < _SMALL[0]):
        return exact
    fixed, high = a.detach(), None
    if on_cpu:
        found = rational.interval(chosen.order, tolerance, torch.finfo(a.dtype).eps, inverse=inverse)
        if found is None:
            return exact
        low = found[0]
        scale = torch.linalg.matrix_norm(fixed) / found[1]  # at least the largest eigenvalue: no need to look above
        backward = "autograd" if chosen.backward == "auto" else chosen.backward
        quick = replace(chosen, method="mpa", whole=True, backward=backward)
    else:
        steps = 1 if tolerance > 1e-3 else 2
        low = rational.reach(chosen.order, steps, tolerance)
        scale = _scale(fixed, "trace")
        quick = replace(chosen, method="pade_iter", steps=steps)
        high = 1 / low
    if not _within(fixed.reshape(-1, n, n), scale.reshape(-1, 1, 1), low, high):
        return exact
    return replace(quick, scale=scale, check=False)  # there is nothing left to check


def _within(a: Tensor, scale: Tensor, low: float, high: float | None) -> bool:
    """Certify by Cholesky factors that all eigenvalues of A / scale lie in [low, high], or above low."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    first = len(a) // _FIRST
    for part, size in ((a[:first], scale[:first]), (a[first:], scale[first:])):
        if torch.linalg.cholesky_ex(part - low * size * eye).info.any():
            return False
        if high is not None and torch.linalg.cholesky_ex(high * size * eye - part).info.any():
            return False
    return True


class _Root(torch.autograd.Function):
    """Hang the gradient of A^1/2 (or A^-1/2) on a root that was found without one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor, x: Tensor, inverse: bool, by: Steps | None, values: Tensor | None, vectors: Tensor | None
    ) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        _, _, ctx.inverse, ctx.by, values, vectors = inputs
        ctx.save_for_backward(output, values, vectors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, values, vectors = ctx.saved_tensors
        if ctx.by is None and values is None:
            values, vectors = torch.linalg.eigh(x.detach())
        g = (grads[0] + grads[0].mH) / 2
        with in_full(x):
            if ctx.inverse:
                square = x @ x
                g = -(square @ g @ square)
            if values is not None and not torch.is_grad_enabled():  # nobody will ask for the derivative of this
                return divided(g, values, vectors), None, None, None, None, None
        return solve(x, g, ctx.by or "auto", values, vectors, even=True), None, None, None, None, None


def _hung(
    a: Tensor, x: Tensor, inverse: bool, by: Steps | None, values: Tensor | None, vectors: Tensor | None
) -> Tensor:
    found: Tensor = _Root.apply(a, x, inverse, by, values, vectors)  # type: ignore[no-untyped-call]
    return found


def _decomposed(where: str, a: Tensor, chosen: Options, lost: float, *, root: bool, inverse: bool) -> Pair:
    values, vectors = torch.linalg.eigh(a.detach())
    if chosen.check:
        least, most = values[..., 0], torch.maximum(values[..., -1], -values[..., 0])  # they come in order
        if (least < -lost * most).any():
            raise _refused(where, "positive semidefinite", f"an eigenvalue of {least.amin().item():.3g}")
        if inverse and (least <= negligible(a) * most).any():
            raise _refused(where, "positive definite (or `eps` above 0)", f"an eigenvalue of {least.amin().item():.3g}")
    sigma = values.clamp(min=0).sqrt()
    by, exact = (chosen.backward_steps, False) if chosen.backward == "lyapunov" else (None, True)
    found: list[Tensor | None] = []
    with in_full(a):
        for asked, is_inverse in ((root, False), (inverse, True)):
            scaled = sigma.reciprocal() if is_inverse else sigma
            basis = (scaled, vectors) if exact else (None, None)
            half = vectors * scaled.sqrt()[..., None, :]  # times its transpose: symmetric without more ado
            found.append(_hung(a, half @ half.mH, is_inverse, by, *basis) if asked else None)
    return found[0], found[1]


def _approximated(where: str, a: Tensor, chosen: Options, lost: float, *, root: bool, inverse: bool) -> Pair:
    fixed = a.detach()
    size = _scale(fixed, chosen.scale)[..., None, None]
    divisor = torch.where(size > 0, size, 1)
    if chosen.check:
        # Cholesky of A moved by what rounding may explain: upwards it shows A semidefinite, downwards definite
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        moved = -negligible(a) if inverse else lost
        norm = torch.linalg.matrix_norm(fixed)[..., None, None]
        pivot = norm * moved + (torch.finfo(a.dtype).tiny if not inverse else 0)
        if (torch.linalg.cholesky_ex(fixed + pivot * eye).info != 0).any():
            least = torch.linalg.eigvalsh(fixed).amin().item()
            allowed = "positive definite (or `eps` above 0)" if inverse else "positive semidefinite"
            raise _refused(where, allowed, f"an eigenvalue of {least:.3g}")
    # at one step the quotient's own gradient is as good as its root, and half of the work
    own = chosen.backward == "auto" and chosen.method == "mpa" and not chosen.paper
    through = own or chosen.backward == "autograd"
    with torch.set_grad_enabled(through and torch.is_grad_enabled()), in_full(a):
        hat = (a if through else fixed) / divisor
        match chosen.method:
            case "mtp":
                pair = iterations.mtp(hat, chosen.order, root=root, inverse=inverse)
            case "mpa" if chosen.paper or chosen.whole:
                bounded = isinstance(chosen.scale, str) and chosen.scale != "trace"  # the spectrum lies in (0, 1]
                whole = chosen.whole or (bounded and 4**chosen.order * torch.finfo(a.dtype).eps < _SPARED)
                pair = iterations.mpa(hat, chosen.order, root=root, inverse=inverse, whole=whole)
            case "newton_schulz":
                pair = iterations.newton_schulz(hat, chosen.steps, root=root, inverse=inverse)
            case _:
                pair = iterations.coupled(hat, chosen.order, chosen.steps, root=root, inverse=inverse)
        x = None if pair[0] is None else pair[0] * size.clamp(min=0).sqrt()
        y = None if pair[1] is None else pair[1] / divisor.sqrt()
    if through:
        return x, y
    by = None if chosen.backward == "eigh" else chosen.backward_steps
    return tuple(  # type: ignore[return-value]
        None if found is None else _hung(a, found, is_inverse, by, None, None)
        for found, is_inverse in ((x, False), (y, True))
    )


def _scale(a: Tensor, scale: Scale | float | Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale
    if scale == "trace":
        found = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    elif scale == "fro":
        found = torch.linalg.matrix_norm(a)
    elif scale == "spectral":
        found = torch.linalg.eigvalsh(a)[..., -1]
    else:
        found = torch.full(a.shape[:-2], float(scale), dtype=a.dtype, device=a.device)
    return found
