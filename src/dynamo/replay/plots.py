"""How is a plot drawn without a plotting library? Lines on axes, as SVG that needs nothing else.

Colours are CSS classes, so that one picture is right on a light page and on a dark one.
"""

import math
from collections.abc import Sequence
from html import escape

import msgspec

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 30, 44  # margins that hold the labels
SIDES = 8  # colours before they repeat, then dashed

# Okabe and Ito's colours: told apart also by the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#b8a800")
STYLE = (
    ".plot{font:12px system-ui,sans-serif}.plot text{fill:#333}.plot .grid{stroke:#ccc;stroke-width:.6}"
    ".plot .axis{stroke:#666}.plot path{fill:none;stroke-width:1.8;stroke-linejoin:round}"
    ".plot .title{font-weight:600;font-size:13px}"
    + "".join(f".plot .s{i}{{stroke:{colour}}}.plot .k{i}{{fill:{colour}}}" for i, colour in enumerate(COLOURS))
    + "@media(prefers-color-scheme:dark){.plot text{fill:#ddd}.plot .grid{stroke:#444}.plot .axis{stroke:#999}}"
)


class Series(msgspec.Struct, frozen=True):
    """A line, by its points from left to right."""

    name: str
    points: Sequence[tuple[float, float]]


class Axis(msgspec.Struct, frozen=True):
    """What is along a side. `low` and `high` None are where the points are."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


class _Scale:
    """Where a value is on an axis of so many pixels, and the values worth a mark."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        if axis.log:
            values = [value for value in values if value > 0] or [1.0]
        values = values or [0.0]
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        if axis.log:
            low, high = max(low, high / 1e6), max(high, low * 1.01)  # more than six decades show nothing
        elif high <= low:
            high = low + 1
        self._log, self.low, self.high = axis.log, low, high
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """The pixel."""
        low, high = self.low, self.high
        if self._log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        part = (value - low) / (high - low)
        return self._start + min(1.0, max(0.0, part)) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        if not self._log:
            return _even_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if len(decades) <= 3 else (1,)
        marks = [step * 10.0**decade for decade in decades for step in steps]
        return [mark for mark in marks if self.low * 0.999 <= mark <= self.high * 1.001]


def _even_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next((unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough), unit * 10)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def plot(title: str, series: Sequence[Series], x: Axis, y: Axis, *, standalone: bool = False) -> str:
    """An SVG with a line for each series and a legend. `standalone` makes it fit for a file of its own."""
    across = _Scale(x, [px for one in series for px, _ in one.points], LEFT, WIDTH - RIGHT)
    legend_rows = -(-len(series) // 4) if len(series) > 1 else 0
    height = HEIGHT + 18 * legend_rows
    up = _Scale(y, [py for one in series for _, py in one.points], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}">'
    ]
    if standalone:
        parts.append(f"<style>{STYLE}</style>")
    parts.append(f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>')
    parts += _axes(across, up, x, y)
    parts += [_line(one, i, across, up) for i, one in enumerate(series) if one.points]
    if legend_rows:
        parts += [_legend(one.name, i) for i, one in enumerate(series)]
    parts.append("</svg>")
    return "".join(parts)


def _axes(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in across.ticks():
        px = across.at(value)
        parts.append(f'<line class="grid" x1="{px:.1f}" y1="{TOP}" x2="{px:.1f}" y2="{bottom}"/>')
        parts.append(f'<text x="{px:.1f}" y="{bottom + 15}" text-anchor="middle">{_short(value)}</text>')
    for value in up.ticks():
        py = up.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{py:.1f}" x2="{WIDTH - RIGHT}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 33}" text-anchor="middle">{escape(x.label)}</text>')
    half = (TOP + bottom) / 2
    parts.append(
        f'<text x="14" y="{half}" text-anchor="middle" transform="rotate(-90 14 {half})">{escape(y.label)}</text>'
    )
    return parts


def _line(series: Series, number: int, across: _Scale, up: _Scale) -> str:
    path = "L".join(f"{across.at(px):.1f} {up.at(py):.1f}" for px, py in series.points)
    dashed = ' stroke-dasharray="5 3"' if number >= SIDES else ""
    return f'<path class="s{number % SIDES}"{dashed} d="M{path}"><title>{escape(series.name)}</title></path>'


def _legend(name: str, number: int) -> str:
    px, py = LEFT + (number % 4) * 122, HEIGHT + 10 + 18 * (number // 4)
    return (
        f'<rect class="k{number % SIDES}" x="{px}" y="{py - 8}" width="14" height="4"/>'
        f'<text x="{px + 19}" y="{py - 2}">{escape(name)}</text>'
    )


def _short(value: float) -> str:
    """A number for an axis: 1500 as 1.5k."""
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}"
