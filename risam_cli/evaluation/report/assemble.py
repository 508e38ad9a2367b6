"""The whole report of a run, and its files."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from risam_cli.data.readers.source import SampleSource
from risam_cli.errors import OutputError
from risam_cli.evaluation.report.compare import REPORT_FILE, Other, comparison_part
from risam_cli.evaluation.report.gallery import Picture, draw_cases
from risam_cli.evaluation.report.parts import (
    curves_part,
    figure_parts,
    interval_part,
    protocol_part,
)
from risam_cli.evaluation.report.render import to_html, to_json, to_markdown
from risam_cli.evaluation.report.schema import (
    AnswersPart,
    CountsPart,
    DatasetPart,
    EnvironmentPart,
    FileNote,
    NoTargetFitPart,
    Report,
    TimingPart,
)
from risam_cli.evaluation.scoring import Scored, pick_cases
from risam_cli.files.durable import replace_durably
from risam_cli.metrics.protocols import Protocol
from risam_cli.version import __version__

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
_CASES = 12


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run knows beside its scores."""

    command: Sequence[str]
    dataset: DatasetPart
    answers: AnswersPart
    counts: CountsPart
    timing: TimingPart
    threshold: float | None = None
    no_target_fit: NoTargetFitPart | None = None


def assemble(
    facts: RunFacts, scored: Scored, protocol: Protocol, rows: Path, other: Other | None
) -> Report:
    """The report of a scored run; ``rows`` is its ``per_expression.jsonl``."""
    figures, slices = figure_parts(scored, protocol)
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=list(facts.command),
        dataset=facts.dataset,
        protocol=protocol_part(protocol, facts.answers.kind, facts.threshold),
        answers=facts.answers,
        counts=facts.counts,
        figures=figures,
        interval=interval_part(),
        slices=slices,
        curves=curves_part(scored.table, protocol),
        no_target_fit=facts.no_target_fit,
        comparison=None if other is None else comparison_part(rows, other, protocol),
        timing=facts.timing,
        environment=environment(),
    )


def gallery(scored: Scored) -> dict[str, list[Picture]]:
    """The worst, the best and an even draw of cases, drawn."""
    chosen = {
        "Worst": scored.worst,
        "Best, where there is a target": scored.best,
        "Drawn at random": scored.typical,
    }
    return {
        heading: draw_cases(pick_cases(cases, _CASES)) for heading, cases in chosen.items() if cases
    }


def write_reports(folder: Path, report: Report, pictures: Mapping[str, Sequence[Picture]]) -> None:
    """Write ``report.html``, ``report.md`` and last ``report.json``, each whole or not at all."""
    write_whole(folder / HTML_FILE, to_html(report, pictures))
    write_whole(folder / MARKDOWN_FILE, to_markdown(report))
    write_whole(folder / REPORT_FILE, to_json(report))


def write_whole(path: Path, content: str) -> None:
    """Write a text file beside its place and move it there. Raises OutputError."""
    part = path.with_name(f".{path.name}.part")
    try:
        # A lone surrogate of someone's JSON has no UTF-8; its escape is at least readable.
        part.write_text(content, encoding="utf-8", errors="backslashreplace")
        replace_durably(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", "see space and rights"
        ) from error


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
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileNote(name=path.name, bytes=path.stat().st_size, sha256=digest)


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
