"""``risam compare-models``: one picture, the figures beneath it, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from support.cli import Cli

from risam_cli.api.model import load
from risam_cli.cli import main
from risam_cli.drawing.comparison import CELL, ComparisonRow, Panel, draw_comparison
from risam_cli.segmenters.risam import RisamSegmenter

IMAGE = (60, 80)  # rows, columns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (*IMAGE, 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    return tmp_path


def test_the_figures_are_those_of_the_masks(folder: Path, model_folder: Path, cli: Cli) -> None:
    own = load(model_folder, "cpu").predict(str(folder / "a.png"), "red circle")
    truth = np.zeros(IMAGE, np.uint8)
    truth[: IMAGE[0] // 2] = 255
    cv2.imwrite(str(folder / "truth.png"), truth)
    done = cli(
        *("compare-models", folder / "a.png", "-e", "red circle", "--model", model_folder),
        *("--model", "refshapes-tiny", "--truth", folder / "truth.png", "--json"),
        *("-o", folder / "out"),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [a["model"] for a in told["answers"]] == [model_folder.name, "refshapes-tiny"]
    first = told["answers"][0]
    both = (own.mask & (truth > 0)).sum() / (own.mask | (truth > 0)).sum()
    assert first["iou"] == pytest.approx(0.0 if own.no_target else both)
    assert first["no_target"] == own.no_target
    picture = np.asarray(Image.open(told["picture"]))
    assert picture.shape[1] > 4 * CELL  # image, truth and two models


def test_every_image_and_expression_has_its_row(folder: Path, model_folder: Path, cli: Cli) -> None:
    done = cli(
        *("compare-models", folder / "a.png", folder / "b.png", "-e", "red circle", "-e", "star"),
        *("--model", model_folder, "--json", "-o", folder / "out"),
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["answers"]
    found = [(Path(a["image"]).name, a["expression"]) for a in answers]
    assert found == [(i, e) for i in ("a.png", "b.png") for e in ("red circle", "star")]
    assert all(a["iou"] is None and 0 <= a["score"] <= 1 for a in answers)
    assert {p.name for p in (folder / "out").iterdir()} >= {"comparison.png"}
    again = cli(
        *("compare-models", folder / "a.png", "-e", "star", "--model", model_folder),
        *("-o", folder / "out"),
    )
    assert again.returncode == 1
    assert "is not empty" in again.stderr


def test_words_that_a_model_does_not_know_are_told_once(folder: Path, cli: Cli) -> None:
    done = cli(
        *("compare-models", folder / "a.png", folder / "b.png", "-e", "the zebra", "-e", "a star"),
        *("--model", "refshapes-tiny", "-o", folder / "out"),
    )
    assert done.returncode == 0, done.stderr
    wanted = "warning: refshapes-tiny: 'the zebra': the model does not know: zebra"
    assert [line for line in done.stderr.splitlines() if "does not know" in line] == [wanted]


def test_a_bad_image_costs_its_rows_alone(folder: Path, model_folder: Path, cli: Cli) -> None:
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:90])
    small = folder / "small.png"
    Image.new("L", IMAGE[::-1]).save(small)
    done = cli(
        *("compare-models", "bad.png", "a.png", "-e", "star", "--model", model_folder, "--json"),
        *("--truth", "none.png", "--truth", small, "-o", "out"),
        cwd=folder,
    )
    assert done.returncode == 3, done.stderr
    assert "1 item failed: see out/failures.jsonl" in done.stderr
    assert [a["image"] for a in json.loads(done.stdout)["answers"]] == ["a.png"]
    failure = json.loads((folder / "out/failures.jsonl").read_text())
    assert (failure["image"], failure["stage"]) == ("bad.png", "decode")
    none = cli(
        "compare-models", *["bad.png"] * 2, "-e", "star", "--model", model_folder, cwd=folder
    )
    assert none.returncode == 1
    assert "none of the images can be read" in none.stderr


def test_an_image_that_a_model_fails_at_costs_its_panels_alone(
    folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    Image.new("RGB", IMAGE[::-1]).save(folder / "a.png")
    encode = RisamSegmenter.encode_images

    def fails_at_black(segmenter: RisamSegmenter, inputs: Any) -> Any:
        if inputs[0].values.max() <= 0:
            raise RuntimeError("odd shapes")
        return encode(segmenter, inputs)

    monkeypatch.setattr(RisamSegmenter, "encode_images", fails_at_black)
    images, out = (str(folder / "a.png"), str(folder / "b.png")), str(folder / "out")
    asked = ["compare-models", *images, "-e", "star", "--model", str(model_folder), "--json"]
    assert main([*asked, "-o", out]) == 3
    told = capfd.readouterr()
    assert [a["image"] for a in json.loads(told.out)["answers"]] == [images[1]]
    failure = json.loads((folder / "out/failures.jsonl").read_text())
    assert (failure["image"], failure["expression"]) == (images[0], "star")
    assert failure["message"].startswith(f"{model_folder.name}: ")
    assert "odd shapes" in failure["message"]
    assert (folder / "out/comparison.png").is_file()


def test_a_wrong_model_name_is_told_before_another_model_works(folder: Path, cli: Cli) -> None:
    (damaged := folder / "damaged").mkdir()  # which only loading it tells
    asked = ("compare-models", folder / "a.png", "-e", "star", "--model", damaged)
    done = cli(*asked, "--model", "nonsense", "-o", folder / "out")
    assert done.returncode == 1
    assert "'nonsense'" in done.stderr


@pytest.mark.parametrize("kind", ["labels of 16 bits", "a lossy file", "a palette", "alpha"])
def test_a_true_mask_is_read_as_masks_are_everywhere(folder: Path, cli: Cli, kind: str) -> None:
    inside = np.zeros(IMAGE, bool)
    inside[20:40, 8:30] = True
    file = folder / "truth.png"
    if kind == "labels of 16 bits":
        Image.fromarray(inside.astype(np.uint16)).save(file)
    elif kind == "a lossy file":
        noise = np.random.default_rng(0).integers(0, 40, IMAGE)
        file = file.with_suffix(".jpg")
        Image.fromarray(np.where(inside, 255 - noise, noise).astype(np.uint8)).save(file)
    elif kind == "a palette":
        labels = Image.fromarray(inside.astype(np.uint8), "P")
        labels.putpalette([0, 0, 0, 0, 0, 0])
        labels.save(file)
    else:
        pixels = np.full((*IMAGE, 4), 90, np.uint8)
        pixels[..., 3] = np.where(inside, 255, 0)
        Image.fromarray(pixels).save(file)
    Image.fromarray(inside).save(folder / "plain.png")
    arguments = ("compare-models", folder / "a.png", "-e", "star", "--model", "refshapes-tiny")
    drawn = []
    for truth in (file, folder / "plain.png"):
        out = folder / f"out-{truth.stem}"
        done = cli(*arguments, "--truth", truth, "-o", out)
        assert done.returncode == 0, done.stderr
        drawn.append(np.asarray(Image.open(out / "comparison.png")))
    assert np.array_equal(*drawn)


def test_a_true_mask_that_can_be_read_in_two_ways_is_told_of(
    folder: Path, model_folder: Path, cli: Cli
) -> None:
    soft = np.tile(np.linspace(0, 255, IMAGE[1]).astype(np.uint8), (IMAGE[0], 1))
    Image.fromarray(soft).save(folder / "soft.png")
    done = cli(
        *("compare-models", folder / "a.png", "-e", "star", "--model", model_folder),
        *("--truth", folder / "soft.png", "-o", folder / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert "soft.png holds gray levels between: 128 and above was taken" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.png", "-e", "star", "--truth", "a.png", "--truth", "b.png"), "2 true masks for 1"),
        (("a.png", "-e", " "), "the expression ' ' has no words"),
        (("none.png", "-e", "star"), "none.png"),
        (("a.png", "-e", "star", "--truth", "small.png"), "small.png is 8x6, its image 80x60"),
        (("a.png", "-e", "star", "--truth", "none.png"), "none.png"),
        (("a.png", "-e", "star", "--truth", "text.png"), "text.png is not an image"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    folder: Path, model_folder: Path, cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(folder / "small.png")
    (folder / "text.png").write_text("no")
    done = cli("compare-models", *arguments, "--model", model_folder, "-o", "out", cwd=folder)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()


def test_a_mask_is_outlined_and_the_rest_dimmed_in_its_own_panel_alone() -> None:
    rgb = np.full((*IMAGE, 3), 200, np.uint8)
    mask = np.zeros(IMAGE, bool)
    mask[20:40, 20:60] = True
    drawn = draw_comparison(
        [ComparisonRow(rgb, "x", (Panel("image"), Panel("model", mask, "IoU 1.000")))]
    )
    left, right = drawn[:, : drawn.shape[1] // 2], drawn[:, drawn.shape[1] // 2 :]
    assert not (left == 80).all(axis=2).any()  # 0.4 of 200: dimmed
    dimmed, kept = (right == 80).all(axis=2).sum(), (right == 200).all(axis=2).sum()
    assert dimmed / kept == pytest.approx((60 * 80 - 800) / 800, rel=0.25)


def test_a_trained_model_is_called_by_its_run(folder: Path, model_folder: Path, cli: Cli) -> None:
    shutil.copytree(model_folder, folder / "mine/best")
    for models, names in (
        (("mine/best",), ["mine/best"]),
        (("mine/best", "refshapes-tiny"), ["mine/best", "refshapes-tiny"]),
    ):
        given = [part for model in models for part in ("--model", model)]
        done = cli(
            *("compare-models", "a.png", "-e", "star", *given, "--json", "--overwrite"), cwd=folder
        )
        assert done.returncode == 0, done.stderr
        assert [a["model"] for a in json.loads(done.stdout)["answers"]] == names


def test_a_comparison_needs_rows_with_panels() -> None:
    for rows in ([], [ComparisonRow(np.zeros((4, 4, 3), np.uint8), "x", ())]):
        with pytest.raises(ValueError, match="rows with panels"):
            draw_comparison(rows)
