"""What real readers make of exported masks: IoU against the source, for every format and choice.

    python benchmarks/export_roundtrip.py INSTANCES.json [--images DIR]

INSTANCES.json is a COCO file whose annotations hold RLE (any number of them; the 740 masks of 100
COCO photos are what docs/export-masks.md shows). Every mask is exported as an expression of its
own and read back by pycocotools, supervision, and, where they are installed, datumaro and labelme
(`pip install datumaro labelme`, best in an environment of their own: they need OpenCV 4). Masks
under 64 pixels are listed apart, and so are masks with holes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from risam_cli.cli import main as risam
from risam_cli.masks import rle as masks
from risam_cli.masks.polygons import to_polygons

Mask = NDArray[np.bool_]
Found = Iterator[tuple[str, Mask]]  # a mask may come in pieces
SMALL = 64  # pixels


def by_pycocotools(out: Path) -> Found:
    """By ``annToMask``."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(out / "instances.json"))
    for annotation in coco.anns.values():
        yield annotation["expression"], coco.annToMask(annotation).astype(np.bool_)


def _by_supervision(data: sv.DetectionDataset) -> Found:
    for _, _, detections in data:
        if detections.mask is not None:
            for number, mask in zip(detections.class_id, detections.mask, strict=True):
                yield data.classes[number], mask


def supervision_coco(out: Path) -> Found:
    """DetectionDataset.from_coco."""
    yield from _by_supervision(
        sv.DetectionDataset.from_coco(str(IMAGES), str(out / "instances.json"), force_masks=True)
    )


def supervision_yolo(out: Path) -> Found:
    """DetectionDataset.from_yolo."""
    yield from _by_supervision(
        sv.DetectionDataset.from_yolo(
            str(out / "images"), str(out / "labels"), str(out / "data.yaml")
        )
    )


def by_labelme(out: Path) -> Found:
    """LabelFile and shapes_to_label."""
    import labelme

    for path in (out / "labelme").glob("*.json"):
        size = (
            json.loads(path.read_text())["imageHeight"],
            json.loads(path.read_text())["imageWidth"],
        )
        for shape in labelme.LabelFile(str(path)).shapes:
            _, drawn = labelme.utils.shapes_to_label(size, [shape], {shape["label"]: 1})
            yield shape["label"], drawn > 0


def by_datumaro(out: Path) -> Found:
    """Dataset.import_from, polygons by its own mask_tools (which are pycocotools)."""
    import datumaro

    data = datumaro.Dataset.import_from(str(out), "cvat")
    names = [c.name for c in next(iter(data.categories().values())).items]
    for item in data:
        height, width = item.media.size
        for one in item.annotations:
            if one.type.name == "polygon":
                rle = coco_mask.frPyObjects([list(one.points)], height, width)
                mask = coco_mask.decode(coco_mask.merge(rle))
            else:
                mask = one.image
            yield names[one.label], np.asarray(mask).astype(np.bool_)


CASES: list[tuple[list[str], str, Callable[[Path], Found]]] = [
    (["coco"], "pycocotools", by_pycocotools),
    (["coco"], "supervision", supervision_coco),
    (["coco-polygons"], "pycocotools", by_pycocotools),
    (["coco-polygons", "--holes", "drop"], "pycocotools", by_pycocotools),
    (["coco-polygons", "--simplify", "1"], "pycocotools", by_pycocotools),
    (["coco-polygons"], "supervision", supervision_coco),
    (["coco-polygons", "--vertices", "center"], "supervision", supervision_coco),
    (["coco-polygons", "--vertices", "center"], "pycocotools", by_pycocotools),
    (["yolo"], "supervision", supervision_yolo),
    (["yolo", "--parts", "join"], "supervision", supervision_yolo),
    (["yolo", "--holes", "drop"], "supervision", supervision_yolo),
    (["labelme"], "labelme", by_labelme),
    (["labelme", "--shapes", "mask"], "labelme", by_labelme),
    (["cvat"], "datumaro", by_datumaro),
    (["cvat", "--shapes", "mask"], "datumaro", by_datumaro),
]
IMAGES = Path()


def write_records(table: dict[str, Any], path: Path) -> dict[str, Mask]:
    """Every annotation as a record; gives the masks by expression."""
    images = {image["id"]: image for image in table["images"]}
    wanted, lines = {}, []
    for a in table["annotations"]:
        name = f"mask {a['id']}"
        row = {"image": images[a["image_id"]]["file_name"], "expression": name}
        lines.append(json.dumps({**row, "segmentation": a["segmentation"]}) + "\n")
        wanted[name] = masks.decode(masks.parse_rle(a["segmentation"], size=None, where=name))
    path.write_text("".join(lines))
    return wanted


def show(label: str, ious: list[float]) -> str:
    """Mean and worst."""
    return f"{label} {np.mean(ious):.4f}/{min(ious):.4f}" if ious else f"{label} -"


def main() -> None:
    """Measure and print."""
    global IMAGES
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("instances", type=Path)
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    IMAGES = options.images or options.instances.parent / "images"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = write_records(json.loads(options.instances.read_text()), folder / "p.jsonl")
        holed = {n for n, m in wanted.items() if any(p.holes for p in to_polygons(m))}
        small = {n for n, m in wanted.items() if m.sum() < SMALL}
        print(f"{len(wanted)} masks, {len(small)} under {SMALL} pixels, {len(holed)} with holes")
        print("mean/worst IoU")
        for number, (choice, reader, read) in enumerate(CASES):
            title = f"{' '.join(choice)} -> {reader}"
            if find_spec(reader) is None:
                print(f"{title}: not installed")
                continue
            out = folder / str(number)
            copy = ["--copy-images"] if choice[0] in {"yolo", "labelme", "cvat"} else []
            command = ["export-masks", str(folder / "p.jsonl"), "--to", *choice, *copy]
            if risam([*command, "-o", str(out), "--image-root", str(IMAGES), "-q"]):
                raise SystemExit("the export failed")
            found: dict[str, Mask] = {}
            for key, mask in read(out):
                found[key] = found[key] | mask if key in found else mask
            ious = {
                n: float((found[n] & m).sum() / (found[n] | m).sum()) if n in found else 0.0
                for n, m in wanted.items()
            }
            groups = {
                "no hole": [v for n, v in ious.items() if n not in small | holed],
                "holes": [v for n, v in ious.items() if n in holed - small],
                "small": [v for n, v in ious.items() if n in small],
            }
            all_large = show("all but small", groups["no hole"] + groups["holes"])
            rest = ", ".join(show(label, values) for label, values in groups.items())
            print(f"{title}: {all_large}; {rest}", flush=True)


if __name__ == "__main__":
    main()
