"""A table of several runs as text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence

from risam_cli.evaluation.report.compare import Row, SideBySide
from risam_cli.evaluation.report.render import (
    NAMES,
    change_interval,
    percent,
    probability,
    signed,
)

_HEAD = ("figure", "run", "%", "change", "95 % interval", "p")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def to_text(table: SideBySide) -> str:
    """Aligned columns, a blank line between figures."""
    rows = [_cells(row) for row in table.rows]
    widths = [max(len(row[k]) for row in [_HEAD, *rows]) for k in range(len(_HEAD))]
    lines = [_title(table), "", _aligned(_HEAD, widths)]
    for row, cells in zip(table.rows, rows, strict=True):
        if row.change is None and row is not table.rows[0]:
            lines.append("")
        lines.append(_aligned(cells, widths))
    return "\n".join([*lines, *_notes(table)]) + "\n"


def to_markdown(table: SideBySide) -> str:
    """A table of GitHub's kind."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_for_markdown(cell) for cell in cells) + " |"

    rows = [line(_cells(row)) for row in table.rows]
    lines = [_title(table), "", line(_HEAD), "| --- | --- | ---: | ---: | --- | ---: |", *rows]
    return "\n".join([*lines, *_notes(table)]) + "\n"


def to_csv(table: SideBySide) -> str:
    """One row a figure and run; fractions in 0..1, empty where undefined."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["figure", "run", "value", "difference", "low", "high", "p", "expressions", "images"]
    )
    for row in table.rows:
        c = row.change
        changes = [None] * 4 if c is None else [c.difference, c.low, c.high, c.p]
        writer.writerow([row.figure, row.run, row.value, *changes, table.shared, table.images])
    return out.getvalue()


def to_latex(table: SideBySide) -> str:
    """A ``tabular`` for booktabs: a run a row, changes and their intervals below the values."""
    figures = list(dict.fromkeys(row.figure for row in table.rows))
    by = {(row.figure, row.run): row for row in table.rows}
    lines = [
        f"% {_title(table)}".replace("\n", " "),
        r"\begin{tabular}{l" + "r" * len(figures) + "}",
        r"\toprule",
        " & ".join(["", *(_for_latex(NAMES[name]) for name in figures)]) + r" \\",
        r"\midrule",
    ]
    for run in table.runs:
        rows = [by[name, run] for name in figures]
        cells = [_for_latex(run), *(percent(row.value).replace("–", "--") for row in rows)]
        lines.append(" & ".join(cells) + r" \\")
        if rows[0].change is not None:
            lines.append(" & ".join(["", *map(_latex_change, rows)]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"% {remark}" for remark in table.remarks]
    return "\n".join(lines) + "\n"


WRITERS: dict[str, Callable[[SideBySide], str]] = {
    "text": to_text,
    "md": to_markdown,
    "csv": to_csv,
    "latex": to_latex,
}
"""By the names that the setting ``to`` takes."""


def _title(table: SideBySide) -> str:
    return (
        f"{table.data}, protocol {table.protocol}: {table.shared} expressions of {table.images} "
        f"images that all {len(table.runs)} runs scored; changes against {table.runs[0]}, "
        "intervals paired by image"
    )


def _cells(row: Row) -> tuple[str, ...]:
    if row.change is None:
        return (NAMES[row.figure], row.run, percent(row.value), "", "", "")
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
        cell.rjust(width) if k in (2, 3) else cell.ljust(width)
        for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()


def _notes(table: SideBySide) -> list[str]:
    return ["", *table.remarks] if table.remarks else []


def _for_markdown(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _for_latex(text: str) -> str:
    return re.sub(r"[\\&%$#_{}~^]", lambda found: _LATEX[found[0]], text)


def _latex_change(row: Row) -> str:
    assert row.change is not None
    change = f"{signed(row.change.difference)} [{change_interval(row.change)}]"
    plain = change.replace("…", r"\,\ldots\,").replace("–", "--")
    return rf"{{\scriptsize {plain}}}"
