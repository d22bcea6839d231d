"""Charts as plain SVG: a line, stairs, a scatter, stacked histograms. They need no script."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 540, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 30, 42


@dataclass(frozen=True)
class Axis:
    """A linear map from values to pixels, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Series:
    """Points of one kind: (x, y, tooltip), drawn with one colour and one marker."""

    label: str
    colour: str
    marker: str
    points: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Band:
    """A labelled stretch of the x axis."""

    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Panel:
    """One histogram: (colour, values) layers that are stacked in order."""

    label: str
    layers: tuple[tuple[str, tuple[float, ...]], ...]


def nice_step(span: float, count: int) -> float:
    """The step of 1, 2 or 5 times a power of ten that cuts `span` into at most `count` parts."""
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))


def fit_axis(
    low: float, high: float, start: float, end: float, count: int = 5, least_step: float = 0.0
) -> Axis:
    """An axis over round numbers, at least `least_step` apart, that covers [low, high]."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-12 * size, 1e-200):  # one value, as far as a chart can tell
        pad = size / 2 if size > 1e-200 else 0.5
        low, high = low - pad, high + pad
    step = max(nice_step(high - low, count), least_step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def line_chart(
    points: Sequence[tuple[float, float]],
    x_label: str,
    y_label: str,
    colour: str,
    bands: Sequence[Band] = (),
    y_low: float | None = None,
) -> str:
    """A line through points in order of x, over optional bands.

    Args:
        points: At least one (x, y).
        x_label: Name of the x axis, which counts.
        y_label: Name of the y axis.
        colour: Of the line.
        bands: Labelled stretches of the x axis behind the line.
        y_low: Lowest value the y axis must show; None for the points' own.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x = _x_axis(min(xs), max(xs), least_step=1.0)
    y = fit_axis(min([*ys, *([] if y_low is None else [y_low])]), max(ys), HEIGHT - _BOTTOM, _TOP)
    parts = []
    for index, band in enumerate(bands):
        left, right = max(x(band.low), x.start), min(x(band.high), x.end)
        parts.append(
            f'<rect x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0):.1f}" '
            f'height="{HEIGHT - _BOTTOM - _TOP}" class="band{index % 2}"/>'
            + _text((left + right) / 2, _TOP - 3, band.label, "band-label", "middle")
        )
    parts.append(_frame(x, y, x_label, y_label))
    path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" class="line"/>')
    if len(points) <= 80:
        dots = Series(
            "", colour, "dot", tuple((a, b, f"{x_label} {a:g}: {b:.4g}") for a, b in points)
        )
        parts += _markers(dots, x, y)
    return _svg(HEIGHT, f"{y_label} by {x_label}", parts)


def doubling_stairs(
    steps: Sequence[tuple[int, float, str]], x_label: str, y_label: str, colour: str
) -> str:
    """Stairs over an axis that doubles from tick to tick, one tread from each start to its double.

    Args:
        steps: At least one (start, y, tooltip), each start a power of two above the last.
        x_label: Name of the x axis.
        y_label: Name of the y axis.
        colour: Of the line.
    """
    powers, ys = [start.bit_length() - 1 for start, _, _ in steps], [y for _, y, _ in steps]
    every = 1 + (powers[-1] - powers[0]) // 8
    ticks = range(powers[0], powers[-1] + 2, every)
    x = Axis(powers[0], powers[-1] + 1, _LEFT, WIDTH - _RIGHT, tuple(ticks))
    y = fit_axis(min([*ys, 0.0]), max(ys), HEIGHT - _BOTTOM, _TOP)
    path = " ".join(
        f"{x(power):.1f},{y(height):.1f} {x(power + 1):.1f},{y(height):.1f}"
        for power, height in zip(powers, ys, strict=True)
    )
    dots = tuple(
        (power + 0.5, height, title)
        for power, (_, height, title) in zip(powers, steps, strict=True)
    )
    parts = [
        _frame(x, y, x_label, y_label, lambda power: f"{2 ** round(power):,}"),
        f'<polyline points="{path}" fill="none" stroke="{colour}" class="line"/>',
        *_markers(Series("", colour, "dot", dots), x, y),
    ]
    return _svg(HEIGHT, f"{y_label} by {x_label}", parts)


def scatter(
    series: Sequence[Series], x_label: str, y_label: str, mark: float, mark_label: str
) -> str:
    """Scores in [0, 1] over a positive quantity, with a labelled vertical line at `mark`."""
    xs = [point[0] for one in series for point in one.points]
    x = _x_axis(0.0, max([*xs, mark * 1.2]))
    # A little air keeps the markers of full and of no score inside the frame.
    y = Axis(-0.04, 1.04, HEIGHT - _BOTTOM, _TOP, (0.0, 0.25, 0.5, 0.75, 1.0))
    at = x(mark)
    parts = [
        _frame(x, y, x_label, y_label),
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" class="mark"/>',
        _text(at + 4, _TOP - 4, mark_label, "band-label", "start"),
    ]
    for one in series:
        parts += _markers(one, x, y)
    return _svg(HEIGHT, f"{y_label} by {x_label}", parts)


def histograms(
    panels: Sequence[Panel],
    x_label: str,
    bins: int = 16,
    least_step: float = 0.0,
    counted: str = "Attempts",
) -> str:
    """Stacked histograms below each other over one x axis.

    Args:
        panels: Each with at least one value.
        x_label: Name of the x axis.
        bins: About how many bars.
        least_step: Least width of a bar; 1 for counts.
        counted: What the bars count.
    """
    highest = max(value for panel in panels for _, values in panel.layers for value in values)
    step = max(nice_step(max(highest, 1e-9), bins), least_step)
    edges = max(1, math.floor(highest / step + 1e-9) + 1)
    x = _x_axis(0.0, edges * step, least_step)
    room = 96
    parts: list[str] = []
    for index, panel in enumerate(panels):
        parts += _histogram(panel, x, step, edges, _TOP + index * room, room - 30)
    floor = _TOP + len(panels) * room - 30
    for tick in x.ticks:
        parts.append(_text(x(tick), floor + 16, _tick(tick), "tick", "middle"))
    parts.append(_text((x.start + x.end) / 2, floor + 34, x_label, "axis-label", "middle"))
    return _svg(floor + 42, f"{counted} by {x_label}", parts)


def marker(kind: str, x: float, y: float, colour: str, title: str = "") -> str:
    """One marker; shapes differ so that colour is not the only sign."""
    tooltip = f"<title>{escape(title)}</title>" if title else ""
    style = f'fill="{colour}" class="point"'
    if kind == "square":
        return (
            f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}>{tooltip}</rect>'
        )
    if kind == "triangle":
        corners = f"{x:.1f},{y - 5:.1f} {x + 5:.1f},{y + 4:.1f} {x - 5:.1f},{y + 4:.1f}"
        return f'<polygon points="{corners}" {style}>{tooltip}</polygon>'
    radius = 2.5 if kind == "dot" else 4.5
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {style}>{tooltip}</circle>'


def _histogram(
    panel: Panel, x: Axis, step: float, edges: int, top: float, height: float
) -> list[str]:
    layers = [
        (
            colour,
            [sum(min(int(v / step + 1e-9), edges - 1) == b for v in values) for b in range(edges)],
        )
        for colour, values in panel.layers
    ]
    totals = [sum(heights[b] for _, heights in layers) for b in range(edges)]
    y = Axis(0, max(totals), top + height, top + 8, (0, max(totals)))
    parts = [_text(x.start, top, panel.label, "panel-label", "start")]
    for tick in y.ticks:
        parts.append(
            _grid(x, y(tick)) + _text(x.start - 6, y(tick) + 4, _tick(tick), "tick", "end")
        )
    stacked = [0] * edges
    for colour, heights in layers:
        for b, count in enumerate(heights):
            if count:
                low, high = y(stacked[b]), y(stacked[b] + count)
                left, right = x(b * step) + 1, x((b + 1) * step) - 1
                title = f"{_tick(b * step)} to {_tick((b + 1) * step)}: {count}"
                parts.append(
                    f'<rect x="{left:.1f}" y="{high:.1f}" width="{right - left:.1f}" '
                    f'height="{low - high:.1f}" fill="{colour}" class="bar">'
                    f"<title>{title}</title></rect>"
                )
                stacked[b] += count
    return parts


def _x_axis(low: float, high: float, least_step: float = 0.0) -> Axis:
    """Ticks on round numbers, but the axis ends where the data ends."""
    fitted = fit_axis(low, high, _LEFT, WIDTH - _RIGHT, 8, least_step)
    if high <= low:
        return fitted
    ticks = tuple(tick for tick in fitted.ticks if low - 1e-9 <= tick <= high * (1 + 1e-9))
    return Axis(low, high, _LEFT, WIDTH - _RIGHT, ticks)


def _frame(
    x: Axis, y: Axis, x_label: str, y_label: str, x_tick: Callable[[float], str] | None = None
) -> str:
    parts = []
    for tick in y.ticks:
        parts.append(_grid(x, y(tick)))
        parts.append(_text(x.start - 6, y(tick) + 4, _tick(tick), "tick", "end"))
    for tick in x.ticks:
        said = (x_tick or _tick)(tick)
        parts.append(_text(x(tick), HEIGHT - _BOTTOM + 16, said, "tick", "middle"))
    parts.append(_text((x.start + x.end) / 2, HEIGHT - 6, x_label, "axis-label", "middle"))
    parts.append(_text(4, 12, y_label, "axis-label", "start"))
    return "".join(parts)


def _markers(series: Series, x: Axis, y: Axis) -> list[str]:
    return [
        marker(series.marker, x(a), y(b), series.colour, title) for a, b, title in series.points
    ]


def _grid(x: Axis, at: float) -> str:
    return f'<line x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>'


def _tick(value: float) -> str:
    return f"{value:.6g}" if abs(value) > 1e-12 else "0"


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(height: float, label: str, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
