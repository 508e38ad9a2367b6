"""What the Python API answers with: results that hold RLE, give masks, and show themselves.

Nothing here needs torch.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.data.images.images import open_rgb
from risam_cli.data.images.memory import Pixels, pixels_to_rgb
from risam_cli.drawing.drawing import no_larger
from risam_cli.drawing.overlay import draw_overlay
from risam_cli.drawing.png import encode_mask, encode_rgb
from risam_cli.errors import ImageError, UsageError
from risam_cli.explain.explanation import Explanation
from risam_cli.explain.page import to_html
from risam_cli.explain.write import write_explanation
from risam_cli.files.write import write_file
from risam_cli.masks import rle as masks
from risam_cli.outputs.records import to_json
from risam_cli.types import Failure, Prediction, Rle

_SHOWN_SIDE = 640  # pixels of the longer side in a notebook
_SHOWN_RESULTS = 24
_GRAY = 128  # of the ground where the image is not at hand
_FRAME = 760  # pixels of a notebook's frame


class Result:
    """The answer to one expression about one image.

    It holds the mask as RLE, so that many results take little room. It also holds the image as it
    was given, to show itself; a path is read again for that.

    Args:
        prediction: the record, as ``risam predict`` writes it.
        source: where the image is to be had for showing; None for nowhere.
    """

    __slots__ = ("_source", "prediction")

    def __init__(self, prediction: Prediction, source: Path | Pixels | None) -> None:
        self.prediction = prediction
        self._source = source

    @property
    def image(self) -> str:
        """The image's path as given, or the name that it got."""
        return self.prediction.image

    @property
    def expression(self) -> str:
        """The expression as given."""
        return self.prediction.expression

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image and of the mask, in pixels."""
        return self.prediction.height, self.prediction.width

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W), True where the expression refers to. Decoded anew at every access."""
        return masks.decode(self.prediction.segmentation)

    @property
    def rle(self) -> Rle:
        """The mask as COCO's compressed RLE."""
        return self.prediction.segmentation

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x, y, w, h) around the mask, in pixels; zeros where it is empty."""
        return self.prediction.bbox

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return self.prediction.area

    @property
    def score(self) -> float:
        """How good the answer probably is, in 0..1."""
        assert self.prediction.score is not None  # a model always gives one
        return self.prediction.score

    @property
    def no_target(self) -> bool:
        """Whether the model says that nothing fits; the mask is then empty."""
        return self.prediction.no_target

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be known besides, such as that the expression was cut."""
        unknown = self.prediction.unknown_words
        more = (f"the model does not know: {', '.join(unknown)}",) if unknown else ()
        return self.prediction.notes + more

    @property
    def unknown_words(self) -> tuple[str, ...]:
        """Words of the expression that the model does not know."""
        return self.prediction.unknown_words

    def to_json(self) -> str:
        """The record as a line of ``predictions.jsonl``, without its end."""
        return to_json(self.prediction)

    def save(self, path: str | Path) -> None:
        """Writes the mask as PNG, 0 and 255, whole or not at all; makes the folder.

        Raises:
            UsageError: it is not a path, or names no file. OutputError: it cannot be written.
        """
        target = _path_of(path)
        if not target.name:
            raise UsageError(f"the path {str(path)!r} names no file", "give one, such as mask.png")
        write_file(target, encode_mask(self.mask))

    def overlay(self) -> NDArray[np.uint8]:
        """The image with the mask drawn into it, (kH + L, kW, 3); see ``outputs.overlay``.

        Raises:
            ImageError: the image cannot be read any more.
        """
        return self._drawn(source_rgb(self._source, self.size))

    def __repr__(self) -> str:
        what = "nothing fits" if self.no_target else f"{self.area} pixels"
        return f"<Result {self.expression!r} in {self.image!r}: {what}, score {self.score:.3f}>"

    def _repr_png_(self) -> bytes:
        return encode_rgb(
            self._drawn(no_larger(_rgb_or_gray(self._source, self.size), _SHOWN_SIDE))
        )

    def _repr_html_(self) -> str:
        uri = base64.b64encode(self._repr_png_()).decode("ascii")
        what = "nothing fits" if self.no_target else f"{self.area:,} pixels"
        caption = f"{what}, score {self.score:.3f}"
        notes = "".join(f"<br>{html.escape(note)}" for note in self.notes)
        words = html.escape(self.expression)
        return (
            '<figure style="display:inline-block;margin:4px;max-width:340px;vertical-align:top">'
            f'<img alt="{words}" style="max-width:100%" src="data:image/png;base64,{uri}">'
            f"<figcaption><b>{words}</b><br>{caption}{notes}<br>"
            f"<small>{html.escape(self.image)}</small></figcaption></figure>"
        )

    def _drawn(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        mask = self.mask
        if mask.shape != rgb.shape[:2]:
            size = (rgb.shape[1], rgb.shape[0])
            share = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
            mask = np.asarray(share) >= 0.5
        return draw_overlay(rgb, [mask], [self.expression], scores=[self.score])


class Results(list[Result]):
    """The answers about one image, in the order of its expressions: a list that shows itself.

    Attributes:
        failures: one for each expression that has no result; only where they are kept.
    """

    def __init__(self, results: Iterable[Result] = (), failures: Iterable[Failure] = ()) -> None:
        super().__init__(results)
        self.failures = tuple(failures)

    def _repr_html_(self) -> str:
        shown = [result._repr_html_() for result in self[:_SHOWN_RESULTS]]
        if len(self) > _SHOWN_RESULTS:
            shown.append(f"<p>and {len(self) - _SHOWN_RESULTS} more</p>")
        shown += [f"<p>failed: {html.escape(failure.message)}</p>" for failure in self.failures]
        return f"<div>{''.join(shown)}</div>"


@dataclass(frozen=True, slots=True, repr=False)
class ExplanationResult(Explanation):
    """What the network looked at: saves itself, and shows itself in a notebook."""

    @classmethod
    def of(cls, explanation: Explanation) -> ExplanationResult:
        """The same explanation, with ways to save and show it."""
        return cls(*(getattr(explanation, field.name) for field in fields(explanation)))

    def save(
        self, output: str | Path, *, with_json: bool = False, overwrite: bool = False
    ) -> list[str]:
        """Writes what ``risam explain`` writes; see :func:`write_explanation`.

        Raises:
            UsageError: ``output`` is not a path. OutputError: it cannot be written.
        """
        return write_explanation(self, _path_of(output), with_json=with_json, overwrite=overwrite)

    def _repr_html_(self) -> str:
        """The page, in a frame of its own, for a notebook."""
        page = html.escape(to_html(self))
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="what the network looked at" '
            f'style="width:100%;height:{_FRAME}px;border:0"></iframe>'
        )


def _path_of(given: str | Path) -> Path:
    """A path that the caller names. Raises UsageError where it is none."""
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(f"{given!r} is not a path", "give text or a pathlib.Path")
    return Path(text)


def source_rgb(source: Path | Pixels | None, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image that was asked about, read again: (H, W, 3).

    Raises:
        ImageError: it is not at hand, cannot be read, or is of another ``size`` (H, W) now.
    """
    if source is None:
        raise ImageError("the image is not kept", "give a path, or keep_images=True")
    rgb = open_rgb(source) if isinstance(source, Path) else pixels_to_rgb(source, "the image")
    if rgb.shape[:2] != size:
        raise ImageError(f"the image is {rgb.shape[1]}x{rgb.shape[0]} now, its mask is not")
    return rgb


def _rgb_or_gray(source: Path | Pixels | None, size: tuple[int, int]) -> NDArray[np.uint8]:
    try:
        return source_rgb(source, size)
    except ImageError:
        return np.full((*size, 3), _GRAY, np.uint8)
