"""What is asked of the network and what it answers, image by image and expression by expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from risam_cli.data.images.images import EncoderImage
from risam_cli.inference.ahead import Ahead
from risam_cli.inference.mask_rules import Mask


@dataclass(frozen=True, slots=True)
class Job:
    """One image with the texts that are asked of it.

    Attributes:
        groups: how many of the texts belong to each sample, in order; empty for one sample.
        ahead: what its loader got ready of the image; None where nobody has.
    """

    image: EncoderImage
    texts: Sequence[str]
    groups: Sequence[int] = ()
    ahead: Ahead | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the network says of one expression.

    Attributes:
        job, text: which one: index of the job, index of its text.
        mask: as the mask rule made it, before any no-target rule; None where it failed.
        iou: predicted IoU of the mask, 0..1.
        no_target: probability that nothing fits, 0..1.
        cut_to: tokens that the expression was cut to, or 0.
        error: one line, where it failed; else empty.
    """

    job: int
    text: int
    mask: Mask | None
    iou: float = 0.0
    no_target: float = 0.0
    cut_to: int = 0
    error: str = ""
    error_kind: str = "ModelError"


Batch = Sequence[tuple[int, Job]]
"""Jobs with their numbers."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One expression on its way through the decoder.

    Attributes:
        number: of its job; position: among the job's texts.
        row: of the job's image among the features.
        group: its job, and the sample in it.
    """

    number: int
    position: int
    row: int
    group: tuple[int, int]
    job: Job

    @property
    def words(self) -> str:
        """As they were asked."""
        return self.job.texts[self.position]

    def failed(self, kind: str, error: str) -> Answer:
        """The answer that says what went wrong."""
        return Answer(self.number, self.position, None, error=error, error_kind=kind)


def flattened(batch: Batch) -> list[Asked]:
    """The expressions of a batch in order."""
    asked = []
    for row, (number, job) in enumerate(batch):
        position = 0
        for group, size in enumerate(job.groups or [len(job.texts)]):
            for _ in range(size):
                asked.append(Asked(number, position, row, (number, group), job))
                position += 1
    return asked
