"""COCO-style JSON of pairs in REFER's form: refs(unc).p beside instances.json.

::

    cd ../shared/photos
    python …/benchmarks/refer_form.py instances.json data --images images

writes ``data/refcoco``, of expressions of one object, which ``risam train`` and ``risam eval`` read
as RefCOCO. Every fifth image goes to the split val, the others to train.
"""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any


def main() -> None:
    """Reads the arguments and writes the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    options = parser.parse_args()
    print(write_refer_form(options.annotations, options.images, options.output))


def write_refer_form(annotations: Path, images: Path, output: Path) -> dict[str, int]:
    """Writes ``output/refcoco``, with a link to the images.

    Returns:
        Numbers of refs, expressions and images.
    """
    content = json.loads(annotations.read_text(encoding="utf-8"))
    split = {
        image["id"]: "train" if number % 5 else "val"
        for number, image in enumerate(content["images"])
    }
    category = {a["id"]: a["category_id"] for a in content["annotations"]}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    refs: dict[int, dict[str, Any]] = {}
    for expression in content["expressions"]:
        if len(expression["ann_ids"]) != 1:
            continue
        (ann_id,) = expression["ann_ids"]
        ref = refs.setdefault(
            ann_id,
            {
                "ref_id": ann_id,
                "ann_id": ann_id,
                "category_id": category[ann_id],
                "image_id": expression["image_id"],
                "file_name": names[expression["image_id"]],
                "split": split[expression["image_id"]],
                "sent_ids": [],
                "sentences": [],
            },
        )
        text = expression["text"]
        ref["sent_ids"].append(expression["id"])
        ref["sentences"].append(
            {"raw": text, "sent": text, "sent_id": expression["id"], "tokens": text.split()}
        )
    folder = output / "refcoco"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(list(refs.values()), protocol=2))
    kept = {key: content[key] for key in ("images", "annotations", "categories")}
    (folder / "instances.json").write_text(json.dumps(kept), encoding="utf-8")
    link = folder / "images"
    if not link.exists():
        link.symlink_to(images.resolve(), target_is_directory=True)
    return {
        "refs": len(refs),
        "expressions": sum(len(ref["sentences"]) for ref in refs.values()),
        "images": len({ref["image_id"] for ref in refs.values()}),
    }


if __name__ == "__main__":
    main()
