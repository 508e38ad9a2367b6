"""``risam eval`` of one's own model: the part that training held out, and what it has seen."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.eval_files import (
    TRUTH,
    Run,
    coco_content,
    image_file,
    record,
    write_records,
    write_refer,
)
from support.training_runs import RAW, run, settings, write_coco

from risam_cli.cli import main
from risam_cli.commands.train import scoring_commands
from risam_cli.console.console import Console
from risam_cli.data.readers.catalog import open_dataset
from risam_cli.training.data.build import DataBuilder
from risam_cli.weights.trained_on import TrainedOn, entries_of, inherited, to_card

A, B = "COCO_train2014_000000000011.jpg", "COCO_train2014_000000000012.jpg"


@pytest.fixture
def evaluate(tmp_path: Path, capfd: Any) -> Any:
    number = 0

    def evaluated(*args: object) -> Run:
        nonlocal number
        number += 1
        folder = tmp_path / f"out{number}"
        capfd.readouterr()
        code = main(["eval", *map(str, args), "-o", str(folder)])
        seen = capfd.readouterr()
        return Run(code, seen.out, seen.err, folder)

    return evaluated


def _data(folder: Path, train: dict[str, Any], **changes: Any) -> DataBuilder:
    changes = {"val": RAW["val"], "stages": [RAW["stages"][1]], **changes}
    return DataBuilder(settings(folder / "run", train=train, **changes), Console())


def _known() -> dict[str, Any]:
    """Two images, every truth known."""
    content = coco_content()
    return {**content, "expressions": content["expressions"][:3]}


def _model(folder: Path, small: Path, builder: DataBuilder) -> Path:
    """The small model with the card of one that was trained on these data."""
    model = folder / "model"
    shutil.copytree(small, model, dirs_exist_ok=True)
    builder.train()
    card = {"name": "small", "figures": {}, "trained_on": to_card(builder.trained_on)}
    (model / "card.json").write_text(json.dumps(card))
    return model


# --- a part of the images -------------------------------------------------------------------------


def test_what_training_prints_scores_the_images_that_it_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """From ``risam init`` to the figures of the held-out part, by the lines that are printed."""
    data = write_coco(tmp_path / "my data")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my data/pairs.json", "-o", "mine.yaml"]) == 0
    assert main(["train", "mine.yaml", "--steps", "1", "--set", "device=cpu"]) == 0
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("score it: ")]
    assert lines == [
        "score it: risam eval --dataset coco --root 'my data/pairs.json' --only-every 2 "
        "--model runs/mine/best -o runs/mine-eval"
    ]
    typed = shlex.split(lines[0].removeprefix("score it: risam "))
    assert main(typed) == 0
    held_out = Run(0, "", capfd.readouterr().err, Path("runs/mine-eval"))
    assert held_out.report.dataset.only_every == 2
    assert held_out.report.dataset.counts["images"] == held_out.report.counts.images == 1
    assert {row["image"] for row in held_out.rows()} == {"1.png"}
    assert held_out.report.answers.images_in_training == 0
    assert "this model's training" not in held_out.err
    for name in ("report.html", "report.md"):
        assert "only one image in 2" in (held_out.folder / name).read_text()

    whole = [part for part in typed if part not in ("--only-every", "2")]
    assert main([*whole[:-1], "whole"]) == 0
    told = "1 of 2 images were in this model's training; figures on them say little about new"
    assert f"warning: {told} images, use --only-every 2" in capfd.readouterr().err
    report = Run(0, "", "", Path("whole")).report
    assert report.answers.images_in_training == 1
    assert report.answers.remarks == [f"{told} images, use --only-every 2"]
    for name in ("report.html", "report.md"):
        assert "1 of 2 images were in this model" in Path("whole", name).read_text()
    card = json.loads(Path("runs/mine/best/card.json").read_text())
    entry, start = card["trained_on"]
    assert start["dataset"] == "refshapes"  # by the model it started from
    assert entry["files"][0]["name"] == "pairs.json"
    assert (entry["leave_out_every"], entry["images"]) == (2, 1)
    assert (
        "trained on: pairs.json, leave_out_every 2" in Path("runs/mine/best/README.md").read_text()
    )
    assert data["dataset"] == "coco"


def test_parts_of_a_file_share_no_image_and_are_all_of_it(tmp_path: Path) -> None:
    content = coco_content()
    content["images"] = [
        {**content["images"][0], "id": k, "file_name": f"{k}.jpg"} for k in range(7)
    ]
    content["annotations"] = []
    content["expressions"] = [
        {"id": k, "image_id": k % 7, "ann_ids": [], "text": f"{k}"} for k in range(10)
    ]
    (tmp_path / "a.json").write_text(json.dumps(content))
    whole = open_dataset("coco", tmp_path / "a.json", None)
    held = whole.part([0, 3, 6])
    rest = whole.part([1, 2, 4, 5])
    assert [group.image for group in held.chosen()] == ["0.jpg", "3.jpg", "6.jpg"]
    assert (held.counts["images"], held.counts["expressions"], held.planned) == (3, 4, 4)
    assert held.counts["expressions"] + rest.counts["expressions"] == 10
    mixed = [group.image for group in held.limited(shuffle=1).chosen()]
    assert sorted(mixed) == ["0.jpg", "3.jpg", "6.jpg"]
    assert len(list(held.limited(limit=2).chosen())) == 1


def test_predictions_are_scored_on_a_part(tmp_path: Path, evaluate: Any) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(coco_content()))
    records = [
        record("900", A, "both cats", TRUTH[101] | TRUTH[102]),
        record("902", B, "low one", TRUTH[104]),
    ]
    theirs = write_records(tmp_path / "p.jsonl", records)
    asked = ("--dataset", "coco", "--root", path, "--predictions", theirs)
    done = evaluate(*asked, "--leave-out-every", 2)
    assert "1 predictions were ignored (--leave-out-every 2)" in done.err
    assert {row["image"] for row in done.rows()} == {B}
    assert done.report.dataset.leave_out_every == 2
    assert not (done.folder / "surplus.jsonl").exists()
    assert done.report.dataset.count_differences == []


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [
        (["--only-every", "2", "--leave-out-every", "2"], 2, "contradict each other"),
        (["--only-every", "1"], 2, "--only-every"),
        (["--leave-out-every", "2", "--split", "testA"], 1, "leaves no image of refcoco testA"),
    ],
)
def test_parts_that_cannot_be_are_told(
    tmp_path: Path, evaluate: Any, asked: list[str], code: int, message: str
) -> None:
    write_refer(tmp_path / "data")
    split = [] if "--split" in asked else ["--split", "val"]
    done = evaluate("--dataset", "refcoco", "--root", tmp_path / "data", *split, *asked)
    assert done.code == code
    assert message in done.err
    assert not done.folder.exists()


def test_scenes_that_are_drawn_have_no_part(evaluate: Any) -> None:
    done = evaluate("--dataset", "refshapes", "--split", "val", "--only-every", 5)
    assert done.code == 2
    assert "--only-every 5 applies to files, but these scenes are drawn" in done.err


# --- what a model has seen ------------------------------------------------------------------------


def test_a_training_split_is_told_of_and_another_is_not(
    tmp_path: Path, evaluate: Any, model_folder: Path
) -> None:
    root = tmp_path / "data"
    write_refer(root)
    builder = _data(tmp_path, {"dataset": "refcoco", "root": str(root), "split": "train"})
    model = _model(tmp_path, model_folder, builder)
    asked = ("--dataset", "refcoco", "--root", root, "--model", model, "--device", "cpu")
    train = evaluate(*asked, "--split", "train")
    assert "1 of 1 images were in this model's training" in train.err
    assert "use another split" in train.err
    other = evaluate(*asked, "--split", "testA")
    assert other.report.answers.images_in_training == 0
    assert "model's training" not in other.err
    # Splits that share pictures, as G-Ref's by Google do, are held against each other by picture.
    val = evaluate(*asked, "--split", "val")
    assert "1 of 2 images were in this model's training" in val.err


def test_what_a_mixture_left_out_was_not_seen(
    tmp_path: Path, evaluate: Any, model_folder: Path
) -> None:
    root = tmp_path / "data"
    write_refer(root)
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps(_known()))
    images = root / "images/mscoco/images/train2014"
    coco = {"dataset": "coco", "annotations": str(pairs), "images": str(images)}
    mix = {"dataset": "mixed", "members": {"mine": coco}}
    builder = _data(tmp_path, mix, val={"held": {**coco, "limit": 1}})
    model = _model(tmp_path, model_folder, builder)
    assert builder.trained_on[0].dropped == "0"
    asked = ("--dataset", "coco", "--root", pairs, "--images", images, "--model", model)
    whole = evaluate(*asked)
    assert "1 of 2 images were in this model's training" in whole.err
    assert evaluate(*asked, "--only-every", 2).report.answers.images_in_training == 0


def test_a_file_that_changed_since_is_told_of(
    tmp_path: Path, evaluate: Any, model_folder: Path
) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(_known()))
    for number, name in enumerate((A, B)):
        image_file(tmp_path / name, seed=number)
    coco = {"dataset": "coco", "annotations": str(path), "leave_out_every": 2}
    model = _model(tmp_path, model_folder, _data(tmp_path, coco))
    path.write_text(path.read_text() + "\n")
    asked = ("--dataset", "coco", "--root", path, "--model", model)
    done = evaluate(*asked)
    told = "trained on pairs.json, leave_out_every 2, when that file had different content"
    assert told in done.err
    assert done.report.answers.images_in_training is None
    path.rename(tmp_path / "others.json")
    another = evaluate("--dataset", "coco", "--root", tmp_path / "others.json", "--model", model)
    assert another.report.answers.images_in_training == 0
    (tmp_path / "others.json").rename(path)
    # A card that says nothing, or nonsense, is no reason to say anything or to stop.
    for card in ({}, {"trained_on": 3}, {"trained_on": [{"dropped": "9" * 5000}]}, []):
        (model / "card.json").write_text(json.dumps(card))
        done = evaluate(*asked)
        assert done.code == 0
        assert done.report.answers.images_in_training is None
        assert "trained on" not in done.err


def test_drawn_scenes_of_the_training_split_are_told_of(
    tmp_path: Path, evaluate: Any, model_folder: Path
) -> None:
    scenes = {"dataset": "refshapes", "family": "refshapes", "scenes": 1}
    model = _model(tmp_path, model_folder, _data(tmp_path, scenes))
    asked = ("--dataset", "refshapes", "--limit", 2, "--model", model)
    assert "was trained on scenes of RefShapes train" in evaluate(*asked, "--split", "train").err
    assert "was trained on" not in evaluate(*asked, "--split", "val").err
    written = ["-o", str(tmp_path / "data"), "--family", "refshapes", "--scenes", "1"]
    assert main(["refshapes", *written, "--splits", "train,val", "-q"]) == 0
    asked = (*asked, "--root", tmp_path / "data")
    for split, told in (("train", True), ("val", False)):
        done = evaluate(*asked, "--split", split)
        assert ("was trained on scenes of RefShapes train" in done.err) == told
        assert done.report.answers.images_in_training is None


def test_what_a_model_started_from_is_on_its_card_too(tmp_path: Path) -> None:
    quick: dict[str, Any] = {
        "stages": [{**RAW["stages"][1], "steps": 1}], "validate_every": 1, "model": RAW["model"],
    }  # fmt: skip
    first, second = (write_coco(tmp_path / name) for name in ("first", "second"))
    Path(second["annotations"]).write_text(Path(second["annotations"]).read_text() + " ")
    start = run(tmp_path / "a", **quick, train=first, val={"mine": first})
    chosen = {"train": second, "val": {"mine": second}}
    more = [run(tmp_path / "b", **quick, **chosen, init_from=str(start))]
    more.append(run(tmp_path / "c", **quick, **chosen, init_encoder_from=str(start)))
    beside = inherited(tmp_path / "a/checkpoints/last.pt")
    assert beside == entries_of(json.loads((start / "card.json").read_text())) != []
    for best in more:
        entries = entries_of(json.loads((best / "card.json").read_text()))
        assert len({one.files[0].sha256 for one in entries}) == 2


@pytest.mark.parametrize("dropped", [[], [0], [3], [0, 1, 2], [1, 2, 5, 8, 9]])
def test_numbers_come_back_from_the_card(dropped: list[int]) -> None:
    spans = {(): "", (0,): "0", (3,): "3", (0, 1, 2): "0-2", (1, 2, 5, 8, 9): "1-2,5,8-9"}
    entry = TrainedOn(dataset="coco", split="all", leave_out_every=5, dropped=spans[tuple(dropped)])
    (back,) = entries_of({"trained_on": json.loads(json.dumps(to_card([entry, entry])))})
    assert back == entry
    assert back.numbers(11) == [n for n in range(11) if n % 5 and n not in dropped]


# --- the command that training prints -------------------------------------------------------------


def test_each_validation_set_that_eval_reads_has_its_command() -> None:
    scenes = {"dataset": "refshapes", "split": "val"}
    val = {
        "g": {"dataset": "grefcoco", "root": "data", "split": "val", "split_by": "unc", "limit": 9},
        "my/own": {"dataset": "coco", "annotations": "a.json", "split": "val", "bands": [3, 2, 1],
                   "images": "a b", "leave_out_every": 3},
        "one": {**scenes, "family": "grefshapes"},
        "all": {**scenes, "family": "mixed"},
        "wide": {**scenes, "family": "refshapes", "variety": "wide"},
        "other": {**scenes, "family": "refshapes", "seed": 5},
    }  # fmt: skip
    chosen = settings(Path("runs/x"), val=val)
    end = "--model runs/x/best -o runs/x-eval"
    assert list(scoring_commands(chosen, Path("runs/x/best"))) == [
        f"risam eval --dataset grefcoco --root data --split val --split-by unc {end}-g",
        "risam eval --dataset coco --root a.json --split val --images 'a b' --bands 3,2,1 "
        f"--leave-out-every 3 {end}-my_own",
        f"risam eval --dataset refshapes --family grefshapes --split val {end}-one",
    ]
