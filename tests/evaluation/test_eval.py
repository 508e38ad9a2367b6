"""``risam eval`` with predictions, from the command line to the files."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from support.eval_files import (
    TRUTH,
    H,
    Mask,
    Run,
    W,
    box_mask,
    coco_content,
    image_file,
    instances,
    record,
    write_grefcoco,
    write_phrasecut,
    write_records,
    write_refer,
)

from risam_cli.cli import main
from risam_cli.commands import eval as eval_command
from risam_cli.data.readers.catalog import DATASETS
from risam_cli.data.readers.refer import SPLIT_BY
from risam_cli.data.readers.refshapes import BENCHMARKS
from risam_cli.data.refshapes.dataset import FAMILIES
from risam_cli.evaluation.report import assemble
from risam_cli.metrics.figures import FIGURES
from risam_cli.metrics.protocols import PROTOCOLS

A, B = "COCO_train2014_000000000011.jpg", "COCO_train2014_000000000012.jpg"
NOTHING = np.zeros((H, W), bool)


def grefcoco_records() -> list[dict[str, Any]]:
    """Answers to gRefCOCO val: right, half right, and wrong about "no target"."""
    return [
        record("10", A, "both cats", TRUTH[101] | TRUTH[102], score=0.9),
        record("11", A, "the two cats", TRUTH[101], score=0.6),
        record("20", A, "the dog", NOTHING, score=0.8),
        record("30", A, "a horse", box_mask((0, 0, 5, 5)), score=0.1),
        record("40", B, "low one", NOTHING, score=0.3),
        record("50", B, "the group", TRUTH[105], score=0.7),
    ]


@pytest.fixture
def evaluate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run ``risam eval`` in this process; ``-o`` is chosen."""
    number = 0

    def run(*args: str | Path, output: Path | None = None) -> Run:
        nonlocal number
        number += 1
        folder = output or tmp_path / f"out{number}"
        capfd.readouterr()
        code = main(["eval", *map(str, args), "-o", str(folder)])
        seen = capfd.readouterr()
        return Run(code, seen.out, seen.err, folder)

    return run


@pytest.fixture
def grefcoco(tmp_path: Path) -> list[str | Path]:
    """Arguments for gRefCOCO val, made in ``tmp_path/data``."""
    write_grefcoco(tmp_path / "data")
    return ["--dataset", "grefcoco", "--root", tmp_path / "data", "--split", "val"]


def test_predictions_are_scored_and_every_file_is_written(
    tmp_path: Path, evaluate: Any, grefcoco: list[Any]
) -> None:
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    run = evaluate(*grefcoco, "--predictions", path, "--json")
    assert run.code == 0, run.err
    figures = json.loads(run.out)
    assert list(figures) == list(FIGURES)
    both, one = int((TRUTH[101] | TRUTH[102]).sum()), int(TRUTH[101].sum())
    ious = [1, one / both, 1, 0, 0, 1]
    assert figures["miou"] == pytest.approx(np.mean(ious), abs=1e-12)
    union = both + both + 0 + 25 + int(TRUTH[104].sum()) + int(TRUTH[105].sum())
    both_hit = both + one + int(TRUTH[105].sum())
    assert figures["oiou"] == pytest.approx(both_hit / union, abs=1e-12)
    assert (figures["n_acc"], figures["t_acc"]) == (0.5, 0.75)
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "per_expression.jsonl",
        "report.html",
        "report.json",
        "report.md",
    ]
    report = run.report
    assert report.counts.scored == 6
    assert report.counts.no_target == 2
    assert report.dataset.notes == ["1 refs without a sentence were left out"]
    assert any("8905" in line for line in report.dataset.count_differences)
    assert {f.name for f in report.dataset.files} == {"grefs(unc).json", "instances.json"}
    assert [row["id"] for row in run.rows()] == ["10", "11", "20", "30", "40", "50"]
    assert [row["iou"] for row in run.rows()] == pytest.approx(ious)
    assert "the published number is 8905" in run.err
    assert "mIoU" in run.err


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_is_named_in_every_report(
    tmp_path: Path, evaluate: Any, grefcoco: list[Any], protocol: str
) -> None:
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    run = evaluate(*grefcoco, "--predictions", path, "--protocol", protocol)
    assert run.code == 0
    assert run.report.protocol.definition == PROTOCOLS[protocol].definition
    assert run.report.protocol.remarks
    for name in ("report.md", "report.html"):
        text = (run.folder / name).read_text(encoding="utf-8")
        assert PROTOCOLS[protocol].definition.split(".")[0] in html.unescape(text)


def test_no_torch_is_loaded_for_predictions(tmp_path: Path, grefcoco: list[Any]) -> None:
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    args = ["eval", *map(str, grefcoco), "--predictions", str(path), "-o", str(tmp_path / "out")]
    code = (
        "import sys; from risam_cli.cli import main; "
        f"assert main({args!r}) == 0; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_surplus_and_doubled_predictions_are_named_and_counted(
    tmp_path: Path, evaluate: Any, grefcoco: list[Any]
) -> None:
    records = grefcoco_records()
    odd = [record("777", A, "unasked", NOTHING), records[0], records[5]]
    path = write_records(tmp_path / "p.jsonl", [*records[:5], *odd, records[5]])
    path.write_text(path.read_text() + '{"id": "50"')
    run = evaluate(*grefcoco, "--predictions", path)
    assert run.code == 3
    counts = run.report.counts
    assert (counts.missing, counts.surplus, counts.doubled, counts.malformed) == (0, 1, 2, 1)
    assert run.rows("surplus.jsonl") == [{"id": "777", "image": A, "expression": "unasked"}]
    assert "777" in run.err
    messages = [row["message"] for row in run.rows("failures.jsonl")]
    assert sum("second prediction for 'the group'" in m for m in messages) == 1
    assert sum("second prediction" in m for m in messages) == 2
    assert sum("ends in the middle" in m for m in messages) == 1

    path = write_records(tmp_path / "q.jsonl", [records[0], records[3], records[4], odd[0]])
    run = evaluate(*grefcoco, "--predictions", path)
    assert run.code == 3
    assert run.report.counts.missing == 3
    assert f"{A}: no prediction for 'the two cats'; it scores zero" in run.err
    missing = {row["id"]: row for row in run.rows() if row["missing"]}
    assert sorted(missing) == ["11", "20", "50"]
    assert all(row["iou"] == 0 for row in missing.values())
    assert [row["id"] for row in run.rows("failures.jsonl")] == ["11", "20", "50"]
    assert run.report.figures["n_acc"].value == 0  # a missing "no target" is not right
    assert "have no answer and score zero" in (run.folder / "report.md").read_text()
    assert "warning: 3 of " in run.err


def test_surplus_alone_is_no_failure(tmp_path: Path, evaluate: Any, grefcoco: list[Any]) -> None:
    surplus = record("777", A, "of another split", NOTHING)
    path = write_records(tmp_path / "p.jsonl", [*grefcoco_records(), surplus])
    run = evaluate(*grefcoco, "--predictions", path)
    assert run.code == 0
    assert not (run.folder / "failures.jsonl").exists()


def test_a_malformed_prediction_fails_alone_and_scores_zero(
    tmp_path: Path, evaluate: Any, grefcoco: list[Any]
) -> None:
    records = grefcoco_records()
    records[0] = record("10", A, "both cats", np.ones((H + 2, W), bool))
    records[5]["segmentation"] = {"size": [H, W], "counts": "!"}
    run = evaluate(*grefcoco, "--predictions", write_records(tmp_path / "p.jsonl", records))
    assert run.code == 3
    assert {row["id"]: row["missing"] for row in run.rows()} == {
        "10": True,
        "11": False,
        "20": False,
        "30": False,
        "40": False,
        "50": True,
    }
    failed = {row["id"]: row["message"] for row in run.rows("failures.jsonl")}
    assert "42x60" in failed["10"]
    assert "damaged" in failed["50"] or "sum" in failed["50"]


def test_refcoco_and_phrasecut_from_the_command_line(tmp_path: Path, evaluate: Any) -> None:
    write_refer(tmp_path / "data")
    answers = {"10": 101, "11": 101, "12": 101, "20": 102, "30": 101, "60": 105}
    records = [
        {**record(name, "", "", TRUTH[ann]), "image": None, "expression": None}
        for name, ann in answers.items()
    ]
    path = write_records(tmp_path / "p.jsonl", records)
    base = ["--dataset", "refcoco", "--root", tmp_path / "data", "--split"]
    run = evaluate(*base, "val", "--split-by", "unc", "--predictions", path)
    assert run.code == 0, run.err
    assert run.report.figures["miou"].value == 1
    assert run.report.figures["n_acc"].value is None
    assert {s.name for s in run.report.slices} >= {"length", "place", "distractors", "category"}

    write_phrasecut(tmp_path / "data")
    ones = [record(f"7__{k}", "7.jpg", "", np.ones((50, 70), bool)) for k in (1, 2)]
    path = write_records(tmp_path / "q.jsonl", ones)
    phrasecut = ["--dataset", "phrasecut", "--root", tmp_path / "data", "--split", "val"]
    run = evaluate(*phrasecut, "--predictions", path, "--protocol", "phrasecut")
    assert run.code == 0, run.err
    shares = [row["gt_area"] / 3500 for row in run.rows()]
    assert run.report.figures["miou"].value == pytest.approx(np.mean(shares))


def test_limit_shuffle_and_surplus(tmp_path: Path, evaluate: Any, grefcoco: list[Any]) -> None:
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    run = evaluate(*grefcoco, "--predictions", path, "--limit", 2, "--shuffle", 1)
    assert run.code == 0
    assert run.report.counts.scored == 2
    assert run.report.counts.surplus == 0
    assert (run.report.dataset.limit, run.report.dataset.shuffle) == (2, 1)
    assert "Only 2 of the split's 6 expressions" in (run.folder / "report.md").read_text()


def test_truth_that_is_unknown_is_in_no_figure(tmp_path: Path, evaluate: Any) -> None:
    data = tmp_path / "mine"
    data.mkdir()
    content = coco_content()
    (data / "instances.json").write_text(json.dumps(content))
    records = [record("900", A, "both cats", TRUTH[101] | TRUTH[102])]
    records += [record("901", B, "the dog", NOTHING), record("902", B, "low one", TRUTH[104])]
    texts = {"101": "captioned", "102": "expressed", "103#0": "first", "103#1": "second"}
    records += [record(name, A, text, TRUTH[101]) for name, text in texts.items()]
    path = write_records(tmp_path / "p.jsonl", records)
    run = evaluate("--dataset", "coco", "--root", data, "--predictions", path)
    assert run.code == 0, run.err
    assert (run.report.counts.scored, run.report.counts.unscored) == (7, 1)


def test_images_that_are_missing_cost_the_exit_code_only(
    tmp_path: Path, evaluate: Any, grefcoco: list[Any]
) -> None:
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    images = tmp_path / "data/images/train2014"
    (images / B).unlink()
    run = evaluate(*grefcoco, "--predictions", path)
    assert run.code == 3
    assert run.report.counts.images_missing == 1
    assert run.report.counts.scored == 6
    assert evaluate(*grefcoco, "--predictions", path, "--skip-missing").code == 0
    (images / A).unlink()  # without any image at all, masks are still scored
    run = evaluate(*grefcoco, "--predictions", path)
    assert run.code == 0
    assert "image not at hand" in (run.folder / "report.html").read_text()


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_stops_with_one_line(tmp_path: Path, evaluate: Any, grefcoco: list[Any]) -> None:
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    base = ["--predictions", path]
    nowhere = [*grefcoco[:3], tmp_path / "nowhere", *grefcoco[4:]]
    (coco := tmp_path / "coco.json").write_text(json.dumps(coco_content()))
    cases: list[tuple[list[Any], int, str]] = [
        ([*nowhere, *base], 1, "does not exist"),
        ([*grefcoco[:5], "testC", *base], 1, "its splits: testA (1), val (6)"),
        (["--dataset", "refcoco", *grefcoco[2:], *base], 1, "refs(unc).p"),
        ([*grefcoco, "--predictions", tmp_path / "none.jsonl"], 1, "none.jsonl"),
        ([*grefcoco, *base, "--compare", tmp_path], 1, "report.json"),
        (["--dataset", "grefcoco", "--split", "val", *base], 2, "needs --root"),
        ([*grefcoco[:4], *base], 2, "needs --split"),
        ([*grefcoco, *base, "--model", "x"], 2, "--model is for a model"),
        ([*grefcoco, *base, "--threshold", "0.4"], 2, "--threshold is for a model"),
        ([*grefcoco, *base, "--fit-no-target"], 2, "--fit-no-target"),
        ([*grefcoco, *base, "--family", "refshapes"], 2, "--family"),
        ([*grefcoco, *base, "--protocol", "mine"], 2, "mine"),
        ([*grefcoco, *base, "--limit", "0"], 2, "0"),
        (["--dataset", "coco", "--root", coco, "--split", "", *base], 1, "has no split ''"),
        ([*grefcoco, "--threshold", "nan"], 2, "nan"),
    ]
    for args, code, message in cases:
        run = evaluate(*args)
        assert run.code == code, (args, run.err)
        assert message in run.err, args
        assert "Traceback" not in run.err
        assert run.out == ""
        assert not (run.folder / "report.json").exists()


def test_files_that_are_cut_or_hostile_are_refused(tmp_path: Path, evaluate: Any) -> None:
    folder = write_refer(tmp_path / "data")
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    args = ["--dataset", "refcoco", "--root", folder, "--split", "val", "--predictions", path]
    whole = (folder / "instances.json").read_text()
    (folder / "instances.json").write_text(whole[: len(whole) // 2])
    run = evaluate(*args)
    assert run.code == 1
    assert "damaged at character" in run.err
    (folder / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    run = evaluate(*args)
    assert run.code == 1
    assert "is refused: at byte 0 its pickle asks to import a name 'os system'" in run.err


def test_a_report_is_not_overwritten_unasked(
    tmp_path: Path, evaluate: Any, grefcoco: list[Any]
) -> None:
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    first = evaluate(*grefcoco, "--predictions", path)
    before = (first.folder / "report.json").read_bytes()
    again = evaluate(*grefcoco, "--predictions", path, output=first.folder)
    assert again.code == 1
    assert "--overwrite" in again.err
    assert (first.folder / "report.json").read_bytes() == before
    assert evaluate(*grefcoco, "--predictions", path, "--overwrite", output=first.folder).code == 0
    taken = tmp_path / "taken"
    taken.write_text("a file")
    run = evaluate(*grefcoco, "--predictions", path, output=taken / "below")
    assert run.code == 1
    assert "cannot write" in run.err


@pytest.mark.parametrize("broken", ["answers", "page"])
def test_a_run_that_fails_leaves_every_file_of_the_earlier_report(
    broken: str, tmp_path: Path, evaluate: Any, grefcoco: list[Any], monkeypatch: Any
) -> None:
    records = grefcoco_records()
    some = write_records(tmp_path / "some.jsonl", [*records[1:], {**records[1], "id": "surplus"}])
    out = evaluate(*grefcoco, "--predictions", some).folder
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert {"failures.jsonl", "surplus.jsonl", "per_expression.jsonl"} < before.keys()
    other = write_records(tmp_path / "other.jsonl", records if broken == "page" else [])
    with monkeypatch.context() as patched:
        if broken == "page":
            patched.setattr(assemble, "to_json", Mock(side_effect=OSError(28, "disk full")))
        assert evaluate(*grefcoco, "--predictions", other, "--overwrite", output=out).code == 1
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    other = write_records(tmp_path / "other.jsonl", records)
    assert evaluate(*grefcoco, "--predictions", other, "--overwrite", output=out).code == 0
    assert not {"failures.jsonl", "surplus.jsonl"} & {path.name for path in out.iterdir()}


def test_annotations_that_do_not_exist_are_failures(
    tmp_path: Path, evaluate: Any, grefcoco: list[Any]
) -> None:
    content = instances()
    content["annotations"] = [a for a in content["annotations"] if a["id"] != 104]
    (tmp_path / "data/grefcoco/instances.json").write_text(json.dumps(content))
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    run = evaluate(*grefcoco, "--predictions", path)
    assert run.code == 3
    assert run.report.counts.failed == 1
    assert [row["id"] for row in run.rows("failures.jsonl")] == ["40"]
    assert "40" not in [row["id"] for row in run.rows()]


# --- comparing ------------------------------------------------------------------------------------


def _many(root: Path, number: int = 40) -> Path:
    """A COCO-style set of squares, two expressions an image."""
    content: dict[str, Any] = {"images": [], "annotations": [], "expressions": []}
    for k in range(number):
        content["images"].append({"id": k, "file_name": f"{k}.png", "height": H, "width": W})
        square = [10, 10, 30, 10, 30, 30, 10, 30]
        content["annotations"].append({"id": k, "image_id": k, "segmentation": [square]})
        for j, ann_ids in enumerate(([k], [])):
            content["expressions"].append(
                {"id": 10 * k + j, "image_id": k, "ann_ids": ann_ids, "text": f"<b>{k}</b> {j}"}
            )
    root.mkdir()
    image_file(root / "0.png")
    (root / "instances.json").write_text(json.dumps(content))
    return root


def _answers(path: Path, masks: list[Mask]) -> Path:
    records = []
    for k, mask in enumerate(masks):
        records.append(record(str(10 * k), f"{k}.png", f"<b>{k}</b> 0", mask))
        records.append(record(str(10 * k + 1), f"{k}.png", f"<b>{k}</b> 1", NOTHING))
    return write_records(path, records)


def test_two_runs_side_by_side(tmp_path: Path, evaluate: Any) -> None:
    root = _many(tmp_path / "set")
    rng = np.random.default_rng(0)
    worse = [box_mask((10, 10, 30, int(rng.integers(20, 28)))) for _ in range(40)]
    better = [mask | box_mask((10, 10, 30, 28)) for mask in worse]
    better[7] = NOTHING
    args = ["--dataset", "coco", "--root", root, "--skip-missing", "--predictions"]
    first = evaluate(*args, _answers(tmp_path / "a" / "predictions.jsonl", worse))
    second = evaluate(
        *args,
        _answers(tmp_path / "b" / "predictions.jsonl", better),
        "--compare",
        first.folder / "report.json",
    )
    assert first.code == second.code == 0
    found = second.report.comparison
    assert found is not None
    assert (found.other_name, found.shared, found.only_this, found.only_other) == ("a", 80, 0, 0)
    for name, change in found.figures.items():
        assert change.other == first.report.figures[name].value
        assert change.this == second.report.figures[name].value
    miou = found.figures["miou"]
    assert miou.difference is not None
    assert miou.low is not None
    assert 0 < miou.low < miou.difference
    assert miou.p is not None
    assert miou.p < 0.05
    assert [e.id for e in found.worse] == ["70"]
    assert len(found.better) == 20
    gains = [e.this - e.other for e in found.better]
    assert gains == sorted(gains, reverse=True)
    assert not found.remarks
    assert "against a on 80 shared expressions" in second.err

    lavt = evaluate(
        *args, tmp_path / "b", "--protocol", "lavt", "--compare", first.folder, "--limit", 30
    )
    assert lavt.code == 0
    comparison = lavt.report.comparison
    assert comparison is not None
    assert comparison.shared == 30
    assert comparison.only_other == 50
    assert any("was made under native" in line for line in comparison.remarks)
    assert any("another ground-truth area" in line for line in comparison.remarks)
    assert "was made under native" in lavt.err

    itself = evaluate(
        *args, tmp_path / "b", "--compare", first.folder, "--overwrite", output=first.folder
    )
    assert itself.code == 2
    (first.folder / "per_expression.jsonl").unlink()
    run = evaluate(*args, tmp_path / "b", "--compare", first.folder)
    assert run.code == 1
    assert "per_expression.jsonl is missing" in run.err


# --- the command itself ---------------------------------------------------------------------------


def test_the_commands_own_lists_are_those_of_the_modules() -> None:
    assert (*DATASETS, "refshapes") == eval_command.DATASETS
    assert tuple(PROTOCOLS) == eval_command.PROTOCOLS
    assert tuple(BENCHMARKS) == eval_command.FAMILIES == FAMILIES
    by = {name for names in SPLIT_BY.values() for name in names}
    option = next(p for p in eval_command.command.params if p.name == "split_by")
    assert set(option.type.choices) == by  # type: ignore[attr-defined]


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from risam_cli.cli import main; main(['eval', '--help']); "
        "sys.exit(bool({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == 0


def test_every_table_of_the_markdown_report_is_whole(
    tmp_path: Path, evaluate: Any, grefcoco: list[Any]
) -> None:
    path = write_records(tmp_path / "p.jsonl", grefcoco_records())
    first = evaluate(*grefcoco, "--predictions", path)
    run = evaluate(*grefcoco, "--predictions", path, "--compare", first.folder)
    tables: list[list[str]] = [[]]
    for line in (run.folder / "report.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    tables = [table for table in tables if table]
    assert len(tables) > 5
    for table in tables:
        assert set(table[1]) <= set("|-: "), table
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1, table
    assert any("scoring, s" in line and len(table) > 4 for table in tables for line in table)


@pytest.mark.parametrize("by", ["umd", "google"])
def test_a_report_on_g_ref_says_whose_splits_they_are(
    by: str, tmp_path: Path, evaluate: Any
) -> None:
    from support.eval_files import write_refer

    write_refer(tmp_path / "data", "refcocog", by)
    path = write_records(tmp_path / "p.jsonl", [record("10", A, "left cat", TRUTH[101])])
    args = ["--dataset", "refcocog", "--root", tmp_path / "data", "--split", "val"]
    args += ["--split-by", by] if by == "google" else []
    run = evaluate(*args, "--predictions", path)
    assert run.report.dataset.split_by == by
    page = (run.folder / "report.md").read_text(encoding="utf-8")
    assert f"refcocog val ({by})" in page.splitlines()[0]
    assert f"split val (by {by})" in page
