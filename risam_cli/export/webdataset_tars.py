"""Tar shards in the layout of WebDataset, by its own library: an image's records and masks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Self

from risam_cli.drawing.png import encode_mask
from risam_cli.errors import DataError, UsageError, setting
from risam_cli.export.format import Context, Format, Labeled, LabeledImage

SHARDS = "shards"
_MOST = 1 << 29  # bytes of a shard, from where on the next one begins
_TIME = 0.0  # of every member, so that equal exports are equal


class WebDatasetTars(Format):
    """``shards/000000.tar`` …: of each image ``KEY.json``, ``KEY.0.mask.png`` … and maybe itself.

    ``KEY.json`` is the object of a manifest's line, with the records under ``records``, so that a
    tar whose images were copied is an input of ``risam predict``. Masks are exact.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._tar: Any = None
        self._part = context.folder.staging / "shard.tar"
        self._count = self._size = 0

    def __enter__(self) -> Self:
        try:
            self._library = importlib.import_module("webdataset")
        except ImportError:
            raise UsageError(
                f"{setting('to', 'webdataset')} needs a package that is not installed",
                "pip install 'risam[remote]'",
            ) from None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tar is not None:
            self._tar.close()
        self._part.unlink(missing_ok=True)

    def add(self, image: LabeledImage) -> None:
        """Append one image, empty masks too."""
        sample: dict[str, Any] = {"__key__": f"{image.index:09}"}
        rows = []
        for place, (number, one) in enumerate(image.records.items()):
            name = f"{place}.mask.png"
            sample[name] = encode_mask(Labeled(one, number, 0, "").mask)
            rows.append(
                {"id": one.id, "expression": one.expression, "mask": name, "score": one.score}
                | {"no_target": one.no_target, "segmentation": one.segmentation}
                | ({} if one.instance is None else {"instance": one.instance})
            )
        asked = list(dict.fromkeys(row["expression"] for row in rows))
        said = {"image": image.image, "expressions": asked, "records": rows}
        sample["json"] = json.dumps(said).encode()
        if self.context.copy_images:
            sample[image.path.suffix.lower().lstrip(".") or "jpg"] = _bytes(image.path)
        if self._tar is None:
            self._tar = self._library.TarWriter(str(self._part), mtime=_TIME, encoder=False)
        self._tar.write(sample)
        self._size += sum(len(value) for value in sample.values())
        if self._size >= _MOST:
            self._end_shard()

    def finish(self) -> None:
        """End the last shard."""
        if self._tar is not None:
            self._end_shard()

    def _end_shard(self) -> None:
        self._tar.close()
        self._tar = None
        self.context.folder.place([(self._part, f"{SHARDS}/{self._count:06}.tar")], sync=False)
        self._count, self._size = self._count + 1, 0


def _bytes(path: Path) -> bytes:
    from risam_cli.data.images.files import open_regular

    try:
        with open_regular(path) as file:
            return file.read()
    except DataError as error:
        raise DataError(error.message, f"give {setting('image_root', 'DIR')} where it is") from None
