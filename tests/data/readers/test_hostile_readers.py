"""Annotation files, records and manifests by an attacker: refused in one line, within bounds."""

from __future__ import annotations

import io
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import hostile_images

from risam_cli import cli
from risam_cli.data.identity import expression_key, image_key
from risam_cli.data.readers import jsonstream
from risam_cli.data.readers.jsonstream import iter_json
from risam_cli.data.readers.results import Results
from risam_cli.errors import DataError
from risam_cli.export import folder
from risam_cli.export.targets import target_name
from risam_cli.files import jsonlines
from risam_cli.masks import rle as masks

DIGITS = "9" * 5000
RECORD: dict[str, Any] = {
    "id": "1",
    "image": "a.png",
    "expression": "x",
    "segmentation": {"size": [24, 32], "counts": [100, 50, 618]},
}


def _coco(**change: Any) -> dict[str, Any]:
    """A COCO-style file of one image, one annotation and one expression."""
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": 24, "width": 32}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}
        ],
        "categories": [{"id": 1, "name": "x"}],
        "expressions": [{"id": 1, "image_id": 1, "ann_ids": [1], "text": "x"}],
        **change,
    }


def _annotation(**change: Any) -> dict[str, Any]:
    return _coco(annotations=[{**_coco()["annotations"][0], **change}])


def _image(**change: Any) -> dict[str, Any]:
    return _coco(images=[{**_coco()["images"][0], **change}])


FAR = [0, 0, 9.9e6, 0, 9.9e6, 1]

ANNOTATIONS: dict[str, tuple[str, str]] = {
    "number of 5000 digits": (f'{{"images": [{{"id": {DIGITS}}}]}}', "thousands of digits"),
    "list as image_id": (json.dumps(_annotation(image_id=[1])), "image_id"),
    "object as image_id": (json.dumps(_annotation(image_id={"a": 1})), "image_id"),
    "list as category": (json.dumps(_annotation(category_id=[[1]])), "category_id"),
    "number among categories": (json.dumps(_coco(categories=[5])), "categories[] has no id"),
    "line among expressions": (json.dumps(_coco(expressions=["a\nb"])), "is not an object"),
    "deep": ("[" * 200_000, "nests too deeply"),
    "deep objects": ('{"images":' * 200_000, "nests too deeply"),
    "infinite height": (json.dumps(_image(height=1e999)), "are inf and 32"),
    "height of 2^70": (json.dumps(_image(height=2**70)), "over the limit"),
    "outline of ten million": (json.dumps(_annotation(segmentation=[FAR])), "in pixels"),
    "outlines without end": (
        json.dumps(_annotation(segmentation=[[0, 0, 9e5, 0, 9e5, 1]] * 30)),
        "longer than",
    ),
    "coordinate of 400 digits": (json.dumps(_annotation(segmentation=[[10**400] * 6])), "numbers"),
    "NaN coordinate": (json.dumps(_annotation(segmentation=[[float("nan")] * 6])), "finite"),
    "odd coordinates": (json.dumps(_annotation(segmentation=[[1, 1, 9, 1, 9, 9, 3]])), "7 coord"),
    "runs below zero": (
        json.dumps(_annotation(segmentation={"size": [24, 32], "counts": [-1, 769]})),
        "out of range",
    ),
    "runs over 64 bits": (
        json.dumps(_annotation(segmentation={"size": [24, 32], "counts": [2**64, 1]})),
        "out of range",
    ),
    "mask of 2^80 pixels": (
        json.dumps(_annotation(segmentation={"size": [2**40, 2**40], "counts": [1]})),
        "over the limit",
    ),
}


def _evaluate(tmp_path: Path, annotations: str, record: str, capsys: Any) -> tuple[int, str]:
    """Exit code and stderr of an evaluation of one record."""
    (tmp_path / "c.json").write_text(annotations, encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(record + "\n", encoding="utf-8")
    options = ["--dataset", "coco", "--split", "all", "-o", str(tmp_path / "out"), "--overwrite"]
    files = ["--root", str(tmp_path / "c.json"), "--predictions", str(tmp_path / "p.jsonl")]
    code = cli.main(["eval", *options, *files])
    return code, capsys.readouterr().err


def _export(tmp_path: Path, record: str, capsys: Any, *options: str) -> tuple[int, str, list[Any]]:
    """Exit code, stderr and failures of an export of one record."""
    (tmp_path / "p.jsonl").write_text(record + "\n", encoding="utf-8")
    out = tmp_path / "out"
    to = [] if "--to" in options else ["--to", "coco"]
    code = cli.main(["export-masks", str(tmp_path / "p.jsonl"), *to, "-o", str(out), *options])
    failures = out / "failures.jsonl"
    rows = failures.read_text().splitlines() if failures.exists() else []
    return code, capsys.readouterr().err, [json.loads(row)["message"] for row in rows]


@pytest.mark.parametrize("what", ANNOTATIONS)
def test_annotations_are_refused_in_one_line(what: str, tmp_path: Path, capsys: Any) -> None:
    text, words = ANNOTATIONS[what]
    code, err, *_ = _evaluate(tmp_path, text, json.dumps(RECORD), capsys)
    assert code == 1
    assert words in err
    assert "internal error" not in err
    assert err.splitlines()[-1].startswith("error: ")


def test_a_name_that_no_file_can_have_costs_its_own_image_only(tmp_path: Path, capsys: Any) -> None:
    for name in ("n" * 5000, "a\0.png", "\udc80.png", "../../../../dev/zero", "/dev/zero"):
        text = json.dumps(_image(file_name=name))
        code, err = _evaluate(tmp_path, text, json.dumps({**RECORD, "image": name}), capsys)
        assert (code, "1 of 1 images are missing" in err) == (0, True), name


@pytest.mark.parametrize("score", ["9" * 400, "-" + "9" * 400, "NaN", "Infinity"])
def test_a_score_of_nonsense_costs_no_mask(score: str, tmp_path: Path, capsys: Any) -> None:
    record = json.dumps(RECORD)[:-1] + f', "score": {score}}}'
    code, err, failures = _export(tmp_path, record, capsys, "--to", "png")
    assert (code, failures) == (0, [])
    assert "1 records have a score that is not a number in 0..1; it is left out" in err
    assert len(list((tmp_path / "out/masks").iterdir())) == 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (json.dumps({**RECORD, "segmentation": None, "mask": "a\0.png"}), "cannot be read"),
        (json.dumps({**RECORD, "segmentation": None, "mask": "n" * 9000}), "cannot be read"),
        (json.dumps({**RECORD, "segmentation": None, "mask": "/dev/zero"}), "not a regular file"),
        (json.dumps({**RECORD, "segmentation": None, "mask": "pipe.png"}), "not a regular file"),
        (json.dumps({**RECORD, "segmentation": None, "mask": "bomb.png"}), "too large"),
        (json.dumps({**RECORD, "segmentation": None, "mask": "cut.png"}), "not an image"),
        (json.dumps({**RECORD, "segmentation": None, "mask": "/etc/passwd"}), "not an image"),
        (
            json.dumps({**RECORD, "segmentation": {"size": [32768, 32768], "counts": [2**30]}}),
            "--max-pixels",
        ),
        (json.dumps({**RECORD, "height": 10**30, "width": 1}), "(height x width)"),
    ],
    ids=lambda value: value[:40] if value.startswith("'") else None,
)
def test_a_record_fails_alone(record: str, words: str, tmp_path: Path, capsys: Any) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "bomb.png").write_bytes(hostile_images.HOSTILE["bomb-14000.png"][0])
    (tmp_path / "cut.png").write_bytes(hostile_images.HOSTILE["cut.png"][0])
    both = f"{record}\n{json.dumps({**RECORD, 'image': 'b.png'})}"
    code, err, failures = _export(tmp_path, both, capsys, "--to", "png")
    assert code == 3
    assert [words in message for message in failures] == [True]
    assert "internal error" not in err
    assert len(list((tmp_path / "out/masks").iterdir())) == 1


def test_only_images_are_copied_beside_labels(tmp_path: Path, capsys: Any) -> None:
    """A record names any file it likes; its content must not end in what is given on."""
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    record = json.dumps({**RECORD, "image": str(tmp_path / "key")})
    code, _, failures = _export(tmp_path, record, capsys, "--to", "yolo", "--copy-images")
    assert code == 3
    assert "cannot be copied" in failures[0]
    assert not [p for p in (tmp_path / "out").rglob("*") if b"OPENSSH" in _bytes(p)]


def test_a_name_that_no_file_can_have_fails_alone(tmp_path: Path, capsys: Any) -> None:
    picture = Image.new("RGB", (32, 24))
    picture.save(tmp_path / "good.png")
    picture.save(tmp_path / "good.tiff", compression="tiff_lzw")
    names = ["n" * 300 + ".png", "a/" * 3000 + "b.png", "nul\0.png", "good.png", "good.tiff"]
    record = "\n".join(
        json.dumps({**RECORD, "id": str(k), "image": name}) for k, name in enumerate(names)
    )
    for kind in ("yolo", "labelme", "coco"):
        root = ["--image-root", str(tmp_path), "--overwrite"]
        code, _, failures = _export(tmp_path, record, capsys, "--to", kind, "--copy-images", *root)
        assert code == 3
        assert len(failures) == 3
        copies = [one.name for one in (tmp_path / "out").rglob("good*") if one.suffix != ".txt"]
        assert sum(name.endswith((".png", ".tiff")) for name in copies) == 2


def test_an_image_that_cannot_be_read_to_its_end_fails_alone(
    tmp_path: Path,
) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(DataError, match=r"good\.png: Input/output error"):
        folder._read(Broken(), tmp_path / "good.png")


def test_results_that_are_being_replaced_are_not_read(tmp_path: Path, capsys: Any) -> None:
    """A merge, or what was done again, that was cut while it was moved in."""
    (tmp_path / ".risam").mkdir()
    (tmp_path / ".risam" / "splice").touch()
    code, err, _ = _export(tmp_path, json.dumps(RECORD), capsys)
    assert code == 1
    assert f"the results in {tmp_path} are being replaced, or this was interrupted" in err
    (tmp_path / ".risam" / "splice").unlink()
    assert _export(tmp_path, json.dumps(RECORD), capsys)[0] == 0


def test_names_and_cells_cost_no_more_than_their_length(tmp_path: Path, capsys: Any) -> None:
    """Unicode orders combining marks in the square of their number."""
    marks = "a" + "\u0301\u0316" * 200_000
    started = time.process_time()
    assert image_key(marks) == image_key(f"./{marks}")
    assert expression_key(marks)
    record = json.dumps({**RECORD, "image": marks, "expression": marks})
    assert _export(tmp_path, record, capsys)[0] in (0, 3)
    rows = b"image,expression,segmentation\na.png,x," + b"(" * 3_000_000 + b"\n"
    (tmp_path / "p.csv").write_bytes(rows)
    given = ["export-masks", str(tmp_path / "p.csv"), "--to", "coco", "-o", str(tmp_path / "b")]
    assert cli.main(given) in (1, 3)
    assert time.process_time() - started < 20
    assert image_key("e\u0301.png") == image_key("\u00e9.png")


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@pytest.mark.parametrize("kind", ["yolo", "labelme", "png", "coco"])
def test_a_folder_called_like_a_file_stands_in_no_ones_way(
    kind: str, tmp_path: Path, capsys: Any
) -> None:
    names = ["a.jpg", "a.txt/b.jpg", "a.json/b.jpg", "a.png/b.jpg", "a.jpg/b.jpg"]
    records = "\n".join(json.dumps({**RECORD, "image": name}) for name in names)
    code, _, failures = _export(tmp_path, records, capsys, "--to", kind)
    assert (code, failures) == (0, [])
    assert len({target_name(name) for name in names}) == len(names)
    assert target_name("street.d/car.jpg") == "street.d/car.jpg"


def test_a_value_is_written_no_longer_than_it_is_shown() -> None:
    bomb: Any = ["lol"] * 9
    for _ in range(40):
        bomb = [bomb] * 9
    assert len(jsonlines.brief(bomb)) <= 60
    assert len(jsonlines.brief({"a": bomb})) <= 60


def test_a_record_without_end_is_not_held(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(jsonstream, "MAX_RECORD", 1 << 20)
    path = tmp_path / "long.json"
    path.write_text('[{"a": "' + "x" * (16 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match="longer than"):
        list(iter_json(path))
    with pytest.raises(DataError, match="longer than"):
        Results(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


def test_a_line_of_predictions_without_end_is_not_held(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("risam_cli.data.readers.results.MAX_LINE", 1 << 20)
    long = json.dumps({**RECORD, "pad": "x" * (20 << 20)})
    tracemalloc.start()
    code, err = _evaluate(tmp_path, json.dumps(_coco()), f"{json.dumps(RECORD)}\n{long}", capsys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == 3
    assert "line 2: longer than 1 MiB" in err
    assert peak < 90 << 20  # twice the test's own text; what was read of it is below 2 MiB


def test_offsets_are_those_of_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n\n" + b"x" * 50 + b"\nlast")
    with open(path, "rb") as stream:
        assert list(jsonlines.read_lines_at(stream, 10)) == [
            (1, 0, b"one\n"),
            (3, 5, None),
            (4, 56, b"last"),
        ]


def test_polygons_within_bounds_are_still_drawn() -> None:
    """The limit is far beyond any outline that an image can have."""
    side = 13_000
    teeth = [v for x in range(0, side, 260) for v in (x, 0, x + 130, side)]
    rle = masks.from_polygons([[*teeth, side, 0]], (side, side))
    assert 0.3 < masks.area(rle) / side**2 < 0.7
    assert np.asarray(rle["size"]).tolist() == [side, side]
