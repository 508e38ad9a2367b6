"""What a model's card says it was trained on, so that an evaluation can tell what it has seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from risam_cli.errors import ModelError
from risam_cli.files.hashing import sha256_of_file
from risam_cli.settings.base import Settings
from risam_cli.settings.data import BenchmarkData, CocoData, PartOfFile
from risam_cli.weights.folder import find_model, read_card

KEY = "trained_on"
"""Of the card."""


class AnnotationFile(Settings):
    """A file by its name and its content."""

    name: str
    sha256: str


class TrainedOn(PartOfFile):
    """One data set that a model was trained on.

    Attributes:
        files: the annotation files; none where scenes are drawn.
        images: how many there were in training, where files hold them.
        dropped: numbers of the part's images that were left out of a mixture, as ``3,7-12``.
    """

    dataset: str
    split: str
    split_by: str | None = None
    family: str | None = None
    files: tuple[AnnotationFile, ...] = ()
    images: int | None = Field(None, ge=0)
    dropped: str = Field("", pattern=r"^(\d{1,9}(-\d{1,9})?(,|$))*$")

    def numbers(self, count: int) -> list[int]:
        """Which images of the split were in training, of ``count`` in all."""
        left_out: set[int] = set()
        for span in filter(None, self.dropped.split(",")):
            first, _, last = span.partition("-")
            left_out.update(range(int(first), min(count, int(last or first) + 1)))
        return [number for number in self.chosen(count) if number not in left_out]

    def told(self) -> str:
        """The data set in words: its file or its name and split, and the part."""
        what = f"{self.dataset} {self.split}"
        if self.dataset == "coco" and self.files:
            what = self.files[0].name + (f" ({self.split})" if self.split != "all" else "")
        keys = ("leave_out_every", "only_every", "limit")
        parts = [f"{key} {value}" for key in keys if (value := getattr(self, key)) is not None]
        return ", ".join([what, *parts])


def files_trained_on(
    data: CocoData | BenchmarkData, files: Sequence[Path], count: int, numbers: Sequence[int]
) -> TrainedOn:
    """The entry of a data set in files.

    Args:
        files: its annotation files, which are read to hash them.
        count: how many images the split holds; numbers: of those that are trained on.

    Raises:
        OSError: a file cannot be read.
    """
    dropped = sorted({*data.chosen(count)} - {*numbers})
    return TrainedOn(
        dataset=data.dataset,
        split=data.split,
        split_by=data.split_by if isinstance(data, BenchmarkData) else None,
        only_every=data.only_every,
        leave_out_every=data.leave_out_every,
        limit=data.limit,
        files=tuple(AnnotationFile(name=f.name, sha256=sha256_of_file(f)) for f in files),
        images=len(numbers),
        dropped=_spans(dropped),
    )


def _spans(numbers: Iterable[int]) -> str:
    """Rising numbers as ``3,7-12``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def entries_of(card: Mapping[str, Any]) -> list[TrainedOn]:
    """What a card says; nothing where it says nothing, or what is not understood here."""
    try:
        return [TrainedOn.model_validate(entry) for entry in card.get(KEY, [])]
    except (ValidationError, TypeError):
        return []


def to_card(entries: Sequence[TrainedOn]) -> list[dict[str, Any]]:
    """The entries as the card holds them, each once."""
    plain = [one.model_dump(mode="json", exclude_defaults=True) for one in entries]
    return [one for number, one in enumerate(plain) if one not in plain[:number]]


def inherited(source: str | Path | None) -> list[TrainedOn]:
    """What the model was trained on that a training starts from.

    Args:
        source: a model folder, a bundled model's name, or a checkpoint of a training run, beside
            whose folder lies its model; None: there is none.
    """
    if source is None:
        return []
    path = Path(source)
    try:
        folder = path.parent.parent / "best" if path.is_file() else find_model(source)
        return entries_of(read_card(folder))
    except ModelError:
        return []
