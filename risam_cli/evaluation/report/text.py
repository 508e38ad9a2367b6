"""Numbers as people read them, and the table that a run prints."""

from __future__ import annotations

from risam_cli.evaluation.report.schema import ChangePart, Figure, Report

NAMES = {
    "oiou": "oIoU",
    "miou": "mIoU",
    "giou": "gIoU",
    "ciou": "cIoU",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
    **{f"pr@0.{x}": f"Pr@0.{x}" for x in (3, *range(5, 10))},
}


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a number of per cent, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def interval(figure: Figure) -> str:
    """The interval of a figure in per cent, or a dash."""
    if figure.low is None or figure.high is None:
        return "–"
    return f"{percent(figure.low)} – {percent(figure.high)}"


def signed(value: float | None) -> str:
    """A difference of fractions in per cent points, with its sign."""
    return "–" if value is None else f"{100 * value:+.2f}"


def probability(value: float | None) -> str:
    """A p-value."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def change_interval(change: ChangePart) -> str:
    """The interval of a difference."""
    if change.low is None or change.high is None:
        return "–"
    return f"{signed(change.low)} … {signed(change.high)}"


def title(report: Report) -> str:
    """What was scored on what, in one line."""
    return f"{report.answers.name} on {report.dataset.name} {report.dataset.split}"


def console_table(report: Report) -> str:
    """The headline as a table of plain text."""
    counts = report.counts
    lines = [
        f"{title(report)}, protocol {report.protocol.name}: {counts.scored} expressions, "
        f"{counts.images} images, {counts.no_target} without a target",
        f"{'figure':<8} {'%':>7}   95 % interval",
    ]
    for name, figure in report.figures.items():
        lines.append(f"{NAMES[name]:<8} {percent(figure.value):>7}   {interval(figure)}")
    if report.comparison is not None:
        other = report.comparison
        lines += [
            "",
            f"against {other.other_name} on {other.shared} shared expressions",
            f"{'figure':<8} {'change':>7}   {'95 % interval':<18} p",
        ]
        for name, change in other.figures.items():
            lines.append(
                f"{NAMES[name]:<8} {signed(change.difference):>7}   "
                f"{change_interval(change):<18} {probability(change.p)}"
            )
    return "\n".join(lines)
