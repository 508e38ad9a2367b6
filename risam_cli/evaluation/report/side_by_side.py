"""Tables of several runs, a split each, as text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Collection, Iterable, Sequence

from risam_cli.console.text import counted, sanitize
from risam_cli.errors import UsageError, setting
from risam_cli.evaluation.report.compare import Row, SideBySide
from risam_cli.evaluation.report.render import (
    NAMES,
    change_interval,
    figure_labels,
    interval,
    percent,
    probability,
    signed,
)
from risam_cli.evaluation.report.schema import Figure
from risam_cli.metrics.intervals import LEAST_IMAGES, REPLICATES

Tables = Sequence[SideBySide]
Figures = Collection[str]

_HEAD = ("figure", "run", "%", "change", "95 % interval", "p")
_NUMBERS = ("%", "change", "p")
_CSV = ("dataset", "split", "slice", "level", "figure", "run", "value")
_CSV_CHANGE = ("difference", "low", "high", "p", "expressions", "images", "own_low", "own_high")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "^": r"\textasciicircum{}",
}


def require_figures(tables: Tables, chosen: Figures) -> None:
    """Refuse a figure that no report has, such as one of another protocol.

    Raises:
        UsageError: naming it and those that there are.
    """
    known = dict.fromkeys(row.figure for table in tables for row in table.rows)
    for name in sorted(set(chosen) - set(known)):
        raise UsageError(
            f"{setting('figures', name)}: no report has this figure",
            f"choose from {', '.join(known)}",
        )


def to_text(tables: Tables, chosen: Figures = ()) -> str:
    """Aligned columns, a blank line between figures."""
    parts = []
    for table in tables:
        lines = [sanitize(_title(table))]
        for heading, rows in _sections(table, chosen):
            head = _head(table)
            cells = [tuple(map(sanitize, _cells(row, names, table))) for row, names in rows]
            widths = [max(len(row[k]) for row in [head, *cells]) for k in range(len(head))]
            lines += ["", *([sanitize(heading)] if heading else []), _aligned(head, widths)]
            for k, ((row, _), line) in enumerate(zip(rows, cells, strict=True)):
                if row.change is None and k and len(table.runs) > 1:
                    lines.append("")
                lines.append(_aligned(line, widths))
        parts.append("\n".join([*lines, *_notes(table)]))
    return "\n\n".join(parts) + "\n"


def to_markdown(tables: Tables, chosen: Figures = ()) -> str:
    """Tables of GitHub's kind."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_for_markdown(cell) for cell in cells) + " |"

    parts = []
    for table in tables:
        lines = [_for_markdown(_title(table))]
        for heading, rows in _sections(table, chosen):
            lines += ["", *([f"**{_for_markdown(heading)}**", ""] if heading else [])]
            head = _head(table)
            marks = ["---:" if name in _NUMBERS else "---" for name in head]
            lines += [line(head), f"| {' | '.join(marks)} |"]
            lines += [line(_cells(row, names, table)) for row, names in rows]
        parts.append("\n".join([*lines, *_notes(table)]))
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Tables, chosen: Figures = ()) -> str:
    """One row a figure and run; fractions in 0..1, empty where undefined.

    ``ciou`` and ``giou``, which repeat ``oiou`` and ``miou`` where every expression has a target,
    are left out there. ``low`` and ``high`` are of the difference, ``own_low`` and ``own_high`` of
    the value.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_CSV, *_CSV_CHANGE])
    for table in tables:
        for row in (*table.rows, *table.slices):
            repeated = row.figure in ("ciou", "giou") and not table.no_target
            if row.figure not in chosen if chosen else repeated:
                continue
            c = row.change
            changes = [None] * 4 if c is None else [c.difference, c.low, c.high, c.p]
            place = [table.dataset, table.split, row.slice, row.level]
            writer.writerow(
                map(
                    _for_table,
                    [
                        *(*place, row.figure, row.run, row.value, *changes),
                        *(row.expressions, row.images, row.low, row.high),
                    ],
                )
            )
    return out.getvalue()


def to_latex(tables: Tables, chosen: Figures = ()) -> str:
    """A ``table`` for booktabs: a run a row, below it the values' own intervals, and the changes.

    Several splits stand beside each other, each under its name. Slices are left out. The caption
    says what was scored, by which protocol, and what the intervals are.
    """
    columns = [(table, _defined(table, _figures(table, table.rows, chosen))) for table in tables]
    lines = [f"% {_title(table)}".replace("\n", " ") for table in tables]
    lines += [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(tables)}}}",
        r"\begin{tabular}{l" + "r" * sum(len(names) for _, names in columns) + "}",
        r"\toprule",
    ]
    if len(tables) > 1:
        heads = [
            rf"\multicolumn{{{len(names)}}}{{c}}{{{_for_latex(_data(table))}}}"
            for table, names in columns
        ]
        lines.append(" & ".join(["", *heads]) + r" \\")
    # Where two names mean the same number, the one that is usual for such data.
    head = [
        _for_latex(label.split(" = ")[-1 if table.no_target else 0])
        for table, names in columns
        for label in names.values()
    ]
    lines += [" & ".join(["", *head]) + r" \\", r"\midrule"]
    for run in dict.fromkeys(run for table in tables for run in table.runs):
        rows = [
            next((row for row in table.rows if (row.figure, row.run) == (name, run)), None)
            for table, names in columns
            for name in names
        ]
        values = (percent(row.value if row else None).replace("–", "--") for row in rows)
        # A bracket or an asterisk at a row's start would belong to the end of the one before.
        label = "{}" * run.startswith(("[", "*")) + _for_latex(run)
        lines.append(" & ".join([label, *values]) + r" \\")
        for what, cell in ((r"95\,\% interval", _latex_interval), ("change", _latex_change)):
            cells = [cell(row) for row in rows]
            if any(cells):
                small = (rf"{{\scriptsize {one}}}" if one else "" for one in (what, *cells))
                lines.append(" & ".join(small) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    lines += [f"% {remark}" for table in tables for remark in table.remarks]
    return "\n".join(lines) + "\n"


def _defined(table: SideBySide, names: dict[str, str]) -> dict[str, str]:
    """The figures without those that no run has, such as N-acc where everything has a target."""
    has = {row.figure for row in table.rows if row.value is not None}
    return {name: label for name, label in names.items() if name in has} or names


def _caption(tables: Tables) -> str:
    """What was scored and how, and what stands in brackets, as LaTeX."""
    scored = "; ".join(
        f"{_data(table)}, protocol {table.protocol} ({table.shared} expressions of {table.images} "
        "images)"
        for table in tables
    )
    parts = [f"{_for_latex(scored)}. Per cent."]
    rows = [row for table in tables for row in table.rows]
    changes = [row.change for row in rows if row.change is not None]
    lows = [*(row.low for row in rows), *(change.low for change in changes)]
    if any(low is not None for low in lows):
        parts.append(
            rf"In brackets 95\,\% intervals by a bootstrap over images ({REPLICATES} draws)."
        )
    if any(table.images < LEAST_IMAGES for table in tables):
        parts.append(f"Fewer than {LEAST_IMAGES} images give no interval.")
    firsts = list(dict.fromkeys(table.runs[0] for table in tables if len(table.runs) > 1))
    if firsts:
        paired = ", paired by image; $p$ is of the same draws" * any(
            one.p is not None for one in changes
        )
        parts.append(rf"Changes are against \emph{{{_for_latex(', '.join(firsts))}}}{paired}.")
    return " ".join(parts)


WRITERS: dict[str, Callable[[Tables, Figures], str]] = {
    "text": to_text,
    "md": to_markdown,
    "csv": to_csv,
    "latex": to_latex,
}
"""By the names that the setting ``to`` takes."""


def _figures(table: SideBySide, rows: Iterable[Row], chosen: Figures) -> dict[str, str]:
    """The figures to show, with their labels; a name that only repeats another is put to it."""
    values: dict[str, dict[str, float | None]] = {}
    for row in rows:
        values.setdefault(row.run, {})[row.figure] = row.value
    if chosen:
        present = next(iter(values.values()), {})
        return {name: NAMES[name] for name in present if name in chosen}
    return figure_labels(list(values.values()), no_target=table.no_target > 0)


def _sections(
    table: SideBySide, chosen: Figures
) -> list[tuple[str, list[tuple[Row, dict[str, str]]]]]:
    """All expressions first, under no heading, then each level of each slice."""
    by_level: dict[str, list[Row]] = {"": list(table.rows)}
    for row in table.slices:
        expressions = counted(row.expressions, "expression")
        by_level.setdefault(f"{row.slice}: {row.level} ({expressions})", []).append(row)
    sections = []
    for heading, rows in by_level.items():
        names = _figures(table, rows, chosen)
        sections.append((heading, [(row, names) for row in rows if row.figure in names]))
    return [(heading, rows) for heading, rows in sections if rows]


def _data(table: SideBySide) -> str:
    return f"{table.dataset} {table.split}"


def _title(table: SideBySide) -> str:
    what = f"{_data(table)}, protocol {table.protocol}: {counted(table.shared, 'expression')} of "
    images = counted(table.images, "image")
    if len(table.runs) == 1:
        return f"{what}{images}"
    every = "both" if len(table.runs) == 2 else f"all {len(table.runs)}"
    return (
        f"{what}{images} that {every} runs scored; changes against "
        f"{table.runs[0]}, intervals paired by image"
    )


def _head(table: SideBySide) -> Sequence[str]:
    """One run has no changes: its intervals are those of its own figures."""
    return _HEAD if len(table.runs) > 1 else ("figure", "run", "%", "95 % interval")


def _cells(row: Row, names: dict[str, str], table: SideBySide) -> tuple[str, ...]:
    if len(table.runs) == 1:
        own = Figure(value=row.value, low=row.low, high=row.high, images=row.images)
        bounds = "" if row.slice else interval(own)
        return (names[row.figure], row.run, percent(row.value), bounds)
    if row.change is None:
        return (names[row.figure], row.run, percent(row.value), "", "", "")
    return (
        "",
        row.run,
        percent(row.value),
        signed(row.change.difference),
        change_interval(row.change),
        probability(row.change.p),
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(
        cell.rjust(width) if k == 2 or (k == 3 and len(cells) > 4) else cell.ljust(width)
        for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()


def _notes(table: SideBySide) -> list[str]:
    return ["", *table.remarks] if table.remarks else []


def _for_markdown(cell: str) -> str:
    plain = sanitize(cell).replace("\\", "\\\\").replace("|", "\\|")
    return html.escape(plain, quote=False)


def _for_table(value: object) -> object:
    """A cell of a CSV file: spreadsheets run text that begins so."""
    if not isinstance(value, str):
        return value
    plain = sanitize(value)
    return f"'{plain}" if plain.startswith(tuple("=+-@")) else plain


def _for_latex(text: str) -> str:
    return re.sub(r"[\\&%$#_{}~^<>|]", lambda found: _LATEX[found[0]], sanitize(text))


def _latex_number(value: float | None, *, sign: bool) -> str:
    """Per cent, or points with a sign; a minus, not a hyphen, in any font and mode."""
    text = signed(value) if sign else percent(value)
    return text.replace("-", "$-$").replace("+", "$+$")


def _latex_bounds(low: float | None, high: float | None, *, sign: bool) -> str:
    if low is None or high is None:
        return ""
    return f"[{_latex_number(low, sign=sign)}, {_latex_number(high, sign=sign)}]"


def _latex_interval(row: Row | None) -> str:
    return "" if row is None else _latex_bounds(row.low, row.high, sign=False)


def _latex_change(row: Row | None) -> str:
    if row is None or row.change is None or row.change.difference is None:
        return ""
    change = row.change
    parts = [_latex_number(change.difference, sign=True)]
    if change.low is not None:
        parts.append(_latex_bounds(change.low, change.high, sign=True))
    if change.p is not None:
        text = probability(change.p)
        parts.append(f"$p {text}$" if text.startswith("<") else f"$p = {text}$")
    return " ".join(parts)
