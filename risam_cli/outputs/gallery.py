"""A run as a page to look at: ``gallery/index.html``, opened from disk, for any number of images.

::

    gallery/index.html       the page: text, style, code and counts
    gallery/data/00000.js    what was asked and answered, 250 images a file, in input order
    gallery/items/…js        one file an image: a small picture and the outlines of its masks

A page opened from disk may not fetch files, but it may load scripts; so what it needs comes as
scripts that hold one JSON value each. ``items`` are loaded for the cards in sight only, which is
why they are apart from ``data``. Outlines are vector paths: they stay sharp at any size, and each
can be shown or hidden. Nothing names a time, a machine or an absolute place, so equal runs give
equal bytes.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.drawing.drawing import svg_path
from risam_cli.drawing.palette import color
from risam_cli.errors import OutputError
from risam_cli.files.confine import require_under
from risam_cli.outputs.naming import GALLERY
from risam_cli.version import __version__

SIDE = 400
"""Pixels of a small picture's longer side; smaller images keep their size."""

PAGE = f"{GALLERY}/index.html"
PER_FILE = 250  # images in one file of data

_COLORS = 28  # of the palette; then they repeat
_QUALITY = 70
_DATA = re.compile(r"\d{5,}\.js")


@dataclass(frozen=True, slots=True)
class Row:
    """What the page says about one image.

    Attributes:
        image: as the records name it.
        records: of ``predictions.jsonl``, in the order of the outlines in ``item``.
        failures: of ``failures.jsonl``.
        item, overlay: paths relative to the output folder, or None where there is none.
    """

    image: str
    records: Sequence[Mapping[str, Any]]
    failures: Sequence[Mapping[str, Any]]
    item: str | None = None
    overlay: str | None = None


@dataclass(slots=True)
class Counts:
    """What stands at the head of the page; ``empty`` are masks without a pixel, which are none."""

    images: int = 0
    expressions: int = 0
    masks: int = 0
    no_target: int = 0
    empty: int = 0
    failures: int = 0

    def add(self, row: Row) -> None:
        """Count one image."""
        nothing = sum(bool(record["no_target"]) for record in row.records)
        masks = sum(bool(record["area"]) and not record["no_target"] for record in row.records)
        self.images += 1
        self.expressions += len(row.records) + len(row.failures)
        self.masks += masks
        self.no_target += nothing
        self.empty += len(row.records) - masks - nothing
        self.failures += len(row.failures)


@dataclass(slots=True)
class Gallery:
    """Writes the page of one run; call :meth:`add` for every image, then :meth:`finish`.

    Memory does not grow with the number of images.

    Args:
        folder: the output folder.
        about: short facts for the foot of the page, name to value.
        maker: the command that writes it, for its title.
        write: writes a file of the folder, given its name and text.
        model: the name of the one that answered, where that is known.
        warning: what must be known before the masks are believed; may be set until the end.

    Raises:
        OutputError: a link in the folder leads out of it.
    """

    folder: Path
    about: Mapping[str, str]
    write: Callable[[str, str], None]
    maker: str = "predict"
    model: str = ""
    warning: str = ""
    counts: Counts = field(default_factory=Counts)
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _written: int = 0

    def __post_init__(self) -> None:
        require_under(self.folder, self.folder / GALLERY / "data")

    def add(self, row: Row) -> None:
        """Take one image.

        Raises:
            OutputError: the folder cannot be written.
        """
        self.counts.add(row)
        self._waiting.append(_to_json(row))
        if len(self._waiting) == PER_FILE:
            self._flush()

    def finish(self) -> Path:
        """Write what is left and the page itself; gives the page's path.

        Raises:
            OutputError: the folder cannot be written.
        """
        if self._waiting:
            self._flush()
        for path in _data_files(self.folder):
            if int(path.stem) >= self._written:
                path.unlink(missing_ok=True)
        counts = {name: getattr(self.counts, name) for name in Counts.__dataclass_fields__}
        head = {
            "counts": counts,
            "files": self._written,
            "about": dict(self.about),
            "model": self.model,
            "warning": self.warning,
            "colors": ["#{:02x}{:02x}{:02x}".format(*color(index)) for index in range(_COLORS)],
        }
        self.write(PAGE, _page(head, self.maker))
        return self.folder / PAGE

    def _flush(self) -> None:
        text = f"risam.data({self._written},{_script_json(self._waiting)});\n"
        name = f"{GALLERY}/data/{self._written:05d}.js"
        self.write(name, text)
        self._written += 1
        self._waiting.clear()


def remove_pages(folder: Path) -> None:
    """Delete what :class:`Gallery` wrote in an output folder, and nothing else there.

    Raises:
        OutputError: a link in the folder leads out of it.
    """
    require_under(folder, folder / GALLERY / "data")
    for path in (folder / PAGE, *_data_files(folder)):
        path.unlink(missing_ok=True)


def _data_files(folder: Path) -> Iterator[Path]:
    place = folder / GALLERY / "data"
    return (path for path in place.glob("*.js") if _DATA.fullmatch(path.name))


# --- one image ------------------------------------------------------------------------------------


def small_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of an image's small picture."""
    scale = min(1.0, SIDE / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def outline(mask: NDArray[np.bool_]) -> str:
    """The outlines of a mask (H, W), holes too, in its small picture's pixels, as SVG path data."""
    height, width = small_size(*mask.shape)
    gray = mask.astype(np.uint8) * np.uint8(255)
    if (height, width) != mask.shape:
        gray = np.asarray(cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    found = gray >= 128
    if not found.any():  # a mask of a few pixels must not vanish
        found = gray > 0
    return svg_path(found)


def encode_item(rgb: NDArray[np.uint8], size: tuple[int, int], outlines: Sequence[str]) -> bytes:
    """The file of one image.

    Args:
        rgb: (h, w, 3) uint8, the image at its own or any other size.
        size: (H, W) of the image.
        outlines: one an expression, as :func:`outline` gives them; empty where there is no mask.
    """
    height, width = small_size(*size)
    small = rgb
    if rgb.shape[:2] != (height, width):
        small = np.asarray(cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    )
    if not done:
        raise OutputError(f"a picture of {small.shape} could not be written as JPEG")
    item = {
        "w": small.shape[1],
        "h": small.shape[0],
        "src": f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode('ascii')}",
        "paths": list(outlines),
    }
    return f"risam.item({_script_json(item)});\n".encode()


# --- the page -------------------------------------------------------------------------------------


def _to_json(row: Row) -> dict[str, Any]:
    """A row in short keys: there may be a million of them."""
    # An answer's third value is null where it has no score; its fourth: 0 a mask, 1 no target, 2 a
    # mask without a pixel.
    out: dict[str, Any] = {"i": row.image}
    if row.records:
        out["s"] = [row.records[0]["width"], row.records[0]["height"]]
        out["e"] = [_answer(record) for record in row.records]
    if row.item is not None:
        out["k"] = row.item.removeprefix(f"{GALLERY}/")
    if row.overlay is not None:
        out["o"] = row.overlay
    if row.failures:
        out["f"] = [[one["id"], one["expression"] or "", one["message"]] for one in row.failures]
    return out


def _answer(record: Mapping[str, Any]) -> list[Any]:
    answer = [
        record["id"],
        record["expression"],
        record.get("score"),
        1 if record["no_target"] else 2 if record["area"] == 0 else 0,
        record["mask"] or "",
    ]
    notes = list(record.get("notes", ()))
    if unknown := record.get("unknown_words"):
        notes.append(f"unknown words: {', '.join(unknown)}")
    return [*answer, notes] if notes else answer


def _script_json(value: object) -> str:
    """JSON that may stand in a script: ASCII, and never ``</script>`` or ``<!--``."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _page(head: Mapping[str, Any], maker: str) -> str:
    parts = {
        name: (files("risam_cli.outputs") / "gallery_page" / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    }
    filled = {
        "STYLE": parts["page.css"],
        "CODE": parts["page.js"],
        "HEAD": _script_json(head),
        "VERSION": __version__,
        "MAKER": maker,
    }
    return re.sub(r"@(STYLE|CODE|HEAD|VERSION|MAKER)@", lambda m: filled[m[1]], parts["page.html"])


def about(settings: Mapping[str, Any]) -> dict[str, str]:
    """What the foot of the page says, from a run's identity; see :mod:`risam_cli.runs.ledger`."""
    facts = {"model": str(settings.get("model", ""))[:16]}
    for name, key in (("threshold", "threshold"), ("no-target threshold", "no_target_threshold")):
        value = settings.get(key)
        if isinstance(value, (int, float)):
            facts[name] = f"{value:.4g}"
    return {name: value for name, value in facts.items() if value}
