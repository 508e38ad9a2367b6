"""``training.html``: a training run to look at, out of what it left in its folder."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from risam_cli.drawing import svg
from risam_cli.drawing.html import page_environment
from risam_cli.files.jsonlines import load_json
from risam_cli.files.safe_yaml import load_yaml
from risam_cli.files.write import write_file
from risam_cli.training.log import INDEX, METRICS, PICTURES, read_rows
from risam_cli.version import __version__

PAGE = "training.html"

_POINTS = 400  # of a curve; more are not seen
_COLUMNS = 5  # answers of an example, from the first validation to the last
_NAMES = {
    "miou": "mIoU",
    "oiou": "oIoU",
    "giou": "gIoU",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
    "pr@0.5": "Pr@0.5",
    "pr@0.9": "Pr@0.9",
}
_NO_CURVE = {"kind", "stage", "name", "step", "seconds", "expressions"}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage: its curves and how it ended."""

    name: str
    kind: str
    steps: int
    planned: int
    facts: str
    charts: Sequence[tuple[str, Markup, Sequence[str]]]
    ended: str = ""


@dataclass(frozen=True, slots=True)
class Sight:
    """A fixed example: the truth and the answers after some steps, as ``data:`` addresses."""

    text: str
    image: str
    held_out: str
    truth: str
    answers: Sequence[tuple[str, str]] = field(default_factory=list)


def write_page(folder: Path, command: Sequence[str], outcome: str) -> Path:
    """Writes ``training.html`` of a run that has ended, however it did.

    Args:
        folder: the run's; command: as it was typed; outcome: how the run ended, in words.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / PAGE
    page = to_html(folder, command, outcome)
    write_file(path, page)
    return path


def to_html(folder: Path, command: Sequence[str], outcome: str) -> str:
    """The page as one HTML file that needs nothing else; see :func:`write_page`."""
    rows = [row for _, row in read_rows(folder / METRICS)]
    resolved = (folder / "config.resolved.yaml").read_text(encoding="utf-8")
    settings = load_yaml(resolved)
    best, names = _best(rows), _names(rows)
    environment = page_environment("risam_cli.training")
    environment.filters["percent"] = lambda v: "–" if v is None else f"{100 * v:.2f}"
    page = environment.get_template("training.html.j2").render(
        settings=settings,
        resolved=resolved,
        command=command,
        outcome=outcome,
        version=__version__,
        last=rows[-1] if rows else None,
        duration=_duration(rows[-1]["seconds"]) if rows else "",
        best=best,
        cards=_cards(rows, best),
        table=_table(best, names),
        names=names,
        stages=[
            _stage(number, stage, rows, best, settings.get("best_by", "miou"), names)
            for number, stage in enumerate(settings["stages"])
        ],
        sights=_sights(folder / PICTURES, best),
        colors=svg.LINE_COLORS,
    )
    return page.rstrip() + "\n"


def _best(rows: Sequence[Row]) -> Row | None:
    """The validation that ``best/`` is from: the first of the highest."""
    scored = [r for r in rows if r["kind"] in ("val", "average") and r.get("best", -1) >= 0]
    return max(scored, key=lambda r: r["best"], default=None)


def _names(rows: Sequence[Row]) -> Mapping[str, str]:
    """The figures to show, with their names: without gIoU where it never differs from mIoU."""
    pairs = (
        (row[key], row.get(f"{key.removesuffix('giou')}miou"))
        for row in rows
        for key in row
        if key.endswith(".giou")
    )
    return {k: name for k, name in _NAMES.items() if k != "giou" or any(a != b for a, b in pairs)}


def _cards(rows: Sequence[Row], best: Row | None) -> list[tuple[str, str, str]]:
    """(name, value, remark)."""
    cards = []
    if best is not None:
        what = "average" if best["kind"] == "average" else best["name"]
        cards.append(("best figure", f"{best['best']:.4f}", f"{what}, step {best['step']:,}"))
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    if losses:
        cards.append(("last loss", f"{losses[-1]:.3f}", f"first {losses[0]:.3f}"))
    if rows and rows[-1]["seconds"] > 0:
        last = rows[-1]
        rate = last["expressions"] / last["seconds"]
        cards.append(("expressions a second", f"{rate:.3g}", "validation counted in"))
        cards.append(("expressions seen", f"{last['expressions']:,}", ""))
    return cards


def _table(best: Row | None, names: Mapping[str, str]) -> list[tuple[str, list[float | None]]]:
    """Figures of each validation set at the best validation, in the order of ``names``."""
    if best is None:
        return []
    sets = list(dict.fromkeys(key[: -len(".miou")] for key in best if key.endswith(".miou")))
    return [(name, [best.get(f"{name}.{figure}") for figure in names]) for name in sets]


def _stage(
    number: int,
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    best: Row | None,
    best_by: str,
    names: Mapping[str, str],
) -> StageView:
    own = [r for r in rows if r["stage"] == number]
    train = [r for r in own if r["kind"] == "train"]
    held_out = [r for r in own if r["kind"] == "val"]
    stopped = [r for r in own if r["kind"] == "stop"]
    facts = [f"{settings['images_per_step']} images a step"]
    if settings.get("accumulate", 1) > 1:
        facts.append(f"in {settings['accumulate']} parts")
    facts.append(f"learning rate {settings['learning_rate']:g}")
    if settings["kind"] == "referring":
        facts.append(f"image encoder trained: {settings['train_encoder']}")
    steps = max((r["step"] for r in own), default=0)
    ended = f"ended early, after step {stopped[-1]['step']:,}" if stopped else ""
    charts = [*_train_charts(train), *_validation_charts(held_out, number, best, best_by, names)]
    return StageView(
        settings["name"],
        settings["kind"],
        steps,
        settings["steps"],
        ", ".join(facts),
        charts,
        ended,
    )


def _train_charts(rows: Sequence[Row]) -> list[tuple[str, Markup, list[str]]]:
    if not rows:
        return []
    steps = [r["step"] for r in rows]
    losses = [r["loss"] for r in rows]
    smooth = _smoothed(losses)
    high = max(smooth) * 1.15
    raw = svg.Line("as logged", *_thinned(steps, losses), faint=True)
    curve = svg.Line("running mean", *_thinned(steps, smooth))
    charts: list[tuple[str, Markup, list[str]]]
    charts = [("Loss", svg.lines([raw, curve], "step", "loss", y_high=high), [])]
    parts = [k for k in rows[0] if k not in _NO_CURVE | {"loss", "lr"}]
    series = [svg.Line(k, *_thinned(steps, _smoothed([r[k] for r in rows]))) for k in parts]
    if series:
        charts.append(("On the training batches", svg.lines(series, "step", "figure"), parts))
    rate = svg.Line("rate", *_thinned(steps, [r["lr"] for r in rows]))
    charts.append(("Learning rate", svg.lines([rate], "step", "learning rate"), []))
    return charts


def _validation_charts(
    rows: Sequence[Row], stage: int, best: Row | None, best_by: str, names: Mapping[str, str]
) -> list[tuple[str, Markup, list[str]]]:
    if not rows:
        return []
    steps = [r["step"] for r in rows]
    marks = []
    if best is not None and best["stage"] == stage and best["kind"] == "val":
        marks = [svg.Mark(best["step"], best["best"], f"best {best['best']:.4f}")]
    if best is None or rows[-1]["best"] < 0:  # A dense stage: accuracies of its own.
        keys = [k for k in rows[0] if k not in _NO_CURVE | {"best", "watched"}]
        series = [_over(rows, steps, k, k) for k in keys]
        return [("Validation", svg.lines(series, "step", "figure"), keys)]
    series = [_over(rows, steps, "best", "best")]
    charts: list[tuple[str, Markup, list[str]]]
    charts = [
        (
            f"{_NAMES.get(best_by, best_by)}, which best/ goes by",
            svg.lines(series, "step", "figure", marks=marks),
            [],
        )
    ]
    for figure, name in names.items():
        keys = [k for k in rows[0] if k.endswith(f".{figure}")]
        series = [_over(rows, steps, k, k.removesuffix(f".{figure}")) for k in keys]
        series = [one for one in series if one.xs]
        if series:
            labels = [one.label for one in series]
            charts.append((name, svg.lines(series, "step", name, y_high=1.0), labels))
    return charts


def _over(rows: Sequence[Row], steps: Sequence[int], key: str, label: str) -> svg.Line:
    points = [(s, r[key]) for s, r in zip(steps, rows, strict=True) if r.get(key) is not None]
    return svg.Line(label, [s for s, _ in points], [y for _, y in points])


def _smoothed(values: Sequence[float]) -> list[float]:
    """A running mean over a fiftieth of the values."""
    width = max(1, len(values) // 50)
    out, total = [], 0.0
    for place, value in enumerate(values):
        total += value
        if place >= width:
            total -= values[place - width]
        out.append(total / min(place + 1, width))
    return out


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``_POINTS`` points: means of stretches."""
    size = -(-len(xs) // _POINTS)
    starts = range(0, len(xs), size)
    return (
        [sum(xs[k : k + size]) / len(xs[k : k + size]) for k in starts],
        [sum(ys[k : k + size]) / len(ys[k : k + size]) for k in starts],
    )


def _sights(folder: Path, best: Row | None) -> list[Sight]:
    """The fixed examples, as answered at a few validations from the first to the last."""
    if not (folder / INDEX).is_file():
        return []
    told = load_json((folder / INDEX).read_text(encoding="utf-8"))
    sights = []
    for one in told:
        found = sorted(folder.glob(f"{one['key']}-stage*-step*.webp"))
        answers = [(_step_of(path), _uri(path)) for path in _spread(found, best)]
        truth = _uri(folder / f"{one['key']}-truth.webp")
        sights.append(Sight(one["text"], one["image"], one["held_out"], truth, answers))
    return sights


def _spread(paths: Sequence[Path], best: Row | None) -> list[Path]:
    """``_COLUMNS`` of them, even, with the first, the last and the best."""
    if len(paths) <= _COLUMNS:
        return list(paths)
    chosen = {round(k * (len(paths) - 1) / (_COLUMNS - 1)) for k in range(_COLUMNS)}
    if best is not None:
        name = f"-stage{best['stage'] + 1}-step{best['step']:08d}.webp"
        place = next((k for k, path in enumerate(paths) if path.name.endswith(name)), None)
        inner = sorted(chosen - {0, len(paths) - 1})
        if place is not None and place not in chosen:
            chosen.remove(min(inner, key=lambda k: abs(k - place)))
            chosen.add(place)
    return [paths[k] for k in sorted(chosen)]


def _step_of(path: Path) -> str:
    _, stage, step = path.stem.rsplit("-", 2)
    return f"stage {stage.removeprefix('stage')}, step {int(step.removeprefix('step')):,}"


def _uri(path: Path) -> str:
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
