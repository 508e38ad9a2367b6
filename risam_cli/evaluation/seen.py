"""Which images of a split a model was trained on, by its card."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from risam_cli.data.readers.catalog import open_dataset
from risam_cli.data.readers.refer import SPLIT_BY
from risam_cli.data.readers.source import Group, SampleSource
from risam_cli.errors import RisamError, setting, told
from risam_cli.evaluation.request import EvalRequest
from risam_cli.files.hashing import sha256_of_file
from risam_cli.weights.folder import find_model, read_card
from risam_cli.weights.trained_on import TrainedOn, entries_of


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model has seen of a split.

    Attributes:
        images: how many of those evaluated were in its training; None where that is not known.
        remarks: what a reader must know of it, a line each.
    """

    images: int | None = None
    remarks: tuple[str, ...] = ()


def seen_in_training(asked: EvalRequest, source: SampleSource) -> Seen:
    """What a model of ``risam train`` has seen of the images that it is evaluated on.

    A split of the annotation file that the model was trained on is held against that training,
    image by image; a file with other content is told of where name and split are the same.
    """
    with suppress(RisamError, OSError):  # a card that cannot be read tells nothing
        entries = entries_of(read_card(find_model(asked.model)))
        if source.generated:
            return _seen_scenes(entries, source)
        if entries:
            return _seen_files(entries, asked, source)
    return Seen()


def _seen_scenes(entries: Sequence[TrainedOn], source: SampleSource) -> Seen:
    """Scenes that are drawn have no files to compare: the split alone tells."""
    if any(one.dataset == "refshapes" and one.split == source.split for one in entries):
        return Seen(
            remarks=(
                f"this model was trained on scenes of RefShapes {source.split}: figures on it say "
                "little about new scenes, use another split",
            )
        )
    return Seen()


def _seen_files(entries: Sequence[TrainedOn], asked: EvalRequest, source: SampleSource) -> Seen:
    content = sha256_of_file(source.files[0])
    same = [one for one in entries if one.files and one.files[0].sha256 == content]
    if not same:
        if asked.dataset == "refshapes":  # scenes too, written before they are read
            return _seen_scenes(entries, source)
        return _seen_other_content(entries, source)
    seen: set[str] = set()
    for entry in same:
        groups = _groups(entry, asked, source)
        seen.update(groups[number].image for number in entry.numbers(len(groups)))
    chosen = [group.image for group in source.chosen()]
    number = sum(image in seen for image in chosen)
    if not number:
        return Seen(0)
    return Seen(
        number,
        (
            f"{number} of {len(chosen)} images were in this model's training; figures on them say "
            f"little about new images, {_held_out(same, asked)}",
        ),
    )


def _groups(entry: TrainedOn, asked: EvalRequest, source: SampleSource) -> Sequence[Group]:
    """All images of the split that was trained on; none where this file does not hold it.

    A card is a file's word: nothing is opened but what the evaluation has opened itself.
    """
    if entry.split == source.split:
        return source.groups
    if entry.dataset not in ("coco", *SPLIT_BY):
        return ()
    path = source.files[0]
    return open_dataset(
        entry.dataset,
        path if entry.dataset == "coco" else path.parent,
        entry.split,
        split_by=entry.split_by,
        image_root=asked.image_root,
    ).groups


def _held_out(entries: Sequence[TrainedOn], asked: EvalRequest) -> str:
    """How to score what they leave out."""
    every = {one.leave_out_every for one in entries}
    if len(every) == 1 and None not in every and asked.only_every is None:
        return told(f"use {setting('only_every', next(iter(every)))}")
    others = {one.split for one in entries} != {"all"}
    return "use another split" if others else "use a file that it has not seen"


def _seen_other_content(entries: Sequence[TrainedOn], source: SampleSource) -> Seen:
    """Nothing is known of a file that changed since; only that it may be the same images."""
    for entry in entries:
        alike = entry.dataset == source.dataset and entry.split == source.split
        own = Path(source.files[0]).name
        if alike and entry.files and entry.files[0].name == own:
            return Seen(
                remarks=(
                    f"this model was trained on {entry.told()}, when that file had different "
                    "content: some of these images may have been in its training",
                )
            )
    return Seen(0)
