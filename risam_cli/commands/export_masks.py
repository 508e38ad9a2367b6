"""``risam export-masks``: predictions into the formats that other tools read."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from risam_cli.commands.options import (
    UNIT,
    LocalPath,
    bands_option,
    choice,
    confine_option,
    json_option,
    names_option,
    output_option,
    verbosity_options,
)
from risam_cli.console.console import get_console
from risam_cli.console.text import counted
from risam_cli.errors import EXIT_OK, EXIT_SOME_FAILED, UsageError

if TYPE_CHECKING:
    from risam_cli.export.categories import Naming
    from risam_cli.export.run_export import Outcome, Request

FORMATS = (
    *("coco", "coco-polygons", "yolo", "labelme", "cvat", "png", "webdataset"),
    *("overlay", "html", "cutout"),
)


def _pixels(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise click.BadParameter(f"{value} is not a distance in pixels.")
    return value


def _share(ctx: click.Context, param: click.Parameter, value: float) -> float:
    given = ctx.get_parameter_source(param.name or "") is not click.core.ParameterSource.DEFAULT
    if given and not 0 < value < 1:  # which nan is not either
        raise click.BadParameter(f"{value} is not between 0 and 1, such as 0.8.")
    return value


@click.command(name="export-masks")
@click.argument("predictions", type=LocalPath(allow_dash=True))
@click.option("--to", "kind", type=choice(FORMATS), required=True, help="What to write.")
@output_option(None)
@click.option(
    "--image-root",
    type=LocalPath(file_okay=False, exists=True),
    help="Folder that image paths are relative to.  [default: the working folder]",
)
@click.option(
    "--annotations",
    type=LocalPath(dir_okay=False),
    help="For COCO results: the COCO file that names their images and categories.",
)
@click.option(
    "--category-map",
    type=LocalPath(dir_okay=False),
    help="JSON, YAML or CSV that maps expressions to categories; `*` stands for all others.",
)
@names_option
@click.option("--one-class", metavar="NAME", help="One category for all masks.")
@click.option("--min-score", default=0.0, help="Skip masks with a lower score.", **UNIT)
@click.option(
    "--min-area",
    type=click.IntRange(min=0),
    default=0,
    metavar="PIXELS",
    help="Skip masks with a smaller area.",
)
@click.option(
    "--agree-with",
    type=LocalPath(allow_dash=False),
    metavar="PREDICTIONS",
    help="Skip masks that these predictions, such as another model's, do not have.",
)
@click.option(
    "--min-iou",
    help="--agree-with: lowest IoU at which two masks agree.  [default: 0.7]",
    **UNIT,
)
@click.option(
    "--simplify",
    type=float,
    default=0.0,
    metavar="PIXELS",
    callback=_pixels,
    help="Polygons: how far an outline may move.  [default: 0, exact]",
)
@click.option(
    "--holes",
    type=choice(["bridge", "drop"]),
    default="bridge",
    show_default=True,
    help="Polygons: keep holes by a bridge, or fill them.",
)
@click.option(
    "--vertices",
    type=choice(["edge", "center"]),
    help="Polygons: for readers that fill by pixel centres (edge) or border included (center).  "
    "[default: center for yolo, else edge]",
)
@click.option(
    "--parts",
    type=choice(["split", "join"]),
    default="split",
    show_default=True,
    help="yolo: a mask of several parts as several lines, or joined in one.",
)
@click.option(
    "--split",
    type=float,
    default=0.0,
    metavar="SHARE",
    callback=_share,
    help="yolo: this share of the images for training, the others for validation, such as 0.8; by "
    "their names, the same in every run.  [default: no split]",
)
@click.option(
    "--shapes",
    type=choice(["polygon", "mask"]),
    default="polygon",
    show_default=True,
    help="labelme, cvat: what to write.",
)
@click.option(
    "--style",
    type=choice(["binary", "indexed", "semantic"]),
    default="binary",
    show_default=True,
    help="png: one file per mask, or one per image with the numbers of masks or categories.",
)
@click.option(
    "--padding",
    type=click.IntRange(min=0),
    default=0,
    metavar="PIXELS",
    help="cutout: margin around the mask.",
)
@click.option(
    "--copy-images", is_flag=True, help="coco, yolo, labelme, cvat: also copy the images."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=178_956_970,
    show_default=True,
    metavar="N",
    help="Masks with more pixels fail.",
)
@bands_option
@confine_option(
    "Refuse images outside of --image-root and mask files outside of their list's folder: for "
    "results from strangers."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in the folder.")
@json_option
@verbosity_options
def command(
    category_map: Path | None,
    one_class: str | None,
    min_iou: float | None,
    bands: tuple[int, int, int] | None,
    names: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Turn PREDICTIONS into another annotation format.

    PREDICTIONS is a predictions.jsonl, the folder that holds it, a COCO file of annotations
    (instances.json) or results, a folder of PNG masks with a manifest (columns image, expression,
    mask), what CVAT or labelme saved after a review, or `-` for JSONL on stdin.

    What is lost in the conversion (holes, overlaps, polygons against masks) is reported at the
    end, and with --json on stdout.

    \b
    Examples:
      risam export-masks risam-out --to coco -o coco
      risam export-masks risam-out --to yolo -o yolo --one-class dog --copy-images --split 0.8
      risam export-masks reviewed/annotations.xml --to coco -o labels
    """
    from risam_cli.data.images.images import image_size, open_rgb
    from risam_cli.export.format import ExportSettings
    from risam_cli.export.run_export import Request, run_export

    if min_iou is not None and options["agree_with"] is None:
        raise UsageError("--min-iou needs --agree-with", "give the other model's predictions")
    chosen = {name: options.pop(name) for name in ExportSettings.__dataclass_fields__}
    request = Request(
        **options,
        naming=_naming(category_map, one_class),
        settings=ExportSettings(**chosen),
        min_iou=0.7 if min_iou is None else min_iou,
        names=names or "relative",
    )
    with get_console().progress(f"export {request.kind}", None, "masks") as progress:
        outcome = run_export(
            request,
            partial(open_rgb, bands=bands),
            partial(image_size, bands=bands),
            lambda masks, failures: progress.advance(masks, failures=failures),
            begin=lambda total: progress.update(total=total),
        )
    _tell(outcome, request)
    if as_json:
        summary = {**outcome.tally.summary(), "failures": outcome.failures}
        place = {"format": request.kind, "output": str(request.output)}
        click.echo(json.dumps({**place, **summary}))
    return EXIT_SOME_FAILED if outcome.failures else EXIT_OK


def _naming(category_map: Path | None, one_class: str | None) -> Naming:
    from risam_cli.export.categories import ByExpression, OneClass, read_map

    if category_map is not None and one_class is not None:
        raise UsageError("--category-map and --one-class contradict each other", "give one of them")
    if one_class is not None:
        if not one_class.strip():
            raise UsageError("--one-class is empty", "name the class")
        return OneClass(one_class)
    return ByExpression() if category_map is None else read_map(category_map)


def _why_nothing(outcome: Outcome) -> str:
    tally = outcome.tally
    reasons = [
        (tally.empty, "with an empty mask"),
        (tally.filtered, "filtered out (--min-score, --min-area)"),
        (outcome.failures, "that failed"),
    ]
    return ", ".join(f"{counted(count, 'record')} {what}" for count, what in reasons if count)


def _tell(outcome: Outcome, request: Request) -> None:
    """The account, on stderr: what was written, and what was lost."""
    console, tally = get_console(), outcome.tally
    masks, images = counted(tally.masks, "mask"), counted(tally.images, "image")
    parts = [f"{masks} of {images} as {request.kind} in {request.output}"]
    parts.append(counted(outcome.categories, "category", "categories"))
    if tally.empty:
        parts.append(f"{counted(tally.empty, 'record')} with an empty mask")
    if tally.filtered:
        parts.append(f"{tally.filtered} filtered out")
    console.info(", ".join(parts))
    if not tally.masks:
        console.warn("nothing was exported: " + _why_nothing(outcome))
    if tally.split_images:
        shares = (f"{count} for {name}" for name, count in tally.split_images.items())
        console.info(f"images: {', '.join(shares)}")
    if tally.root is not None:
        console.info(f"image names start in {tally.root}")
    if tally.measured:
        mean = tally.iou_sum / tally.measured
        worst = f"{tally.iou_worst:.4f} ({tally.worst})" if tally.iou_worst < 1 else "1.0000"
        console.info(
            f"polygons against masks: mean IoU {mean:.4f}, worst {worst}; "
            f"{tally.holes - tally.holes_lost} of {tally.holes} holes kept"
        )
    if tally.split:
        console.warn(
            f"{counted(tally.split, 'mask has', 'masks have')} several parts and became "
            "several objects; --parts join keeps each as one"
        )
    if tally.hidden:
        console.warn(f"lost under another mask of the same image: {counted(tally.hidden, 'pixel')}")
    for line in (*(f"{count} {note}" for note, count in tally.notes.items()), *tally.remarks):
        console.warn(line)
    if outcome.failures:
        console.warn(f"{outcome.failures} failed; see {request.output / 'failures.jsonl'}")
