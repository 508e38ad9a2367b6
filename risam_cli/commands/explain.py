"""``risam explain``: what the words looked at, and which words the regions heard."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from risam_cli.commands import completing
from risam_cli.commands.options import (
    bands_option,
    decode_option,
    device_options,
    model_option,
    output_option,
    threshold_options,
    verbosity_options,
)
from risam_cli.console.text import counted
from risam_cli.errors import EXIT_OK, EXIT_SOME_FAILED, DataError, OutputError

if TYPE_CHECKING:
    from risam_cli.explain.explanation import Explanation, Shown
    from risam_cli.inference.pipeline import PredictSettings
    from risam_cli.segmenters.risam import RisamSegmenter
    from risam_cli.types import Failure

GRID = 5  # points along the longer side


def _parse_points(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[float, float], ...]:
    points = []
    for value in values:
        try:
            x, y = (float(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not X,Y in pixels, such as 120,80.") from None
        if not (math.isfinite(x) and math.isfinite(y)):
            raise click.BadParameter(f"{value!r} is not X,Y in pixels, such as 120,80.")
        points.append((x, y))
    return tuple(points)


@click.command("explain")
@click.argument(
    "inputs", metavar="IMAGE...", nargs=-1, required=True, shell_complete=completing.files
)
@click.option(
    "-e",
    "--expression",
    "expressions",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="What to explain. May be given several times.",
)
@model_option
@output_option("risam-explain")
@click.option(
    "--point",
    "points",
    multiple=True,
    metavar="X,Y",
    callback=_parse_points,
    help="Show which words inform this pixel. May be given several times.  [default: a grid]",
)
@click.option(
    "--grid",
    type=click.IntRange(1, 12),
    metavar="N",
    default=GRID,
    show_default=True,
    help="Without --point: points along the longer side.",
)
@click.option(
    "--block",
    type=click.IntRange(min=0),
    metavar="N",
    help="Show this block's attention, counted from 0.  [default: the mean of all]",
)
@click.option(
    "--head",
    type=click.IntRange(min=0),
    metavar="N",
    help="Show this head's attention, counted from 0.  [default: the mean of all]",
)
@click.option("--json", "as_json", is_flag=True, help="Also write the raw maps, explain.json.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier explanation in the folder.")
@threshold_options
@device_options
@decode_option
@bands_option
@verbosity_options
def command(**options: Any) -> int:
    """Show what the network looked at, after Figure 1 of the paper.

    IMAGE is an image file, or a folder, a pattern or a manifest of images. If there are
    several, each image has its own page, and index.html links to them.

    Shows for each word the regions that it attends to (Language-Guided Attention), for points of
    the image the words that inform them most (Vision-Guided Attention), and the predicted mask.
    Writes a picture for each expression, and one page, explain.html, that opens offline and
    responds to mouse, touch and keyboard.

    \b
    Examples:
      risam explain photo.jpg -e "the red circle on the left"
      risam explain photo.jpg -e "the dog" -e "the cat" --point 120,80 --json -o why
      risam explain photos/ -e "the dog" -o why
    """
    return _explain(**options)


def _explain(
    inputs: tuple[str, ...],
    expressions: tuple[str, ...],
    output: Path,
    as_json: bool,
    overwrite: bool,
    **options: Any,
) -> int:
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise OutputError(f"{output} is not empty", "choose another -o or give --overwrite")
    from risam_cli.console.console import get_console
    from risam_cli.explain.write import INDEX, write_explanation, write_explanations

    console = get_console()
    given = _given(inputs, expressions, output)
    if given.single:
        (image,) = given.images
        explanation = _explainer(given, expressions, **options)(image)
        _tell(explanation)
        for name in write_explanation(explanation, output, with_json=as_json, overwrite=overwrite):
            console.info(str(output / name))
        return EXIT_OK
    if given.unasked:
        console.warn(
            f"{counted(given.unasked, 'image has', 'images have')} expressions of their own, "
            "which are not explained: only those given by -e are"
        )
    explain = _explainer(given, expressions, **options)
    failed = write_explanations(
        tuple(given.images),
        explain,
        output,
        with_json=as_json,
        overwrite=overwrite,
        failures=given.failures,
    )
    explained = len(given.images) + len(given.failures) - failed
    console.info(f"{counted(explained, 'image')} explained: {output / INDEX}")
    if failed:
        console.warn(f"{counted(failed, 'image')} failed: see {output / 'failures.jsonl'}")
    return EXIT_SOME_FAILED if failed else EXIT_OK


@dataclass(frozen=True, slots=True)
class _Given:
    """What the user named.

    Attributes:
        images: their files by name, each once.
        failures: of manifest lines and folders that name none.
        single: it is one image, named as such.
        unasked: how many images bring expressions of their own.
    """

    images: Mapping[str, Path]
    failures: tuple[Failure, ...]
    single: bool
    unasked: int


def _given(inputs: tuple[str, ...], expressions: tuple[str, ...], output: Path) -> _Given:
    """The images of files, folders, patterns and manifests.

    Raises:
        DataError: an input is not there, or there is no image at all.
    """
    from risam_cli.data.identity import image_key
    from risam_cli.data.inputs.inputs import Inputs
    from risam_cli.files.store import RemotePath

    def key_of(path: Path) -> str:
        return str(path) if isinstance(path, RemotePath) else image_key(os.path.abspath(path))

    found = Inputs(inputs, expressions, exclude=output)
    found.check()
    images: dict[str, Path] = {}
    failures: list[Failure] = []
    keys: set[str] = set()
    unasked: set[str] = set()
    for entry in found:
        if entry.sample is None:
            failures += entry.failures
            continue
        sample, key = entry.sample, key_of(entry.sample.path)
        if key not in keys:
            keys.add(key)
            # Two manifests can call two files by one name.
            name = str(sample.path) if sample.image in images else sample.image
            images[name] = sample.path
        if any(one.text not in expressions for one in sample.expressions):
            unasked.add(key)
    if not images:
        why = f"; the first failure: {failures[0].message}" if failures else ""
        message = f"{', '.join(inputs)}: there is no image{why}"
        raise DataError(message, "name image files or a folder")
    single = not failures and len(inputs) == 1 and list(images) == list(found.arguments)
    return _Given(images, tuple(failures), single, len(unasked))


def _tell(explanation: Explanation) -> None:
    """What the user must know of it, on stderr."""
    from risam_cli.console.console import get_console

    console = get_console()
    for line in explanation.missing:
        console.warn(line)
    for explained in explanation.expressions:
        attention = explained.attention
        notes = list(explained.prediction.notes)
        strange = dict.fromkeys(repr(word.text) for word in attention.words if word.unknown)
        if strange:
            notes.append(f"the model does not know {', '.join(strange)}")
        for note in notes:
            console.warn(f"{attention.expression!r}: {note}")


def _explainer(
    given: _Given,
    expressions: tuple[str, ...],
    model: str | None,
    points: tuple[tuple[float, float], ...],
    grid: int,
    block: int | None,
    head: int | None,
    device: str,
    precision: str,
    threshold: float | None,
    no_target_threshold: float | None,
    full_decode: bool,
    bands: tuple[int, int, int] | None,
) -> Callable[[str], Explanation]:
    """Loads the model; torch is imported here and not before.

    Args:
        given: a single image is read before, since a bad one is to be told before a model is
            loaded.
    """
    from risam_cli.data.images.images import open_rgb, read_for_encoder
    from risam_cli.explain.explainer import explain_image
    from risam_cli.explain.explanation import Shown
    from risam_cli.inference.device import choose_device, choose_precision
    from risam_cli.inference.pipeline import PredictSettings, Session, compute_settings

    chosen = choose_device(device)
    settings = PredictSettings(
        chosen,
        choose_precision(precision, chosen),
        threshold=threshold,
        no_target_threshold=no_target_threshold,
    )
    if given.single:
        (path,) = given.images.values()
        open_rgb(path, bands=bands)
    shown = Shown(points, grid, block, head)
    segmenter = _segmenter(model, settings, shown)
    session = Session(segmenter, compute_settings(segmenter, settings))
    if no_target_threshold is None:
        no_target_threshold = segmenter.thresholds.no_target

    def explain(image: str) -> Explanation:
        path = given.images[image]
        rgb = open_rgb(path, bands=bands)
        scaled = read_for_encoder(path, segmenter.frames, full_decode=full_decode, bands=bands)
        encoded = session.encode(scaled)
        return explain_image(session, encoded, image, rgb, expressions, shown, no_target_threshold)

    return explain


def _segmenter(model: str | None, settings: PredictSettings, shown: Shown) -> RisamSegmenter:
    """Loads a model that can be explained.

    Raises:
        UsageError: it has no such block or head; told here, before anything is written.
        ModelError: it cannot be loaded.
    """
    from risam_cli.explain.explainer import require_chosen
    from risam_cli.segmenters.resolve import load_segmenter, require_risam, require_risam_name

    require_risam_name(model, "risam explain")
    loaded = load_segmenter(model, device=settings.device, precision=settings.precision)
    segmenter = require_risam(loaded, "risam explain")
    attending: Any = segmenter.loaded.model.attention
    heads = attending[0].heads if attending else 0
    require_chosen(shown, segmenter.name, len(attending), heads)
    return segmenter
