"""How good is the small model? Figures with intervals, on text it was not fitted to.

A language model is judged by its next-token probabilities: perplexity, and against its float original the paired
difference of log-likelihood, the divergence of the distributions, how often the most probable token is the same, and
how honest its confidence is. A model without such probabilities (an encoder, any other network) is judged by how far
its outputs moved. Whether a model predicts the next token is tried, not looked up: changing the last token must leave
all earlier outputs alone.

The outputs of one window are held at a time, those of the base and of one candidate.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.metrics import CalibrationAssessment
from planish.quant.calls import rows
from planish.quant.intervals import Estimate
from planish.quant.report import model_bytes
from planish.quant.scores import Tally, predicts_next

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What is known of a model after `evaluate`; what does not apply is None.

    Attributes:
        windows: Windows of text it was judged on.
        tokens: Tokens predicted in them, or positions compared.
        bytes: Size of the model in memory.
        tokens_per_second: Rate at which it read the windows.
        confidence: Level of the intervals.
        perplexity: Exponential of the mean negative log-likelihood of a token.
        difference: Mean log-likelihood lost against the base, nats a token; paired by window.
        kl: Mean divergence KL(base || model), nats a token.
        agreement: Share of tokens for which base and model find the same one most probable.
        smooth_ece: Calibration error of the confidence in the most probable token.
        calibration: The same with its curve, its interval (resampled by window) and what a calibrated model would show.
        relative_error: Squared change of the outputs relative to the base's, where there are no probabilities.
        cosine: Mean cosine between outputs of base and model, where there are no probabilities.

    Example:
        >>> difference = Estimate(0.01, low=-0.01, high=0.03)
        >>> Evaluation(9, 900, bytes=100, tokens_per_second=1.0, confidence=0.95, difference=difference).lossless
        True
    """

    windows: int
    tokens: int
    bytes: int
    tokens_per_second: float
    confidence: float
    perplexity: Estimate | None = None
    difference: Estimate | None = None
    kl: Estimate | None = None
    agreement: Estimate | None = None
    smooth_ece: float | None = None
    calibration: CalibrationAssessment | None = field(default=None, repr=False, compare=False)
    relative_error: Estimate | None = None
    cosine: Estimate | None = None

    @property
    def lossless(self) -> bool:
        """Whether no loss was seen: the interval of the paired difference contains zero."""
        return self.difference is not None and self.difference.low <= 0 <= self.difference.high

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as JSON-able values; an estimate is [value, low, high]."""
        out: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, CalibrationAssessment):
                value = _calibration(value)
            out[item.name] = value.to_json() if isinstance(value, Estimate) else value
        return {**out, "lossless": self.lossless}

    def __str__(self) -> str:
        """Return the figures, one a line."""
        level = f"{100 * self.confidence:.4g} %"
        lines = [f"{self.tokens:,} tokens in {self.windows:,} windows; {level} intervals in brackets"]
        if self.perplexity:
            lines.append(f"perplexity         {_show(self.perplexity, '.3f')}")
        if self.difference:
            verdict = "lossless: the interval contains zero" if self.lossless else "not shown to be lossless"
            lines.append(f"loss against base  {_show(self.difference, '+.4f')} nats a token: {verdict}")
        if self.kl:
            lines.append(f"KL from base       {_show(self.kl, '.4f')} nats a token")
        if self.agreement:
            lines.append(f"top-1 agreement    {_show(self.agreement, '.3f')}")
        if self.smooth_ece is not None:
            shown = str(self.calibration).removeprefix("smECE ") if self.calibration else f"{self.smooth_ece:.4f}"
            lines.append(f"smooth ECE         {shown}")
        if self.relative_error:
            lines.append(f"relative error     {_show(self.relative_error, '.3g')}")
        if self.cosine:
            lines.append(f"cosine to base     {_show(self.cosine, '.4f')}")
        lines.append(f"size               {self.bytes / 1e6:.1f} MB")
        lines.append(f"speed              {self.tokens_per_second:.1f} tokens/s read")
        return "\n".join(lines)


def _show(estimate: Estimate, form: str) -> str:
    interval = f" [{estimate.low:{form}}, {estimate.high:{form}}]" if math.isfinite(estimate.low) else ""
    return f"{estimate.value:{form}}{interval}"


def _calibration(found: CalibrationAssessment) -> dict[str, Any]:
    """Return an assessment as JSON-able values; the curve by rows: predicted, true, density, band, null band."""
    curve, bands = found.curve, [*(found.band or ()), *(found.null_band or ())]
    columns = [curve.prob_pred, curve.prob_true, curve.density, *bands]
    return {
        "floor": _or_none(found.floor),
        "p_value": _or_none(found.p_value),
        "excess": [_or_none(value) for value in (found.excess, found.low, found.high)],
        "curve": [[_or_none(float(part)) for part in row] for row in zip(*columns, strict=True)],
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    against: nn.Module | None = None,
    *,
    confidence: float = 0.95,
    n_bootstrap: int = 2000,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge a model, alone or against its float original; both are left as they are.

    Args:
        model: The model.
        batches: What the model takes, each row a window of text: dicts with `input_ids`, or tensors. Padding that an
            `attention_mask` marks is left out. Eight windows or more, for there to be intervals.
        against: The base; needed where the model gives no next-token probabilities.
        confidence: Level of the intervals, in (0, 1). Default 0.95.
        n_bootstrap: Resamples of the windows, >= 100. Default 2000.
        generator: Source of the resamples; default a fixed one.
        progress: Called as progress("evaluate", done, total) after every window.

    Returns:
        The figures.

    Raises:
        ValueError: There is nothing to score, an argument is out of range, outputs are not finite, or those of the
            two models differ in shape.

    Example:
        >>> base, model = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
        >>> _ = model.load_state_dict(base.state_dict())
        >>> evaluate(model, [torch.ones(2, 8)], base).relative_error.value
        0.0
    """
    named = {"model": model} if against is None else {"base": against, "model": model}
    options = (confidence, n_bootstrap, generator, progress)
    return _judge("evaluate", named, batches, *options, paired=against is not None)["model"]


def compare(
    base: nn.Module,
    models: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    confidence: float = 0.95,
    n_bootstrap: int = 2000,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Judge several models against one base, which runs once a window.

    Args:
        base: The float original.
        models: The candidates by name; "base" is taken.
        batches: See `evaluate`.
        confidence: See `evaluate`.
        n_bootstrap: See `evaluate`.
        generator: See `evaluate`.
        progress: See `evaluate`.

    Returns:
        The figures of "base" and of each candidate.

    Raises:
        ValueError: See `evaluate`; or a candidate is called "base".

    Example:
        >>> net = torch.nn.Linear(8, 4)
        >>> list(compare(net, {"same": net}, [torch.ones(2, 8)]))
        ['base', 'same']
    """
    if "base" in models:
        raise bad("compare", "models", "named otherwise than 'base'", "base")
    named = {"base": base, **models}
    return _judge("compare", named, batches, confidence, n_bootstrap, generator, progress, paired=True)


@torch.no_grad()
def _judge(
    where: str,
    models: dict[str, nn.Module],
    batches: Iterable[Any],
    confidence: float,
    n_bootstrap: int,
    generator: torch.Generator | None,
    progress: Progress | None,
    *,
    paired: bool,
) -> dict[str, Evaluation]:
    if not 0 < confidence < 1:
        raise bad(where, "confidence", "a float in (0, 1)", confidence)
    if n_bootstrap < 100:
        raise bad(where, "n_bootstrap", "an int >= 100", n_bootstrap)
    windows = [window for batch in batches for window in rows(batch)]
    if not windows:
        raise bad(where, "batches", "at least one batch of what the model takes", [])
    training = {module: module.training for model in models.values() for module in model.modules()}
    tallies = {name: Tally(f"{where}, {name}") for name in models}
    try:
        for model in models.values():
            model.eval()
        predicts = predicts_next(next(iter(models.values())), windows[0])
        if not predicts and not paired:
            raise bad(where, "against", "the float model, where a model gives no next-token probabilities", None)
        for done, window in enumerate(windows, 1):
            base: Tensor | None = None
            for name, model in models.items():
                output = tallies[name].run(model, window, predicts=predicts)
                if base is None and paired:
                    base = output
                if predicts:
                    tallies[name].predicted(output, window, base)
                elif base is not None:
                    tallies[name].moved(output, window, base)
            if progress is not None:
                progress("evaluate", done, len(windows))
    finally:
        for module, mode in training.items():
            module.training = mode
    if not tallies[next(iter(models))].count:
        raise bad(where, "batches", "windows of at least two tokens", "only shorter ones")
    options: dict[str, Any] = {"confidence": confidence, "n_bootstrap": n_bootstrap, "paired": paired}
    return {
        name: Evaluation(bytes=model_bytes(models[name]), **tally.figures(generator=_again(generator), **options))
        for name, tally in tallies.items()
    }


def _again(generator: torch.Generator | None) -> torch.Generator | None:
    """Return a generator in the same state, so that every model meets the same resamples."""
    return None if generator is None else generator.clone_state()
