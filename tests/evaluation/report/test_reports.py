"""Reports: the documented schema, one file that opens offline, and nothing in it that runs."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pydantic import ValidationError
from support.eval_files import box_mask, image_file

from risam_cli.data.readers.predictions import Answer
from risam_cli.drawing import svg
from risam_cli.evaluation.report import render
from risam_cli.evaluation.report.assemble import Done, assemble, gallery, write_reports
from risam_cli.evaluation.report.render import (
    ANSWER,
    TRUTH,
    draw_case,
    remarks,
    to_html,
    to_json,
    to_markdown,
)
from risam_cli.evaluation.report.schema import (
    AnswersPart,
    ChangedExpression,
    ChangePart,
    ComparisonPart,
    CountsPart,
    DatasetPart,
    Figure,
    NoTargetFitPart,
    Report,
    TimingPart,
)
from risam_cli.evaluation.scoring import Answered, Case, EvalRun, Scored, Scorer, pick_cases
from risam_cli.files.folder import OutputFolder
from risam_cli.masks import rle as masks
from risam_cli.metrics.protocols import get_protocol
from risam_cli.types import Expression, Sample

HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> | `x` {{ 7*7 }} \" ' & \u202e"
SIZE = (40, 60)


def _scored(folder: Path, hostile: str = "the red one") -> tuple[Scored, Path]:
    """Thirty images with four expressions each, good and bad answers."""
    rng = np.random.default_rng(0)
    rows: list[str] = []
    scorer = Scorer(get_protocol("native"), rows.append)
    for k in range(30):
        image = folder / f"{k}.png"
        image_file(image, SIZE, k)
        expressions, answers = [], []
        for j in range(4):
            true = box_mask((5, 5, 25, 25), size=SIZE) if j else np.zeros(SIZE, bool)
            predicted = box_mask((5, 5, 25, int(rng.integers(6, 30))), size=SIZE)
            words = hostile if j == 1 else "the large thing next to the left one"
            attributes = {"referents": int(j > 0), "category": hostile if j else f"c{k}"}
            expressions.append(Expression(f"{k}-{j}", words, masks.encode(true), not j, attributes))
            probability = float(rng.random())
            answers.append(
                Answer(masks.encode(predicted), probability > 0.5, float(rng.random()), probability)
            )
        sample = Sample(f"{hostile}/{k}.png", image, tuple(expressions), SIZE)
        scorer.add(Answered(sample, tuple(answers)))
    scored = scorer.finish()
    path = folder / "per_expression.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return scored, path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Any]:
    """A report with every part in it, all texts hostile, and its pictures."""
    folder = tmp_path_factory.mktemp("report")
    scored, rows = _scored(folder, HOSTILE)
    dataset = DatasetPart(name=HOSTILE, split="val", notes=[HOSTILE], limit=120)
    done = Done(
        EvalRun(scored, 4.0, rows),
        answers=AnswersPart(
            kind="model", name=HOSTILE, sha256="0" * 64, no_target_threshold=0.5, device="cpu"
        ),
        counts=CountsPart(images=30, scored=120, no_target=30, missing=1, surplus=2, failed=3),
        timing=TimingPart(
            decode=1, encode=2, decode_mask=3, score=0.5, total=4, expressions_per_second=30
        ),
        no_target_fit=NoTargetFitPart(
            threshold=0.4, before=0.5, n_acc=0.9, t_acc=0.8, giou=0.7, stored_in="model"
        ),
    )
    command = ["risam", "eval", HOSTILE]
    report = assemble(command, dataset, get_protocol("native"), done, None)
    change = ChangePart(other=0.5, this=0.6, difference=0.1, low=-0.01, high=0.2, p=0.04)
    moved = ChangedExpression(id="1", image=HOSTILE, expression=HOSTILE, other=0.0, this=1.0)
    comparison = ComparisonPart(
        other_name=HOSTILE,
        other_protocol="lavt",
        shared=120,
        only_this=0,
        only_other=0,
        figures=dict.fromkeys(report.figures, change),
        better=[moved],
        worse=[moved],
        remarks=[HOSTILE],
    )
    return report.model_copy(update={"comparison": comparison}), gallery(scored)


class _Reader(HTMLParser):
    """Collects tags, attributes and whether every opened tag is closed."""

    VOID = frozenset(("meta", "img", "br", "line", "circle", "polyline", "rect", "image", "path"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return  # <rect> with a title inside
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_shows_hostile_text_and_runs_none_of_it(made: Any) -> None:
    page = to_html(*made)
    reader = _read(page)
    tags = {tag for tag, _ in reader.seen}
    assert not tags & {"script", "iframe", "object", "embed", "link", "form", "base"}
    for tag, attributes in reader.seen:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "src" not in attributes
        if "href" in attributes:
            assert tag == "image"
            assert (attributes["href"] or "").startswith("data:image/webp;base64,")
    assert page.count("<script") == 0
    shown = " ".join(reader.words)
    assert "<script>alert(1)</script>" in shown
    assert "{{ 7*7 }}" in shown
    assert "49" not in re.findall(r"\b49\b", shown[: shown.index("Figures")])


def test_the_page_needs_nothing_else(made: Any) -> None:
    page = to_html(*made)
    without_pictures = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", without_pictures)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_holds_every_part(made: Any) -> None:
    report, pictures = made
    page = html.unescape(to_html(report, pictures))
    for words in (
        "Figures",
        "Curves",
        "Slices",
        "Worst",
        "Best",
        "Drawn at random",
        "Risk against coverage",
        "N-acc against T-acc",
        "Expression length",
        "Most worsened",
        "fitted: 0.4",
        "has no answer and scores zero.",
    ):
        assert words in page, words
    assert report.protocol.definition.split(">")[0] in page
    assert {len(shown) for shown in pictures.values()} == {12}
    for name, figure in report.figures.items():
        assert render.percent(figure.value) in page, name


def test_figures_undefined_are_dashes(made: Any) -> None:
    report, _ = made
    figures = {
        **report.figures,
        "n_acc": report.figures["n_acc"].model_copy(update={"value": None}),
    }
    page = to_markdown(report.model_copy(update={"figures": figures}))
    assert "| N-acc | – |" in page


def test_markdown_tables_stay_tables(made: Any) -> None:
    page = to_markdown(made[0])
    assert "<script" not in page
    assert "<img" not in page
    tables = re.findall(r"(?:^\|.*\|$\n?)+", page, re.M)
    assert len(tables) > 8
    for table in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1, table


def test_json_is_the_documented_schema(made: Any, repo: Path) -> None:
    report, _ = made
    content = json.loads(to_json(report))
    assert content["schema_version"] == 1
    assert Report.model_validate(content) == report
    assert "NaN" not in to_json(report)
    written = json.loads((repo / "docs/report.schema.json").read_text())
    assert written == Report.model_json_schema(), "run: python docs/generate_schema.py"


def test_the_example_is_a_report_of_this_version(repo: Path) -> None:
    folder = repo / "docs/example-report"
    report = Report.model_validate_json((folder / "report.json").read_bytes())
    assert to_markdown(report) == (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_every_field_of_the_report_is_documented(repo: Path) -> None:
    page = (repo / "docs/eval.md").read_text(encoding="utf-8")
    names = set(Report.model_fields)
    names |= set(CountsPart.model_fields) | set(ComparisonPart.model_fields)
    missing = [name for name in sorted(names) if f"`{name}`" not in page]
    assert missing == []


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"surprise": 1},
        {"figures": {"miou": {"value": 1.5}}},
        {"counts": {"images": 1}},
    ],
)
def test_other_shapes_are_refused(made: Any, change: dict[str, Any]) -> None:
    content = {**json.loads(to_json(made[0])), **change}
    with pytest.raises(ValidationError):
        Report.model_validate(content)


def test_lone_surrogates_do_not_stop_a_report(tmp_path: Path, made: Any) -> None:
    report, pictures = made
    odd = report.model_copy(update={"command": ["risam", "\ud800"]})
    with OutputFolder(tmp_path, "eval", ()) as folder:
        write_reports(folder, odd.model_copy(update={"command": ["x"]}), pictures)
        names = sorted(p.name for p in folder.staging.iterdir())
    assert names == ["report.html", "report.json", "report.md"]
    page = to_html(odd, pictures)
    (tmp_path / "odd.html").write_text(page, encoding="utf-8", errors="backslashreplace")


# --- pictures -------------------------------------------------------------------------------------


def _case(path: Path, **more: Any) -> Case:
    fields: dict[str, Any] = {
        "id": "1",
        "image": "a.png",
        "path": path,
        "expression": "it",
        "iou": 0.5,
        "score": math.nan,
        "target": masks.encode(box_mask((5, 5, 25, 30), size=SIZE)),
        "prediction": masks.encode(box_mask((30, 5, 55, 30), size=SIZE)),
        "gt_no_target": False,
        "answered_none": False,
    }
    return Case(**{**fields, **more})


def _pixels(uri: str) -> np.ndarray[Any, Any]:
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int64)


def _filled(path: str, width: int, height: int) -> np.ndarray[Any, Any]:
    """The area of an SVG path of straight lines, filled by the even-odd rule."""
    total = np.zeros((height, width), bool)
    for ring in re.findall(r"M([^Z]+)Z", path):
        points = [tuple(int(v) for v in point.split(",")) for point in ring.split()]
        canvas = Image.new("1", (width, height))
        ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
        total ^= np.array(canvas)
    return total


def test_outlines_are_those_of_the_masks(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (60, 40), (40, 90, 140)).save(path)
    made, none = (draw_case(one) for one in (_case(path), _case(path, answered_none=True)))
    assert _pixels(made.uri).shape == (made.height, made.width, 3) == (213, 320, 3)
    assert np.abs(_pixels(made.uri) - (40, 90, 140)).max() < 8  # nothing is painted on the image
    scale = 320 / 60
    for outline, box in ((made.truth, (5, 5, 25, 30)), (made.answer, (30, 5, 55, 30))):
        expected = np.zeros((213, 320), bool)
        x0, y0, x1, y1 = (round(v * scale) for v in box)
        expected[y0:y1, x0:x1] = True
        found = _filled(outline, 320, 213)
        assert (found & expected).sum() / (found | expected).sum() > 0.97
    assert none.truth == made.truth
    assert none.answer == ""


def test_holes_are_outlined_too(tmp_path: Path) -> None:
    ring = box_mask((5, 5, 35, 35), size=SIZE) & ~box_mask((15, 15, 25, 25), size=SIZE)
    made = draw_case(_case(tmp_path / "none.png", target=masks.encode(ring)))
    assert made.truth.count("M") == 2
    found = _filled(made.truth, 320, 213)
    assert found.sum() / ring.sum() == pytest.approx((320 / 60) ** 2, rel=0.08)


def test_pictures_without_their_image_say_so(tmp_path: Path) -> None:
    gone = draw_case(_case(tmp_path / "none.png"))
    assert gone.note == "image not at hand"
    assert gone.truth
    path = tmp_path / "other.png"
    Image.new("RGB", (60, 50)).save(path)
    assert "50x60" in draw_case(_case(path)).note


def test_a_target_of_one_pixel_is_still_drawn(tmp_path: Path) -> None:
    tiny = np.zeros((3000, 2000), bool)
    tiny[1500, 1000] = True
    nothing = masks.empty((3000, 2000))
    case = _case(tmp_path / "none.png", target=masks.encode(tiny), prediction=nothing)
    made = draw_case(case)
    found = np.argwhere(_filled(made.truth, made.width, made.height))
    assert len(found) > 0
    assert np.abs(found.mean(axis=0) - (160, 106.5)).max() < 2
    assert made.answer == ""


def test_truth_and_answer_have_colours_of_their_own(made: Any) -> None:
    page = to_html(*made)
    for name, color in (("truth", TRUTH), ("answer", ANSWER)):
        assert f".{name} {{ --swatch: #{bytes(color).hex()}; }}" in page
        assert f'class="outline {name}"' in page


def test_cases_are_of_different_images_where_there_are_enough(tmp_path: Path) -> None:
    cases = [_case(tmp_path, id=str(k), image=f"{k // 3}.png") for k in range(9)]
    assert [c.id for c in pick_cases(cases, 3)] == ["0", "3", "6"]
    assert [c.id for c in pick_cases(cases, 5)] == ["0", "1", "3", "4", "6"]
    assert len(pick_cases(cases, 99)) == 9


def test_the_gallery_takes_the_worst_and_the_best(tmp_path: Path) -> None:
    scored, _ = _scored(tmp_path)
    lines = (tmp_path / "per_expression.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    ious = sorted(row["iou"] for row in rows)
    assert [c.iou for c in scored.worst] == ious[:60]
    with_target = sorted((row["iou"] for row in rows if not row["gt_no_target"]), reverse=True)
    assert [c.iou for c in scored.best] == with_target[:60]
    assert len({c.id for c in scored.typical}) == 60


# --- plots and numbers ----------------------------------------------------------------------------


def test_plots_put_values_where_they_belong() -> None:
    plot = svg.dot_plot([svg.Bar("<a>", 25.0, 0.0, 100.0, "n=1")], "mIoU, %", high=100.0, line=50.0)
    _read(f"<div>{plot}</div>")
    assert "&lt;a&gt;" in plot
    left, right = 156, 500 - 92
    centre = float(re.search(r'<circle cx="([\d.]+)"', plot)[1])  # type: ignore[index]
    assert centre == pytest.approx(left + 0.25 * (right - left), abs=0.1)
    ends = re.findall(
        r'<line x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)" y2="[\d.]+" class="whisker"', plot
    )
    assert (float(ends[0][0]), float(ends[0][1])) == (left, right)
    bar = svg.dot_plot([svg.Bar("a", 200.0, None, None)], "x", high=100.0)
    assert f'cx="{right:.1f}"' in bar  # kept inside the axis
    assert svg.histogram([0, 0], "x", "y") == ""
    _read(f"<div>{svg.histogram([1, 3], 'IoU', 'share')}</div>")
    _read(f"<div>{svg.curve([0, 1], [0, 1], 'x', 'y', marks=[svg.Mark(0.5, 0.5, '<m>')])}</div>")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 100), (-2, 2), (-37.3, 37.3), (0, 0.05)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    ticks = svg._ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low <= t <= high + 1e-9 for t in ticks)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


def test_numbers_as_people_read_them() -> None:
    assert render.percent(0.12345) == "12.35" or render.percent(0.12345) == "12.34"
    assert render.percent(None) == "–"
    assert render.signed(-0.01) == "-1.00"
    assert render.signed(0.01) == "+1.00"
    assert render.probability(0.0004) == "< 0.001"
    assert render.probability(None) == "–"


def test_no_page_holds_what_a_terminal_obeys(made: Any) -> None:
    report, pictures = made
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ename.png"
    report = report.model_copy(
        update={
            "dataset": report.dataset.model_copy(update={"name": evil, "split": evil}),
            "answers": report.answers.model_copy(update={"name": evil}),
        }
    )
    for page in (to_markdown(report), to_html(report, pictures)):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
        assert "x1b" in page
    assert "\u202e" not in to_markdown(report)
    assert evil in json.loads(to_json(report))["answers"]["name"]


@pytest.mark.parametrize(
    ("t_acc", "n_acc", "told"),
    [
        (0.5, 0.02, []),
        (None, 0.5, []),
        (0.0, 1.0, ["Nearly every expression with a target was answered “no target” (T-acc 0.00)"]),
        (0.31, 1.0, ["Most expressions with a target were answered “no target” (T-acc 31.00)"]),
        (1.0, 0.0, ["Hardly any expression without a target was answered “no target”"]),
    ],
)
def test_answers_that_are_mostly_nothing_or_never_are_told(
    made: Any, t_acc: float | None, n_acc: float, told: list[str]
) -> None:
    changed = {"t_acc": Figure(value=t_acc), "n_acc": Figure(value=n_acc)}
    counts = made[0].counts.model_copy(update={"missing": 0})
    report = made[0].model_copy(
        update={"figures": {**made[0].figures, **changed}, "counts": counts}
    )
    lines = remarks(report)
    assert len(lines) == len(told)
    assert all(line.startswith(start) for line, start in zip(lines, told, strict=True))


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (0, ["Nearly every", "Hardly any"]),
        (3, ["3 of 6 expressions have no answer and score zero."]),
    ],
)
def test_a_missing_answer_is_not_told_as_no_target(
    made: Any, missing: int, told: list[str]
) -> None:
    nothing = Figure(value=0.0)
    report = made[0].model_copy(
        update={
            "figures": {**made[0].figures, "t_acc": nothing, "n_acc": nothing},
            "counts": made[0].counts.model_copy(
                update={"scored": 6, "no_target": 2, "missing": missing}
            ),
        }
    )
    lines = remarks(report)
    assert len(lines) == len(told)
    assert all(line.startswith(start) for line, start in zip(lines, told, strict=True))
