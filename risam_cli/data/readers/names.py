"""What a COCO file calls its images and categories, for results that know them by id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from risam_cli.data.identity import id_text, image_key
from risam_cli.data.readers.instances import file_name_of
from risam_cli.data.readers.jsonstream import iter_json
from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief

Record = dict[str, Any]

IMAGE_KEYS = ("image", "file_name")
TEXT_KEYS = ("expression", "caption", "sent", "phrase", "text")


class Names:
    """What a COCO file calls its images and categories.

    Attributes:
        images: id as text -> the image's entry, in the file's order.
        categories: id as text -> (id, name), in the file's order.
        texts: id of an annotation as text -> the first expression that refers to it alone.
    """

    def __init__(self, path: Path | None, table: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.images: dict[str, Mapping[str, Any]] = {}
        self.categories: dict[str, tuple[Any, str]] = {}
        self.texts: dict[str, str] = {}
        self._by_name: dict[str, Mapping[str, Any]] = {}
        if path is None:
            return
        read: Mapping[str, list[Any]] = {"images": [], "categories": [], "expressions": []}
        if table is None:
            for key, item in iter_json(path):
                if key in read:
                    read[key].append(item)
        else:
            read = table
        for image in read["images"]:
            name = id_text(image.get("id")) if isinstance(image, Mapping) else None
            file_name = None if name is None else file_name_of(image)
            if name is None or not file_name:
                raise DataError(f"{path}: an image without id or file_name: {brief(image)}")
            image = {**image, "file_name": file_name}
            if name in self.images and self.images[name] != image:
                raise DataError(f"{path}: two images have the id {name}", "ids must differ")
            self.images[name] = image
            self._by_name.setdefault(image_key(file_name), image)
        for category in read["categories"]:
            name = id_text(category.get("id")) if isinstance(category, Mapping) else None
            if name is None:
                raise DataError(f"{path}: a category without id: {brief(category)}")
            self.categories[name] = (category["id"], str(category.get("name")))
        for text, ann_ids in map(spoken, read["expressions"]):
            name = id_text(ann_ids[0]) if len(ann_ids) == 1 else None
            if text is not None and name is not None:
                self.texts.setdefault(name, text)
        if not self.images:
            raise DataError(
                f"{path} is not a COCO file: it lists no images", "it has images and categories"
            )

    def image(self, record: Record) -> Mapping[str, Any] | None:
        """The entry of a record's image: by its id, else by its name; None where it has none."""
        known = self.images.get(id_text(record.get("image_id")) or "")
        name = next((record[key] for key in IMAGE_KEYS if record.get(key)), None)
        if known is None and isinstance(name, str):
            known = self._by_name.get(image_key(name))
        return known

    def complete(self, record: Record, where: str) -> None:
        """Give a result its image's name and size, and its category's name.

        Raises:
            DataError: its image is not among the file's.
        """
        given = record.get("image_id")
        image_id, known = id_text(given), self.image(record)
        if known is not None:
            record.setdefault("image", known["file_name"])
            for key in ("height", "width"):
                if known.get(key) is not None:
                    record.setdefault(key, known[key])
        elif not any(record.get(key) for key in IMAGE_KEYS):
            if image_id is None or self.path is not None:
                known_here = f"among the {len(self.images)} images of {self.path}"
                raise DataError(
                    f"{where}: the image_id {brief(given)} is not "
                    f"{known_here if self.path else 'an id'}",
                    "check that both files belong together",
                )
            record["image"] = image_id
        if any(record.get(key) for key in TEXT_KEYS):
            return
        category = id_text(record.get("category_id"))
        text = self.texts.get(id_text(record.get("id")) or "")
        if text is not None:
            record["expression"] = text
        elif category is not None:
            unnamed = (category, unnamed_category(category))
            record["expression"] = self.categories.get(category, unnamed)[1]


def unnamed_category(category: str | None) -> str:
    """What stands for the name of a category that no COCO file names."""
    return f"category {category}"


def spoken(expression: Any) -> tuple[str | None, list[Any]]:
    """Text and annotations of an entry of a COCO-style file's list of expressions."""
    if not isinstance(expression, Mapping):
        return None, []
    text = next((v for k in TEXT_KEYS if isinstance(v := expression.get(k), str)), None)
    ann_ids = expression.get("ann_ids", expression.get("ann_id"))
    return text, ann_ids if isinstance(ann_ids, list) else [ann_ids]
