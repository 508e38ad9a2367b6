"""The records that travel between readers, engine and outputs. Frozen, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict


class Rle(TypedDict):
    """COCO's compressed run-length encoding: column-major runs as an ASCII string."""

    size: list[int]  # [H, W]
    counts: str


@dataclass(frozen=True, slots=True)
class Expression:
    """One referring expression of an image.

    Attributes:
        id: the record's id, as the contract forms it (unique within a run).
        text: the expression as given.
        target: ground truth as RLE at the image's size, or None where none is known. A known
            empty target ("nothing in the image fits") is an RLE of area 0.
        no_target: True where the ground truth says that nothing fits; None where unknown.
        redrawn: the ground truth as another rule than the union draws it (see
            :meth:`risam_cli.data.readers.source.SampleSource.redrawn`), where it differs.
        attributes: what the data set knows beside: category, ref_id, referents (their number) …
        number: which of its image's expressions it is, from 0; its files are named by it.
    """

    id: str
    text: str
    target: Rle | None = None
    no_target: bool | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    redrawn: Rle | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with all its expressions: the unit that is decoded and encoded once.

    Attributes:
        image: the image as named by the user or the data set (goes into records).
        path: the file to open.
        expressions: at least one.
        size: (H, W) where the data set states it; checked against the file.
    """

    image: str
    path: Path
    expressions: tuple[Expression, ...]
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One record of ``predictions.jsonl``: see the contract.

    Attributes:
        segmentation: RLE of the mask at the image's size.
        bbox: (x, y, w, h) in pixels, floats; zeros for an empty mask.
        area: pixels of the mask.
        score: predicted quality of the mask in 0..1; None where someone's record has none.
        no_target: True where the model says that nothing fits; the mask is then empty.
        mask: the PNG's path relative to the output folder, or None.
        notes: anything that the user must know, such as "expression cut to 77 tokens".
        instance: its number among the instances of the expression, from 0, where each has a record
            of its own; else None.
        unknown_words: words of the expression that the model does not know.
    """

    id: str
    image: str
    expression: str
    height: int
    width: int
    segmentation: Rle
    bbox: tuple[float, float, float, float]
    area: int
    score: float | None
    no_target: bool
    mask: str | None = None
    notes: tuple[str, ...] = ()
    instance: int | None = None
    unknown_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """One row of ``failures.jsonl``: an image (or one expression of it) that has no record.

    Attributes:
        stage: "read", "decode", "predict" or "write".
        error: the exception's class name.
        message: one line naming value, place and fix.
    """

    id: str
    image: str
    expression: str | None
    stage: str
    error: str
    message: str
