"""``risam init``: a YAML file that trains as it is, out of what the data hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from support.settings_files import load_settings
from support.training_runs import write_coco

from risam_cli.cli import main


def test_what_is_written_trains_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "mine")
    path = tmp_path / "mine/pairs.json"
    content = json.loads(path.read_text())
    content["expressions"][0]["text"] = "the shiny boat"
    path.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine/pairs.json", "-o", "boats.yaml"]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "wrote boats.yaml", "a first try: risam train boats.yaml --steps 20",
    ]  # fmt: skip
    text = Path("boats.yaml").read_text()
    assert (
        "2 images, 4 expressions (2 of nothing in the image) of 7 words, 40x64 to 120x90 pixels"
        in text
    )
    assert "2 of these words are new to it" in text
    assert main(["train", "boats.yaml", "--steps", "1", "--set", "device=cpu", "-q"]) == 0
    assert Path("runs/boats/best/config.json").is_file()
    held = [load_settings(Path("boats.yaml")).val["mine"], load_settings(Path("boats.yaml")).train]
    assert [[d.takes(k) for k in (0, 1)] for d in held] == [[True, False], [False, True]]  # type: ignore[union-attr]


@pytest.mark.parametrize("images", [1, 2, 4, 5, 7, 400])
def test_steps_and_held_out_images_follow_the_number_of_images(tmp_path: Path, images: int) -> None:
    data = write_coco(tmp_path / "mine")
    path = Path(data["annotations"])
    content = json.loads(path.read_text())
    first, said = content["images"][0], content["expressions"][0]
    content["images"] = [{**first, "id": k} for k in range(images)]
    content["annotations"] = [{**content["annotations"][0], "image_id": 0}]
    content["expressions"] = [
        {**said, "id": k, "image_id": k, "ann_ids": []} for k in range(images)
    ]
    path.write_text(json.dumps(content))
    file = tmp_path / "train.yaml"
    assert main(["init", str(path), "-o", str(file), "--images", data["images"], "-q"]) == 0
    settings = load_settings(file)
    assert settings.val["mine"].annotations == str(path)  # type: ignore[union-attr]
    trained = [k for k in range(images) if settings.train.takes(k)]  # type: ignore[union-attr]
    shown = [k for k in range(images) if settings.val["mine"].takes(k)]  # type: ignore[union-attr]
    assert trained
    assert shown
    assert images == 1 or not set(trained) & set(shown)
    stage = settings.stages[0]
    assert stage.images_per_step <= len(trained)
    assert stage.warmup < stage.steps
    assert settings.validate_every <= stage.steps


def test_the_splits_that_a_file_has_are_kept(tmp_path: Path) -> None:
    """Nothing of its test split is trained on."""
    data = write_coco(tmp_path / "mine")
    path, file = Path(data["annotations"]), tmp_path / "train.yaml"
    content = json.loads(path.read_text())
    for image, split in zip(content["images"], ("testA", "train"), strict=True):
        image["split"] = split
    path.write_text(json.dumps(content))
    assert main(["init", str(path), "-o", str(file), "-q"]) == 0
    settings = load_settings(file)
    assert (settings.train.split, settings.val["mine"].split) == ("train", "testA")  # type: ignore[union-attr]
    content["images"][0]["split"] = "val"
    content["expressions"][0]["split"] = "testA"
    path.write_text(json.dumps(content))
    assert main(["init", str(path), "-o", str(file), "-q", "--overwrite"]) == 0
    assert load_settings(file).val["mine"].split == "val"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["my: run #1", "'q\"", "ü {x}", "--- a", "b\nc: ["])
def test_names_of_any_kind_are_quoted(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    data = write_coco(folder)
    file = folder / f"{name}.yaml"
    assert main(["init", data["annotations"], "-o", str(file), "-q"]) == 0
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert raw["train"]["annotations"] == data["annotations"]
    assert raw["output"].startswith("runs/")


def test_a_path_that_yaml_cannot_hold_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "mine")
    folder = (tmp_path / "mine").rename(tmp_path / os.fsdecode(b"\xff"))
    assert main(["init", str(folder / "pairs.json"), "-o", str(tmp_path / "train.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("\\xff/pairs.json cannot be written in YAML; rename it")


def test_names_with_backslashes_are_found(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "mine")
    path = Path(data["annotations"])
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = f"{Path(data['images']).name}\\{image['file_name']}"
    path.write_text(json.dumps(content))
    images = Path(data["images"]).parent
    code = main(["init", str(path), "-o", str(tmp_path / "a.yaml"), "--images", str(images), "-q"])
    assert code == 0


def test_what_cannot_be_trained_on_is_told_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_coco(tmp_path / "mine")
    path, file = Path(data["annotations"]), tmp_path / "train.yaml"
    content = json.loads(path.read_text())

    def told(*more: str) -> str:
        assert main(["init", str(path), "-o", str(file), *more]) == 1
        return capsys.readouterr().err

    file.write_text("mine")
    assert "already exists; choose another --output, or give --overwrite" in told()
    file.unlink()
    file.mkdir()
    assert "train.yaml is a folder; give a file by --output" in told("--overwrite")
    file.rmdir()
    assert "2 of 2 images are missing" in told("--images", str(tmp_path))
    path.write_text(json.dumps({**content, "expressions": []}))
    assert "holds no expressions; add a list 'expressions'" in told()
    path.unlink()
    assert "cannot read" in told()
    path.mkdir()
    assert "Is a directory; name the JSON file in it" in told()
    assert not file.exists()
