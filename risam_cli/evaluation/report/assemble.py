"""The whole report of a run, and its files."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.images.images import Bands
from risam_cli.data.readers.source import SampleSource
from risam_cli.evaluation.report.compare import Other, comparison_part
from risam_cli.evaluation.report.render import Picture, draw_case, to_html, to_json, to_markdown
from risam_cli.evaluation.report.schema import (
    AnswersPart,
    CountsPart,
    CurvesPart,
    DatasetPart,
    EnvironmentPart,
    Figure,
    FileNote,
    IntervalPart,
    LevelPart,
    NoTargetCurvePoint,
    NoTargetFitPart,
    ProtocolPart,
    Report,
    RiskCoveragePart,
    SlicePart,
    TimingPart,
    value,
)
from risam_cli.evaluation.scoring import REPORT_FILE, EvalRun, Scored, pick_cases
from risam_cli.files.folder import OutputFolder
from risam_cli.files.hashing import sha256_of_file
from risam_cli.files.store import size_of
from risam_cli.files.write import make_file, writing
from risam_cli.metrics.curves import no_target_curve, risk_coverage
from risam_cli.metrics.figures import Flags, Ints, ScoreTable, Terms, figures, outcome, terms
from risam_cli.metrics.intervals import (
    LEAST_IMAGES,
    LEVEL,
    REPLICATES,
    SEED,
    count_images,
    intervals,
    masked,
)
from risam_cli.metrics.protocols import Protocol
from risam_cli.metrics.slices import SLICE_FIGURES, Slice, shown_levels
from risam_cli.version import __version__

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
_CASES = 12


@dataclass(frozen=True, slots=True)
class Done:
    """A finished run with what its kind of answers adds to the report.

    Attributes:
        threshold: of masks, where it need not be the protocol's.
        finish: to be called once the reports are written: what was kept to go on with may go.
    """

    run: EvalRun
    answers: AnswersPart
    counts: CountsPart
    timing: TimingPart
    threshold: float | None = None
    no_target_fit: NoTargetFitPart | None = None
    finish: Callable[[], None] = lambda: None


def assemble(
    command: Sequence[str],
    dataset: DatasetPart,
    protocol: Protocol,
    done: Done,
    other: Other | None,
) -> Report:
    """The report of a run; ``command`` is as it was typed."""
    scored, rows = done.run.scored, done.run.rows
    table = scored.table
    parts = terms(table, protocol)
    bounds = intervals(list(parts.values()), table.cluster)
    every = np.ones(len(table), np.bool_)
    levels = (_slice(parts, table, one) for one in scored.slices)
    slices = [part for part in levels if part.levels]
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=list(command),
        dataset=dataset,
        protocol=protocol_part(protocol, done.answers.kind, done.threshold),
        answers=done.answers,
        counts=done.counts,
        figures=_figures(parts, list(parts), bounds, every, table.cluster),
        interval=IntervalPart(
            level=LEVEL, replicates=REPLICATES, seed=SEED, least_images=LEAST_IMAGES
        ),
        slices=slices,
        curves=curves_part(table, protocol),
        no_target_fit=done.no_target_fit,
        comparison=None if other is None else comparison_part(rows, other, protocol, slices),
        timing=done.timing,
        environment=environment(),
    )


def gallery(scored: Scored, bands: Bands | None = None) -> dict[str, list[Picture]]:
    """The worst, the best and an even draw of cases, drawn."""
    chosen = {
        "Worst": scored.worst,
        "Best, where there is a target": scored.best,
        "Drawn at random": scored.typical,
    }
    return {
        heading: [draw_case(case, bands) for case in pick_cases(cases, _CASES)]
        for heading, cases in chosen.items()
        if cases
    }


def write_reports(
    folder: OutputFolder, report: Report, pictures: Mapping[str, Sequence[Picture]]
) -> None:
    """Write ``report.html``, ``report.md`` and ``report.json`` aside, yet to come into place."""
    for name, text in (
        (HTML_FILE, to_html(report, pictures)),
        (MARKDOWN_FILE, to_markdown(report)),
        (REPORT_FILE, to_json(report)),
    ):
        with writing(folder.path / name):
            make_file(folder.staging / name, text)


def dataset_part(source: SampleSource, differences: Sequence[str], **more: object) -> DatasetPart:
    """What was scored against, with the hashes of the annotation files."""
    return DatasetPart.model_validate(
        {
            "name": source.dataset,
            "split": source.split,
            "files": [file_note(path) for path in source.files],
            "counts": dict(source.counts),
            "count_differences": list(differences),
            "notes": list(source.notes),
            **more,
        }
    )


def file_note(path: Path) -> FileNote:
    """Name, size and SHA-256 of a file."""
    return FileNote(name=path.name, bytes=size_of(path) or 0, sha256=sha256_of_file(path))


def environment() -> EnvironmentPart:
    """What this process runs on; torch is named only where it was loaded."""
    torch = sys.modules.get("torch")
    return EnvironmentPart(
        risam=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        numpy=np.__version__,
        torch=None if torch is None else str(torch.__version__),
    )


# --- from a scored run to the parts of its report -------------------------------------------------

_BINS = 20

_PREDICTION_REMARKS = {
    "image": "The predictions came as finished masks, so the threshold on probabilities is that "
    "of whoever made them.",
    "stretch": "The predictions came as finished masks at the image's size: they were resized to "
    "{canvas}x{canvas} by nearest neighbour like the ground truth, and the threshold on "
    "probabilities is that of whoever made them.",
    "letterbox": "The predictions came as finished masks at the image's size: they were compared "
    "as they are, without the warp through {canvas}x{canvas}, and the threshold on probabilities "
    "is that of whoever made them.",
}


def protocol_part(protocol: Protocol, kind: str, threshold: float | None = None) -> ProtocolPart:
    """The protocol as it was applied, with what had to differ."""
    remarks = []
    if kind == "predictions":
        remarks.append(_PREDICTION_REMARKS[protocol.resolution].format(canvas=protocol.canvas))
        if protocol.no_target == "head":
            remarks.append(
                "Where a record says no_target, its mask is usually empty already; the union then "
                "keeps the ground truth only."
            )
    if threshold is not None and threshold != protocol.threshold:
        remarks.append(
            f"The mask threshold was {threshold:g}; the protocol's own is "
            f"{protocol.threshold:g}. These are not this protocol's figures."
        )
    return ProtocolPart(
        name=protocol.name,
        definition=protocol.definition,
        threshold=protocol.threshold if threshold is None else threshold,
        resolution=protocol.resolution,
        canvas=protocol.canvas,
        empty_iou=protocol.empty_iou,
        strict=protocol.strict,
        no_target=protocol.no_target,
        targets_only=protocol.targets_only,
        remarks=remarks,
    )


def _slice(parts: Terms, table: ScoreTable, one: Slice) -> SlicePart:
    """One slice with intervals; where its levels are open, the largest of them."""
    numbers = table.slices.get(one.name, np.full(len(table), -1))
    sizes = np.bincount(numbers[numbers >= 0], minlength=len(one.levels))
    present, left_out = shown_levels(sizes, one.levels, most_frequent=one.open)
    names = [name for name in SLICE_FIGURES if name in parts]
    columns = (masked(parts[name], numbers == k) for k in present for name in names)
    bounds = intervals(columns, table.cluster)
    levels = []
    for row, k in enumerate(present):
        own = bounds[row * len(names) : (row + 1) * len(names)]
        levels.append(
            LevelPart(
                label=one.levels[k],
                expressions=int(sizes[k]),
                figures=_figures(parts, names, own, numbers == k, table.cluster),
            )
        )
    return SlicePart(
        name=one.name,
        title=one.title,
        definition=one.definition,
        levels=levels,
        left_out=left_out,
    )


def _figures(
    parts: Terms,
    names: Sequence[str],
    bounds: NDArray[np.float64],
    chosen: Flags,
    cluster: Ints,
) -> dict[str, Figure]:
    found = figures({name: parts[name] for name in names}, chosen)
    return {
        name: Figure(
            value=value(found[name]),
            low=value(float(bounds[k, 0])),
            high=value(float(bounds[k, 1])),
            images=count_images(masked(parts[name], chosen), cluster),
        )
        for k, name in enumerate(names)
    }


def curves_part(table: ScoreTable, protocol: Protocol) -> CurvesPart:
    """The curves that the run's data allow."""
    points = no_target_curve(table, protocol)
    risk = risk_coverage(table, protocol)
    iou = outcome(table, protocol).iou
    return CurvesPart(
        no_target=[
            NoTargetCurvePoint(threshold=p.threshold, n_acc=p.n_acc, t_acc=p.t_acc, giou=p.giou)
            for p in points
        ]
        or None,
        risk_coverage=RiskCoveragePart(
            coverage=[round(float(c), 6) for c in risk.coverage],
            risk=[round(float(r), 6) for r in risk.risk],
            area=risk.area,
        )
        if risk
        else None,
        iou_histogram=[int(n) for n in np.histogram(iou, bins=_BINS, range=(0, 1))[0]],
    )
