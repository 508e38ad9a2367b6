"""The records of ``predictions.jsonl`` and ``failures.jsonl``, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief
from risam_cli.masks import rle as masks
from risam_cli.types import Failure, Prediction

MAX_LINE = 64 << 20
"""Bytes of a line over which it is no record: the RLE of a huge ragged mask stays far below."""

PREDICTIONS = "predictions.jsonl"
FAILURES = "failures.jsonl"


def to_json(p: Prediction) -> str:
    """One line of JSON without its end, keys in the contract's order.

    Pure ASCII: neither a terminal nor a reader that knows more line ends than one stumbles.
    """
    record: dict[str, Any] = {
        "id": p.id,
        "image": p.image,
        "expression": p.expression,
        "height": p.height,
        "width": p.width,
        "segmentation": {"size": list(p.segmentation["size"]), "counts": p.segmentation["counts"]},
        "bbox": list(p.bbox),
        "area": p.area,
        "score": p.score,
        "no_target": p.no_target,
        "mask": p.mask,
    }
    if p.score is None:
        del record["score"]
    if p.instance is not None:
        record["instance"] = p.instance
    if p.notes:
        record["notes"] = list(p.notes)
    if p.unknown_words:
        record["unknown_words"] = list(p.unknown_words)
    return json.dumps(record, ensure_ascii=True, allow_nan=False)


def failure_to_json(failure: Failure) -> str:
    """One line of JSON without its end, in pure ASCII."""
    record = {
        "id": failure.id,
        "image": failure.image,
        "expression": failure.expression,
        "stage": failure.stage,
        "error": failure.error,
        "message": failure.message,
    }
    return json.dumps(record, ensure_ascii=True)


def from_json(obj: Mapping[str, Any], where: str) -> Prediction:
    """A record from its JSON object; anyone's, not only this tool's.

    Needed are ``segmentation`` (RLE in any of COCO's forms) and either ``id`` or ``image`` with
    ``expression``. Box and area are taken from the mask, whatever the record says; ``score``
    is None and ``no_target`` is "the mask is empty" where the record does not say.

    Args:
        where: the record's place, for messages.

    Raises:
        DataError: a value is missing or wrong.
    """
    if not isinstance(obj, Mapping):
        raise DataError(f"{where}: a record must be an object, not {brief(obj)}")
    if "segmentation" not in obj:
        raise DataError(f"{where}: 'segmentation' is missing", "give an RLE as COCO has it")
    rle = masks.parse_rle(obj["segmentation"], size=_stated_size(obj, where), where=where)
    image, expression = _text(obj, "image", where), _text(obj, "expression", where)
    name = obj.get("id")
    if name is None and not (image and expression):
        raise DataError(f"{where}: neither an 'id' nor 'image' and 'expression' are given")
    if isinstance(name, bool) or not isinstance(name, (str, int, type(None))):
        raise DataError(f"{where}: 'id' is {brief(name)}", "give a string")
    area = masks.area(rle)
    return Prediction(
        id="" if name is None else str(name),
        image=image,
        expression=expression,
        height=rle["size"][0],
        width=rle["size"][1],
        segmentation=rle,
        bbox=masks.bbox(rle),
        area=area,
        score=_score(obj, where),
        no_target=_no_target(obj, area, where),
        mask=_text(obj, "mask", where) or None,
        notes=_texts(obj, "notes", where),
        instance=_instance(obj, where),
        unknown_words=_texts(obj, "unknown_words", where),
    )


def _stated_size(obj: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    height, width = obj.get("height"), obj.get("width")
    if height is None and width is None:
        return None
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        raise DataError(f"{where}: 'height' and 'width' are {brief(height)} and {brief(width)}")
    return height, width


def _text(obj: Mapping[str, Any], key: str, where: str) -> str:
    value = obj.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {brief(value)}", "give a string")
    return value or ""


def _score(obj: Mapping[str, Any], where: str) -> float | None:
    value = obj.get("score")
    if value is None:
        return None
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not 0 <= value <= 1:  # which NaN is not either
        raise DataError(f"{where}: 'score' is {brief(value)}", "give a number in 0..1")
    return float(value)


def _no_target(obj: Mapping[str, Any], area: int, where: str) -> bool:
    value = obj.get("no_target")
    if value is None:
        return area == 0
    if not isinstance(value, bool):
        raise DataError(f"{where}: 'no_target' is {brief(value)}", "give true or false")
    return value


def _texts(obj: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = obj.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: {key!r} is {brief(value)}", "give a list of strings")
    return tuple(value)


def _instance(obj: Mapping[str, Any], where: str) -> int | None:
    value = obj.get("instance")
    if value is not None and (type(value) is not int or value < 0):
        raise DataError(f"{where}: 'instance' is {brief(value)}", "give a number from 0 on")
    return value
