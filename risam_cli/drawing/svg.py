"""Small plots as inline SVG. Colours are CSS classes, so that the page's light and dark follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 460, 300
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a dot plot: a value with its interval, in the units of the axis."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with a label on a curve."""

    x: float
    y: float
    label: str


def dot_plot(
    rows: Sequence[Bar],
    axis: str,
    *,
    low: float = 0.0,
    high: float = 1.0,
    line: float | None = None,
) -> Markup:
    """Rows of dots with whiskers on a common axis; ``line`` is drawn through all of them."""
    # Narrow enough for a phone, where it shrinks to the page and no bar may be out of view.
    label_width, note_width, width, pitch = 156, 92, 500, 24
    left, right = label_width, width - note_width
    height = pitch * len(rows) + 44
    bottom = pitch * len(rows) + 8

    def x(number: float) -> float:
        share = (min(max(number, low), high) - low) / (high - low)
        return left + share * (right - left)

    out = [_open(width, height, f"{axis}: {len(rows)} rows")]
    for tick in _ticks(low, high):
        out.append(_line(x(tick), 4, x(tick), bottom, "grid"))
        out.append(_text(x(tick), bottom + 16, _short(tick), "tick", "middle"))
    if line is not None:
        out.append(_line(x(line), 4, x(line), bottom, "reference"))
    for k, row in enumerate(rows):
        y = 8 + pitch * (k + 0.5)
        out.append(_text(left - 10, y + 4, _cut(row.label, 22), "label", "end", title=row.label))
        out.append(_text(right + 10, y + 4, row.note, "tick", "start"))
        if row.low is not None and row.high is not None:
            out.append(_line(x(row.low), y, x(row.high), y, "whisker"))
            for end in (row.low, row.high):
                out.append(_line(x(end), y - 4, x(end), y + 4, "whisker"))
        if row.value is not None:
            out.append(f'<circle cx="{x(row.value):.1f}" cy="{y:.1f}" r="4.5" class="dot"/>')
    out.append(_text((left + right) / 2, height - 6, axis, "axis", "middle"))
    return _close(out)


def curve(
    xs: Sequence[float],
    ys: Sequence[float],
    x_axis: str,
    y_axis: str,
    *,
    marks: Sequence[Mark] = (),
    y_high: float = 1.0,
) -> Markup:
    """One curve over 0..1, with labelled points on it."""
    out = [_open(_WIDTH, _HEIGHT, f"{y_axis} against {x_axis}")]
    out += _frame(x_axis, y_axis, y_high)
    points = [(_x(a), _y(b / y_high)) for a, b in zip(xs, ys, strict=True)]
    out.append(_series(points, "curve"))
    placed: list[float] = []
    for mark in marks:
        cx, cy = _x(mark.x), _y(mark.y / y_high)
        out.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" class="mark"/>')
        leftward = cx > _WIDTH * 0.55
        # Labels of neighbouring points are moved apart.
        y = cy + 18
        while any(abs(y - other) < 16 for other in placed):
            y += 16
        placed.append(y)
        anchor = "end" if leftward else "start"
        out.append(_text(cx + (-8 if leftward else 8), y, mark.label, "label", anchor))
    return _close(out)


@dataclass(frozen=True, slots=True)
class Line:
    """A series of points, in the order of x; ``faint`` is drawn thin behind the others.

    ``color`` is its number among the colours; None takes its place among the series.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    faint: bool = False
    color: int | None = None


def lines(
    series: Sequence[Line],
    x_axis: str,
    y_axis: str,
    *,
    y_high: float | None = None,
    marks: Sequence[Mark] = (),
) -> Markup:
    """Several series over one axis from 0, told apart by colour; nothing where there is no point.

    Args:
        y_high: None takes the series' own; what lies beyond is drawn at the edge.
        marks: points that stand out, with their labels.
    """
    xs = [x for one in series for x in one.xs]
    ys = [y for one in series for y in one.ys]
    if not xs:
        return Markup("")
    left, right = 0.0, max(1.0, *xs)
    low, high = 0.0, max(ys) if y_high is None else y_high
    high = high if high > low else low + 1

    def at(x: float, y: float) -> tuple[float, float]:
        part = (min(max(y, low), high) - low) / (high - low)
        return _x((x - left) / (right - left)), _y(part)

    out = [_open(_WIDTH, _HEIGHT, f"{y_axis} against {x_axis}")]
    for tick in _ticks(left, right):
        out.append(_text(at(tick, low)[0], _HEIGHT - _BOTTOM + 16, _count(tick), "tick", "middle"))
    for tick in _ticks(low, high):
        y = at(left, tick)[1]
        out.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, "grid"))
        out.append(_text(_LEFT - 6, y + 4, _count(tick), "tick", "end"))
    out.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_axis, "axis", "middle"))
    shown = [one for one in series if not one.faint]
    for one in series:
        place = (series if one.faint else shown).index(one) if one.color is None else one.color
        number = place % LINE_COLORS
        points = [at(*point) for point in zip(one.xs, one.ys, strict=True)]
        out.append(_series(points, f"curve line{number}" + " faint" * one.faint))
    for mark in marks:
        cx, cy = at(mark.x, mark.y)
        out.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" class="mark"/>')
        end = cx > _WIDTH * 0.55
        x, anchor = cx + (-9 if end else 9), "end" if end else "start"
        out.append(_text(x, cy + (18 if cy < _HEIGHT / 2 else -9), mark.label, "label", anchor))
    return _close(out)


LINE_COLORS = 6
"""How many colours :func:`lines` has, as the CSS classes ``line0`` to ``line5``."""


def _count(number: float) -> str:
    """As :func:`_short`, with large numbers in thousands."""
    if abs(number) >= 1e6:
        return f"{_short(number / 1e6)} M"
    if abs(number) >= 1e4:
        return f"{_short(number / 1e3)} k"
    return _short(number) if abs(number) >= 0.01 or not number else f"{number:.0e}"


def histogram(counts: Sequence[int], x_axis: str, y_axis: str) -> Markup:
    """Bars of equal width over 0..1."""
    total, most = sum(counts), max(counts, default=0)
    if not most:
        return Markup("")
    y_high = most / total
    out = [_open(_WIDTH, _HEIGHT, f"{y_axis} by {x_axis}")]
    out += _frame(x_axis, y_axis, y_high)
    for k, count in enumerate(counts):
        x0, x1 = _x(k / len(counts)), _x((k + 1) / len(counts))
        y = _y(count / most)
        out.append(
            f'<rect x="{x0 + 1:.1f}" y="{y:.1f}" width="{x1 - x0 - 2:.1f}" '
            f'height="{_HEIGHT - _BOTTOM - y:.1f}" class="bar">'
            f"<title>{k / len(counts):.2f}–{(k + 1) / len(counts):.2f}: {count}</title></rect>"
        )
    return _close(out)


def _frame(x_axis: str, y_axis: str, y_high: float) -> list[str]:
    out = []
    for tick in _ticks(0, 1):
        out.append(_line(_x(tick), _TOP, _x(tick), _HEIGHT - _BOTTOM, "grid"))
        out.append(_text(_x(tick), _HEIGHT - _BOTTOM + 16, _short(tick), "tick", "middle"))
    for tick in _ticks(0, y_high):
        y = _y(tick / y_high)
        out.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, "grid"))
        out.append(_text(_LEFT - 6, y + 4, _short(tick), "tick", "end"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    out.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_axis, "axis", "middle"))
    out.append(
        f'<text x="13" y="{middle:.1f}" class="axis" text-anchor="middle" '
        f'transform="rotate(-90 13 {middle:.1f})">{escape(y_axis)}</text>'
    )
    return out


def _series(points: Sequence[tuple[float, float]], name: str) -> str:
    """A line through points; one alone, through which none goes, is a dot."""
    if len(points) == 1:
        [(x, y)] = points
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{name} alone"/>'
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{text}" class="{name}"/>'


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to seven of them."""
    span = high - low
    scale = 10.0 ** max(0, math.ceil(math.log10(span / _STEPS[-1] / 6.5))) if span > 0 else 1.0
    step = scale * next(s for s in _STEPS if span / scale / s <= 6.5)
    first = math.floor(low / step)
    ticks = [k * step for k in range(first, first + 12)]
    return [t for t in ticks if low - 1e-9 <= t <= high + 1e-9]


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".").replace("-", "−") or "0"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _open(width: int, height: int, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escape(description)}">'
    )


def _close(parts: list[str]) -> Markup:
    # Every text in the parts went through escape.
    return Markup("\n".join([*parts, "</svg>"]))


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{name}"/>'


def _text(x: float, y: float, text: str, name: str, anchor: str, *, title: str = "") -> str:
    whole = f"<title>{escape(title)}</title>" if title and title != text else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{name}" text-anchor="{anchor}">'
        f"{escape(text)}{whole}</text>"
    )
