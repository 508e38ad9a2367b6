"""CVAT for images 1.1, as CVAT gives it back: one XML file, alone or in CVAT's zip.

Read tag by tag, an image at a time. Files come from anywhere: a document type declaration, which
CVAT never writes and entities need, is refused, and so is an image that does not end.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.readers.shapes import (
    ERROR,
    MAX_PIXELS,
    Shape,
    ellipse,
    placed,
    records_of,
    rectangle,
)
from risam_cli.errors import DataError, reason_of

NAME = "annotations.xml"

_CHUNK = 1 << 16
_MOST = 1 << 28  # bytes of an image's element, or of what lies between two
_DEEPEST = 32
_SHAPES = ("polygon", "mask", "box", "ellipse", "polyline", "points", "cuboid", "skeleton")
# A declaration that can be read as bytes, of an encoding in which it could not: what was in it has
# been turned into UTF-8 since, see risam_cli.files.plain.
_WAS_WIDE = re.compile(
    rb"""<\?xml[^>]*\bencoding\s*=\s*["'](?:iso-10646-)?(?:utf|ucs)-?(?:16|32|2|4)""", re.I
)
_FIX = "export the task from CVAT again, as 'CVAT for images 1.1'"


@dataclass(slots=True)
class _Image:
    attributes: Mapping[str, str]
    shapes: list[Shape] = field(default_factory=list)


def open_zip(stream: BinaryIO, path: Path) -> BinaryIO | None:
    """The annotations in a zip file as CVAT exports it; None where it is another kind of file.

    Raises:
        DataError: it is damaged.
    """
    try:
        return zipfile.ZipFile(stream).open(NAME)  # type: ignore[return-value]
    except KeyError:
        return None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read: {reason}", "download it again") from None


def cvat_records(
    stream: BinaryIO, path: Path, start: Path | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of its image, from 1, and record, of every object; see :func:`records_of`.

    Args:
        path: of the file, for messages, and beside which images may lie.
        start: where names of images begin; by default the working folder.

    Raises:
        DataError: it is not XML, not of images, damaged, or hostile.
    """
    folders = [start or Path(), path.parent / "images", path.parent]
    tasks: dict[str, str | None] = {}  # of a project, by the names of its images
    for number, image in enumerate(_images(stream, path), 1):
        name = image.attributes.get("name", "")
        where = f"{path}, image {name!r}"
        try:
            size = int(image.attributes["height"]), int(image.attributes["width"])
        except (KeyError, ValueError):
            raise DataError(f"{where}: it has no height and width", _FIX) from None
        if not name:
            raise DataError(f"{path}, image {number}: it has no name", _FIX)
        task = image.attributes.get("task_id")
        if image.shapes and tasks.setdefault(name, task) != task:
            told = f"{where}: tasks {tasks[name]} and {task} both have an image of this name"
            yield number, {ERROR: f"{told}; export one task at a time"}
            continue
        name = placed(name, folders, start or Path()) or name
        for record in records_of(name, size, image.shapes, where):
            yield number, record


def _images(stream: BinaryIO, path: Path) -> Iterator[_Image]:
    try:
        chunk = stream.read(_CHUNK)
        reader = _Reader(path, "utf-8" if _WAS_WIDE.match(chunk) else None)
        while chunk:
            reader.feed(chunk)
            yield from reader.taken()
            chunk = stream.read(_CHUNK)
        reader.feed(b"", last=True)
        yield from reader.taken()
    except expat.ExpatError as error:
        raise DataError(f"{path} is not XML, or is truncated: {error}", _FIX) from None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}", "download it again") from None


class _Reader:
    """Takes chunks of XML, gives the images that are whole.

    Args:
        encoding: of the chunks, where it is not as they say.
    """

    def __init__(self, path: Path, encoding: str | None) -> None:
        self._path = path
        self._parser = expat.ParserCreate(encoding)
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._depth = 0
        self._since = 0  # bytes since an image ended
        self._image: _Image | None = None
        self._shape: tuple[str, dict[str, str]] | None = None
        self._beside: dict[str, str] = {}
        self._attribute: str | None = None
        self._done: list[_Image] = []

    def feed(self, chunk: bytes, *, last: bool = False) -> None:
        """Read on."""
        self._since += len(chunk)
        if self._since > _MOST:
            raise DataError(f"{self._path}: an image of more than {_MOST >> 20} MiB", _FIX)
        self._parser.Parse(chunk, last)

    def taken(self) -> list[_Image]:
        """The images that have ended since."""
        done, self._done = self._done, []
        return done

    def _refuse(self, *unused: object) -> None:
        raise DataError(
            f"{self._path} has a document type declaration, which CVAT does not write", _FIX
        )

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise DataError(f"{self._path}: elements nested {_DEEPEST} deep", _FIX)
        if self._depth == 1 and name != "annotations":
            raise DataError(f"{self._path} is not a CVAT file: it begins with <{name}>", _FIX)
        if name == "track":
            raise DataError(f"{self._path} is of a video: it has tracks", _FIX)
        if name == "image" and self._depth == 2:
            self._image = _Image(attributes)
        elif name in _SHAPES and self._image is not None and self._shape is None:
            self._shape, self._beside = (name, attributes), {}
        elif name == "attribute" and self._shape is not None:
            self._attribute = attributes.get("name", "")
            self._beside[self._attribute] = ""

    def _characters(self, text: str) -> None:
        if self._attribute is not None:
            self._beside[self._attribute] += text

    def _end(self, name: str) -> None:
        self._depth -= 1
        if name == "attribute":
            self._attribute = None
        elif self._shape is not None and name == self._shape[0] and self._depth == 2:
            assert self._image is not None
            self._image.shapes.append(_shape(*self._shape, self._beside))
            self._shape = None
        elif name == "image" and self._depth == 1 and self._image is not None:
            self._done.append(self._image)
            self._image, self._since = None, 0


def _shape(kind: str, given: Mapping[str, str], beside: Mapping[str, str]) -> Shape:
    """A shape by its attributes and by the elements within it."""
    found: dict[str, Any] = {
        "label": given.get("label", ""),
        "expression": beside.get("expression", ""),
        "exported": beside.get("exported_label", ""),
    }
    try:
        score = float(beside.get("score", ""))
        found["score"] = score if 0 <= score <= 1 else None
    except ValueError:
        pass
    group = given.get("group_id", "0")
    found["group"] = int(group) if group.isdecimal() and len(group) < 16 and int(group) else None
    try:
        return Shape(**found, **_outline(kind, given))
    except DataError as error:
        return Shape(**found, wrong=error.message)
    except (KeyError, ValueError, OverflowError) as error:
        return Shape(**found, wrong=f"a {kind} that cannot be read: {error!r:.80}")


def _outline(kind: str, given: Mapping[str, str]) -> dict[str, Any]:
    """What it covers. Raises DataError, KeyError, ValueError or OverflowError."""
    turned = float(given.get("rotation", "0"))
    if kind == "polygon":
        points = given["points"].replace(";", ",").split(",")
        return {"polygons": [[float(v) for v in points]]}
    if kind == "box":
        left, upper, right, lower = (float(given[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        return {"polygons": [rectangle(left, upper, right, lower, turned)]}
    if kind == "ellipse":
        x, y, across, down = (float(given[key]) for key in ("cx", "cy", "rx", "ry"))
        return {"polygons": [ellipse(x, y, across, down, turned)]}
    if kind == "mask":
        left, top, width, height = (int(given[k]) for k in ("left", "top", "width", "height"))
        return {"mask": _unrolled(given["rle"], (height, width)), "corner": (left, top)}
    raise DataError(f"a {kind} has no area; draw a polygon or a mask")


def _unrolled(text: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of runs row by row, the first of background."""
    runs = np.array([int(run) for run in text.split(",")], np.int64)
    whole = size[0] * size[1]
    if min(size) < 1 or whole > MAX_PIXELS or runs.min() < 0 or runs.max() > whole:
        raise DataError(f"a mask of {size[1]}x{size[0]} pixels, or runs that do not fit it")
    if int(runs.sum()) != whole:
        raise DataError(f"a mask whose runs sum to {int(runs.sum())} pixels, not {whole}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size)
