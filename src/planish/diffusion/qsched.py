r"""Q-Sched: mend a quantized few-step sampler by two scalars a step in its scheduler, not by its weights.

Before each step the sample x_i and the model's output m_i are multiplied; the step formula is unchanged, and the
network still sees the unscaled x_i:

    x_i <- c_x[i] x_i,      m_i <- c_eps[i] m_i,      c[i] = linspace(c_start, 1, T)[i]

Two numbers are searched for on a grid, with the same noise for all candidates; no float model is needed.

================  ===================================  =====================================
paper             here                                 shape, range, default
================  ===================================  =====================================
c_x, c_eps        ``sample_coeff, model_coeff``        T numbers > 0
[0.8, 1.2]        ``coeff_range``                      its ends
50 x 50 grid      ``grid, levels``                     5 x 5, then halved around the best
JAQ               `JAQLoss`                            maximised
================  ===================================  =====================================

Differs from the paper: the search goes from coarse to fine, always includes the untouched schedule, follows an optimum
that lies on the grid's edge, and keeps the untouched schedule unless images held out of the search say that the gain is
real. The float model can be tuned the same way beside it: what both gain is the sampler's, not the quantization's.
When to use: up to eight steps. See `planish.diffusion.fit_cache` for many.

Reference:
    Frumkin and Marculescu, Q-Sched: Pushing the Boundaries of Few-Step Diffusion Models with Quantization-Aware
    Scheduling, 2025. https://arxiv.org/abs/2509.01624
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from planish._support import bad
from planish.diffusion.schedulers import linear_coefficients, wrap_scheduler

Sampler = Callable[[list[float], list[float]], Tensor]
Score = Callable[[Tensor], Tensor]
Profile = Literal["linear", "constant"]
_FARTHEST = 2.0  # a search leaves its range by no more than this factor
_FEWEST = 8  # held-out images from which an interval is worth anything


@dataclass(frozen=True)
class Point:
    """One candidate of a search.

    Attributes:
        sample_start: c_x at the first step.
        model_start: c_eps at the first step.
        score: Mean over the images searched on.
    """

    sample_start: float
    model_start: float
    score: float


@dataclass(frozen=True)
class TunedSchedule:
    """What a search found; `wrap` puts it into a scheduler.

    Attributes:
        sample_coeff: c_x for each step; ones where nothing was gained.
        model_coeff: c_eps for each step, likewise.
        best: The best candidate, whether or not its gain is real.
        score: Its mean score on the images held out.
        untouched: The mean score there of the schedule as it was.
        low: Lower end of the 95 % interval of the gain, image by image.
        high: Its upper end.
        points: All candidates.
        widened: Whether the best lies outside the range that was given.
        float_tuned: The same search for the float model, if it was asked for.

    Example:
        >>> found = TunedSchedule([1.0], [1.0], Point(1.0, 1.0, 0.5), 0.5, 0.5, 0.0, 0.0, (), False)
        >>> found.gained
        False
    """

    sample_coeff: list[float]
    model_coeff: list[float]
    best: Point
    score: float
    untouched: float
    low: float
    high: float
    points: tuple[Point, ...]
    widened: bool
    float_tuned: "TunedSchedule | None" = field(default=None, repr=False)

    @property
    def gained(self) -> bool:
        """Whether the gain on the images held out is above 0 beyond doubt."""
        return self.low > 0

    def wrap(self, scheduler: Any) -> Any:  # noqa: ANN401  (any of diffusers')
        """Return a scheduler like the one given, with these coefficients."""
        steps = len(self.sample_coeff)
        return wrap_scheduler(scheduler, self.sample_coeff, self.model_coeff, num_steps=steps)

    def __str__(self) -> str:
        """Return a table: the model, and the float model beside it."""
        lines = [f"{'':10}  untouched      tuned   gain [95 %]             c_x, c_eps at first"]
        for name, found in (("this model", self), ("in float", self.float_tuned)):
            if found is None:
                lines.append(f"{name:10}  not tuned: how much of the gain mends quantization is not known")
                continue
            gain = found.score - found.untouched
            lines.append(
                f"{name:10}  {found.untouched:9.4g}  {found.score:9.4g}   {gain:+.3g} [{found.low:+.3g}, "
                f"{found.high:+.3g}]   {found.best.sample_start:.4g}, {found.best.model_start:.4g}"
                f"{'' if found.gained else '   not kept'}"
            )
        return "\n".join(lines)


def tune_schedule(
    sampler: Sampler,
    steps: int,
    score: Score,
    *,
    profile: Profile = "linear",
    coeff_range: tuple[int | float, int | float] = (0.8, 1.2),
    grid: int = 5,
    levels: int = 3,
    base: Sequence[int | float] | None = None,
    held_out: int | float = 0.5,
    widen: bool = True,
    guard: Callable[[Tensor], float] | None = None,
    float_sampler: Sampler | None = None,
    store: str | Path | None = None,
    name: str = "",
    progress: Callable[[str, int], None] | None = None,
) -> TunedSchedule:
    """Search the two coefficients that make a sampler's images best.

    Args:
        sampler: Draws the images of all prompts with coefficients (c_x, c_eps), a number for each step, always from
            the same noise; `wrap_scheduler` takes them.
        steps: T >= 1.
        score: Scores each image, the higher the better: `JAQLoss`, `ReferenceLoss`, or any function.
        profile: "linear" goes from the number searched for to 1, as published; "constant" stays.
        coeff_range: Of both numbers at first.
        grid: Points across it, >= 2.
        levels: How often spacing is halved around the best, >= 0: a grid as large there each time.
        base: c_eps to multiply the candidates by: `OutputErrors.gain`, where a float model is at hand.
        held_out: Share of the images, at the end, that the search does not see, in (0, 1).
        widen: Follow an optimum beyond the range, to half its lower and twice its upper end.
        guard: Judges images as one set, the lower the better; candidates above the untouched schedule are out, on the
            images that the search sees and, in the end, on those held out. A distance of distributions sees what no
            score of single images does: images that are each better, and all alike.
        float_sampler: The float model's sampler, to be tuned the same way beside it.
        store: A file that keeps what was scored, so that a stopped search goes on.
        name: What the scores in `store` belong to (checkpoint, bits, guidance, seed); another is refused.
        progress: Called as progress(model, candidates scored) after each.

    Returns:
        The schedule: untouched unless the gain on the images held out is above 0 beyond doubt.

    Raises:
        ValueError: A setting is out of range; scores are not one finite number an image; the store belongs to another
            search.

    Example:
        >>> noise = torch.linspace(-1, 1, 40)
        >>> def sampler(c_x, c_eps):
        ...     return c_x[0] * noise - 0.8 * c_eps[0] * noise  # an output that is a fifth too small
        >>> found = tune_schedule(sampler, 1, lambda x: -x.abs(), coeff_range=(1.0, 1.2))
        >>> found.gained, round(found.sample_coeff[0] / found.model_coeff[0], 2)
        (True, 0.8)
    """
    where = "tune_schedule"
    low, high = coeff_range
    if steps < 1:
        raise bad(where, "steps", "at least 1", steps)
    if profile not in ("linear", "constant"):
        raise bad(where, "profile", "'linear' or 'constant'", profile)
    if not 0 < low < high < math.inf:
        raise bad(where, "coeff_range", "two numbers above 0 in order", coeff_range)
    if grid < 2:
        raise bad(where, "grid", "at least 2", grid)
    if levels < 0:
        raise bad(where, "levels", "at least 0", levels)
    if not 0 < held_out < 1:
        raise bad(where, "held_out", "in (0, 1)", held_out)
    if base is not None and (len(base) != steps or not all(math.isfinite(b) and b > 0 for b in base)):
        raise bad(where, "base", f"a list of {steps} numbers above 0", base)
    settings = {"steps": steps, "profile": profile, "base": None if base is None else list(base), "name": name}
    kept = _Store(None if store is None else Path(store), settings)
    found = None
    for label, draw in (("float", float_sampler), ("model", sampler)):
        if draw is not None:
            scorer = _Scorer(label, draw, steps, score, profile, base if label == "model" else None, kept, progress)
            scorer.guard, scorer.held_out = guard, held_out
            far = _FARTHEST if widen else 1.0
            found = _search(scorer, (low, high), (low / far, high * far), grid, levels, found)
    assert found is not None  # noqa: S101  (the model is always searched)
    return found


class _Store:
    """Scores by candidate, in a JSON file that is written after each."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.scores: dict[str, tuple[list[float], list[float] | None]] = {}
        if path is not None and path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.get("settings") != settings:
                raise bad("tune_schedule", "store", f"of this search, {settings}", record.get("settings"))
            self.scores = {key: (found[0], found[1]) for key, found in record["scores"].items()}

    def put(self, key: str, scores: list[float], guard: list[float] | None) -> None:
        self.scores[key] = scores, guard
        if self.path is not None:
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps({"settings": self.settings, "scores": self.scores}), encoding="utf-8")
            partial.replace(self.path)


class _Scorer:
    """One model's candidates, each scored once."""

    def __init__(
        self, label: str, draw: Sampler, steps: int, score: Score, profile: Profile, base: Sequence[int | float] | None,
        store: _Store, progress: Callable[[str, int], None] | None,
    ) -> None:  # fmt: skip
        self.label, self.draw, self.steps, self.score, self.profile = label, draw, steps, score, profile
        self.base, self.store, self.progress = base, store, progress
        self.seen: dict[tuple[float, float], tuple[Tensor, list[float]]] = {}
        self.guard: Callable[[Tensor], float] | None = None
        self.held_out: int | float = 0.5

    def lists(self, point: tuple[float, float]) -> tuple[list[float], list[float]]:
        end = [1.0, 1.0] if self.profile == "linear" else list(point)
        x, e = (linear_coefficients(s, t, self.steps) for s, t in zip(point, end, strict=True))
        return x, e if self.base is None else [a * b for a, b in zip(e, self.base, strict=True)]

    def __call__(self, point: tuple[float, float]) -> tuple[Tensor, list[float]]:
        if point not in self.seen:
            self.seen[point] = self.scored(f"{point[0]!r},{point[1]!r}", self.lists(point))
        return self.seen[point]

    def untouched(self) -> tuple[Tensor, list[float]]:
        return self.scored("untouched", ([1.0] * self.steps, [1.0] * self.steps))

    def split(self, n: int) -> int:
        """Return how many of n images the search sees."""
        seen = n - round(self.held_out * n)
        if not 0 < seen < n:
            raise bad("tune_schedule", "sampler", "a function that draws enough images to hold some out", n)
        return seen

    def scored(self, key: str, lists: tuple[list[float], list[float]]) -> tuple[Tensor, list[float]]:
        key = f"{self.label}:{key}"
        known = self.store.scores.get(key)
        if known is None or (self.guard is not None and known[1] is None):
            images = self.draw(*lists)
            scores = self.score(images)
            if scores.ndim != 1 or len(scores) != len(images) or not torch.isfinite(scores).all():
                raise bad("tune_schedule", "score", "a function that gives a finite number an image", scores)
            split, judged = self.split(len(images)), None
            if self.guard is not None:
                judged = [float(self.guard(part)) for part in (images[:split], images[split:])]
            known = scores.double().tolist(), judged
            self.store.put(key, *known)
            if self.progress is not None:
                self.progress(self.label, len(self.seen) + 1)
        judged = known[1] if self.guard is not None else None
        return torch.tensor(known[0], dtype=torch.float64), [0.0, 0.0] if judged is None else judged


def _search(
    scorer: _Scorer, bounds: tuple[float, float], reachable: tuple[float, float], grid: int, levels: int,
    beside: TunedSchedule | None,
) -> TunedSchedule:  # fmt: skip
    untouched, allowed = scorer.untouched()
    split = scorer.split(len(untouched))
    spacing = (bounds[1] - bounds[0]) / (grid - 1)
    axis = [round(bounds[0] + i * spacing, 12) for i in range(grid)]

    def value(point: tuple[float, float]) -> float:
        scores, judged = scorer(point)
        return float(scores[:split].mean()) if judged[0] <= allowed[0] else -math.inf

    reach = max(grid // 2, 1)
    best = max([(1.0, 1.0), *((x, e) for x in axis for e in axis)], key=value)
    for level in range(levels + 1):
        step = spacing / 2**level
        while True:  # go on until the best is surrounded: also beyond the range, where it lay on the edge
            around = [
                (round(best[0] + i * step, 12), round(best[1] + j * step, 12))
                for i in range(-reach, reach + 1)
                for j in range(-reach, reach + 1)
            ]
            better = max([best, *(p for p in around if all(reachable[0] <= c <= reachable[1] for c in p))], key=value)
            if value(better) <= value(best):
                break
            best = better
    gains = (scorer(best)[0] - untouched)[split:]
    low, high = _interval(gains)
    kept = low > 0 and scorer(best)[1][1] <= allowed[1] and value(best) >= float(untouched[:split].mean())
    lists = scorer.lists(best) if kept else ([1.0] * scorer.steps, [1.0] * scorer.steps)
    scored = sorted((p, float(s[:split].mean())) for p, (s, _) in scorer.seen.items())
    points = tuple(Point(*p, mean) for p, mean in scored)
    wide = any(not bounds[0] <= c <= bounds[1] for c in best)
    held = float(scorer(best)[0][split:].mean()), float(untouched[split:].mean())
    return TunedSchedule(*lists, Point(*best, value(best)), *held, low, high, points, wide, beside)


def _interval(gains: Tensor) -> tuple[float, float]:
    """Return the 95 % interval of a mean by Student's t; from a few images nothing is known."""
    n = len(gains)
    if n < _FEWEST:
        return -math.inf, math.inf
    z, v = 1.959964, n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)  # Cornish-Fisher
    mean, half = float(gains.mean()), t * float(gains.std()) / math.sqrt(n)
    return mean - half, mean + half
