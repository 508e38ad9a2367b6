"""Runs of published models: resumed, side by side, in shards, by instances; all to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.predict_runs import Killed, Run, contents, run_json
from support.records import read_records

import risam_cli
from risam_cli.cli import main
from risam_cli.data.images.images import MAX_PIXELS
from risam_cli.errors import RisamError, UsageError
from risam_cli.inference import pipeline
from risam_cli.inference.feature_cache import CacheSettings
from risam_cli.inference.pipeline import PredictSettings, compute_settings
from risam_cli.masks import rle as masks
from risam_cli.runs.merge import find_parts, merge_parts
from risam_cli.runs.shard import Shard
from risam_cli.runs.writer import Saving
from risam_cli.segmenters import grounded_sam
from risam_cli.segmenters.grounded_sam import distinct_first
from risam_cli.segmenters.resolve import load_segmenter

CPU = torch.device("cpu")
TEXTS = ("the dog", "a cat on the left", "two boats")
KINDS = ["clipseg", "florence2", "sam3", "grounded"]
DETECTORS = ["sam3", "grounded"]


def named(root: Path, kind: str) -> str:
    if kind == "grounded":
        return f"grounded-sam:{root / 'dino'}+{root / 'sam'}"
    return str(root / kind)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    for number in range(5):
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        size = (70 + 9 * number, 90 - 11 * number)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
            folder / f"{number}.png"
        )
    return folder


@pytest.fixture(scope="module")
def segmenter(folders: Path) -> Callable[[str], Any]:
    known: dict[str, Any] = {}

    def load(kind: str) -> Any:
        if kind not in known:
            known[kind] = load_segmenter(named(folders, kind), device=CPU, precision=torch.float32)
        return known[kind]

    return load


def run(segmenter: Any, pictures: Path, output: Path, **settings: Any) -> Run:
    base = PredictSettings(CPU, batch_size=2, lookahead=16, cores=1)
    return Run([pictures], output, TEXTS, segmenter, settings=replace(base, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_kills_lanes_and_shards_change_no_byte(
    kind: str, segmenter: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = segmenter(kind)
    run(model, pictures, tmp_path / "whole").go()
    whole = contents(tmp_path / "whole")
    assert len(list(read_records(tmp_path / "whole"))) == 15
    assert len(whole) == 2 + 15

    # Three images side by side.
    run(model, pictures, tmp_path / "lanes", cores=3).go()
    assert contents(tmp_path / "lanes") == whole

    # Killed at the third image, and gone on with.
    encode, seen = model.encode_images, []

    def dying(inputs: Any) -> Any:
        seen.append(len(inputs))
        if len(seen) == 3:
            raise Killed
        return encode(inputs)

    monkeypatch.setattr(model, "encode_images", dying)
    with pytest.raises(Killed):
        run(model, pictures, tmp_path / "killed").go()
    assert contents(tmp_path / "killed") != whole
    seen.clear()
    monkeypatch.setattr(model, "encode_images", lambda inputs: seen.append(1) or encode(inputs))
    run(model, pictures, tmp_path / "killed").go()
    assert 0 < len(seen) < 5
    assert contents(tmp_path / "killed") == whole

    # One encoding an image, however many expressions.
    seen.clear()
    run(model, pictures, tmp_path / "counted").go()
    assert len(seen) == 5

    # In two parts.
    for index in range(2):
        part = run(model, pictures, tmp_path / f"part{index}")
        replace(part, plan={"shard": Shard(index, 2)}).go()
    merge_parts(find_parts([tmp_path / "part0", tmp_path / "part1"]), tmp_path / "merged")
    merged = contents(tmp_path / "merged")
    assert {name: merged[name] for name in whole} == whole


@pytest.mark.parametrize("kind", DETECTORS)
def test_instances_make_up_the_union_and_the_best_is_one_of_them(
    kind: str, segmenter: Any, pictures: Path, tmp_path: Path
) -> None:
    model = segmenter(kind)
    found: dict[str, dict[tuple[str, str], list[Any]]] = {}
    for select in ("union", "best", "all"):
        output = tmp_path / select
        run(model, pictures, output, select=select).go()
        for record in read_records(output):
            by = found.setdefault(select, {})
            by.setdefault((record.image, record.expression), []).append(record)
    several = 0
    for key, (union,) in found["union"].items():
        (best,), each = found["best"][key], found["all"][key]
        if union.no_target:
            assert [one.instance for one in each] == [None]
            assert each[0].no_target
            assert each[0].area == 0
            continue
        several += len(each) > 1
        assert [one.instance for one in each] == list(range(len(each)))
        assert {one.id for one in each} == {union.id}
        assert union.score == best.score == max(one.score for one in each)
        decoded = [masks.decode(one.segmentation) for one in each]
        whole, together = masks.decode(union.segmentation), np.any(decoded, axis=0)
        # Boxes that repeat a better one are in the union, and have no record of their own.
        assert not (together & ~whole).any()
        assert kind == "grounded" or np.array_equal(together, whole)
        top = max(range(len(each)), key=lambda k: each[k].score)
        assert best.segmentation == each[top].segmentation
    assert several > 3
    names = [one.mask for each in found["all"].values() for one in each]
    assert len(set(names)) == len(names)
    assert all((tmp_path / "all" / name).is_file() for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_images_long_expressions_and_no_detection_are_answered(
    kind: str, segmenter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images smaller than a patch, thin ones; over the text length; nothing above the threshold."""
    (tmp_path / "pictures").mkdir()
    sizes = {"1.png": (1, 1), "2.png": (3, 2), "3.png": (400, 2), "4.png": (1, 300)}
    for name, size in sizes.items():
        Image.new("RGB", size, (90, 140, 30)).save(tmp_path / "pictures" / name)
    model = segmenter(kind)
    settings = {"instance_threshold": 1.0} if kind in DETECTORS else {}
    asked = run(model, tmp_path / "pictures", tmp_path / "out", **settings)
    replace(asked, e=("the dog", "the dog and the cat " * 60)).go()
    records = read_records(tmp_path / "out")
    assert len(records) == 8
    assert (tmp_path / "out" / "failures.jsonl").read_text() == ""
    assert "sequence length" not in caplog.text  # transformers' own warning, in its own words
    for record in records:
        width, height = sizes[Path(record.image).name]
        assert (record.height, record.width) == (height, width)
        with Image.open(tmp_path / "out" / str(record.mask)) as mask:
            assert mask.size == (width, height)
        cut = [note for note in record.notes if note.startswith("expression cut to")]
        assert len(cut) == (len(record.expression) > 20)
        if kind in DETECTORS:
            assert record.no_target
            assert record.area == 0


def test_boxes_that_a_better_one_nearly_covers_are_no_instances_of_their_own(
    segmenter: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = torch.tensor(
        [
            [0.1, 0.1, 0.5, 0.5],
            [0.1, 0.1, 0.5, 0.49],  # the first, nearly
            [0.6, 0.1, 0.9, 0.5],
            [0.1, 0.1, 0.5, 0.4],  # 0.75 of the first: another
            [0.6, 0.1, 0.9, 0.5],  # the third
            [0.1, 0.1, 0.5, 0.42],  # 0.8 of the first, and the fourth, nearly
        ]
    )
    assert distinct_first(boxes) == ([0, 2, 3, 1, 4, 5], 3)
    assert distinct_first(boxes[:0]) == ([], 0)

    model = segmenter("grounded")
    run(model, pictures, tmp_path / "union").go()
    run(model, pictures, tmp_path / "each", select="all", instance_threshold=0.0).go()
    # Random boxes have less in common.
    monkeypatch.setattr(grounded_sam, "_SAME", 0.05)
    run(model, pictures, tmp_path / "fewer", select="all", instance_threshold=0.0).go()
    counts = [len(read_records(tmp_path / name)) for name in ("fewer", "each")]
    assert 15 < counts[0] < counts[1] == 15 * 20
    # The union is of all, as transformers' documentation has it.
    run(model, pictures, tmp_path / "again").go()
    assert contents(tmp_path / "again") == contents(tmp_path / "union")


def test_hundreds_of_instances_take_no_more_memory_at_a_time(
    segmenter: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from risam_cli.data.images.frames import Frame

    model = segmenter("grounded")
    most: list[int] = []
    to_image = Frame.to_image

    def counted(self: Frame, maps: Any, *rest: Any) -> Any:
        most.append(len(maps))
        return to_image(self, maps, *rest)

    monkeypatch.setattr(Frame, "to_image", counted)
    monkeypatch.setattr(
        pipeline,
        "compute_settings",
        lambda *given: replace(compute_settings(*given), mask_bytes=8 * 90 * 106 * 3),
    )
    run(model, pictures, tmp_path / "few", instance_threshold=0.0).go()
    assert sum(most) == 5 * 3 * 20  # every query of every expression
    assert max(most) <= 20
    assert np.mean(most) < 8
    few = contents(tmp_path / "few")
    monkeypatch.undo()
    run(model, pictures, tmp_path / "many", instance_threshold=0.0).go()
    assert contents(tmp_path / "many") == few


def test_the_identity_covers_folders_rules_and_thresholds(
    segmenter: Any, folders: Path, pictures: Path, tmp_path: Path
) -> None:
    model = segmenter("grounded")
    output = tmp_path / "out"
    run(model, pictures, output).go()
    facts = run_json(output)
    assert facts["model"]["kind"] == "grounded-sam"
    assert set(facts["model"]["folders"]) == {"detector", "segmenter"}
    import transformers

    assert facts["versions"]["transformers"] == transformers.__version__
    assert facts["settings"]["transformers"] == transformers.__version__
    for changed, told in (
        ({"select": "best"}, "instances was"),
        ({"instance_threshold": 0.4}, "instance_threshold was"),
        ({"threshold": 0.6}, "threshold was"),
    ):
        with pytest.raises(RisamError, match=told):
            run(model, pictures, output, **changed).go()
    with pytest.raises(RisamError, match="model was"):
        run(segmenter("clipseg"), pictures, output).go()
    # The second folder of two alone is another.
    other = f"grounded-sam:{folders / 'dino'}+{folders / 'sam-hq'}"
    with pytest.raises(RisamError, match="model was"):
        run(load_segmenter(other, device=CPU, precision=torch.float32), pictures, output).go()


def test_what_published_models_cannot_do_is_told_in_one_line(
    segmenter: Any, pictures: Path, tmp_path: Path
) -> None:
    model = segmenter("clipseg")
    with pytest.raises(UsageError, match="does not distinguish instances"):
        run(model, pictures, tmp_path / "a", select="all").go()
    with pytest.raises(UsageError, match="scores no instances"):
        run(model, pictures, tmp_path / "b", instance_threshold=0.3).go()
    kept = run(model, pictures, tmp_path / "c")
    with pytest.raises(UsageError, match="feature cache"):
        replace(kept, plan={"feature_cache": CacheSettings(tmp_path / "kept")}).go()
    assert not (tmp_path / "kept").exists()


def test_commands_refuse_or_take_a_published_model(
    folders: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(folders / "clipseg")
    picture = str(pictures / "0.png")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (folders / "clipseg").iterdir())
    refused = [
        ["explain", picture, "-e", "the dog", "--model", model, "-o", str(tmp_path / "why")],
        [
            *("eval", "--dataset", "refshapes", "--split", "val", "--limit", "2"),
            *("--fit-no-target", "--model", model, "-o", str(tmp_path / "fit")),
        ],
        [
            *("predict", picture, "-e", "the dog", "--model", model, "--compile"),
            *("-o", str(tmp_path / "compiled")),
        ],
    ]
    for arguments in refused:
        assert main(arguments) in (1, 2)
        told = [line for line in capsys.readouterr().err.splitlines() if "clipseg" in line]
        assert told or arguments[0] == "predict"
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (folders / "clipseg").iterdir()) == before

    report = tmp_path / "report"
    taken = [
        *("eval", "--dataset", "refshapes", "--split", "val", "--limit", "3"),
        *("--model", model, "-o", str(report)),
    ]
    assert main(taken) == 0
    capsys.readouterr()
    facts = json.loads((report / "report.json").read_text())
    assert facts["answers"]["name"] == model
    assert facts["protocol"]["threshold"] == 0.3  # its own, for its probabilities are not meant


def test_doctor_times_a_published_model(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(folders / "clipseg"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["kind"] == "clipseg"
    assert facts["forward"]["seconds"]["total"] > 0
    assert "settings" not in facts


@pytest.mark.parametrize("kind", KINDS)
def test_the_python_interface_says_what_the_command_says(
    kind: str, folders: Path, segmenter: Any, pictures: Path, tmp_path: Path
) -> None:
    run(segmenter(kind), pictures, tmp_path / "out").go()
    model = risam_cli.load(named(folders, kind), device="cpu")
    records = {(r.image, r.expression): r for r in read_records(tmp_path / "out")}
    for path in sorted(pictures.iterdir())[:2]:
        encoded = model.encode(path)
        for results in (model.predict(path, TEXTS), encoded.predict(TEXTS)):
            for result in results:
                record = records[str(path), result.expression]
                assert result.prediction == replace(record, mask=None)


def test_exports_take_instances(
    segmenter: Any, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = segmenter("grounded")
    saving = Saving(True, True, MAX_PIXELS, html=True)
    replace(run(model, pictures, tmp_path / "out", select="all"), saving=saving).go()
    count = sum(1 for _ in read_records(tmp_path / "out"))
    assert count > 15
    assert (tmp_path / "out" / "gallery" / "index.html").is_file()
    for kind in ("coco", "yolo", "labelme", "cvat", "png", "overlay"):
        arguments = ["export-masks", str(tmp_path / "out"), "--to", kind]
        assert main([*arguments, "-o", str(tmp_path / kind)]) == 0, kind
    written = json.loads((tmp_path / "coco" / "instances.json").read_text())
    whole = [one for one in read_records(tmp_path / "out") if one.area]
    assert len(written["annotations"]) == len(whole)
    # One expression refers to all of its instances, and all of them together are scored.
    assert len(written["expressions"]) == 15
    assert sum(len(one["ann_ids"]) for one in written["expressions"]) == len(whole)
    capsys.readouterr()
    for answers in (tmp_path / "out", tmp_path / "coco" / "instances.json"):
        arguments = [
            *("eval", "--dataset", "coco", "--root", str(tmp_path / "coco" / "instances.json")),
            *("--predictions", str(answers), "--json", "-o", str(tmp_path / f"s-{answers.name}")),
        ]
        assert main(arguments) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)["miou"] == 1.0


def test_two_kinds_from_the_command_line_import_only_what_they_need(
    folders: Path, pictures: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from risam_cli.cli import main; code = main(sys.argv[1:]); "
        "print(code, sorted(n for n in sys.modules if n.startswith('risam_cli.segmenters.')), "
        "'transformers' in sys.modules, 'torchvision' in sys.modules)"
    )
    arguments = ["predict", str(pictures / "0.png"), "-e", "the dog", "-o", str(tmp_path / "own")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.split(" ", 1)[0] == "0"
    assert "clipseg" not in done.stdout
    assert done.stdout.strip().endswith("False False")


def without_pixels(found: list[Any], numbers: Any) -> list[Any]:
    """What a segmenter found, with instances whose masks are empty."""
    for one in found:
        one.maps.grid[numbers] = -9.0
    return found


@pytest.mark.parametrize("kind", DETECTORS)
def test_an_instance_without_a_pixel_is_none(
    kind: str, segmenter: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = segmenter(kind)
    decode, every = model.decode, {"instance_threshold": 0.0}
    run(model, pictures, tmp_path / "before", select="all", **every).go()
    before = list(read_records(tmp_path / "before"))

    monkeypatch.setattr(model, "decode", lambda *given: without_pixels(decode(*given), [0, 2]))
    run(model, pictures, tmp_path / "fewer", select="all", **every).go()
    run(model, pictures, tmp_path / "best", select="best", **every).go()
    seen = [one for one in before if one.area and one.instance not in (0, 2)]
    fewer = list(read_records(tmp_path / "fewer"))
    assert [one.segmentation for one in fewer] == [one.segmentation for one in seen]
    assert all(one.area for one in fewer)
    best = list(read_records(tmp_path / "best"))
    assert len(best) == 15
    for record in best:
        key = (record.image, record.expression)
        first = next(one for one in fewer if (one.image, one.expression) == key)
        assert first.instance == 0
        assert (record.segmentation, record.score) == (first.segmentation, first.score)

    monkeypatch.setattr(model, "decode", lambda *given: without_pixels(decode(*given), ...))
    for select in ("all", "best", "union"):
        run(
            model, pictures, tmp_path / f"none-{select}", select=select, instance_threshold=0.0
        ).go()
        none = list(read_records(tmp_path / f"none-{select}"))
        assert [(one.area, one.no_target, one.instance) for one in none] == [(0, True, None)] * 15


@pytest.mark.parametrize("protocol", ["native", "lavt", "cris", "gres", "lisa", "phrasecut"])
def test_no_instance_is_no_target_under_every_protocol(
    protocol: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        *("eval", "--dataset", "refshapes", "--family", "grefshapes", "--split", "val"),
        *("--limit", "8", "--model", str(folders / "sam3"), "--instance-threshold", "1"),
        *("--protocol", protocol, "--json", "-o", str(tmp_path)),
    ]
    assert main(asked) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["n_acc"], figures["t_acc"]) == (1.0, 0.0)
    answers = json.loads((tmp_path / "report.json").read_text())["answers"]
    assert (answers["instances"], answers["instance_threshold"]) == ("union", 1.0)
    assert set(answers["versions"]) == {"transformers"}
    assert "union of instances scored above 1" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_instances_of_a_model_without_any_leave_no_run_behind(
    command: str, folders: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {
        "predict": ["predict", str(pictures / "0.png"), "-e", "the dog"],
        "eval": ["eval", "--dataset", "refshapes", "--split", "val", "--limit", "2"],
    }[command]
    asked += ["--model", str(folders / "clipseg"), "-o", str(tmp_path / "out")]
    assert main([*asked, "--instance-threshold", "0.3"]) == 2
    assert "scores no instances" in capsys.readouterr().err
    assert main(asked) == 0
