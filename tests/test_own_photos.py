"""The whole way of docs/photos.md on real photos, with tiny models: each step is one command."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import published
from support.export_cases import iou
from support.made_parts import ENCODER, sam_file
from support.paths import REPO
from support.records import read_records

from risam_cli.cli import main
from risam_cli.masks import rle as masks

pytestmark = [pytest.mark.photos, pytest.mark.slow]

TEXTS = ("the person", "the dog on the left", "two boats", "a tree")


def risam(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that must succeed says on stderr."""
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    told = capsys.readouterr().err
    assert code == 0, told
    return told


def expressions(labels: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((labels / "instances.json").read_text())["expressions"]
    return found


def config(tmp_path: Path, sam: Path) -> Path:
    """The shipped settings for photos of one's own, made small."""
    small = {
        "extends": str(REPO / "configs" / "own_photos_vit_b.yaml"),
        "output": str(tmp_path / "run"), "workers": 0, "threads": 1, "device": "cpu",
        "precision": "fp32", "validate_every": 2, "checkpoint_every": 2, "log_every": 1,
        "pictures": 1, "loss": {"target_size": 32},
        "model": {
            "image_encoder": {**ENCODER, "checkpoint": str(sam)},
            "text_encoder": {"hidden": 16, "heads": 2, "layers": 1},
            "fusion": {"dim": 32, "heads": 2, "blocks": 1, "ffn_dim": 32},
            "decoder": {"heads": 2, "layers": 2, "ffn_dim": 32, "mask_dim": 8},
        },
        "stages": [{"name": "all", "kind": "referring", "train_encoder": "adapters", "steps": 2,
                    "images_per_step": 2, "learning_rate": 1.0e-4, "text_learning_rate": 1.0e-4}],
    }  # fmt: skip
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small))
    return path


def review(path: Path) -> None:
    """Deletes the first object, and draws another on the second image."""
    tree = ET.parse(path)
    first, second = [image for image in tree.iter("image") if len(image)][:2]
    group = first[0].get("group_id")
    for shape in [
        one for one in first if one is first[0] or (group and one.get("group_id") == group)
    ]:
        first.remove(shape)
    corners = {"xtl": "10", "ytl": "10", "xbr": "60", "ybr": "50"}
    ET.SubElement(second, "box", {"label": "the thing that I drew", **corners})
    tree.write(path)


@pytest.fixture
def apart(photos: Path, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve photos in the working folder, no network, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in sorted(photos.iterdir())[:12]:
        shutil.copy(path, tmp_path / "photos")


@pytest.mark.usefixtures("apart")
def test_from_a_folder_of_photos_to_an_evaluated_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = published.clipseg(tmp_path / "clipseg")
    other = published.clipseg(tmp_path / "other", seed=1)

    # 1. Two models' masks.
    asked = [option for text in TEXTS for option in ("-e", text)]
    for name, folder in (("asked", model), ("asked-too", other)):
        told = risam(capsys, "predict", "photos", *asked, "--model", folder, "-o", name)
        assert "48 records" in told

    # 3. What both agree on, marked as a model's answers.
    pairs = zip(read_records(tmp_path / "asked"), read_records(tmp_path / "asked-too"), strict=True)
    ious = [iou(*(masks.decode(one.segmentation) for one in pair)) for pair in pairs]
    middle = float(np.median(ious))
    agree = ("--agree-with", "asked-too", "--min-iou", middle)
    export = ("--to", "coco", "--copy-images")
    risam(capsys, "export-masks", "asked", *agree, *export, "-o", "agreed")
    assert len(expressions(tmp_path / "agreed")) == sum(one >= middle for one in ious)
    risam(capsys, "export-masks", "asked", *export, "-o", "labels")
    assert len(expressions(tmp_path / "labels")) == 48
    assert all(one["pseudo"] for one in expressions(tmp_path / "labels"))

    # 2. A review in CVAT, read back.
    risam(capsys, "export-masks", "asked", "--to", "cvat", "--copy-images", "-o", "for-cvat")
    review(tmp_path / "for-cvat" / "annotations.xml")
    risam(capsys, "export-masks", "for-cvat", *export, "-o", "reviewed")
    drawn = [one for one in expressions(tmp_path / "reviewed") if "I drew" in one["text"]]
    assert len(drawn) == 1
    assert not any("pseudo" in one for one in expressions(tmp_path / "reviewed"))
    found = json.loads((tmp_path / "labels" / "instances.json").read_text())
    again = json.loads((tmp_path / "reviewed" / "instances.json").read_text())
    assert len(again["annotations"]) == len(found["annotations"])  # one less, one more

    # 4. A model of one's own. Words are learned, for no text encoder can be had.
    sam_file(tmp_path / "sam.pth")
    settings = config(tmp_path, tmp_path / "sam.pth")
    for labels, pseudo in (("labels", True), ("reviewed", False)):
        told = risam(
            capsys,
            *("train", settings, "--set", f"train.annotations={labels}/instances.json"),
            "--overwrite",
        )
        assert ("pseudo" in told) == pseudo
        assert "learns the words of the training expressions" in told
        assert "all known to the text encoder" in told

    # 5. Both scored alike, and side by side.
    data = ("--dataset", "coco", "--root", "reviewed/instances.json")
    risam(capsys, "eval", *data, "--model", model, "-o", "scored-published")
    risam(
        capsys,
        *("eval", *data, "--model", "run/best", "-o", "scored-own"),
        *("--compare", "scored-published"),
    )
    report = json.loads((tmp_path / "scored-own" / "report.json").read_text())
    assert report["comparison"]["figures"]
    assert main(["compare", "scored-published", "scored-own", "--to", "csv"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) >= 3
