"""Charts for the report page, as inline SVG that takes its colours from the page's style sheet.

One frame with two axes carries every chart; a chart is that frame with series in it. Widths are in the units of the
view box, chosen so that text stays readable on a telephone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 68, 10, 12, 44


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: What the legend calls it.
        points: (x, y) pairs; a y that is not finite breaks the line.
        kind: Class that colours it: "base", "ours", "rival" or "faint".
        dots: Mark every point, with its value to be read on hover.
        band: (x, low, high) triples of an area to be shaded behind the line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "ours"
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        label: What it shows, with its unit.
        low: Where it begins.
        high: Where it ends.
        log: Logarithmic; both ends must be positive.
    """

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies, from 0 to 1."""
        if self.log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, 1e-300))
            return (value - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round values between the ends."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            decades = [10.0**power for power in powers]
            inside = [t for t in decades if self._holds(t)]
            if len(inside) >= 3:
                return inside[:: math.ceil(len(inside) / 6)]
            for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                finer = [t * step for t in decades for step in steps if self._holds(t * step)]
                if len(finer) >= 3:
                    return finer
            return round_steps(self.low, self.high)
        return round_steps(self.low, self.high)

    def _holds(self, value: float) -> bool:
        return self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)


def round_steps(low: float, high: float, most: int = 6) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten between two values.

    Example:
        >>> round_steps(0, 1)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * s for s in (1, 2, 5, 10, 20) if (high - low) / (power * s) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def axis_of(label: str, values: Sequence[float], *, log: bool = False) -> Axis:
    """Return an axis on which values fit with a little room, where they are finite (and positive, if it is log)."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return Axis(label, 0.1 if log else 0.0, 1.0, log)
    low, high = min(known), max(known)
    if log:
        return Axis(label, low / 1.3, high * 1.3, log=True)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(label, low - room, high + room)


@dataclass
class Frame:
    """A chart under construction.

    Attributes:
        title: What a reader who cannot see it is told.
        x: The horizontal axis.
        y: The vertical axis.
        height: Height in units of the view box.
        left: Room at the left for numbers or names.
    """

    title: str
    x: Axis
    y: Axis
    height: int = HEIGHT
    left: int = LEFT
    parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point lies in the view box."""
        across, up = self.x.place(x), self.y.place(y)
        inner = WIDTH - self.left - RIGHT, self.height - TOP - BOTTOM
        return self.left + across * inner[0], TOP + (1 - up) * inner[1]

    def add(self, part: str) -> None:
        """Add a piece of SVG."""
        self.parts.append(part)

    def line(self, series: Series) -> None:
        """Add a series."""
        if len(series.band) > 1:
            edge = [(x, low) for x, low, _ in series.band] + [(x, high) for x, _, high in reversed(series.band)]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (self.at(*p) for p in edge))
            self.add(f'<polygon class="band {series.kind}" points="{path}"/>')
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in series.points:
            if math.isfinite(y) and (y > 0 or not self.y.log):
                runs[-1].append((x, y))
            elif runs[-1]:
                runs.append([])
        for run in runs:
            if len(run) > 1:
                path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (self.at(*p) for p in run))
                self.add(f'<polyline class="line {series.kind}" points="{path}"/>')
        if series.dots:
            for x, y in (point for run in runs for point in run):
                a, b = self.at(x, y)
                told = escape(f"{series.name}: {short(y)} at {short(x)}")
                self.add(
                    f'<circle class="dot {series.kind}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{told}</title></circle>'
                )

    def render(self) -> str:
        """Return the SVG."""
        grid: list[str] = []
        floor, right = self.height - BOTTOM, WIDTH - RIGHT
        for tick in self.y.ticks():
            y = self.at(self.x.low, tick)[1]
            grid.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            grid.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
        for tick in self.x.ticks():
            x = self.at(tick, self.y.low)[0]
            grid.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
            grid.append(f'<text class="tick" x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{short(tick)}</text>')
        middle = (TOP + floor) / 2
        grid.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>')
        grid.append(
            f'<text class="label" x="{(LEFT + right) / 2}" y="{self.height - 6}" text-anchor="middle">'
            f"{escape(self.x.label)}</text>"
        )
        if self.y.label:
            grid.append(
                f'<text class="label" transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">'
                f"{escape(self.y.label)}</text>"
            )
        return _svg(self.title, self.height, [*grid, *self.parts])


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Return a chart of lines with its legend."""
    frame = Frame(title, x, y)
    for one in series:
        frame.line(one)
    named = [s for s in series if s.name and s.kind != "faint"]
    keys = "".join(f'<span class="key {s.kind}">{escape(s.name)}</span>' for s in named) if len(named) > 1 else ""
    return frame.render() + (f'<p class="legend">{keys}</p>' if keys else "")


def whiskers(title: str, label: str, rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """Return intervals about zero: one row (name, kind, value, low, high) each."""
    finite = [v for row in rows for v in row[2:] if math.isfinite(v)]
    x = axis_of(label, [0.0, *finite])
    height = TOP + BOTTOM + 36 * len(rows)
    left = min(150, 20 + 8 * max(len(row[0]) for row in rows))
    frame = Frame(title, x, Axis("", 0, 1), height, left)
    floor, zero = height - BOTTOM, frame.at(0, 0)[0]
    parts = [f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{TOP}" y2="{floor}"/>']
    for index, (name, kind, value, low, high) in enumerate(rows):
        y = TOP + 36 * index + 18
        ends = [frame.at(v if math.isfinite(v) else value, 0)[0] for v in (low, high)]
        middle, told = frame.at(value, 0)[0], escape(f"{name}: {short(value)}")
        parts += [
            f'<text class="label" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>',
            f'<line class="line {kind}" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}"/>',
            f'<circle class="dot {kind}" cx="{middle:.1f}" cy="{y}" r="5"><title>{told}</title></circle>',
        ]
    for tick in x.ticks():
        across = frame.at(tick, 0)[0]
        parts.append(f'<text class="tick" x="{across:.1f}" y="{floor + 18}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(label)}</text>')
    return _svg(title, height, parts)


def short(value: float) -> str:
    """Return a number as short as it can be said on an axis.

    Example:
        >>> short(0.30000000000000004), short(1e-06), short(25.0)
        ('0.3', '1e-6', '25')
    """
    text = f"{value:.4g}"
    if "e" in text:
        head, _, power = text.partition("e")
        return f"{head}e{int(power)}"
    return text


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
