"""What is fuzzed: each reader with sound inputs to start from. See ``fuzz.py``."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from risam_cli.data.images.images import open_rgb
from risam_cli.data.inputs import manifest
from risam_cli.data.readers.coco import open_coco
from risam_cli.data.readers.phrasecut import open_phrasecut
from risam_cli.data.readers.pickle import load_plain_pickle
from risam_cli.data.readers.predictions import PredictionIndex
from risam_cli.data.readers.refer import open_refer
from risam_cli.data.readers.results import Results
from risam_cli.errors import DataError
from risam_cli.export.categories import read_map
from risam_cli.export.targets import target_name
from risam_cli.files.jsonlines import parse_json, seal
from risam_cli.masks import rle as masks
from risam_cli.outputs.naming import mask_name
from risam_cli.runs.ledger import read_header, read_lines
from risam_cli.settings.train import load_settings
from risam_cli.types import Expression, Sample
from risam_cli.weights.folder import stored_settings

REPO = Path(__file__).resolve().parent.parent
SIZE = (24, 32)
RECORD = {
    "id": "1",
    "image": "a.png",
    "expression": "red circle",
    "height": 24,
    "width": 32,
    "segmentation": {"size": [24, 32], "counts": [100, 50, 618]},
    "score": 0.5,
    "no_target": False,
}
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 24, "width": 32, "split": "val"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {"id": 2, "image_id": 1, "category_id": 1, "segmentation": RECORD["segmentation"]},
        {"id": 3, "image_id": 1, "category_id": 2, "caption": "a cat", "iscrowd": 1},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "expressions": [{"id": 1, "image_id": 1, "ann_ids": [1, 2], "text": "both"}],
}
REFS = [
    {
        "ref_id": 1,
        "image_id": 1,
        "ann_id": 1,
        "split": "val",
        "sentences": [{"sent_id": 7, "sent": "cat", "raw": "Cat"}],
    }
]
TASKS = [{"task_id": "t", "image_id": 1, "phrase": "cat", "Polygons": [[[[1, 1], [9, 1], [9, 9]]]]}]
SHARED = [{"image_id": 1, "height": 24, "width": 32, "split": "val"}]


@dataclass(frozen=True, slots=True)
class Target:
    """One reader.

    Attributes:
        seeds: sound inputs; run: reads one input from a file, and may raise RisamError only.
        as_json: inputs are JSON, so values are changed as well as bytes.
        share: of the cases asked for, where one case takes long.
    """

    seeds: Sequence[bytes]
    run: Callable[[Path], object]
    as_json: bool = False
    share: float = 1.0


def _json(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def _drain(source: Any) -> None:
    for sample in source.iterate(lambda failure: None):
        for expression in sample.expressions:
            if expression.target is not None:
                masks.area(expression.target)


def _refer(path: Path) -> None:
    """The input is the instances; then it is the refs."""
    for name, other, sound in (
        ("instances.json", "refs(unc).json", REFS),
        ("refs(unc).json", "instances.json", COCO),
    ):
        (path.parent / other).write_text(json.dumps(sound))
        shutil.copyfile(path, path.parent / name)
        with suppress(DataError):
            _drain(open_refer(path.parent, "refcoco", "val"))


def _phrasecut(path: Path) -> None:
    for name, other, sound in (
        ("refer_val.json", "image_data_split.json", SHARED),
        ("image_data_split.json", "refer_val.json", TASKS),
    ):
        (path.parent / other).write_text(json.dumps(sound))
        shutil.copyfile(path, path.parent / name)
        with suppress(DataError):
            _drain(open_phrasecut(path.parent, "val"))


def _predictions(path: Path) -> None:
    sample = Sample("a.png", Path("a.png"), (Expression("1", "red circle"),), SIZE)
    with PredictionIndex(path, lambda failure: None) as index:
        with suppress(DataError):
            index.find(sample, sample.expressions[0])
        list(index.surplus())


def _rows(kind: str) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        with open(path, "rb") as stream:
            if kind == "jsonl":
                list(manifest.read_stream(stream, "m"))
            else:
                list(manifest.read_table(stream, "m"))

    return run


def _rle(path: Path) -> None:
    rle = masks.parse_rle(parse_json(path.read_bytes(), "x"), size=None, where="x")
    height, width = rle["size"]
    assert 0 <= masks.area(rle) <= height * width
    x, y, w, h = masks.bbox(rle)
    assert min(x, y) >= 0
    assert x + w <= width
    assert y + h <= height
    if height * width < 1 << 22:
        decoded = masks.decode(rle)
        assert masks.encode(decoded) == rle
        assert int(decoded.sum()) == masks.area(rle)


def _polygons(path: Path) -> None:
    value = parse_json(path.read_bytes(), "x")
    if not isinstance(value, list):
        raise DataError("no list")
    rle = masks.from_polygons(value, SIZE)
    assert masks.decode(rle).shape == SIZE


def _ledger(path: Path) -> None:
    read_header(path)
    sealed = []
    for raw in path.read_bytes().splitlines():  # what got past the checksum, too
        with suppress(ValueError, RecursionError):
            record = json.loads(raw)
            sealed.append(seal(record) if isinstance(record, dict) else raw)
    path.write_bytes(path.read_bytes().partition(b"\n")[0] + b"\n" + b"".join(sealed[1:]))
    for line, _ in read_lines(path):
        for mark in line.files:
            assert not {"", "..", "."} & set(mark.path.split("/"))


def _results(path: Path) -> None:
    with Results(path) as results:
        for number, _, record in results.rows():
            if not isinstance(record, DataError):
                with suppress(DataError):
                    results.mask(record, SIZE, results.place(number))


def _names(path: Path) -> None:
    image = path.read_bytes().decode("utf-8", "surrogateescape")
    for name in (mask_name(image, 0, image), target_name(image)):
        parts = name.split("/")
        assert not {"", ".", ".."} & set(parts), name
        assert all(len(part.encode()) <= 255 for part in parts), name
        assert name.isascii() or not any(c in "\0\n\r\x1b\u202e" for c in name), name


def _images() -> list[bytes]:
    picture = np.arange(20 * 24 * 3, dtype=np.uint32).reshape(20, 24, 3).astype(np.uint8)
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000"):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, kind)
        found.append(file.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", exif=exif, icc_profile=bytes(200))
    found.append(file.getvalue())
    return found


def _configs() -> list[bytes]:
    """The shipped settings that stand alone."""
    texts = [path.read_bytes() for path in sorted((REPO / "configs").glob("*.yaml"))]
    return [text for text in texts if b"extends:" not in text]


def _pickles() -> list[bytes]:
    return [pickle.dumps(REFS * 3, protocol=p) for p in range(pickle.HIGHEST_PROTOCOL + 1)]


_LEDGER_LINE = {
    "entry": 0,
    "key": "k",
    "items": 1,
    "image": "0",
    "stamp": [1, 2, 3, 4],
    "predictions": [0, 1, 2],
    "failures": [0, 0, 0],
    "files": [["masks/a.png", 1, 2]],
}
_LEDGER = seal({"ledger": 2, "identity": {}}) + seal(_LEDGER_LINE)
_LINES = json.dumps({"image": "a.png", "expressions": ["a", "b"], "id": 3}).encode()

TARGETS: dict[str, Target] = {
    "coco": Target(_json(COCO), lambda path: _drain(open_coco(path)), as_json=True),
    "refer": Target(_json(COCO, REFS), _refer, as_json=True, share=0.5),
    "phrasecut": Target(_json(TASKS, SHARED), _phrasecut, as_json=True, share=0.5),
    "pickle": Target(_pickles(), load_plain_pickle),
    "manifest-jsonl": Target([_LINES + b"\n" + _LINES], _rows("jsonl"), as_json=True),
    "manifest-csv": Target([b'image,expression,id\na.png,"x, ""y""",1\nb.png,z,2\n'], _rows("csv")),
    "predictions": Target(_json(RECORD), _predictions, as_json=True),
    "record": Target(_json(RECORD), _results, as_json=True),
    "rle": Target(
        _json(
            {"size": [4, 5], "counts": [3, 4, 13]},
            {"size": [24, 32], "counts": masks.encode(np.eye(24, 32, dtype=np.bool_))["counts"]},
        ),
        _rle,
        as_json=True,
    ),
    "polygons": Target(_json([[1, 1, 9, 1, 9, 9], [3.5, 4, 20, 5, 7, 22.25]]), _polygons, True),
    "results": Target(_json([{"image_id": 1, "category_id": 2, **RECORD}]), _results, True),
    "ledger": Target([_LEDGER], _ledger),
    "settings": Target(
        _configs(),
        partial(load_settings, stored=stored_settings),
        share=0.1,
    ),
    "category-map": Target([b"red circle: shape\n'*': other\n", b"a: &a x\nb: *a\n"], read_map),
    "names": Target(
        [b"street/car.jpg", b"../../etc/passwd", "caf\u00e9/\u202e.png".encode()], _names
    ),
    "image": Target(_images(), lambda path: open_rgb(path, 1 << 20)),
}
