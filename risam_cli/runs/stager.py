"""Files of a sample, made as soon as its masks are there, under names of no meaning.

Called in the finishers' threads; :mod:`risam_cli.runs.writer` moves the files to their places
once the records that name them are written.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.images.images import Rgb, open_for_encoder, open_rgb
from risam_cli.drawing.overlay import draw_overlay
from risam_cli.drawing.png import encode_mask, encode_rgb
from risam_cli.errors import ImageError
from risam_cli.files.patience import within
from risam_cli.inference.loader import TIMEOUT, timed_out
from risam_cli.masks import rle as masks
from risam_cli.outputs.gallery import encode_item, outline, small_size
from risam_cli.outputs.naming import gallery_name, mask_name, overlay_name
from risam_cli.runs.folder import RunFolder
from risam_cli.runs.ledger import FileMark
from risam_cli.types import Expression, Prediction, Sample


@dataclass(frozen=True, slots=True)
class Saving:
    """What is written beside the records.

    Attributes:
        png: the masks.
        overlay: the image with all its masks drawn into it.
        max_pixels, timeout: as for reading the image.
        html: a gallery of the run, see :mod:`risam_cli.outputs.gallery`.
    """

    png: bool
    overlay: bool
    max_pixels: int
    html: bool = False
    timeout: float = TIMEOUT

    @property
    def names(self) -> list[str]:
        """What is written, by the names that the setting ``save`` takes."""
        return [name for name in ("png", "overlay", "html") if getattr(self, name)]


@dataclass(frozen=True, slots=True)
class Staged:
    """A file in the staging folder, and what it will be."""

    path: Path
    mark: FileMark


class Stager:
    """Makes masks, overlays and gallery items in the staging folder; see MaskSink."""

    def __init__(self, folder: RunFolder, saving: Saving) -> None:
        self._folder = folder
        self._saving = saving
        self._numbers = itertools.count()
        self._staged: dict[str, Staged] = {}
        self._names: dict[tuple[str, int], list[str]] = {}  # of masks, by image and expression
        self._outlines: dict[str, dict[int | None, str]] = {}  # until their sample is finished

    def save(
        self,
        sample: Sample,
        expression: Expression,
        mask: NDArray[np.bool_],
        instance: int | None = None,
    ) -> str | None:
        """Stages one mask; gives the name that it will have."""
        if self._saving.html:
            self._outlines.setdefault(expression.id, {})[instance] = outline(mask)
        if not self._saving.png:
            return None
        name = mask_name(sample.image, expression.number, expression.text, instance)
        self._names.setdefault((sample.image, expression.number), []).append(name)
        self._stage(name, encode_mask(mask))
        return name

    def finish(self, sample: Sample, predictions: Sequence[Prediction]) -> None:
        """Stages the overlay of a sample and its item in the gallery."""
        traced = {one.id: self._outlines.pop(one.id, {}) for one in sample.expressions}
        if not predictions or not (self._saving.overlay or self._saving.html):
            return
        own = (predictions[0].height, predictions[0].width)
        if self._saving.overlay:
            rgb = self._read(sample.path, lambda path, most: open_rgb(path, most))
            drawn = draw_overlay(
                rgb,
                [masks.decode(one.segmentation) for one in predictions],
                [one.expression for one in predictions],
            )
            self._stage(_overlay_of(sample), encode_rgb(drawn))
        else:
            side = max(small_size(*own))
            rgb = self._read(sample.path, lambda path, most: open_for_encoder(path, side, most)[0])
        if self._saving.html:
            item = encode_item(rgb, own, [traced[one.id][one.instance] for one in predictions])
            self._stage(_item_of(sample), item)

    def take(self, sample: Sample, predictions: Sequence[Prediction]) -> list[Staged]:
        """The staged files of a sample's records; those of expressions that failed are deleted."""
        names = [one.mask for one in predictions if one.mask is not None]
        if self._saving.overlay and predictions:
            names.append(_overlay_of(sample))
        if self._saving.html and predictions:
            names.append(_item_of(sample))
        taken = [self._staged.pop(name) for name in names]
        for name in self._names_of(sample):
            left = self._staged.pop(name, None)
            if left is not None:
                left.path.unlink(missing_ok=True)
        return taken

    def _names_of(self, sample: Sample) -> Iterator[str]:
        """All names that staged files of a sample may have."""
        for one in sample.expressions:
            yield from self._names.pop((sample.image, one.number), ())
        if sample.expressions:
            yield from (_overlay_of(sample), _item_of(sample))

    def _read(self, path: Path, read: Callable[[Path, int], Rgb]) -> Rgb:
        """The image once more; a drive may stall now that did not before."""
        try:
            return within(self._saving.timeout, lambda: read(path, self._saving.max_pixels))
        except TimeoutError:
            raise ImageError(f"{path}: {timed_out(self._saving.timeout)}") from None

    def _stage(self, name: str, data: bytes) -> None:
        path = self._folder.staging / str(next(self._numbers))
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                path.unlink()
            raise
        self._staged[name] = Staged(path, FileMark(name, len(data), zlib.crc32(data)))


def _overlay_of(sample: Sample) -> str:
    return overlay_name(sample.image, sample.expressions[0].number)


def _item_of(sample: Sample) -> str:
    return gallery_name(sample.image, sample.expressions[0].number)
