"""labelme's files, as a person saved them: one JSON file an image, in any folder below one."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from risam_cli.data.images.bounds import allow_pixels, metered
from risam_cli.data.readers.cells import stated_size
from risam_cli.data.readers.shapes import ERROR, Shape, ellipse, placed, records_of, rectangle
from risam_cli.errors import DataError, ImageError, reason_of
from risam_cli.files.jsonlines import brief, load_json, read_text

FOLDER = "labelme"

_HEAD = 1 << 16  # bytes that are looked at: the image's own flags stand before the shapes
# All boxes of X-AnyLabeling, whose files these are too, have four corners; ``rotation`` and
# ``quadrilateral`` are its own.
_BY_CORNERS = ("polygon", "oriented_rectangle", "rotation", "quadrilateral")
_LOOKED_AT = 100  # files, before a folder is taken for another kind
_AGAIN = "save it with labelme again"
_LONGEST = 1 << 28  # bytes: labelme may keep the image in the file


def is_labelme(file: BinaryIO) -> bool:
    """Whether a file, open at its beginning, is labelme's; it is left there."""
    head = file.read(_HEAD).decode("utf-8-sig", "replace").lstrip()
    file.seek(0)
    return head[:1] == "{" and all(re.search(rf'"{key}"\s*:', head) for key in ("shapes", "flags"))


def holds_labelme(folder: Path) -> bool:
    """Whether one of the first JSON files below a folder is labelme's."""
    for path in islice(_json_files(folder), _LOOKED_AT):
        with suppress(OSError), open(path, "rb") as file:
            if is_labelme(file):
                return True
    return False


def _json_files(folder: Path) -> Iterator[Path]:
    """The JSON files below a folder, by name; not what macOS keeps beside them (``._a.json``)."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(".json") and not name.startswith("._"):
                yield Path(place) / name


def labelme_records(
    path: Path, start: Path | None, skipped: Callable[[str], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of its file, from 1, and record, of every object; see :func:`records_of`.

    Args:
        path: a file, or a folder of them.
        start: where names of images begin; by default the working folder.
        skipped: told the names of JSON files that are not labelme's.
    """
    root = path if path.is_dir() else path.parent
    for number, file in enumerate(_json_files(path) if path.is_dir() else [path], 1):
        try:
            found = _read(file)
            if found is None:
                skipped(str(file))
                continue
            name, size = _image(found, file)
            # Where the image has gone, its file's own place below the folder still tells it.
            gone = (file.parent.relative_to(root) / Path(name).name).as_posix()
            image = placed(name, [file.parent], start or Path()) or gone
            shapes = [_shape(one) for one in found["shapes"]]
            for record in records_of(image, size, shapes, str(file)):
                yield number, record
        except DataError as error:
            yield number, {ERROR: str(error)}


def _read(file: Path) -> Mapping[str, Any] | None:
    """A file's contents; None where it is another kind of JSON."""
    try:
        found = load_json(read_text(file, _LONGEST))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}", "save it again") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {reason_of(error)}") from None
    if not isinstance(found, dict) or not isinstance(found.get("shapes"), list):
        return None
    return found


def _image(found: Mapping[str, Any], file: Path) -> tuple[str, tuple[int, int]]:
    name = found.get("imagePath")
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{file}: 'imagePath' is {brief(name)}", _AGAIN)
    size = stated_size(found, str(file), _AGAIN, ("imageHeight", "imageWidth"))
    if size is None:
        raise DataError(f"{file}: it has no imageHeight and imageWidth", _AGAIN)
    return name.replace("\\", "/"), size


def _shape(one: Any) -> Shape:
    if not isinstance(one, Mapping):
        return Shape("", wrong=f"{brief(one)} is not a shape")
    label, text, exported = (
        value if isinstance(value, str) else ""
        for value in (one.get("label"), one.get("description"), one.get("exported_label"))
    )
    score, group = one.get("score"), one.get("group_id")
    fits = isinstance(score, (int, float)) and not isinstance(score, bool) and 0 <= score <= 1
    found: dict[str, Any] = {
        "label": label,
        "expression": text,
        "exported": exported,
        "score": float(score) if fits else None,  # type: ignore[arg-type]
        "group": group if type(group) is int else None,
    }
    kind = one.get("shape_type", "polygon")
    try:
        return Shape(**found, **_outline(kind, one))
    except DataError as error:
        return Shape(**found, wrong=error.message)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return Shape(**found, wrong=f"a {brief(kind)} that cannot be read: {error!r:.80}")


def _outline(kind: Any, one: Mapping[str, Any]) -> dict[str, Any]:
    """What it covers. Raises DataError, KeyError, TypeError, ValueError or OverflowError."""
    points = [(float(x), float(y)) for x, y in one["points"]]
    if kind in _BY_CORNERS or (kind == "rectangle" and len(points) == 4):
        return {"polygons": [[v for point in points for v in point]]}
    if kind == "mask":
        (left, top), _ = points
        return {"mask": _pixels(one.get("mask")), "corner": (round(left), round(top))}
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return {"polygons": [rectangle(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))]}
    if kind == "circle":
        (x, y), (rim_x, rim_y) = points
        radius = float(np.hypot(rim_x - x, rim_y - y))
        return {"polygons": [ellipse(x, y, radius, radius)]}
    raise DataError(f"a {brief(kind)} has no area; draw a polygon or a mask")


def _pixels(text: Any) -> NDArray[np.bool_]:
    """The PNG that a mask is, within its box."""
    if not isinstance(text, str):
        raise DataError(f"a mask that is {brief(text)}")
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(metered(io.BytesIO(data), "it"), formats=["PNG"]) as image:
            allow_pixels(image)
            return np.asarray(image.convert("L")) != 0
    except (ImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"a mask that is not a PNG: {error!s:.80}") from None
