"""What one window of text says about a model: sums from which `evaluate` makes its figures."""

import time
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from planish.metrics import assess_calibration
from planish.quant.intervals import Estimate, Resamples
from planish.quant.stream import call_model, first_tensor

CHUNK = 128  # tokens whose probabilities over the whole vocabulary are held at a time


def token_ids(window: Any) -> Int[Tensor, "1 tokens"] | None:  # noqa: ANN401
    """Return the token ids of a window, if it has any."""
    ids = window.get("input_ids") if isinstance(window, Mapping) else window
    ids = ids[0] if isinstance(ids, tuple) and len(ids) == 1 else ids
    whole = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() and not ids.is_complex()
    return cast(Tensor, ids) if whole else None


def predicts_next(model: nn.Module, window: Any) -> bool:  # noqa: ANN401
    """Say whether a model gives next-token probabilities, by changing the last token and looking at earlier outputs."""
    ids = token_ids(window)
    if ids is None or ids.shape[1] < 2:
        return False
    ids = ids[:, :16].to(device_of(model))
    output = call_model(model, {"input_ids": ids} if isinstance(window, Mapping) else ids)
    logits = output.get("logits") if isinstance(output, Mapping) else first_tensor(output)
    if logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape or logits.shape[2] <= int(ids.max()):
        return False
    changed = ids.clone()
    changed[:, -1] = torch.where(changed[:, -1] > 0, changed[:, -1] - 1, 1)
    other = call_model(model, {"input_ids": changed} if isinstance(window, Mapping) else changed)
    after = other["logits"] if isinstance(other, Mapping) else first_tensor(other)
    before, after = logits[0, :-1].float(), after[0, :-1].float()
    same = (before - after).abs().amax(-1) <= 1e-5 * before.abs().max()
    return bool(same.float().mean() >= 0.5)  # routed experts add rounding noise to a few; looking ahead changes all


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter or buffer is."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


class Tally:
    """Sums by window for one model.

    Args:
        where: Whose figures they are, for sentences of refusal.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.sums: dict[str, list[float]] = {}
        self.confidence: list[Tensor] = []
        self.hit: list[Tensor] = []
        self.seconds: list[float] = []
        self.read: list[int] = []

    def run(self, model: nn.Module, window: Any, *, predicts: bool) -> Tensor:  # noqa: ANN401
        """Return what the model makes of a window: logits or outputs, the first dimension taken away."""
        device = device_of(model)
        window = _to(window, device)
        began = time.perf_counter()
        output = call_model(model, window)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds.append(time.perf_counter() - began)
        ids = token_ids(window)
        self.read.append(1 if ids is None else ids.shape[1])
        tensor = output["logits"] if predicts and isinstance(output, Mapping) else first_tensor(output)
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{self.where}: its outputs for window {len(self.seconds) - 1} hold NaN or Inf.")
        return tensor[0] if tensor.ndim > 1 else tensor

    def predicted(self, logits: Float[Tensor, "tokens vocab"], window: Any, base: Tensor | None) -> None:  # noqa: ANN401
        """Enter the next-token scores of a window, against the base's logits where there are any."""
        ids = token_ids(window)
        if ids is None:
            raise ValueError(f"{self.where}: a window without token ids cannot be scored.")
        if base is not None and base.shape != logits.shape:
            raise ValueError(f"{self.where}: logits {tuple(logits.shape)} against {tuple(base.shape)} of the base.")
        target = ids[0, 1:].to(logits.device)
        keep = _kept(window, len(target) + 1, logits.device)
        keep = keep[1:] & keep[:-1]
        sums = dict.fromkeys(("tokens", "nll", "lost", "kl", "agree"), 0.0)
        for part in keep.nonzero()[:, 0].split(CHUNK):
            aim = target[part]
            log_p = logits[part].float().log_softmax(-1)
            nll = -log_p.gather(1, aim[:, None])[:, 0]
            top = log_p.max(-1)
            sums["tokens"] += len(part)
            sums["nll"] += float(nll.double().sum())
            self.confidence.append(top.values.exp().clamp(max=1).cpu())
            self.hit.append((top.indices == aim).cpu())
            if base is not None:
                log_q = base[part.to(base.device)].float().log_softmax(-1).to(log_p.device)
                sums["lost"] += float((nll + log_q.gather(1, aim[:, None])[:, 0]).double().sum())
                sums["kl"] += float((log_q.exp() * (log_q - log_p)).double().sum())
                sums["agree"] += int((log_q.argmax(-1) == top.indices).sum())
        self._enter(sums)

    def moved(self, output: Tensor, window: Any, base: Tensor) -> None:  # noqa: ANN401
        """Enter how far outputs moved from the base's."""
        if output.shape != base.shape:
            raise ValueError(f"{self.where}: outputs {tuple(output.shape)} against {tuple(base.shape)} of the base.")
        ours, theirs = (
            t.float().reshape(-1, t.shape[-1]) if t.ndim else t.float().reshape(1, 1) for t in (output, base)
        )
        theirs = theirs.to(ours.device)
        if ours.ndim == 2 and token_ids(window) is not None:
            keep = _kept(window, len(ours), ours.device)
            ours, theirs = ours[keep], theirs[keep]
        sums = {
            "tokens": float(len(ours)),
            "gap": float((ours - theirs).double().square().sum()),
            "size": float(theirs.double().square().sum()),
            "cosine": float(torch.cosine_similarity(ours.double(), theirs.double(), dim=-1).sum()),
        }
        self._enter(sums)

    def _enter(self, sums: dict[str, float]) -> None:
        if sums["tokens"]:
            for name, value in sums.items():
                self.sums.setdefault(name, []).append(value)

    @property
    def count(self) -> int:
        """Tokens scored so far."""
        return int(sum(self.sums.get("tokens", [])))

    def figures(
        self, *, confidence: float, n_bootstrap: int, generator: torch.Generator | None, paired: bool
    ) -> dict[str, Any]:
        """Return the figures by the names of `Evaluation`'s fields."""
        sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in self.sums.items()}
        windows = len(sums["tokens"])
        resamples = Resamples(windows, confidence=confidence, n_bootstrap=n_bootstrap, generator=generator)
        start = 1 if len(self.seconds) > 1 else 0  # the first window warms up
        out: dict[str, Any] = {
            "windows": windows,
            "tokens": self.count,
            "tokens_per_second": sum(self.read[start:]) / max(sum(self.seconds[start:]), 1e-9),
            "confidence": confidence,
        }

        def mean(name: str, of: str = "tokens") -> Estimate:
            return resamples.ratio(sums[name], sums[of])

        if "nll" in sums:
            out["perplexity"] = mean("nll").through(_exp)
            hit, sure = torch.cat(self.hit), torch.cat(self.confidence)
            window = torch.repeat_interleave(torch.arange(windows), sums["tokens"].long())
            found = assess_calibration(hit, sure, groups=window, confidence=confidence, n_points=129)
            out |= {"smooth_ece": found.ece, "calibration": found}
            if paired:
                out |= {"difference": mean("lost"), "kl": mean("kl"), "agreement": mean("agree")}
        elif paired:
            still = float(sums["size"].sum()) == 0
            error = Estimate(0.0, 0.0, 0.0) if still and not float(sums["gap"].sum()) else mean("gap", "size")
            out |= {"relative_error": error, "cosine": mean("cosine")}
        return out


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())  # infinity where math.exp would raise


def _kept(window: Any, tokens: int, device: torch.device) -> Bool[Tensor, " tokens"]:  # noqa: ANN401
    mask = window.get("attention_mask") if isinstance(window, Mapping) else None
    fits = isinstance(mask, Tensor) and mask.shape == (1, tokens)
    return cast(Tensor, mask)[0].bool().to(device) if fits else torch.ones(tokens, dtype=torch.bool, device=device)


def _to(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to(part, device) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_to(part, device) for part in value)
    return value
