"""``risam compare``: any number of reports, paired with the first."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from risam_cli.cli import main
from risam_cli.masks import rle as masks
from risam_cli.metrics.slicer import parse_slice

Ask = Callable[..., str]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Answers that are right, half right on some images, and wrong on the first image."""
    root = tmp_path_factory.mktemp("compare")
    size, rng = (40, 60), np.random.default_rng(0)
    images, annotations, expressions, answers = [], [], [], []
    for number in range(12):
        images.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 60})
        for k in range(2):
            mask = np.zeros(size, bool)
            top, left = rng.integers(2, 15, 2)
            mask[top : top + 20, left : left + 30] = True
            place = 2 * number + k
            annotations.append(
                {
                    "id": place,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": masks.encode(mask),
                    "area": int(mask.sum()),
                    "bbox": [0, 0, 1, 1],
                }
            )
            expressions.append(
                {"id": f"e{place}", "image_id": number, "ann_ids": [place], "text": f"thing {k}"}
            )
            answers.append((number, f"e{place}", f"thing {k}", mask))
    data = root / "data.json"
    data.write_text(
        json.dumps(
            {
                "images": images,
                "annotations": annotations,
                "expressions": expressions,
                "categories": [{"id": 1, "name": "thing"}],
            }
        )
    )
    made = []
    for name in ("right", "half", "first"):
        lines = []
        for number, ident, text, mask in answers:
            shown = mask.copy()
            if name == "half" and number % 2:
                shown[:20] = False
            if name == "first" and number == 0:
                shown[:] = False
            record = {"id": ident, "image": f"{number}.png", "expression": text}
            record |= {"height": 40, "width": 60, "segmentation": masks.encode(shown)}
            lines.append(json.dumps(record | {"score": 0.5, "no_target": False}))
        records = root / f"{name}.jsonl"
        records.write_text("\n".join(lines) + "\n")
        arguments = ["eval", "--dataset", "coco", "--root", str(data)]
        arguments += ["--predictions", str(records), "-o", str(root / name)]
        assert main(arguments) == 0
        made.append(root / name)
    return made


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["compare", *map(str, arguments)]) == code
        seen = capsys.readouterr()
        return seen.out if code == 0 else seen.err

    return run


def rows(text: str) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["figure"], row["run"]): row for row in csv.DictReader(io.StringIO(text))}


def test_values_are_the_reports_own_and_changes_are_theirs(reports: list[Path], ask: Ask) -> None:
    found = rows(ask(*reports, "--to", "csv"))
    runs = list(dict.fromkeys(run for _, run in found))
    assert len(runs) == 3
    for folder, run in zip(reports, runs, strict=True):
        figures = json.loads((folder / "report.json").read_text())["figures"]
        # Every expression has a target: gIoU would repeat mIoU, and cIoU oIoU.
        assert {name for name, label in found if label == run} == figures.keys() - {"giou", "ciou"}
        for name, figure in figures.items():
            if name in ("giou", "ciou"):
                continue
            row = found[name, run]
            assert row["expressions"] == "24"
            assert row["images"] == "12"
            if figure["value"] is not None:
                assert float(row["value"]) == pytest.approx(figure["value"], abs=1e-12)
    first, half, one = runs
    assert found["miou", first]["difference"] == ""
    change = found["miou", half]
    before, after = (float(found["miou", run]["value"]) for run in (first, half))
    assert float(change["difference"]) == pytest.approx(after - before)
    assert float(change["low"]) < float(change["difference"]) < float(change["high"]) < 0
    assert float(change["p"]) < 0.01
    # All of the difference is in one image: draws without it show none.
    assert float(found["miou", one]["high"]) == 0
    assert float(found["miou", one]["p"]) > 0.05


def test_two_reports_are_compared_as_eval_compares_them(
    reports: list[Path], ask: Ask, tmp_path: Path
) -> None:
    root = reports[0].parent
    arguments = ["eval", "--dataset", "coco", "--root", str(root / "data.json")]
    arguments += ["--predictions", str(root / "half.jsonl"), "--compare", str(reports[0])]
    assert main([*arguments, "-o", str(tmp_path / "again")]) == 0
    theirs = json.loads((tmp_path / "again" / "report.json").read_text())["comparison"]["figures"]
    found = rows(ask(reports[0], reports[1], "--to", "csv"))
    run = [run for _, run in found][-1]
    for name in theirs.keys() - {"giou", "ciou"}:
        change = theirs[name]
        for key in ("difference", "low", "high", "p"):
            row = found[name, run][key]
            assert (None if row == "" else float(row)) == change[key]


def test_every_form_says_the_same(reports: list[Path], ask: Ask) -> None:
    value = float(next(iter(rows(ask(*reports, "--to", "csv")).values()))["value"])
    for form, mark in (("text", "mIoU"), ("md", "| mIoU |"), ("latex", r"\toprule")):
        table = ask(*reports, "--to", form)
        assert mark in table
        assert f"{100 * value:.2f}" in table
        assert "half" in table
        assert "24 expressions of 12 images" in table
    latex = ask(*reports, "--to", "latex")
    columns = {line.count("&") for line in latex.splitlines() if line.endswith(r"\\")}
    assert len(columns) == 1
    for form in ("text", "md", "latex"):
        assert "gIoU" not in ask(*reports, "--to", form)
        chosen = ask(*reports, "--to", form.upper(), "--figures", "gIoU,oiou")
        assert "gIoU" in chosen
        assert "mIoU" not in chosen
    assert "choose from oiou" in ask(*reports, "--figures", "dice", code=2)


def _rows_of(latex: str) -> list[list[str]]:
    lines = [line.removesuffix(r" \\") for line in latex.splitlines() if line.endswith(r"\\")]
    return [line.split(" & ") for line in lines]


def test_a_table_for_a_paper_has_intervals_and_says_what_they_are(
    reports: list[Path], ask: Ask
) -> None:
    asked = ("--to", "latex", "--figures", "miou,n_acc")
    latex = ask(f"base={reports[0]}", f"half={reports[1]}", *asked)
    head, base, half, own, change = _rows_of(latex)
    # N-acc is of no expression here.
    assert [row[0] for row in (head, base, half)] == ["", "base", "half"]
    assert head[1:] == ["mIoU"]
    figure = json.loads((reports[1] / "report.json").read_text())["figures"]["miou"]
    bounds = f"[{100 * figure['low']:.2f}, {100 * figure['high']:.2f}]"
    assert own == [r"{\scriptsize 95\,\% interval}", rf"{{\scriptsize {bounds}}}"]
    found = rows(ask(f"base={reports[0]}", f"half={reports[1]}", "--to", "csv"))["miou", "half"]
    assert [float(found[key]) for key in ("own_low", "own_high")] == [figure["low"], figure["high"]]
    numbers = [f"$-${-100 * float(found[key]):.2f}" for key in ("difference", "low", "high")]
    told = (
        rf"{{\scriptsize {numbers[0]} [{numbers[1]}, {numbers[2]}] $p = {float(found['p']):.3f}$}}"
    )
    assert change == [r"{\scriptsize change}", told]
    assert "−" not in latex
    [caption] = [line for line in latex.splitlines() if line.startswith(r"\caption{")]
    assert "coco all, protocol native (24 expressions of 12 images)" in caption
    assert r"95\,\% intervals by a bootstrap over images (2000 draws)" in caption
    assert r"against \emph{base}, paired by image" in caption


def test_one_report_is_a_table_too(reports: list[Path], ask: Ask) -> None:
    figure = json.loads((reports[1] / "report.json").read_text())["figures"]["miou"]
    low, high = (f"{100 * figure[key]:.2f}" for key in ("low", "high"))
    text = ask(reports[1])
    assert "change" not in text
    [line] = [line for line in text.splitlines() if line.startswith("mIoU")]
    assert line.split()[2:] == [f"{100 * figure['value']:.2f}", low, "–", high]
    shown = ask(reports[1], "--to", "md")
    assert f"| mIoU | half.jsonl | {100 * figure['value']:.2f} | {low} – {high} |" in shown
    assert "| --- | --- | ---: | --- |" in shown
    latex = ask(reports[1], "--to", "latex")
    assert f"[{low}, {high}]" in latex
    assert "change" not in latex.lower()


def test_what_others_call_their_runs_compiles(
    reports: list[Path], ask: Ask, tmp_path: Path
) -> None:
    odd = r'[a_b & <x>|~^\\$#"{}%]'
    tables = [
        ask(f"{odd}={reports[0]}", f"*={reports[1]}", "--to", "latex"),
        ask(reports[2], "--to", "latex"),
    ]
    for row in _rows_of("".join(tables)):
        assert not row[0].startswith(("[", "*"))
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex here")
    page = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    (tmp_path / "page.tex").write_text("\n".join([page, *tables, r"\end{document}"]))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_several_splits_stand_in_one_table(reports: list[Path], ask: Ask, tmp_path: Path) -> None:
    root = reports[0].parent
    data = json.loads((root / "data.json").read_text())
    for expression in data["expressions"]:
        expression["split"] = "val" if expression["image_id"] < 11 else "test"
    (tmp_path / "data.json").write_text(json.dumps(data))
    named = []
    for split in ("val", "test"):
        for run in ("right", "half"):
            out = tmp_path / f"{run}-{split}"
            arguments = ["eval", "--dataset", "coco", "--root", str(tmp_path / "data.json")]
            arguments += ["--split", split, "--predictions", str(root / f"{run}.jsonl")]
            assert main([*arguments, "-o", str(out)]) == 0
            named.append(f"{run}={out}")
    text = ask(*named, "--to", "csv", "--slices")
    found = list(csv.DictReader(io.StringIO(text)))
    whole = {
        (row["split"], row["run"]): row
        for row in found
        if row["figure"] == "miou" and not row["slice"]
    }
    assert set(whole) == {(s, run) for s in ("val", "test") for run in ("right", "half")}
    assert float(whole["val", "half"]["difference"]) < 0
    assert float(whole["val", "half"]["p"]) < 0.05
    # Of one image there is no interval and no p-value.
    assert float(whole["test", "half"]["difference"]) < 0
    assert [whole["test", "half"][key] for key in ("low", "high", "p")] == ["", "", ""]
    latex = ask(*named, "--to", "latex", "--figures", "miou,oiou")
    assert r"\multicolumn{2}{c}{coco val} & \multicolumn{2}{c}{coco test}" in latex
    rows_of = [line for line in latex.splitlines() if line.startswith(("right", "half"))]
    assert [line.count("&") for line in rows_of] == [4, 4]
    assert "too few images" in ask(*named)
    # One run on several splits is a table too; different runs of different splits are none.
    assert "coco test" in ask(named[0], named[2])
    assert "share no expression" in ask(named[0], named[3], code=1)


def test_differences_are_told_by_slice(
    reports: list[Path], ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = reports[0].parent
    data = json.loads((root / "data.json").read_text())
    for image in data["images"]:
        image["weather"] = "rain" if image["id"] % 2 else "sun"
    for expression in data["expressions"]:
        expression["hour"] = expression["image_id"]
    (tmp_path / "data.json").write_text(json.dumps(data))
    made = []
    for run in ("right", "half"):
        arguments = ["eval", "--dataset", "coco", "--root", str(tmp_path / "data.json")]
        arguments += ["--predictions", str(root / f"{run}.jsonl"), "-o", str(tmp_path / run)]
        arguments += ["--slice", "weather", "--slice", "hour:0-9,10-", "--slice", "length:1,2"]
        if made:
            arguments += ["--compare", str(made[0])]
        assert main(arguments) == 0
        made.append(tmp_path / run)
    report = json.loads((tmp_path / "half/report.json").read_text())
    slices = {part["name"]: part["levels"] for part in report["slices"]}
    assert {level["label"]: level["expressions"] for level in slices["weather"]} == {
        "rain": 12,
        "sun": 12,
    }
    hours = {level["label"]: level for level in slices["hour"]}
    assert {label: level["expressions"] for label, level in hours.items()} == {
        "0–9": 20,
        "10 or more": 4,
    }
    assert hours["0–9"]["figures"]["miou"]["low"] is not None
    assert hours["10 or more"]["figures"]["miou"]["low"] is None  # of two images
    assert [level["label"] for level in slices["length"]] == ["2 words"]
    assert "--slice length: no expression is in 1\n" in capsys.readouterr().err
    changed = {part["name"]: part["levels"] for part in report["comparison"]["slices"]}
    by_weather = {level["label"]: level["figures"]["miou"] for level in changed["weather"]}
    assert by_weather["sun"]["difference"] == 0
    assert by_weather["rain"]["difference"] < -0.2
    assert "Changes by slice" in (tmp_path / "half/report.html").read_text()
    assert "| weather | rain | 12 |" in (tmp_path / "half/report.md").read_text()
    table = ask(*made, "--slices", "--figures", "miou")
    assert "weather: rain (12 expressions)" in table


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("length", "needs bins"),
        ("length:", "names no bin"),
        (":1-3", "has no name"),
        ("length:3-1", "ends before it begins"),
        ("length:1-4,3-6", "overlap"),
        ("length:1-4,4", "overlap"),
        ("length:short", "are numbers"),
        ("length:1,,3", "empty bin"),
        ("weather:sun,Other", "'other' is the level of what fits no bin"),
        ("mood", "no expression of coco all has a column 'mood'"),
    ],
)
def test_a_slice_that_says_nothing_is_refused(
    reports: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    root = reports[0].parent
    arguments = ["eval", "--dataset", "coco", "--root", str(root / "data.json"), "--slice", text]
    arguments += ["--predictions", str(root / "half.jsonl"), "-o", str(tmp_path / "out")]
    assert main(arguments) in (1, 2)
    seen = capsys.readouterr().err
    assert told in seen
    assert "--slice" in seen


def test_what_cannot_be_compared_is_told(reports: list[Path], ask: Ask, tmp_path: Path) -> None:
    assert "cannot read" in ask(reports[0], tmp_path / "none", code=1)
    told = ask(*reports, "--figures", "miou,pr@0.3", code=2)
    assert "--figures pr@0.3: no report has this figure; choose from oiou" in told
    assert "named twice" in ask(reports[0], reports[0], code=1)
    assert "names no report" in ask("", reports[0], code=2)
    assert main(
        ["eval", "--dataset", "refshapes", "--split", "val", "--limit", "2", "-o", str(tmp_path)]
    ) in (0, 3)
    assert "share no expression" in ask(reports[0], tmp_path, code=1)


def test_ids_that_mean_other_things_are_not_paired(
    reports: list[Path], ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reports[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "per_expression.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]

    def write(**changes: str) -> None:
        changed = [row | changes for row in lines[:2]] + lines[2:]
        file.write_text("".join(json.dumps(row) + "\n" for row in changed))

    write(image="elsewhere\\0.jpg")  # the same image below another root, in another format
    assert "24 expressions" in ask(reports[1], tmp_path)
    for changes in ({"image": "77.png"}, {"expression": "a dog"}):
        write(**changes)
        assert main(["compare", "-q", str(reports[1]), str(tmp_path), "--to", "csv"]) == 0
        out, err = capsys.readouterr()
        assert {row["expressions"] for row in csv.DictReader(io.StringIO(out))} == {"22"}
        assert err == (
            "warning: 2 expression ids that the runs share are of another image or expression in "
            "each: they are left out.\n"
        )
    file.write_text("".join(json.dumps(row | {"expression": "a dog"}) + "\n" for row in lines))
    told = ask(reports[1], tmp_path, code=1)
    assert "24 of the 24 expression ids that the runs share are of another image" in told
    assert told.count("\n") == 1


def test_names_of_others_are_shown_and_not_obeyed(
    reports: list[Path], ask: Ask, tmp_path: Path
) -> None:
    evil = "=cmd|' /C calc'!A0 \x1b[2J<img src=x>"
    folder = tmp_path / "evil"
    shutil.copytree(reports[1], folder)
    report = json.loads((folder / "report.json").read_text())
    report["answers"]["name"] = evil
    (folder / "report.json").write_text(json.dumps(report))
    for kind in ("csv", "md", "latex"):
        page = ask(reports[0], folder, "--to", kind)
        assert "\x1b" not in page
        assert "x1b" in page
    assert "\x1b" not in ask(reports[0], folder)
    assert "<img" not in ask(reports[0], folder, "--to", "md")
    runs = {
        row["run"] for row in csv.DictReader(io.StringIO(ask(reports[0], folder, "--to", "csv")))
    }
    assert not any(run.startswith(("=", "+", "-", "@")) for run in runs)


def test_damaged_levels_are_told(reports: list[Path], ask: Ask, tmp_path: Path) -> None:
    for name in ("report.json", "per_expression.jsonl"):
        (tmp_path / name).write_bytes((reports[0] / name).read_bytes())
    rows_file = tmp_path / "per_expression.jsonl"
    first, *others = rows_file.read_text().splitlines()
    broken = json.dumps(json.loads(first) | {"slices": ["length"]})
    rows_file.write_text("\n".join([broken, *others]) + "\n")
    assert "row 1 is damaged" in ask(reports[1], tmp_path, code=1)
    # Rows of an earlier version know no levels.
    plain = [
        {k: v for k, v in json.loads(line).items() if k != "slices"} for line in (first, *others)
    ]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in plain))
    assert "mIoU" in ask(tmp_path, reports[1], "--slices")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[:12], "of its 12 expressions is"),
        (lambda rows: [rows[0] | {"intersection": 10**9}, *rows[1:]], "does not belong to the"),
        (lambda rows: [*rows, rows[3]], "row 25 is damaged"),
    ],
)
def test_rows_that_do_not_give_the_reports_figures_are_refused(
    change: Any, told: str, reports: list[Path], ask: Ask, tmp_path: Path
) -> None:
    shutil.copytree(reports[1], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "per_expression.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in change(lines)))
    for named in ([tmp_path], [reports[0], tmp_path], [tmp_path, reports[0]]):
        said = ask(*named, code=1)
        assert told in said
        assert "write the report again" in said


def test_a_protocol_of_another_version_is_told_with_its_report(
    reports: list[Path], ask: Ask, tmp_path: Path
) -> None:
    shutil.copytree(reports[1], tmp_path, dirs_exist_ok=True)
    report = json.loads((tmp_path / "report.json").read_text())
    report["protocol"]["name"] = "later"
    (tmp_path / "report.json").write_text(json.dumps(report))
    for named in ([tmp_path], [reports[0], tmp_path]):
        assert f"{tmp_path / 'report.json'}: no protocol is named 'later'" in ask(*named, code=1)


def test_levels_are_called_as_the_data_call_them() -> None:
    assert parse_slice("weather:semi-dry,1-3").as_slice().levels == ("semi-dry", "1–3", "other")
