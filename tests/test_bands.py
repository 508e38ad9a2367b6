"""``--bands`` and ``--confine`` in every command that images and lists of others come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from support.eval_files import box
from support.export_cases import record, write_jsonl

from risam_cli.cli import main
from risam_cli.settings.data import CocoData
from risam_cli.training.data.build import open_source
from risam_cli.training.data.dataset import PackedSamples, ReferringSamples

BANDS = (4, 2, 5)
SIZE = (48, 64)


@pytest.fixture
def scenes(tmp_path: Path) -> tuple[Path, Path]:
    """A data set of one TIFF of five bands, and one of the PNG that three of them are."""
    bands = np.random.default_rng(0).integers(0, 256, (*SIZE, 5), dtype=np.uint8)
    for kind in ("tif", "png"):
        root = tmp_path / kind
        root.mkdir()
        content: dict[str, Any] = {
            "images": [{"id": 1, "file_name": "a.tif", "height": 48, "width": 64}],
            "annotations": [{"id": 1, "image_id": 1, "segmentation": [box(2, 2, 20, 20)]}],
            "expressions": [{"id": 1, "image_id": 1, "ann_ids": [1], "text": "the star"}],
        }
        (root / "instances.json").write_text(json.dumps(content))
        write_jsonl(root / "p.jsonl", [record("a.tif", "x", np.eye(48, 64, dtype=np.bool_))])
    tifffile.imwrite(
        tmp_path / "tif" / "a.tif", bands, photometric="minisblack", planarconfig="contig"
    )
    Image.fromarray(bands[..., [b - 1 for b in BANDS]]).save(tmp_path / "png" / "a.tif", "PNG")
    return tmp_path / "tif", tmp_path / "png"


def same_by_bands(scenes: tuple[Path, Path], out: Path, *command: str, result: str) -> None:
    """A command fails for the TIFF alone; with its bands named it gives what it gives for the PNG.

    It runs in the data set's folder.
    """
    found = []
    for root, bands in ((scenes[0], ["--bands", ",".join(map(str, BANDS))]), (scenes[1], [])):
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(root)
            if bands:
                assert main([*command, "-o", str(out / "plain")]) != 0
            assert main([*command, *bands, "-o", str(out / root.name)]) == 0
        found.append(next((out / root.name).rglob(result)).read_bytes())
    assert found[0] == found[1]


def test_every_command_takes_bands(
    scenes: tuple[Path, Path], tmp_path: Path, model_folder: Path
) -> None:
    model = ["--model", str(model_folder), "--device", "cpu"]
    predict = ["predict", "a.tif", "-e", "the star", *model]
    same_by_bands(scenes, tmp_path / "predict", *predict, result="*.png")
    explain = ["explain", "a.tif", "-e", "the star", *model]
    same_by_bands(scenes, tmp_path / "explain", *explain, result="*.png")
    scored = ["eval", "--dataset", "coco", "--root", ".", *model]
    same_by_bands(scenes, tmp_path / "eval", *scored, result="per_expression.jsonl")
    drawn = ["export-masks", "p.jsonl", "--to", "overlay", "--image-root", "."]
    same_by_bands(scenes, tmp_path / "overlay", *drawn, result="*.png")


def test_training_takes_bands(scenes: tuple[Path, Path]) -> None:
    examples = []
    for root, bands in zip(scenes, (BANDS, None), strict=True):
        data = CocoData(
            dataset="coco", annotations=str(root / "instances.json"), images=str(root), bands=bands
        )
        samples = PackedSamples(open_source("train", data).iterate())
        examples.append(ReferringSamples(samples, 64, 16, None, 1.0, data.bands)[0])
    assert (examples[0].image == examples[1].image).all()


def test_confined_data_read_no_image_elsewhere(
    scenes: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = scenes[1]
    call = ["eval", "--dataset", "coco", "--root", str(root), "--predictions"]
    rows = [{"image": "a.tif", "expression": "the star", "mask": "../m.png"}]
    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(tmp_path / "m.png")
    call += [str(write_jsonl(root / "answers.jsonl", rows)), "-o"]
    assert main([*call, str(tmp_path / "open")]) == 0
    assert main([*call, str(tmp_path / "mask"), "--confine"]) == 3
    assert "to which files are confined" in (tmp_path / "mask" / "failures.jsonl").read_text()
    path = root / "instances.json"
    for name in ("../png/../m.png", str(tmp_path / "m.png")):
        path.write_text(path.read_text().replace("a.tif", name))
        assert main([*call, str(tmp_path / "image"), "--confine"]) == 1
        assert f"{name!r} is outside of {root}" in capfd.readouterr().err
        path.write_text(path.read_text().replace(name, "a.tif"))
