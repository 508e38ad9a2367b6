"""What images that are named by absolute paths are called in a run's folder."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.predict_runs import Run
from support.records import read_records

from risam_cli.cli import main
from risam_cli.data.images.images import MAX_PIXELS
from risam_cli.data.inputs.inputs import Inputs
from risam_cli.errors import OutputError, UsageError
from risam_cli.outputs.naming import Names, mask_name
from risam_cli.runs.writer import Saving


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a/1.png", "b/2.png", "b/deep/3.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), 128, np.uint8)).save(path)
    return tmp_path / "photos"


def _masks(folder: Path) -> set[str]:
    masks = folder / "masks"
    return {path.relative_to(masks).as_posix() for path in masks.rglob("*.png")}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{photos}"], "{photos}"),
        (["{photos}/a", "{photos}/b"], "{photos}"),
        (["{photos}/b/2.png"], "{photos}/b"),
        (["{photos}/a/1.png", "{photos}/b/deep/3.png"], "{photos}"),
        (["{photos}/b/*.png"], "{photos}/b"),
        (["{photos}/list.jsonl"], "{photos}"),
        (["{photos}", "relative/4.png"], None),
        (["{photos}/relative.jsonl"], None),
    ],
)
def test_the_folder_that_all_inputs_share(
    photos: Path, arguments: list[str], expected: str | None
) -> None:
    images = [photos / "a/1.png", photos / "b/2.png"]
    rows = [json.dumps({"image": str(path), "expression": "x"}) for path in images]
    (photos / "list.jsonl").write_text("\n".join(rows))
    (photos / "relative.jsonl").write_text('{"image": "a/1.png", "expression": "x"}')
    found = Inputs([one.format(photos=photos) for one in arguments], ["x"]).common_folder()
    assert found == (None if expected is None else expected.format(photos=photos))


def test_stdin_shares_no_folder() -> None:
    assert Inputs(["-"], ["x"]).common_folder() is None


def test_names_never_meet() -> None:
    names = Names("/data/photos")
    images = ["/data/photos/a/1.jpg", "/data/a/1.jpg", "a/1.jpg", "/data/photos/../a/1.jpg"]
    made = {mask_name(image, 0, "x", names=names) for image in images}
    assert len(made) == len(images)
    assert mask_name(images[0], 0, "x", names=names) == "masks/a/1.jpg__0-x.png"
    assert Names.from_json(names.to_json()) == names
    assert Names.from_json(Names(base=True).to_json()) == Names(base=True)
    assert Names.from_json(None) == Names()


def test_masks_lie_as_the_images_lie(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["predict", str(photos), "-e", "The Thing", "-o", str(out), "-q"]) == 0
    made = {"a/1.png__0-the-thing.png", "b/2.png__0-the-thing.png", "b/deep/3.png__0-the-thing.png"}
    assert _masks(out) == made
    assert {record.image for record in read_records(out)} == {
        str(path) for path in photos.rglob("*.png")
    }


def test_a_run_goes_on_with_the_names_that_it_began_with(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = ["predict", str(photos / "b/2.png"), "-e", "x", "-o", str(out), "-q"]
    assert main(first) == 0
    assert _masks(out) == {"2.png__0-x.png"}
    more = [*first[:2], str(photos / "a/1.png"), *first[2:], "--resume"]
    assert main(more) == 0
    whole = str(photos / "a/1.png").lstrip("/")
    names = _masks(out)
    assert "2.png__0-x.png" in names
    assert any(name.startswith(f"{whole}__0-x.") for name in names - {"2.png__0-x.png"})
    assert len(read_records(out)) == 2
    assert main([*more, "--names", "base"]) == 1
    assert "another" in capsys.readouterr().err


def test_base_names(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Inputs([str(photos)], ["x"])
    found.require_own_names()
    run = Run(
        [photos], tmp_path / "out", saving=Saving(True, False, MAX_PIXELS, files=Names(base=True))
    )
    assert run.go() == 0
    assert {name.partition("__")[0] for name in _masks(tmp_path / "out")} == {
        "1.png",
        "2.png",
        "3.png",
    }
    os.link(photos / "a/1.png", photos / "b/1.png")
    with pytest.raises(UsageError, match="have the same name"):
        found.require_own_names()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(UsageError, match="stdin"):
        Inputs(["-"], ["x"]).require_own_names()


def test_another_way_to_name_is_another_run(photos: Path, tmp_path: Path) -> None:
    saving = Saving(True, False, MAX_PIXELS, files=Names(str(photos)))
    assert Run([photos], tmp_path / "out", saving=saving).go() == 0
    with pytest.raises(OutputError, match="files"):
        Run([photos], tmp_path / "out").go()
