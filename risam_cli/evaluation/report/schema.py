"""The shape of ``report.json``, version 1. ``docs/eval.md`` explains it field by field.

A change that breaks readers of older reports raises ``SCHEMA_VERSION``; new fields
with a default do not.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Literal[1] = 1

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def value(number: float) -> float | None:
    """The number, or None for nan: JSON has no nan."""
    return None if math.isnan(number) else float(number)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Figure(_Part):
    """A figure as a fraction in 0..1 with its 95 % interval; null where undefined.

    ``images`` is how many it is taken from; with fewer than ``interval.least_images`` there is no
    interval, nor where all images say the same.
    """

    value: Fraction | None
    low: Fraction | None = None
    high: Fraction | None = None
    images: int | None = None


class FileNote(_Part):
    """A file that was read: its name, bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


class DatasetPart(_Part):
    """What was scored against.

    ``only_every`` and ``leave_out_every`` say which of every so many images were taken, as the
    settings of these names in training; ``counts`` are those of the part.
    """

    name: str
    split: str
    split_by: str | None = None
    family: str | None = None
    only_every: int | None = None
    leave_out_every: int | None = None
    files: list[FileNote] = []
    counts: dict[str, int] = {}
    count_differences: list[str] = []
    notes: list[str] = []
    limit: int | None = None
    shuffle: int | None = None


class ProtocolPart(_Part):
    """How masks were compared; ``definition`` is the whole in words."""

    name: str
    definition: str
    threshold: Fraction
    resolution: str
    canvas: int
    empty_iou: float
    strict: bool
    no_target: str
    targets_only: bool
    remarks: list[str] = []


class AnswersPart(_Part):
    """Whose masks were scored.

    ``images_in_training`` is how many of the images were in the model's training, by its card; null
    where that does not tell. ``remarks`` say what follows. ``instances`` and
    ``instance_threshold`` say which instances an answer is made of, where the model tells them
    apart; ``versions`` are of the packages beside torch that its results depend on.
    """

    kind: Literal["model", "predictions"]
    name: str
    sha256: str | None = None
    no_target_threshold: float | None = None
    instances: str | None = None
    instance_threshold: float | None = None
    versions: dict[str, str] = {}
    device: str | None = None
    precision: str | None = None
    records: int | None = None
    images_in_training: int | None = None
    remarks: list[str] = []


class CountsPart(_Part):
    """What the figures stand on.

    ``scored`` is the number of expressions behind every figure; ``missing`` of them had no answer
    and score zero. ``unscored`` had no known truth, ``failed`` could not be read or predicted.
    ``overlapping`` have pixels that several polygons of one annotation cover; null where the
    protocol does not ask.
    """

    images: int
    scored: int
    no_target: int
    missing: int = 0
    surplus: int = 0
    doubled: int = 0
    malformed: int = 0
    unscored: int = 0
    failed: int = 0
    skipped: int = 0
    images_missing: int = 0
    overlapping: int | None = None


class IntervalPart(_Part):
    """How intervals were made."""

    method: str = "percentile bootstrap, whole images drawn with replacement"
    unit: Literal["image"] = "image"
    level: float
    replicates: int
    seed: int
    least_images: int = 2


class LevelPart(_Part):
    """One level of a slice."""

    label: str
    expressions: int
    figures: dict[str, Figure]


class SlicePart(_Part):
    """One way to part the expressions; ``left_out`` levels were too rare to list."""

    name: str
    title: str
    definition: str
    levels: list[LevelPart]
    left_out: int = 0


class NoTargetCurvePoint(_Part):
    """What a no-target threshold gives."""

    threshold: float
    n_acc: Fraction
    t_acc: Fraction
    giou: Fraction


class RiskCoveragePart(_Part):
    """Mean of 1 - IoU over the answers of highest score, against their share."""

    coverage: list[float]
    risk: list[float]
    area: float


class CurvesPart(_Part):
    """Curves; null where what they need is unknown."""

    no_target: list[NoTargetCurvePoint] | None = None
    risk_coverage: RiskCoveragePart | None = None
    iou_histogram: list[int] = []


class NoTargetFitPart(_Part):
    """The no-target threshold that was fitted to the split."""

    threshold: float
    before: float
    n_acc: Fraction
    t_acc: Fraction
    giou: Fraction
    criterion: str = "largest mean of N-acc and T-acc, nearest to 0.5 among equals"
    stored_in: str | None = None
    sha256_after: str | None = None


class ChangePart(_Part):
    """A figure of two runs; ``difference`` is this run minus the other, on ``images`` images."""

    other: Fraction | None
    this: Fraction | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    images: int | None = None


class LevelChangePart(_Part):
    """What changed in one level of a slice."""

    label: str
    expressions: int
    figures: dict[str, ChangePart]


class SliceChangePart(_Part):
    """What changed in each level of a slice, the levels being this run's."""

    name: str
    title: str
    levels: list[LevelChangePart]


class ChangedExpression(_Part):
    """An expression whose IoU moved."""

    id: str
    image: str
    expression: str
    other: float
    this: float


class ComparisonPart(_Part):
    """This run beside another on the expressions that both scored."""

    other_name: str
    other_protocol: str
    shared: int
    only_this: int
    only_other: int
    figures: dict[str, ChangePart]
    slices: list[SliceChangePart] = []
    better: list[ChangedExpression]
    worse: list[ChangedExpression]
    remarks: list[str] = []


class TimingPart(_Part):
    """Seconds by stage; a stage that did not run is null."""

    decode: float | None = None
    encode: float | None = None
    decode_mask: float | None = None
    score: float
    total: float
    expressions_per_second: float


class EnvironmentPart(_Part):
    """What it ran on."""

    risam: str
    python: str
    platform: str
    numpy: str
    torch: str | None = None


class Report(_Part):
    """``report.json`` as a whole."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    command: list[str]
    dataset: DatasetPart
    protocol: ProtocolPart
    answers: AnswersPart
    counts: CountsPart
    figures: dict[str, Figure]
    interval: IntervalPart
    slices: list[SlicePart]
    curves: CurvesPart
    no_target_fit: NoTargetFitPart | None = None
    comparison: ComparisonPart | None = None
    timing: TimingPart
    environment: EnvironmentPart
