"""``risam compare-models``: several models' masks of the same expressions, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
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
from risam_cli.errors import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    DataError,
    ImageError,
    OutputError,
    UsageError,
)

if TYPE_CHECKING:
    from risam_cli.api.results import Result
    from risam_cli.data.images.images import Rgb
    from risam_cli.drawing.comparison import ComparisonRow
    from risam_cli.types import Failure, Rle

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
    from risam_cli.data.inputs.inputs import require_askable

    require_askable(expressions)
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise OutputError(f"{output} is not empty", "choose another -o or give --overwrite")
    from risam_cli.console.console import get_console
    from risam_cli.console.text import counted
    from risam_cli.drawing.comparison import draw_comparison
    from risam_cli.drawing.png import encode_rgb
    from risam_cli.export.folder import ExportFolder
    from risam_cli.outputs.records import FAILURES, failure_to_json

    # Bad images and masks are told before a model is loaded.
    pictures, failures = _pictures(images)
    asked = [(image, text) for image in images for text in expressions]
    truth = {
        number: _read_truth(Path(file), pictures[image].shape[:2])
        for number, (file, (image, _)) in enumerate(zip(truths, asked, strict=False))
        if image in pictures
    }
    answers = _answers(list(pictures), expressions, models, device, precision, failures)

    rows, told = [], []
    for number, (image, text) in enumerate(asked):
        if image in pictures:
            found = {name: of.get((image, text)) for name, of in answers.items()}
            row, figures = _row(image, pictures[image], text, truth.get(number), found)
            rows.append(row)
            told += figures
    with ExportFolder(output, "comparison", [PICTURE], overwrite=overwrite) as folder:
        folder.write(PICTURE, encode_rgb(draw_comparison(rows)))
        if failures:
            folder.write(FAILURES, "".join(failure_to_json(one) + "\n" for one in failures))
        folder.complete({"files": [PICTURE], "failures": len(failures)})
    console = get_console()
    console.info(str(output / PICTURE))
    if as_json:
        click.echo(json.dumps({"picture": str(output / PICTURE), "answers": told}))
    if failures:
        console.warn(f"{counted(len(failures), 'item')} failed: see {output / FAILURES}")
    return EXIT_SOME_FAILED if failures else EXIT_OK


def _pictures(images: tuple[str, ...]) -> tuple[dict[str, Rgb], list[Failure]]:
    """The images that can be read, by name, and the failures of the others.

    Raises:
        DataError: one is not there, or none can be read.
    """
    from risam_cli.console.console import get_console
    from risam_cli.data.images.images import open_rgb
    from risam_cli.types import Failure

    pictures, failures = {}, []
    for image in dict.fromkeys(images):
        try:
            pictures[image] = open_rgb(Path(image))
        except ImageError as error:
            if len(images) == 1 or not Path(image).exists():
                raise
            get_console().warn(str(error))
            failures.append(Failure(image, image, None, "decode", "ImageError", str(error)))
    if not pictures:
        raise DataError("none of the images can be read", "name images that can")
    return pictures, failures


def _row(
    image: str, rgb: Rgb, expression: str, truth: Rle | None, found: Mapping[str, Result | None]
) -> tuple[ComparisonRow, list[dict[str, Any]]]:
    """An image and an expression with the answer of each model, None where it failed."""
    from risam_cli.drawing.comparison import ComparisonRow, Panel
    from risam_cli.masks import rle

    panels, told = [Panel("image")], []
    if truth is not None:
        note = "" if rle.area(truth) else "nothing fits"
        panels.append(Panel("truth", rle.decode(truth), note))
    for name, result in found.items():
        if result is None:
            panels.append(Panel(name, None, "failed"))
            continue
        iou = None if truth is None else _iou(result, truth)
        figure = f"score {result.score:.3f}" if iou is None else f"IoU {iou:.3f}"
        note = f"{figure}, nothing fits" if result.no_target else figure
        panels.append(Panel(name, result.mask, note))
        answer = {"iou": iou, "score": result.score, "no_target": result.no_target}
        told.append({"image": image, "expression": expression, "model": name, **answer})
    return ComparisonRow(rgb, expression, tuple(panels)), told


def _answers(
    images: list[str],
    expressions: tuple[str, ...],
    models: tuple[str, ...],
    device: str,
    precision: str,
    failures: list[Failure],
) -> dict[str, dict[tuple[str, str], Result]]:
    """Each model's answers by image and expression; one model is in memory at a time.

    Args:
        failures: is given what failed.
    """
    from risam_cli.api.model import load
    from risam_cli.console.console import get_console
    from risam_cli.segmenters.resolve import parse_model

    names = _names(models)
    for source in models:  # a wrong name is told before the first one works
        parse_model(source)
    found: dict[str, dict[tuple[str, str], Result]] = {}
    told: set[str] = set()  # not for every image again
    for name, source in zip(names, models, strict=True):
        model = load(source, device, precision)
        found[name] = {}
        streamed = model.predict_iter(images, list(expressions), on_error="keep")
        for image, results in zip(images, streamed, strict=True):
            found[name] |= {(image, result.expression): result for result in results}
            said = [f"{name}: {one.expression!r}: {note}" for one in results for note in one.notes]
            for line in said:
                if line not in told:
                    get_console().warn(line)
            told.update(said)
            for failure in results.failures:
                message = f"{name}: {failure.message}"
                get_console().warn(message)
                failures.append(replace(failure, message=message))
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
