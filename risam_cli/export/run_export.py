"""One export from its source to its folder: filters, categories, failures, the final account."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from risam_cli.errors import DataError
from risam_cli.export.categories import Categories, Naming
from risam_cli.export.folder import ExportFolder
from risam_cli.export.format import (
    Context,
    Format,
    Labeled,
    LabeledImage,
    OpenImage,
    Settings,
    Tally,
)
from risam_cli.export.registry import check_options, formats
from risam_cli.export.sources import MAX_PIXELS, ImageGroup, OnFailure, Source
from risam_cli.export.targets import target_name
from risam_cli.outputs.records import FAILURES, failure_to_json
from risam_cli.types import Failure, Prediction


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be exported, and how.

    Attributes:
        predictions: see :class:`risam_cli.export.sources.Source`.
        kind: a name in :func:`risam_cli.export.registry.formats`.
        image_root: where relative image paths begin.
        min_score, min_area: masks below are left out (they count as filtered).
    """

    predictions: Path
    kind: str
    output: Path
    image_root: Path
    naming: Naming
    settings: Settings
    annotations: Path | None = None
    max_pixels: int = MAX_PIXELS
    min_score: float = 0.0
    min_area: int = 0
    overwrite: bool = False
    copy_images: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    tally: Tally
    failures: int
    categories: int


def run_export(
    request: Request,
    open_image: OpenImage,
    advance: Callable[[int, int], None],
    *,
    begin: Callable[[int], None] = lambda total: None,
) -> Outcome:
    """Write everything; each bad record or image is a line in ``failures.jsonl``.

    Args:
        open_image: gives an image file as upright RGB, or raises DataError.
        advance: told after each image how many records it had, and all failures so far.
        begin: told the number of records once it is known.

    Raises:
        UsageError: an option means nothing to the format.
        DataError: the source cannot be read or holds no record.
        OutputError: the folder cannot be used or written.
    """
    info = formats()[request.kind]
    check_options(request.kind, info, request.settings, copy_images=request.copy_images)
    # Until the folder is open, what fails is kept; then it goes there.
    early: list[Failure] = []
    sink: list[OnFailure] = [early.append]

    def fail(failure: Failure) -> None:
        sink[0](failure)

    with (
        Source(
            request.predictions,
            fail,
            annotations=request.annotations,
            max_pixels=request.max_pixels,
        ) as source,
        ExitStack() as stack,
    ):
        begin(len(source))
        folder = stack.enter_context(
            ExportFolder(request.output, request.kind, info.owns, overwrite=request.overwrite)
        )
        tally, categories = Tally(), Categories(request.naming)
        context = Context(
            folder, request.settings, categories, tally, open_image, request.copy_images
        )
        with folder.spool("failures") as failed, info.open(context) as out:
            sink[0] = lambda failure: failed.add(failure_to_json(failure) + "\n")
            for failure in early:
                fail(failure)
            for group in source.groups():
                _add(group, request, source, context, out, fail)
                advance(len(group.predictions), failed.count)
            out.finish()
            if failed.count:
                folder.publish(FAILURES, [failed])
            count = failed.count
        summary = {**tally.summary(), "failures": count, "categories": len(categories.names)}
        folder.complete(summary)
    return Outcome(tally, count, len(categories.names))


def _add(
    group: ImageGroup,
    request: Request,
    source: Source,
    context: Context,
    out: Format,
    fail: OnFailure,
) -> None:
    tally = context.tally
    items: list[Labeled] = []
    empty: list[tuple[int, Prediction]] = []
    for number, p in enumerate(group.predictions):
        if p.score < request.min_score or 0 < p.area < request.min_area:
            tally.filtered += 1
        elif p.area == 0:
            empty.append((number, p))
        else:
            try:
                items.append(Labeled(p, number, *context.categories.index(p.expression)))
            except DataError as error:
                fail(_failure(group, p, error))
    image = LabeledImage(
        index=tally.images,
        image=group.image,
        target=target_name(group.image, source.meeting),
        path=request.image_root / group.image,
        size=group.size,
        items=tuple(items),
        empty=tuple(empty),
    )
    try:
        out.add(image)
    except DataError as error:
        for item in items:
            fail(_failure(group, item.prediction, error))
        if not items:
            fail(Failure(group.image, group.image, None, "write", type(error).__name__, str(error)))
        return
    tally.images += 1
    tally.masks += len(items)
    tally.empty += len(empty)


def _failure(group: ImageGroup, p: Prediction, error: DataError) -> Failure:
    return Failure(p.id, group.image, p.expression, "write", type(error).__name__, str(error))
