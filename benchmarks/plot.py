"""Figures as bars or curves: one SVG that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape

from common import Row, short

from risam_cli.drawing import svg

_WIDTH, _LEFT, _RIGHT, _PITCH = 920, 430, 120, 20
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; font-size: 14px; }
.soft { fill: #57606a; }
.bar { fill: #0072b2; } .met { fill: #009e73; } .missed { fill: #d55e00; }
.whisker { stroke: #24292f; stroke-width: 1.5; } .wanted { stroke: #24292f; stroke-dasharray: 3 3; }
"""


def bars(results: Mapping[str, Sequence[Row]]) -> str:
    """All rows with a unit; a dashed line is what is wanted, a whisker the spread."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for part, rows in results.items():
        for row in rows:
            if row.unit:
                panels.setdefault((part, row.unit), []).append(row)
    parts, y = [], 10
    for (part, unit), rows in panels.items():
        parts.append(_text(10, y + 16, f"{part} ({unit})", "title"))
        parts += _panel(rows, y + 26)
        y += 26 + _PITCH * len(rows) + 16
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" '
        f'width="{_WIDTH}" height="{y}" role="img" aria-label="Benchmark figures">'
        f'<style>{_STYLE}</style><rect width="{_WIDTH}" height="{y}" fill="#ffffff"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_CHART_STYLE = (
    ".grid { stroke: #d8dee4; } .tick { font-size: 11px; fill: #57606a; } "
    ".curve { fill: none; stroke-width: 2; } "
    + " ".join(
        f".line{k} {{ stroke: {color}; }} .key{k} {{ fill: {color}; font-weight: 600; }}"
        for k, color in enumerate(_COLORS)
    )
)


def charts(panels: Mapping[str, Sequence[svg.Line]], x_axis: str, y_axis: str) -> str:
    """Curves in panels, two a row; lines of one label share a colour and a line of the key."""
    width, height = 480, 430
    parts = []
    for number, (title, series) in enumerate(panels.items()):
        left, top = 10 + width * (number % 2), height * (number // 2)
        labels = list(dict.fromkeys(line.label for line in series))
        parts.append(_text(left, top + 24, title, "title"))
        for k, label in enumerate(labels):
            parts.append(_text(left, top + 42 + 15 * k, label, f"key{k % len(_COLORS)}"))
        series = [replace(line, color=labels.index(line.label)) for line in series]
        drawn = str(svg.lines(series, x_axis, y_axis, y_high=1.0))
        place = f'<svg x="{left}" y="{top + 125}" width="460" height="300" '
        parts.append(drawn.replace("<svg ", place, 1))
    across, down = 2 * width + 20, height * -(-len(panels) // 2)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" '
        f'width="{across}" height="{down}" role="img" '
        f'aria-label="{escape(y_axis)} against {escape(x_axis)}"><style>{_STYLE}{_CHART_STYLE}'
        f'</style><rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def _panel(rows: Sequence[Row], top: float) -> list[str]:
    most = max(max(row.value, (row.spread or (0, 0))[1], _bound(row) or 0) for row in rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / (most or 1)
    out = []
    for k, row in enumerate(rows):
        y = top + _PITCH * k
        name = {True: "met", False: "missed", None: "bar"}[row.meets()]
        out.append(_text(_LEFT - 8, y + 14, row.name, "soft", "end"))
        out.append(
            f'<rect x="{_LEFT}" y="{y + 3}" width="{max(row.value * scale, 0.5):.1f}" '
            f'height="{_PITCH - 6}" class="{name}"/>'
        )
        if row.spread is not None:
            low, high = (_LEFT + end * scale for end in row.spread)
            out.append(_line(low, high, y + _PITCH / 2, y + _PITCH / 2, "whisker"))
        bound = _bound(row)
        if bound is not None:
            x = _LEFT + bound * scale
            out.append(_line(x, x, y + 1, y + _PITCH - 1, "wanted"))
        furthest = max(row.value, (row.spread or (0, 0))[1], bound or 0)
        out.append(_text(_LEFT + furthest * scale + 6, y + 14, short(row.value), "soft"))
    return out


def _bound(row: Row) -> float | None:
    return float(row.wanted.split()[1]) if row.wanted else None


def _line(x1: float, x2: float, y1: float, y2: float, name: str) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" class="{name}"/>'


def _text(x: float, y: float, text: str, name: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{name}" text-anchor="{anchor}">{escape(text)}</text>'
    )
