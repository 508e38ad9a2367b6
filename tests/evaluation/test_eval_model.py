"""``risam eval`` with a model: the same figures as its records, one encoding an image, resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from support.carried import numbered
from support.encodes import count_encodes
from support.eval_files import Run, box, image_file, write_records

from risam_cli.cli import main
from risam_cli.data.readers.coco import open_coco
from risam_cli.data.readers.refshapes import open_refshapes, open_refshapes_files
from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.evaluation import scoring as engine
from risam_cli.inference.pipeline import PredictSettings, predict_samples
from risam_cli.masks import rle as masks
from risam_cli.model.fast.decoding import FastRisam
from risam_cli.model.risam import Risam
from risam_cli.segmenters.resolve import load_segmenter
from risam_cli.weights import folder as folders

SIZES = [(40, 60), (64, 64), (90, 50), (33, 70)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images of several sizes, four expressions each, one of them without a target."""
    root = tmp_path / "set"
    content: dict[str, Any] = {"images": [], "annotations": [], "expressions": []}
    for k, (height, width) in enumerate(SIZES):
        image_file(root / f"{k}.png", (height, width), seed=k)
        content["images"].append(
            {"id": k, "file_name": f"{k}.png", "height": height, "width": width}
        )
        for j, edges in enumerate(((2, 2, 20, 20), (10, 5, 30, 30), (0, 0, 33, 33))):
            content["annotations"].append(
                {"id": 10 * k + j, "image_id": k, "segmentation": [box(*edges)]}
            )
        texts = ("red circle", "the small blue square", "leftmost triangle", "all the stars")
        for j, text in enumerate(texts):
            ann_ids = [10 * k + j] if j < 3 else []
            content["expressions"].append(
                {"id": 100 * k + j, "image_id": k, "ann_ids": ann_ids, "text": text}
            )
    (root / "instances.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """The small model, with a head that says "no target" to about half of the expressions."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    return folder


@pytest.fixture
def evaluate(tmp_path: Path, data: Path, model: Path, capfd: Any) -> Any:
    number = 0

    def run(*args: str | Path, output: Path | None = None) -> Run:
        nonlocal number
        number += 1
        folder = output or tmp_path / f"out{number}"
        capfd.readouterr()
        base = ["eval", "--dataset", "coco", "--root", str(data), "--device", "cpu"]
        whose = [] if "--predictions" in args else ["--model", str(model)]
        code = main([*base, *whose, *map(str, args), "-o", str(folder)])
        seen = capfd.readouterr()
        return Run(code, seen.out, seen.err, folder)

    return run


def _records(data: Path, model: Path, bar: float) -> Iterator[dict[str, Any]]:
    """What ``risam predict`` says about the same data."""
    segmenter = load_segmenter(model, device=torch.device("cpu"), precision=torch.float32)
    settings = PredictSettings(torch.device("cpu"), threshold=0.5, no_target_threshold=bar)
    samples = numbered(open_coco(data / "instances.json"))
    for _, result in predict_samples(samples, segmenter, settings):
        for p in result.predictions:
            yield {
                "id": p.id,
                "image": p.image,
                "expression": p.expression,
                "segmentation": p.segmentation,
                "score": p.score,
                "no_target": p.no_target,
            }


def _middle_bar(data: Path, model: Path) -> float:
    """A no-target threshold that parts the random model's answers."""
    segmenter = load_segmenter(model, device=torch.device("cpu"), precision=torch.float32)
    settings = PredictSettings(torch.device("cpu"), keep_raw=True)
    samples = numbered(open_coco(data / "instances.json"))
    results = predict_samples(samples, segmenter, settings)
    found = sorted(raw.no_target for _, result in results for raw in result.raw)
    return (found[len(found) // 2 - 1] + found[len(found) // 2]) / 2


def test_a_model_scores_as_its_own_records_do(
    tmp_path: Path, evaluate: Any, data: Path, model: Path
) -> None:
    bar = _middle_bar(data, model)
    own = evaluate("--no-target-threshold", f"{bar:.9f}")
    assert own.code == 0, own.err
    records = list(_records(data, model, bar))
    assert {r["no_target"] for r in records} == {True, False}
    theirs = evaluate("--predictions", write_records(tmp_path / "p.jsonl", records))
    assert theirs.code == 0, theirs.err
    assert own.report.figures == theirs.report.figures
    timing = own.report.timing
    assert timing.decode is not None
    assert timing.encode is not None
    assert timing.decode_mask is not None
    assert min(timing.decode, timing.encode, timing.decode_mask, timing.score) > 0
    assert own.report.answers.sha256
    assert len(own.report.curves.no_target or []) > 4


def test_images_named_with_backslashes_are_found(evaluate: Any, data: Path) -> None:
    content = json.loads((data / "instances.json").read_text())
    (data / "images").mkdir()
    for image in content["images"]:
        (data / image["file_name"]).rename(data / "images" / image["file_name"])
        image["file_name"] = f"images\\{image['file_name']}"
    (data / "instances.json").write_text(json.dumps(content))
    for confined in ([], ["--confine"]):
        run = evaluate(*confined)
        assert run.code == 0, run.err
        assert run.report.counts.images == len(SIZES)
    (data / "images/0.png").rename(data.parent / "outside.png")
    content["images"][0]["file_name"] = "..\\outside.png"
    (data / "instances.json").write_text(json.dumps(content))
    run = evaluate("--confine")
    assert run.code == 1
    assert "outside" in run.err


def test_an_image_is_encoded_once_for_all_its_sentences(
    evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_encodes(monkeypatch)
    for protocol in ("native", "lavt"):
        seen.clear()
        assert evaluate("--protocol", protocol).code == 0
        assert sum(seen) == len(SIZES)


@pytest.mark.parametrize("protocol", ["lavt", "cris", "gres", "lisa", "phrasecut"])
def test_protocols_see_the_logits(
    evaluate: Any, data: Path, model: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Areas are those of the network's own logits, brought to the protocol's place by hand."""
    run = evaluate("--protocol", protocol)
    assert run.code == 0, run.err
    rows = {row["id"]: row for row in run.rows()}
    segmenter = load_segmenter(model, device=torch.device("cpu"), precision=torch.float32)
    seen: list[torch.Tensor] = []
    decode = FastRisam.decode  # the form that a CPU takes

    def kept(self: FastRisam, *args: Any) -> Any:
        decoded = decode(self, *args)
        seen.append(decoded.mask_logits)
        return decoded

    monkeypatch.setattr(FastRisam, "decode", kept)
    settings = PredictSettings(torch.device("cpu"), cores=1)  # the logits in order
    samples = list(open_coco(data / "instances.json"))
    list(predict_samples(numbered(samples), segmenter, settings))
    logits = torch.cat(seen)
    ids = [e.id for s in samples for e in s.expressions]
    assert len(logits) == len(ids) == 16
    assert set(rows) == set(ids)
    for name, one in zip(ids, logits, strict=True):
        height, width = SIZES[int(name) // 100]
        side = (480, 480) if protocol in ("lavt", "gres") else (height, width)
        assert rows[name]["gt_area"] <= side[0] * side[1]
        if (height, width) == (64, 64):  # the square image fills the encoder's input
            up = torch.nn.functional.interpolate(one[None, None], size=side, mode="bilinear")
            p = up[0, 0].sigmoid().numpy()
            if protocol == "cris":
                p = engine.warp_through_letterbox(p, 416)
            threshold = 0.35 if protocol == "cris" else 0.5
            assert abs(int((p > threshold).sum()) - rows[name]["pred_area"]) <= 2


def test_an_interrupted_run_goes_on_and_ends_the_same(
    evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate()
    rows = (whole.folder / "per_expression.jsonl").read_bytes()
    for protocol in ("native", "lavt"):
        folder = whole.folder.parent / f"cut-{protocol}"
        add = engine.Scorer.add
        with monkeypatch.context() as patch:
            done = iter(range(2))

            def cut(self: Any, answered: Any, done: Any = done, add: Any = add) -> Any:
                if next(done, None) is None:
                    raise KeyboardInterrupt
                return add(self, answered)

            patch.setattr(engine.Scorer, "add", cut)
            run = evaluate("--protocol", protocol, output=folder)
            assert run.code == 130
            assert "error: interrupted; finished work is kept; continue with --resume" in run.err
        assert [p.name for p in folder.iterdir()] == ["answers.jsonl"]
        with (folder / "answers.jsonl").open("a") as stream:
            stream.write('{"id": "cut in the mid')
        run = evaluate("--protocol", protocol, output=folder)
        assert run.code == 1
        assert "--resume" in run.err
        run = evaluate("--protocol", protocol, "--threshold", 0.4, "--resume", output=folder)
        assert run.code == 1
        assert "threshold" in run.err

        encoded: list[int] = []
        encode = Risam.encode_image
        with monkeypatch.context() as patch:
            patch.setattr(
                Risam, "encode_image", lambda s, p, e=encoded, f=encode: (e.append(1), f(s, p))[1]
            )
            run = evaluate("--protocol", protocol, "--resume", output=folder)
        assert run.code == 0, run.err
        assert len(encoded) < len(SIZES)
        assert not (folder / "answers.jsonl").exists()
        if protocol == "native":
            assert (folder / "per_expression.jsonl").read_bytes() == rows
        else:
            again = evaluate("--protocol", protocol)
            assert run.rows() == again.rows()


def test_images_that_are_missing_or_wrong_fail_alone(evaluate: Any, data: Path) -> None:
    (data / "1.png").unlink()
    (data / "2.png").write_text("no image")
    image_file(data / "3.png", (20, 20))
    run = evaluate()
    assert run.code == 3
    counts = run.report.counts
    assert (counts.scored, counts.skipped, counts.images_missing, counts.failed) == (4, 4, 1, 8)
    messages = {row["image"]: row["message"] for row in run.rows("failures.jsonl")}
    assert "is missing" in messages["1.png"]
    assert "2.png" in messages["2.png"]
    assert "20x20" in messages["3.png"]
    assert evaluate("--skip-missing").code == 3  # the broken ones are still failures
    shutil.copy(data / "0.png", data / "2.png")
    image_file(data / "2.png", (90, 50))
    image_file(data / "3.png", (33, 70))
    run = evaluate("--skip-missing")
    assert run.code == 0
    assert run.report.counts.scored == 12
    for k in (0, 2, 3):
        (data / f"{k}.png").unlink()
    run = evaluate("--skip-missing")
    assert run.code == 1
    assert "none of the 4 images" in run.err
    assert str(data) in run.err


def test_the_no_target_threshold_is_fitted_and_stored(
    evaluate: Any, data: Path, model: Path
) -> None:
    before = json.loads((model / "config.json").read_text())
    run = evaluate("--fit-no-target")
    assert run.code == 0, run.err
    fit = run.report.no_target_fit
    assert fit is not None
    after = json.loads((model / "config.json").read_text())
    assert after["model"].pop("no_target_threshold") == fit.threshold
    assert before["model"].pop("no_target_threshold") == fit.before
    assert after == before
    again = evaluate()
    figures = again.report.figures
    assert (figures["n_acc"].value, figures["t_acc"].value) == (fit.n_acc, fit.t_acc)
    assert figures["giou"].value == fit.giou
    assert again.report.answers.sha256 == fit.sha256_after
    assert again.report.answers.no_target_threshold == fit.threshold
    text = (run.folder / "report.html").read_text()
    assert "optimistic" in text
    assert "N-acc against T-acc" in text


def test_fitting_does_not_change_the_bundled_model(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(folders, "BUNDLED", tmp_path / "bundled")
    bundled = shutil.copytree(model, tmp_path / "bundled" / folders.DEFAULT_MODEL)
    before = (bundled / "config.json").read_bytes()
    asked = ["eval", "--dataset", "refshapes", "--family", "grefshapes", "--split", "val"]
    asked += ["--limit", "40", "--fit-no-target", "--device", "cpu"]
    for given in ([], ["--model", folders.DEFAULT_MODEL], ["--model", str(bundled)]):
        assert main([*asked, *given, "-o", str(tmp_path / "fit")]) == 2
        assert "--fit-no-target would change the bundled model" in capsys.readouterr().err
    assert (bundled / "config.json").read_bytes() == before


def test_fitting_needs_both_kinds_of_expression(evaluate: Any, data: Path, model: Path) -> None:
    content = json.loads((data / "instances.json").read_text())
    content["expressions"] = [e for e in content["expressions"] if e["ann_ids"]]
    (data / "instances.json").write_text(json.dumps(content))
    before = (model / "config.json").read_bytes()
    run = evaluate("--fit-no-target")
    assert run.code == 1
    assert "with and without a target" in run.err
    assert "score:" not in run.err  # told before anything is answered
    assert (model / "config.json").read_bytes() == before


def test_a_file_without_expressions_is_said_to_have_none(evaluate: Any, data: Path) -> None:
    content = json.loads((data / "instances.json").read_text())
    (data / "instances.json").write_text(json.dumps({**content, "expressions": []}))
    run = evaluate()
    assert run.code == 1
    assert "coco all holds no expressions" in run.err
    assert "internal error" not in run.err


# --- RefShapes ------------------------------------------------------------------------------------


def test_refshapes_are_drawn_on_the_fly_and_tidied_up(
    tmp_path: Path, model: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    args = ["eval", "--dataset", "refshapes", "--family", "grefshapes", "--split", "val"]
    folder = tmp_path / "out"
    code = main(
        [*args, "--limit", "20", "--model", str(model), "--device", "cpu", "-o", str(folder)]
    )
    assert code == 0, capfd.readouterr().err
    report = Run(code, "", "", folder).report
    assert report.counts.scored == 20
    assert report.counts.images == 4
    assert report.dataset.name == "grefshapes"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("risam-eval-")] == []
    assert "data:image/webp" in (folder / "report.html").read_text()
    assert "not at hand" not in (folder / "report.html").read_text()


def test_drawn_scenes_are_those_of_the_data_set(tmp_path: Path) -> None:
    source = open_refshapes("grefshapes", "testB", tmp_path / "images", scenes=3)
    made = RefShapes("grefshapes", "testB", scenes=3)
    assert source.counts["expressions"] == 18
    for index, sample in enumerate(source):
        item = made[index]
        assert sample.path.is_file()
        for expression, referring in zip(sample.expressions, item.expressions, strict=True):
            assert expression.text == referring.text
            assert expression.target is not None
            np.testing.assert_array_equal(masks.decode(expression.target), item.mask(referring))
            assert expression.no_target == (not referring.objects)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("refshapes", "own"),
        ("refshapes+", "own"),
        ("refshapesg", "own"),
        ("grefshapes", "own"),
        ("grefshapes", "coco"),
        ("refshapes", "coco"),
        ("refshapes", "grefcoco"),
        ("refshapesg", "grefcoco"),
    ],
)
def test_written_refshapes_read_back_as_drawn(tmp_path: Path, family: str, form: str) -> None:
    args = ["refshapes", "-o", str(tmp_path), "--family", family, "--splits", "val", "--scenes"]
    assert main([*args, "4", "--format", form, "-q"]) == 0
    written = open_refshapes_files(tmp_path, family, "val")
    drawn = open_refshapes(family, "val", tmp_path / "images", scenes=4)
    first, second = (
        {e.id: e for s in source for e in s.expressions} for source in (written, drawn)
    )
    assert first.keys() == second.keys()
    for name, expression in first.items():
        assert expression.text == second[name].text
        assert expression.target == second[name].target
        assert expression.no_target == second[name].no_target
        for key in ("referents", "category", "distractors"):
            assert expression.attributes.get(key) == second[name].attributes.get(key), key
    assert all(sample.path.is_file() for sample in written)
    if form == "grefcoco":
        alone = open_refshapes_files(tmp_path / family / form, family, None)
        assert alone.counts == written.counts


def test_written_phrasecut_shapes_read_back_nearly_as_drawn(tmp_path: Path) -> None:
    """PhraseCut's polygons have no holes, so rings and what lies on top are filled."""
    args = ["refshapes", "-o", str(tmp_path), "--family", "refshapes", "--splits", "val"]
    assert main([*args, "--scenes", "4", "--format", "phrasecut", "-q"]) == 0
    written = open_refshapes_files(tmp_path, "refshapes", "val")
    drawn = open_refshapes("refshapes", "val", tmp_path / "images", scenes=4)
    for one, other in zip(written, drawn, strict=True):
        for a, b in zip(one.expressions, other.expressions, strict=True):
            assert a.target is not None
            assert b.target is not None
            intersection, _ = masks.intersection_union(a.target, b.target)
            assert intersection == masks.area(b.target)  # nothing is lost


def test_another_family_is_refused(tmp_path: Path, capfd: Any) -> None:
    args = ["refshapes", "-o", str(tmp_path), "--family", "refshapes", "--splits", "val"]
    assert main([*args, "--scenes", "2", "-q"]) == 0
    asked = ["eval", "--dataset", "refshapes", "--split", "val", "-o", str(tmp_path / "out")]
    root = ["--root", str(tmp_path)]
    assert main([*asked, *root, "--family", "grefshapes", "--predictions", "x"]) == 1
    assert "grefs(unc).json" in capfd.readouterr().err
    (tmp_path / "refcoco").rename(tmp_path / "refcoco+")
    assert main([*asked, *root, "--family", "refshapes+", "--predictions", "x"]) == 1
    assert "holds the family 'refshapes'" in capfd.readouterr().err


def test_limited_sources_read_no_further_than_asked(tmp_path: Path) -> None:
    source = open_refshapes("refshapes", "train", tmp_path / "images").limited(3)
    assert replace(source, limit=3) == source
    assert len([e for s in source for e in s.expressions]) == 3
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_processes_of_torchrun_score_as_one(
    tmp_path: Path, evaluate: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image answered by one of them, all scored by the last; faults are listed as by one."""
    (data / "1.png").write_text("broken")
    monkeypatch.setattr("risam_cli.runs.ranks._GRACE", 0.01)
    alone = evaluate("--limit", "10")
    assert alone.code == 3
    out = tmp_path / "many"
    seen = count_encodes(monkeypatch)

    def as_rank(rank: int, *args: str) -> Run:
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", "3")
            run: Run = evaluate("--limit", "10", *args, output=out)
            return run

    assert (as_rank(2).code, as_rank(0).code) == (0, 0)
    assert not (out / "report.json").exists()
    assert as_rank(0).code == 1  # as one: an interrupted run is refused without a word
    assert "processes of this run differ" in as_rank(1, "--threshold", "0.3", "--resume").err
    last = as_rank(1, "--resume")
    assert last.code == 3, last.err
    assert sum(seen) == 2  # of three images, one is broken
    assert last.report.figures == alone.report.figures
    assert last.report.counts == alone.report.counts
    for name in ("per_expression.jsonl", "failures.jsonl"):
        assert (out / name).read_bytes() == (alone.folder / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.folder.iterdir()}


def test_data_in_a_store_score_as_on_a_disk(evaluate: Any, data: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(data), "/benchmark", recursive=True)
    here, there = evaluate(), evaluate("--root", "memory://benchmark")
    assert (here.code, there.code) == (0, 0), there.err
    assert there.report.figures == here.report.figures
    assert there.report.dataset == here.report.dataset
    memory.rm("/benchmark/2.png")
    gone = evaluate("--root", "memory://benchmark/instances.json", "--images", "memory://benchmark")
    assert gone.code == 3
    assert "image memory://benchmark/2.png is missing" in gone.err
    assert gone.report.counts.images_missing == 1
    memory.rm("/benchmark", recursive=True)
    assert evaluate("--root", "memory://benchmark").code == 1
