"""Two coefficients a step: what tuning a four-step sampler mends of quantization, and what it mends of the sampler.

Pictures of ten classes, guided, by DDIM in 4 steps. Schedules are tuned on 60 pictures, half of them held out, by what
the network `tuned` says of them; the network `judge`, which nothing looked at, has the last word on 100 others of each
of three seeds. The float model tuned the same way stands beside the quantized ones, PTQD and the closed form too.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import data, digits
from benchmarks.harness import Row
from benchmarks.pieces import interval, kept
from planish.diffusion import JAQLoss, measure_output_errors, tune_schedule, wrap_scheduler
from planish.diffusion.denoisers import digits_scheduler
from planish.quant import Affine, quantize, rtn

logger = logging.getLogger("planish.benchmarks")
STEPS, TUNED_ON, SAMPLES, SEEDS, K = 4, 60, 100, 3, 0.5
BITS = {
    "float": None,
    "W4A8": replace(rtn(bits=4, group_size=None), act=Affine(8, group_size=None)),
    "W4A4": replace(rtn(bits=4, group_size=None), act=Affine(4, group_size=None)),
}


@cache
def model(bits: str) -> nn.Module:
    """Return the trained transformer, quantized to order."""
    found, method = digits.denoiser("dit"), BITS[bits]
    if method is not None:
        quantize(found, digits.record(found, n=20), method)
    return found


def draw(bits: str, seed: int, n: int, **coefficients: Any) -> Tensor:  # noqa: ANN401
    scheduler = wrap_scheduler(digits_scheduler(), **coefficients)
    return digits.draw(model(bits), seed=seed, n=n, steps=STEPS, scheduler=scheduler)


@cache
def _real() -> tuple[Tensor, Tensor]:
    features = digits.network("tuned").features(digits.digits()[0][: digits.TRAINED_ON]).double()
    return features.mean(0), torch.linalg.inv(features.T.cov() + 1e-2 * torch.eye(64, dtype=torch.float64))


@torch.no_grad()
def alignment(pictures: Tensor, classes: Tensor) -> Tensor:
    """Return the log-probability of the class asked for."""
    logits = digits.network("tuned")(pictures.clamp(-1, 1))
    return logits.log_softmax(-1).gather(1, classes[:, None])[:, 0].double()


@torch.no_grad()
def quality(pictures: Tensor) -> Tensor:
    """Return minus the Mahalanobis distance of the features from those of real digits."""
    mean, precision = _real()
    away = digits.network("tuned").features(pictures.clamp(-1, 1)).double() - mean
    return -torch.einsum("ni,ij,nj->n", away, precision, away).sqrt()


def tuned(bits: str, k: float, **settings: Any) -> dict[str, Any]:  # noqa: ANN401
    """Search on the pictures of one seed, and return the coefficients and what the search says of them."""
    loss = JAQLoss(alignment, quality, digits.labels(TUNED_ON), k)

    def sampler(c_x: list[float], c_eps: list[float]) -> Tensor:
        return draw(bits, 1000, TUNED_ON, sample_coeff=c_x, model_coeff=c_eps)

    logger.info("tuning %s, k = %g, %s", bits, k, settings)
    store = data.cache_dir() / "schedules" / f"points-2-{bits}-{k:g}"  # ways of searching share what they score
    store.parent.mkdir(parents=True, exist_ok=True)
    name = (data.cache_dir() / "digits-dit" / "fingerprint").read_text()
    found = tune_schedule(sampler, STEPS, loss, levels=1, store=store, name=name, **settings)
    return {
        "sample_coeff": found.sample_coeff, "model_coeff": found.model_coeff, "low": found.low, "high": found.high,
        "gain": found.score - found.untouched, "candidates": len(found.points),
    }  # fmt: skip


def apart(pictures: Tensor) -> float:
    """Return the Frechet distance by the network that the search may look at."""
    return digits.distance(pictures, by="tuned")


def mended(bits: str) -> dict[str, Any]:
    """Return PTQD's corrections and the closed form, from one run beside the float model."""
    errors = measure_output_errors(model(bits), digits.denoiser("dit"), lambda: draw(bits, 1000, TUNED_ON))
    return {"PTQD": errors.ptqd(), "closed form": errors.closed_form()}


def rows(quick: bool, *, fresh: bool = False, **_: object) -> Iterator[Row]:
    """Yield distances, accuracies and errors of every schedule on every model.

    Args:
        quick: One seed, few pictures, no search.
        fresh: Measure again what the cache holds.
        **_: What other benchmarks are asked beside this.
    """
    torch.set_num_threads(1)
    seeds, samples = (1, 20) if quick else (SEEDS, SAMPLES)
    weights = (data.cache_dir() / "digits-dit" / "fingerprint").read_text()
    case = f"transformer, DDIM in {STEPS} steps"
    base: dict[str, list[float]] = {}

    def keep(key: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        return kept("schedules", f"v1 {key} {STEPS} {TUNED_ON} {weights}", make, fresh=fresh)

    for bits in BITS:
        settings: dict[str, dict[str, Any]] = {"untouched": {}}
        if not quick:
            searches: dict[str, dict[str, Any]] = {
                "tuned under a guard": {"guard": apart}, "tuned in [0.8, 1.2]": {"widen": False}, "tuned": {},
            }  # fmt: skip
            for way, options in searches.items():
                key = (
                    f"tuned {bits} {K}"
                    + ("" if way == "tuned" else f" {way}")
                    + (" held out too" if "guard" in way else "")
                )
                found = keep(key, lambda b=bits, o=options: tuned(b, K, **o))
                settings[way] = {key: found[key] for key in ("sample_coeff", "model_coeff")}
                name = f"{bits}, {way}"
                yield Row(case, name, "c_x at first", found["sample_coeff"][0], "")
                yield Row(case, name, "c_eps at first", found["model_coeff"][0], "")
                yield Row(case, name, "JAQ held out", found["gain"], "more", f"{bits}, untouched",
                          found["low"], found["high"])  # fmt: skip
        if bits != "float":
            settings |= keep(f"mended {bits}", lambda b=bits: mended(b))
        if bits == "W4A8" and not quick:
            for k, name in ((0.0, "tuned to alignment alone"), (float("inf"), "tuned to quality alone")):
                found = keep(f"tuned {bits} {k}", lambda b=bits, k=k: tuned(b, k))
                settings[name] = {key: found[key] for key in ("sample_coeff", "model_coeff")}
        for name, coefficients in settings.items():

            def judged(b: str = bits, c: dict[str, Any] = coefficients) -> list[dict[str, float]]:
                scored = []
                for seed in range(seeds):
                    pictures, true = draw(b, seed, samples, **c), draw("float", seed, samples)
                    s = digits.scores(pictures, true)
                    scored.append({"psnr": s.psnr, "accuracy": s.accuracy, "frechet": s.frechet})
                return scored

            pieces = keep(f"judged {bits} {coefficients} {seeds} {samples}", judged)
            subject = f"{bits}, {name}"
            frechet = [p["frechet"] for p in pieces]
            yield Row(case, subject, "Frechet distance", interval(frechet)[0], "", None, *interval(frechet)[1:])
            yield Row(case, subject, "accuracy", sum(p["accuracy"] for p in pieces) / seeds, "")
            if any(p["psnr"] < 100 for p in pieces):  # not the very same pictures
                psnr = [p["psnr"] for p in pieces]
                yield Row(case, subject, "PSNR to float untouched", interval(psnr)[0], "dB", None, *interval(psnr)[1:])
            if name == "untouched":
                base[bits] = frechet
            for against in (
                dict.fromkeys((bits, "float"))
                if name in ("tuned", "tuned under a guard", "tuned in [0.8, 1.2]")
                else ()
            ):
                change = [a / b for a, b in zip(frechet, base[against], strict=True)]
                yield Row(case, subject, "Frechet distance", interval(change)[0], "ratio", f"{against}, untouched",
                          *interval(change)[1:])  # fmt: skip
