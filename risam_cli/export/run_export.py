"""One export from its source to its folder: filters, categories, failures, the final account."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from risam_cli.console.text import first_of
from risam_cli.data.identity import existing, id_text
from risam_cli.data.images.files import require_inside
from risam_cli.data.readers.shapes import MAX_PIXELS
from risam_cli.errors import DataError
from risam_cli.export.agreement import Agreement
from risam_cli.export.categories import UNNAMED, Categories, Naming
from risam_cli.export.folder import ExportFolder
from risam_cli.export.format import (
    Context,
    ExportCounts,
    ExportSettings,
    Format,
    Labeled,
    LabeledImage,
    OpenImage,
)
from risam_cli.export.registry import check_options, formats
from risam_cli.export.sources import ImageGroup, OnFailure, Source
from risam_cli.export.targets import RELATIVE, Placement
from risam_cli.outputs.records import FAILURES, failure_to_json
from risam_cli.types import Failure, Prediction

_NAMED = 5  # categories that a remark names


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be exported, and how.

    Attributes:
        predictions: see :class:`risam_cli.export.sources.Source`.
        kind: a name in :func:`risam_cli.export.registry.formats`.
        image_root: where relative image paths begin; by default the working folder.
        names: see :class:`risam_cli.export.targets.Placement`.
        min_score, min_area: masks below are left out (they count as filtered).
        agree_with: another source; what has no mask there of at least ``min_iou`` is left out.
        confine: refuse images outside of ``image_root``, and mask files outside of their list's
            folder.
    """

    predictions: Path
    kind: str
    output: Path
    image_root: Path | None
    naming: Naming
    settings: ExportSettings
    annotations: Path | None = None
    max_pixels: int = MAX_PIXELS
    min_score: float = 0.0
    min_area: int = 0
    agree_with: Path | None = None
    min_iou: float = 0.0
    overwrite: bool = False
    copy_images: bool = False
    confine: bool = False
    names: str = RELATIVE


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    tally: ExportCounts
    failures: int
    categories: int


def run_export(
    request: Request,
    open_image: OpenImage,
    measure: Callable[[Path], tuple[int, int]],
    advance: Callable[[int, int], None],
    *,
    begin: Callable[[int], None] = lambda total: None,
) -> Outcome:
    """Write everything; each bad record or image is a line in ``failures.jsonl``.

    Args:
        open_image: gives an image file as upright RGB, or raises DataError.
        measure: gives an image file's upright (H, W), or raises DataError.
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

    placement = Placement(info.without, request.names)
    with (
        Source(
            request.predictions,
            fail,
            annotations=request.annotations,
            image_root=request.image_root,
            max_pixels=request.max_pixels,
            placement=placement,
            confine=request.confine,
        ) as source,
        ExitStack() as stack,
    ):
        begin(len(source))
        entries = source.names.images if info.all_images and source.names is not None else {}
        for entry in entries.values():
            placement.see(entry["file_name"])
        other, agreement = request.agree_with, None
        if other is not None:
            agreement = stack.enter_context(Agreement(source, other, request.min_iou, fail))
        copies = request.copy_images and "images" not in info.owns
        owns = (*info.owns, *(["images"] if copies else []))
        folder = stack.enter_context(
            ExportFolder(request.output, request.kind, owns, overwrite=request.overwrite)
        )
        given = source.names.categories if source.names is not None else None
        tally, categories = ExportCounts(), Categories(request.naming, given)
        copies, looked_at, taken = request.copy_images, source.reviewed, _highest(entries)
        context = Context(
            folder, request.settings, categories, tally, open_image, copies, looked_at, taken
        )
        with folder.spool("failures") as failed, info.open(context) as out:
            sink[0] = lambda failure: failed.add(failure_to_json(failure) + "\n")
            for failure in early:
                fail(failure)
            seen: set[str | None] = set()
            for group in source.groups():
                _add(group, request, agreement, placement, context, out, measure, fail)
                if group.entry is not None:
                    seen.add(id_text(group.entry["id"]))
                advance(len(group.records), failed.count)
            bare = (entry for name, entry in entries.items() if name not in seen)
            _add_bare(bare, request, placement, out, fail)
            out.finish()
            _note(tally, categories, source, placement)
            if failed.count:
                folder.publish(FAILURES, [failed])
            count = failed.count
        summary = {**tally.summary(), "failures": count, "categories": len(categories.names)}
        folder.complete(summary)
    return Outcome(tally, count, len(categories.names))


def _add(
    group: ImageGroup,
    request: Request,
    agreement: Agreement | None,
    placement: Placement,
    context: Context,
    out: Format,
    measure: Callable[[Path], tuple[int, int]],
    fail: OnFailure,
) -> None:
    tally = context.tally
    path = Path(existing(str((request.image_root or Path()) / group.image)))
    try:
        if request.confine:
            require_inside(path, request.image_root or Path(), repr(group.image))
        _check_size(group, path, measure)
    except DataError as error:
        for given in group.records:
            fail(_failure(group, given.prediction, error))
        return
    items: list[Labeled] = []
    empty: list[tuple[int, Prediction]] = []
    objections = agreement.objections(group) if agreement is not None else None
    for number, given in enumerate(group.records):
        p = given.prediction
        low = p.score is not None and p.score < request.min_score
        objection = objections[number] if objections is not None else ""
        if isinstance(objection, DataError):
            fail(_failure(group, p, objection))
        elif objection or low or 0 < p.area < request.min_area:
            context.categories.reserve(p.expression, given.category)
            tally.filtered += 1
            if objection:
                tally.note(objection)
        elif p.area == 0:
            context.categories.reserve(p.expression, given.category)
            empty.append((number, p))
        else:
            try:
                category = context.categories.index(p.expression, given.category)
                items.append(Labeled(p, number, *category, given.annotation, given.crowd))
            except DataError as error:
                fail(_failure(group, p, error))
    image = LabeledImage(
        index=tally.images,
        image=group.image,
        target=placement.target(group.image),
        path=path,
        size=group.size,
        items=tuple(items),
        empty=tuple(empty),
        own_name=placement.own_name(group.image),
        name=placement.name(group.image),
        part=_part(group.image, placement, request.settings.split),
        entry=group.entry,
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


def _highest(ids: Iterable[str]) -> int:
    """The highest number among ids; 0 where none is one."""
    return max((int(own) for own in ids if own.isdecimal() and len(own) < 16), default=0)


def _part(image: str, placement: Placement, share: float) -> str:
    if not share:
        return ""
    return "train" if placement.is_train(image, share) else "val"


def _check_size(group: ImageGroup, path: Path, measure: Callable[[Path], tuple[int, int]]) -> None:
    """Hold masks against their image, where it can be looked at: an RLE may have its size turned.

    Raises:
        DataError: they differ.
    """
    if not os.path.isfile(path):
        return
    try:
        size = measure(path)
    except DataError:  # no image: what needs it will say so
        return
    if size == group.size:
        return
    turned = size == group.size[::-1]
    raise DataError(
        f"the masks of {group.image} are {group.size[0]}x{group.size[1]} (height x width), the "
        f"image {path} is {size[0]}x{size[1]}",
        "the RLE's size is [width, height]; COCO has [height, width]"
        if turned
        else "name the folder of the images that were predicted on",
    )


def _add_bare(
    entries: Iterable[Mapping[str, Any]],
    request: Request,
    placement: Placement,
    out: Format,
    fail: OnFailure,
) -> None:
    """Write images of the COCO file that have no record."""
    root = request.image_root or Path()
    for entry in entries:
        name = entry["file_name"]
        path = Path(existing(str(root / name)))
        bare = LabeledImage(
            index=0,  # it has an id of its own
            image=name,
            target=placement.target(name),
            path=path,
            size=(0, 0),
            items=(),
            name=placement.name(name),
            entry=entry,
        )
        try:
            if request.confine and request.copy_images:
                require_inside(path, root, repr(name))
            out.add(bare)
        except DataError as error:
            fail(Failure(name, name, None, "write", type(error).__name__, str(error)))


def _note(
    tally: ExportCounts, categories: Categories, source: Source, placement: Placement
) -> None:
    tally.root = placement.folder
    if categories.unnamed:
        tally.note(f"records have no expression; their class is {UNNAMED!r}", categories.unnamed)
    if unfound := categories.without_mask():
        named = first_of([repr(name) for name in unfound], _NAMED)
        tally.remarks.append(f"categories without a mask, which keep their class: {named}")
    tally.remarks += source.notes()


def _failure(group: ImageGroup, p: Prediction, error: DataError) -> Failure:
    return Failure(p.id, group.image, p.expression, "write", type(error).__name__, str(error))
