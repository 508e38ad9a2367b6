"""The lines of ``predictions.jsonl`` and ``failures.jsonl``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from risam_cli.types import Failure, Prediction

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
    return json.dumps(asdict(failure), ensure_ascii=True)
