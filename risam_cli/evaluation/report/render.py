"""``report.json``, ``report.md`` and ``report.html``: each a pure function of the report."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment

from risam_cli.console.text import counted, sanitize
from risam_cli.data.images.images import Bands, open_rgb
from risam_cli.data.readers.refer import SPLIT_BY
from risam_cli.drawing import svg
from risam_cli.drawing.drawing import outline, webp_uri
from risam_cli.drawing.html import page_environment
from risam_cli.errors import ImageError, setting, told
from risam_cli.evaluation.report.schema import ChangePart, CountsPart, Figure, Report, SlicePart
from risam_cli.evaluation.scoring import Case
from risam_cli.metrics.figures import DEGENERATE, MOSTLY_NOTHING
from risam_cli.metrics.intervals import LEAST_IMAGES

_PLOTTED_CATEGORIES = 20


def to_json(report: Report) -> str:
    """The report as JSON, indented, ending in a newline."""
    try:
        return report.model_dump_json(indent=1) + "\n"
    except ValueError:  # a half of a character, from someone's JSON or a file name
        whole = Report.model_validate(_with_escapes(report.model_dump()))
        return whole.model_dump_json(indent=1) + "\n"


def _with_escapes(value: Any) -> Any:
    """The same value; lone surrogates, which UTF-8 cannot hold, are written as their escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_with_escapes(key): _with_escapes(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_escapes(inner) for inner in value]
    return value


def to_markdown(report: Report) -> str:
    """The report as a page of Markdown."""
    page = _environment(autoescape=False).get_template("report.md.j2").render(_shared(report))
    return page.rstrip() + "\n"


def to_html(report: Report, pictures: Mapping[str, Sequence[Picture]]) -> str:
    """The report as one HTML file that needs nothing else.

    Args:
        pictures: cases by heading, such as ``worst``.
    """
    environment = _environment(autoescape=True)
    colors = {"truth": _css(TRUTH), "answer": _css(ANSWER)}
    page = environment.get_template("report.html.j2").render(
        _shared(report), pictures=pictures, plots=_plots(report), colors=colors
    )
    return page.rstrip() + "\n"


@cache
def _environment(*, autoescape: bool) -> Environment:
    environment = page_environment("risam_cli.evaluation.report", autoescape=autoescape)
    environment.keep_trailing_newline = True
    filters: dict[str, Callable[..., Any]] = {
        "percent": percent,
        "interval": interval,
        "signed": signed,
        "probability": probability,
        "change_interval": change_interval,
        "cell": _cell,
    }
    environment.filters.update(filters)
    return environment


def _shared(report: Report) -> dict[str, Any]:
    return {
        "r": report,
        "title": title(report),
        "labels": labels_of(report),
        "cautions": cautions(report),
        "slices": shown_slices(report),
        "fit_text": _fit_text(report),
        "instances": _instances_text(report),
        "count_rows": _count_rows(report),
        "time_rows": _time_rows(report),
    }


def cautions(report: Report) -> list[str]:
    """What a reader must know before quoting a figure."""
    counts, data = report.counts, report.dataset
    lines = remarks(report)
    if data.limit is not None and counts.scored < data.counts.get("expressions", counts.scored):
        lines.append(
            f"Only {counts.scored} of the split's {data.counts['expressions']} expressions were "
            + told(f"scored ({setting('limit')}).")
        )
    if counts.failed:
        found = counted(counts.failed, "expression failed and is", "expressions failed and are")
        lines.append(f"{found} in no figure: see failures.jsonl.")
    absent = counted(counts.images_missing, "image is missing", "images are missing")
    if counts.skipped:
        found = counted(counts.skipped, "expression is", "expressions are")
        lines.append(f"{found} in no figure: {absent}.")
    elif counts.images_missing:
        lines.append(f"{absent}; pictures show masks only.")
    if counts.surplus:
        found = counted(counts.surplus, "prediction belongs", "predictions belong")
        lines.append(f"{found} to no expression of this split.")
    if counts.doubled:
        found = counted(counts.doubled, "prediction")
        lines.append(f"{found} came a second time; the first was scored.")
    if counts.malformed:
        found = counted(counts.malformed, "line")
        lines.append(f"{found} of the predictions could not be read.")
    if counts.unscored:
        found = counted(counts.unscored, "expression without", "expressions without")
        lines.append(f"{found} a known truth: in no figure.")
    return [*lines, *data.count_differences, *data.notes]


def remarks(report: Report) -> list[str]:
    """What makes figures say less than they seem to: answers missing or all alike, few images."""
    counts, lines = report.counts, list(report.answers.remarks)
    if counts.missing:
        lacking = "has no answer and scores" if counts.missing == 1 else "have no answer and score"
        lines.append(f"{counts.missing} of {counted(counts.scored, 'expression')} {lacking} zero.")
    n_acc, t_acc = (report.figures[name].value for name in ("n_acc", "t_acc"))
    if t_acc is not None and _at_most(t_acc, counts.scored - counts.no_target, counts) < (
        MOSTLY_NOTHING
    ):
        lines.append(
            f"Nearly every expression with a target was answered “no target” (T-acc "
            f"{percent(t_acc)}): gIoU and N-acc are no merit here."
            if t_acc <= DEGENERATE
            else f"Most expressions with a target were answered “no target” (T-acc "
            f"{percent(t_acc)}): what gIoU and N-acc gain by that is lost there."
        )
    if n_acc is not None and _at_most(n_acc, counts.no_target, counts) <= DEGENERATE:
        lines.append(
            f"Hardly any expression without a target was answered “no target” (N-acc "
            f"{percent(n_acc)}): these answers never say that nothing fits."
        )
    if counts.images < LEAST_IMAGES:
        lines.append(
            f"{counted(counts.images, 'image is', 'images are')} too few for intervals and "
            f"p-values; they are given from {LEAST_IMAGES} images on."
        )
    return lines


def _at_most(accuracy: float, of: int, counts: CountsPart) -> float:
    """What N-acc or T-acc would be had every missing answer been right: no answer is no habit."""
    return accuracy + counts.missing / of if of else accuracy


def _instances_text(report: Report) -> str:
    """Which instances an answer is made of, where the model tells them apart."""
    threshold = report.answers.instance_threshold
    above = "" if threshold is None else f" scored above {threshold:g}"
    return f"{'best' if report.answers.instances == 'best' else 'union'} of instances{above}"


def _fit_text(report: Report) -> str:
    fit = report.no_target_fit
    if fit is None:
        return ""
    stored = f" It is stored in {fit.stored_in}." if fit.stored_in else " It was not stored."
    return (
        f"Fitted on this split ({fit.criterion}): {fit.threshold:.4g} instead of {fit.before:.4g}, "
        f"with N-acc {percent(fit.n_acc)}, T-acc {percent(fit.t_acc)} and gIoU "
        f"{percent(fit.giou)} here.{stored} Figures on the split it was fitted on are "
        "optimistic: quote them from another one. The figures above are at the threshold before."
    )


def _count_rows(report: Report) -> list[tuple[str, str]]:
    labels = {
        "images": "images",
        "scored": "expressions scored",
        "no_target": "of them without a target",
        "missing": "of them without an answer (score zero)",
        "surplus": "predictions for no expression",
        "doubled": "predictions given twice",
        "malformed": "unreadable lines of predictions",
        "unscored": "expressions without a known truth",
        "failed": "expressions that failed",
        "skipped": "expressions whose image is missing",
        "images_missing": "images not found",
        "overlapping": "expressions with pixels under several polygons of one object",
    }
    counts = report.counts.model_dump()
    always = ("images", "scored", "no_target", "missing")
    return [(labels[k], f"{v:,}") for k, v in counts.items() if v or k in always]


def _time_rows(report: Report) -> list[tuple[str, str]]:
    timing = report.timing
    stages = [
        ("reading and decoding images", timing.decode),
        ("encoding images", timing.encode),
        ("decoding masks", timing.decode_mask),
        ("scoring", timing.score),
        ("whole run", timing.total),
    ]
    rows = [(f"{label}, s", f"{s:.2f}") for label, s in stages if s is not None]
    return [*rows, ("expressions a second", f"{timing.expressions_per_second:.1f}")]


def shown_slices(report: Report) -> list[SlicePart]:
    """The slices that part this run's expressions at all."""
    return [part for part in report.slices if len(part.levels) > 1]


def _plots(report: Report) -> dict[str, Any]:
    plots: dict[str, Any] = {"slices": {}}
    overall = report.figures["miou"].value
    for part in shown_slices(report):
        rows = []
        for level in part.levels[:_PLOTTED_CATEGORIES]:
            figure = level.figures["miou"]
            note = f"{percent(figure.value, 1)}  n={level.expressions}"
            rows.append(_bar(level.label, figure.value, figure.low, figure.high, note))
        line = _hundred(overall)
        plots["slices"][part.name] = svg.dot_plot(rows, "mIoU, %", high=100.0, line=line)
    curves = report.curves
    plots["histogram"] = svg.histogram(curves.iou_histogram, "IoU", "share of expressions")
    if curves.risk_coverage is not None:
        xs, ys = curves.risk_coverage.coverage, curves.risk_coverage.risk
        high = max(0.05, min(1.0, max(ys) * 1.1))
        plots["risk"] = svg.curve(
            xs, ys, "coverage (answers of highest score)", "risk (mean of 1 − IoU)", y_high=high
        )
    if curves.no_target:
        points = curves.no_target
        plots["no_target"] = svg.curve(
            [p.t_acc for p in points],
            [p.n_acc for p in points],
            "T-acc",
            "N-acc",
            marks=_no_target_marks(report),
        )
    if report.comparison is not None:
        plots["changes"] = _change_plot(report)
    return plots


def _no_target_marks(report: Report) -> list[svg.Mark]:
    marks = []
    figures = report.figures
    n_acc, t_acc = figures["n_acc"].value, figures["t_acc"].value
    threshold, counts = report.answers.no_target_threshold, report.answers.instance_threshold
    if n_acc is not None and t_acc is not None and threshold is not None:
        own = f"{threshold:.3g}" if counts is None else f"instances above {counts:.3g}"
        marks.append(svg.Mark(t_acc, n_acc, f"in use: {own}"))
    if report.no_target_fit is not None:
        fit = report.no_target_fit
        marks.append(svg.Mark(fit.t_acc, fit.n_acc, f"fitted: {fit.threshold:.3g}"))
    return marks


def _change_plot(report: Report) -> Any:
    assert report.comparison is not None
    changes = report.comparison.figures
    bars = [
        _bar(label, c.difference, c.low, c.high, signed(c.difference))
        for name, label in labels_of(report).items()
        if (c := changes.get(name)) is not None
    ]
    ends = [abs(e) for bar in bars for e in (bar.value, bar.low, bar.high) if e is not None]
    reach = min(100.0, max(2.0, max(ends, default=0.0) * 1.15))
    axis = "change (this − other), per cent points"
    return svg.dot_plot(bars, axis, low=-reach, high=reach, line=0.0)


def _bar(
    label: str, value: float | None, low: float | None, high: float | None, note: str
) -> svg.Bar:
    return svg.Bar(label, _hundred(value), _hundred(low), _hundred(high), note)


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _cell(value: object) -> str:
    """Text of others inside a Markdown table: one line, no HTML, no table bars."""
    line = sanitize(" ".join(str(value).split()))
    for character in "\\`*_[]|":
        line = line.replace(character, f"\\{character}")
    return html.escape(line, quote=False)


def _css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


# --- numbers as people read them, and the table that a run prints ---------------------------------

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


def figure_labels(
    values: Sequence[Mapping[str, float | None]], *, no_target: bool
) -> dict[str, str]:
    """The figures of one or several runs with their labels, none of them twice.

    cIoU is oIoU by definition, and gIoU is mIoU where every expression has a target: there both are
    left out. Where some have none, a name that repeats another is put to it.

    Args:
        values: of each run, by figure.
        no_target: whether some expression has no target.
    """
    labels = {name: NAMES[name] for name in (values[0] if values else ())}
    for name, twin in (("oiou", "ciou"), ("miou", "giou")):
        if {name, twin} <= labels.keys() and all(run[name] == run[twin] for run in values):
            del labels[twin]
            if no_target:
                labels[name] = f"{NAMES[name]} = {NAMES[twin]}"
    return labels


def labels_of(report: Report) -> dict[str, str]:
    """The figures of a report with their labels; those of a comparison are the same."""
    runs = [{name: figure.value for name, figure in report.figures.items()}]
    if report.comparison is not None:
        for side in ("other", "this"):
            changes = report.comparison.figures.items()
            runs.append({name: getattr(change, side) for name, change in changes})
    runs = [run for run in runs if run.keys() >= runs[0].keys()]
    return figure_labels(runs, no_target=report.counts.no_target > 0)


def interval(figure: Figure) -> str:
    """The interval of a figure in per cent, or why there is none."""
    if figure.low is not None and figure.high is not None:
        return f"{percent(figure.low)} – {percent(figure.high)}"
    return "–" if figure.value is None else _no_interval(figure.images)


def _no_interval(images: int | None) -> str:
    if images is None:
        return "–"
    return "too few images" if images < LEAST_IMAGES else "all images alike"


def signed(value: float | None) -> str:
    """A difference of fractions in per cent points, with its sign."""
    return "–" if value is None else f"{100 * value:+.2f}"


def probability(value: float | None) -> str:
    """A p-value."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def change_interval(change: ChangePart) -> str:
    """The interval of a difference, or why there is none."""
    if change.low is not None and change.high is not None:
        return f"{signed(change.low)} … {signed(change.high)}"
    return "–" if change.difference is None else _no_interval(change.images)


def title(report: Report) -> str:
    """What was scored on what, in one line; with who made the splits, where several did."""
    data = report.dataset
    several = len(SPLIT_BY.get(data.name, ())) > 1
    by = f" ({data.split_by})" if several and data.split_by else ""
    part = ""
    if data.only_every is not None:
        part = f", only one image in {data.only_every}"
    elif data.leave_out_every is not None:
        part = f", all but one image in {data.leave_out_every}"
    return f"{report.answers.name} on {data.name} {data.split}{by}{part}"


def console_table(report: Report) -> str:
    """The headline as a table of plain text."""
    counts = report.counts
    lines = [
        f"{title(report)}, protocol {report.protocol.name}: "
        f"{counted(counts.scored, 'expression')}, "
        f"{counts.no_target} of them without a target, {counted(counts.images, 'image')}",
        f"{'figure':<11} {'%':>7}   95 % interval",
    ]
    labels = labels_of(report)
    for name, label in labels.items():
        figure = report.figures[name]
        lines.append(f"{label:<11} {percent(figure.value):>7}   {interval(figure)}")
    if report.comparison is not None:
        other = report.comparison
        lines += [
            "",
            f"against {other.other_name} on {other.shared} shared expressions",
            f"{'figure':<11} {'change':>7}   {'95 % interval':<18} p",
        ]
        for name, label in labels.items():
            if (change := other.figures.get(name)) is None:
                continue
            lines.append(
                f"{label:<11} {signed(change.difference):>7}   "
                f"{change_interval(change):<18} {probability(change.p)}"
            )
    return "\n".join(lines)


# --- cases as small pictures ----------------------------------------------------------------------

TRUTH = (86, 180, 233)
"""Sky blue of Okabe and Ito's palette, told apart from the other by every kind of eye."""
ANSWER = (230, 159, 0)
"""Orange of the same palette."""

_SIDE = 320
_PLAIN = 96  # gray of the ground where the image is not at hand


@dataclass(frozen=True, slots=True)
class Picture:
    """One case, drawn.

    Attributes:
        uri: the image as a ``data:`` address of a WebP file.
        width, height: of the picture in pixels.
        truth, answer: outlines as SVG path data; empty where there is no pixel.
        note: why the image itself is not shown, or empty.
    """

    case: Case
    uri: str
    width: int
    height: int
    truth: str
    answer: str
    note: str = ""


def draw_case(case: Case, bands: Bands | None = None) -> Picture:
    """A case as a picture; where its image cannot be read, on plain ground, and it says so."""
    height, width = case.target["size"]
    scale = _SIDE / max(height, width)
    small = max(1, round(width * scale)), max(1, round(height * scale))
    note = ""
    try:
        rgb = open_rgb(case.path, bands=bands)
        if rgb.shape[:2] != (height, width):
            note = f"the image is {rgb.shape[0]}x{rgb.shape[1]}, its masks {height}x{width}"
    except ImageError:
        rgb = np.full((small[1], small[0], 3), _PLAIN, np.uint8)
        note = "image not at hand"
    how = cv2.INTER_AREA if rgb.shape[0] > small[1] else cv2.INTER_CUBIC
    canvas = np.asarray(cv2.resize(rgb, small, interpolation=how), np.uint8)
    answer = "" if case.answered_none else outline(case.prediction, small)
    return Picture(case, webp_uri(canvas), *small, outline(case.target, small), answer, note)
