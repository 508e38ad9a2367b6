"""The formats by name, with the options that each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from risam_cli.errors import UsageError, setting
from risam_cli.export.format import Context, ExportSettings, Format
from risam_cli.outputs.naming import GALLERY


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """How a format is opened, and what it can do.

    Attributes:
        owns: names that it writes directly in the output folder.
        options: settings that mean something to it, beside those that all formats share.
        copies: whether copying images means something to it.
        without: a folder's name that no path in it may have; see
            :class:`risam_cli.export.targets.Placement`.
        all_images: whether it keeps the images of a COCO file that have no record.
    """

    open: Callable[[Context], Format]
    owns: tuple[str, ...]
    options: frozenset[str] = frozenset()
    copies: bool = False
    without: str | None = None
    all_images: bool = False


def formats() -> dict[str, FormatInfo]:
    """All formats by name."""
    from risam_cli.export import coco, cvat, labelme, masks_png, pictures, webdataset_tars, yolo

    outline = frozenset({"simplify", "holes", "vertices"})
    shapes = outline | {"shapes"}
    return {
        "coco": FormatInfo(
            coco.CocoMasks, ("instances.json", "results.json"), copies=True, all_images=True
        ),
        "coco-polygons": FormatInfo(
            coco.CocoPolygons, ("instances.json",), outline, copies=True, all_images=True
        ),
        "yolo": FormatInfo(
            yolo.Yolo,
            ("labels", "images", "data.yaml", "mapping.jsonl"),
            outline | {"parts", "split"},
            copies=True,
            without="images",
        ),
        "labelme": FormatInfo(labelme.Labelme, ("labelme",), shapes, copies=True),
        "cvat": FormatInfo(cvat.Cvat, ("annotations.xml", "images"), shapes, copies=True),
        "png": FormatInfo(masks_png.open_png, masks_png.OWNS, frozenset({"style"})),
        "webdataset": FormatInfo(
            webdataset_tars.WebDatasetTars, (webdataset_tars.SHARDS,), copies=True
        ),
        "overlay": FormatInfo(pictures.Overlays, ("overlays",)),
        "html": FormatInfo(pictures.GalleryPages, (GALLERY,)),
        "cutout": FormatInfo(pictures.Cutouts, ("cutouts",), frozenset({"padding"})),
    }


def check_options(
    kind: str, info: FormatInfo, settings: ExportSettings, *, copy_images: bool
) -> None:
    """Refuse options that the format would ignore.

    Raises:
        UsageError: one was set.
    """
    usual = ExportSettings()
    for name in ExportSettings.__dataclass_fields__:
        if name not in info.options and getattr(settings, name) != getattr(usual, name):
            users = [other for other, one in formats().items() if name in one.options]
            raise UsageError(
                f"{setting(name)} does not apply to {setting('to', kind)}",
                f"it goes with {', '.join(users)}",
            )
    if copy_images and not info.copies:
        users = [other for other, one in formats().items() if one.copies]
        raise UsageError(
            f"{setting('copy_images')} does not apply to {setting('to', kind)}",
            f"it goes with {', '.join(users)}",
        )
    if settings.shapes == "mask" and (settings.simplify or settings.vertices):
        raise UsageError(
            f"{setting('shapes', 'mask')} is exact",
            f"leave out {setting('simplify')} and {setting('vertices')}, or write polygons",
        )
