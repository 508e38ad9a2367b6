"""``risam compare-models``: several models' masks of the same expressions, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from risam_cli.commands import completing
from risam_cli.commands.options import (
    device_options,
    json_option,
    output_option,
    verbosity_options,
)
from risam_cli.data.identity import has_words
from risam_cli.errors import EXIT_OK, OutputError, UsageError

if TYPE_CHECKING:
    from risam_cli.api.results import Result
    from risam_cli.types import Rle

PICTURE = "comparison.png"


@click.command("compare-models")
@click.argument(
    "images", metavar="IMAGE...", nargs=-1, required=True, shell_complete=completing.files
)
@click.option(
    "-e",
    "--expression",
    "expressions",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="What to find in every image. May be given several times.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    metavar="NAME|PATH",
    shell_complete=completing.models,
    help="A model's name, or a folder written by `risam train`. Give it once for each model.",
)
@click.option(
    "--truth",
    "truths",
    multiple=True,
    metavar="MASK",
    shell_complete=completing.files,
    help="The true mask of an image and an expression, nonzero inside. Give one for each "
    "expression of the first image, then of the second, and so on.",
)
@output_option("risam-comparison")
@click.option("--overwrite", is_flag=True, help="Replace an earlier comparison in the folder.")
@json_option
@device_options
@verbosity_options
def command(**options: Any) -> int:
    """Draw several models' masks side by side, after Figure 2 of the paper.

    Writes one picture, comparison.png, with a row for each image and expression: the image, the
    true mask if --truth gives it, each model's mask, and below it its IoU, or its own score if the
    truth is unknown.

    \b
    Examples:
      risam compare-models photo.jpg -e "the dog" --model refshapes-tiny --model runs/mine/best
      risam compare-models a.png -e "red circle" --truth a-red.png --model one --model two -o out
    """
    return _compare(**options)


def _compare(
    images: tuple[str, ...],
    expressions: tuple[str, ...],
    models: tuple[str, ...],
    truths: tuple[str, ...],
    output: Path,
    overwrite: bool,
    as_json: bool,
    device: str,
    precision: str,
) -> int:
    pairs = len(images) * len(expressions)
    if truths and len(truths) != pairs:
        raise UsageError(
            f"{len(truths)} true masks for {pairs} pairs of an image and an expression",
            "give one for each pair, or none",
        )
    for phrase in expressions:
        if not has_words(phrase):
            raise UsageError(f"the expression {phrase!r} has no words", "give words after -e")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise OutputError(f"{output} is not empty", "choose another -o or give --overwrite")
    from risam_cli.console.console import get_console
    from risam_cli.data.images.images import open_rgb
    from risam_cli.drawing.comparison import ComparisonRow, Panel, draw_comparison
    from risam_cli.drawing.png import encode_rgb
    from risam_cli.export.folder import ExportFolder
    from risam_cli.masks import rle

    # Bad images and masks are told before a model is loaded.
    pictures = [open_rgb(Path(image)) for image in images]
    shapes = [picture.shape[:2] for picture in pictures for _ in expressions]
    true = [_read_truth(Path(file), shape) for file, shape in zip(truths, shapes, strict=False)]
    answers = _answers(images, expressions, models, device, precision)

    rows, told = [], []
    for pair in range(pairs):
        image, text = divmod(pair, len(expressions))
        panels = [Panel("image")]
        if true:
            note = "" if rle.area(true[pair]) else "nothing fits"
            panels.append(Panel("truth", rle.decode(true[pair]), note))
        for name, results in answers:
            result, iou = results[pair], None
            if true:
                iou = _iou(result, true[pair])
            figure = f"score {result.score:.3f}" if iou is None else f"IoU {iou:.3f}"
            note = f"{figure}, nothing fits" if result.no_target else figure
            panels.append(Panel(name, result.mask, note))
            told.append(
                {
                    "image": images[image],
                    "expression": expressions[text],
                    "model": name,
                    "iou": iou,
                    "score": result.score,
                    "no_target": result.no_target,
                }
            )
        rows.append(ComparisonRow(pictures[image], expressions[text], tuple(panels)))
    with ExportFolder(output, "comparison", [PICTURE], overwrite=overwrite) as folder:
        folder.write(PICTURE, encode_rgb(draw_comparison(rows)))
        folder.complete({"files": [PICTURE]})
    get_console().info(str(output / PICTURE))
    if as_json:
        click.echo(json.dumps({"picture": str(output / PICTURE), "answers": told}))
    return EXIT_OK


def _answers(
    images: tuple[str, ...],
    expressions: tuple[str, ...],
    models: tuple[str, ...],
    device: str,
    precision: str,
) -> list[tuple[str, list[Result]]]:
    """Each model's name and its answers, image by image; one model is in memory at a time."""
    from risam_cli.api.model import load
    from risam_cli.segmenters.resolve import parse_model

    names = _names(models)
    for source in models:  # a wrong name is told before the first one works
        parse_model(source)
    found = []
    for name, source in zip(names, models, strict=True):
        model = load(source, device, precision)
        answers = model.predict(list(images), list(expressions))
        found.append((name, [result for results in answers for result in results]))
    return found


def _names(models: tuple[str, ...]) -> list[str]:
    """What the models are called: as short as tells them apart, so that best/ names its run."""
    paths = [Path(model).resolve() if Path(model).is_dir() else Path(model) for model in models]
    shortest = 2 if any(path.name in ("best", "averaged") for path in paths) else 1
    for depth in range(shortest, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {model}" for number, model in enumerate(models, start=1)]


def _read_truth(path: Path, shape: tuple[int, ...]) -> Rle:
    from risam_cli.console.console import get_console
    from risam_cli.data.readers.mask_files import read_mask_file

    def doubt(decided: str) -> None:
        get_console().warn(f"{path} {decided}")

    found = read_mask_file(path, "--truth", doubt, no_file="give the path of a PNG")
    height, width = found["size"]
    if (height, width) != tuple(shape):
        raise UsageError(
            f"{path} is {width}x{height}, its image {shape[1]}x{shape[0]}",
            "give the mask of this image, at the image's size",
        )
    return found


def _iou(result: Result, truth: Rle) -> float:
    """By the rules of the protocol ``native``."""
    from risam_cli.metrics.figures import Tally, outcome, score_masks

    tally = Tally()
    tally.add(score_masks("0", "0", result.rle, truth, pred_no_target=result.no_target))
    return float(outcome(tally.table()).iou[0])
