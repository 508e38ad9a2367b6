"""Runs beside each other, expression by expression: two in a report, any number in a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from risam_cli.console.text import sanitize
from risam_cli.errors import DataError, reason_of
from risam_cli.evaluation.report.schema import (
    SEED,
    ChangedExpression,
    ChangePart,
    ComparisonPart,
    Report,
    value,
)
from risam_cli.evaluation.scoring import ROWS_FILE
from risam_cli.metrics.figures import ExpressionScore, ScoreTable, Tally, outcome, terms
from risam_cli.metrics.intervals import Change, compare
from risam_cli.metrics.protocols import Protocol, get_protocol

REPORT_FILE = "report.json"
_MOST_CHANGED = 20


@dataclass(frozen=True, slots=True)
class Other:
    """Another run's report and the file of its expressions."""

    report: Report
    rows: Path


def read_other(path: Path) -> Other:
    """A report given by its ``report.json`` or its folder, with its ``per_expression.jsonl``.

    Raises:
        DataError: one of the two is missing or is not what its name says.
    """
    report_file = path / REPORT_FILE if path.is_dir() else path
    rows = report_file.parent / ROWS_FILE
    try:
        report = Report.model_validate_json(report_file.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read the report {report_file}: {reason_of(error)}",
            f"give a {REPORT_FILE} of risam eval, or its folder",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{report_file} is not a report of this version: {place}: {first['msg']}",
            "write it again with this version of risam eval",
        ) from error
    if not rows.is_file():
        raise DataError(
            f"{rows} is missing, so {report_file} cannot be compared expression by expression",
            f"keep {ROWS_FILE} beside {REPORT_FILE}",
        )
    return Other(report, rows)


def comparison_part(this_rows: Path, other: Other, protocol: Protocol) -> ComparisonPart:
    """Paired bootstrap over the expressions that both runs scored, and those that changed most.

    Both runs' raw counts are put under this run's protocol; where the other was made under another
    one, its masks may have been made at another threshold or size, which a remark says.

    Raises:
        DataError: the other run shares no expression with this one, or its rows are damaged.
    """
    mine = _Rows(this_rows)
    theirs = _Rows(other.rows)
    shared = [name for name in mine.places if name in theirs.places]
    if not shared:
        raise DataError(
            f"{other.rows} shares no expression id with this run",
            "compare runs on the same data set and split",
        )
    rows = np.array([mine.places[name] for name in shared])
    their_rows = np.array([theirs.places[name] for name in shared])
    first, second = _take(theirs.table, their_rows), _take(mine.table, rows)
    changes = compare(terms(first, protocol), terms(second, protocol), second.cluster, seed=SEED)
    before, after = outcome(first, protocol).iou, outcome(second, protocol).iou
    gain = after - before
    order = np.argsort(-np.abs(gain), kind="stable")
    better = [int(k) for k in order if gain[k] > 0][:_MOST_CHANGED]
    worse = [int(k) for k in order if gain[k] < 0][:_MOST_CHANGED]
    texts = mine.texts({int(rows[k]) for k in better + worse})

    def changed(picks: list[int]) -> list[ChangedExpression]:
        return [
            ChangedExpression(
                id=shared[k],
                image=texts[int(rows[k])][0],
                expression=texts[int(rows[k])][1],
                other=float(before[k]),
                this=float(after[k]),
            )
            for k in picks
        ]

    return ComparisonPart(
        other_name=other.report.answers.name,
        other_protocol=other.report.protocol.name,
        shared=len(shared),
        only_this=len(mine.places) - len(shared),
        only_other=len(theirs.places) - len(shared),
        figures={name: _change(c) for name, c in changes.items()},
        better=changed(better),
        worse=changed(worse),
        remarks=_remarks(other.report, first, second, protocol),
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of one run in a table of several.

    Attributes:
        figure: such as ``miou``; run: its label.
        value: on the expressions that all runs scored, a fraction.
        change: against the first run; None for the first itself.
    """

    figure: str
    run: str
    value: float | None
    change: ChangePart | None


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Any number of runs on the expressions that all of them scored.

    Attributes:
        runs: labels, the first being the one that the others are held against.
        data: what was scored, of the first; protocol: under which all counts were put.
        shared: how many expressions; images: of how many images.
        rows: figure by figure, run by run.
        remarks: what a reader must know.
    """

    runs: tuple[str, ...]
    data: str
    protocol: str
    shared: int
    images: int
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]


def side_by_side(others: Sequence[Other]) -> SideBySide:
    """Puts runs side by side, each paired with the first, by the bootstrap over images.

    The raw counts of all are put under the first one's protocol.

    Raises:
        DataError: they share no expression, or a file is damaged.
    """
    read = [_Rows(other.rows) for other in others]
    shared = [name for name in read[0].places if all(name in one.places for one in read[1:])]
    if not shared:
        raise DataError(
            f"the {len(others)} reports share no expression",
            "compare runs on the same data set and split",
        )
    tables = [_take(one.table, np.array([one.places[name] for name in shared])) for one in read]
    first = others[0].report
    protocol = get_protocol(first.protocol.name)
    labels = _labels(others)
    figures = [terms(table, protocol) for table in tables]
    changes = [compare(figures[0], one, tables[0].cluster, seed=SEED) for one in figures]
    rows = [
        Row(name, label, value(found[name].second), _change(found[name]) if k else None)
        for name in figures[0]
        for k, (label, found) in enumerate(zip(labels, changes, strict=True))
    ]
    remarks = []
    for other, label, own, table in zip(others, labels, read, tables, strict=True):
        left = len(own.places) - len(shared)
        if left:
            remarks.append(f"{label}: {left} of its expressions are not in every report.")
        for remark in _remarks(other.report, tables[0], table, protocol):
            remarks.append(f"{label}: {remark}")
    data = f"{first.dataset.name} {first.dataset.split}"
    images = int(tables[0].cluster.max()) + 1
    return SideBySide(
        tuple(labels), data, protocol.name, len(shared), images, tuple(rows), tuple(remarks)
    )


def _labels(others: Sequence[Other]) -> list[str]:
    """What the runs are called: by their answers' names, by their folders where those are equal."""
    names = [sanitize(other.report.answers.name) for other in others]
    if len(set(names)) == len(names):
        return names
    folders = [sanitize(str(other.rows.parent)) for other in others]
    if len(set(folders)) < len(folders):
        twice = next(one for one in folders if folders.count(one) > 1)
        raise DataError(f"the report in {twice} is named twice", "name each report once")
    return [f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]


def _change(c: Change) -> ChangePart:
    return ChangePart(
        other=value(c.first),
        this=value(c.second),
        difference=value(c.difference),
        low=value(c.low),
        high=value(c.high),
        p=value(c.p),
    )


class _Rows:
    """A ``per_expression.jsonl`` as a table; ids stay in memory, texts are read again on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, int] = {}
        tally = Tally()
        for row in _read_rows(path):
            try:
                self.places[row["id"]] = len(tally)
                tally.add(_score(row))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}: row {len(tally) + 1} is damaged: {error!r}") from error
        self.table = tally.table()

    def texts(self, wanted: set[int]) -> dict[int, tuple[str, str]]:
        """Image and expression of the wanted rows."""
        return {
            k: (str(row["image"]), str(row["expression"]))
            for k, row in enumerate(_read_rows(self.path))
            if k in wanted
        }


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}: line {number} is not JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _score(row: dict[str, Any]) -> ExpressionScore:
    def real(key: str) -> float:
        return float("nan") if row[key] is None else float(row[key])

    return ExpressionScore(
        row["id"],
        row["image"],
        intersection=int(row["intersection"]),
        union=int(row["union"]),
        pred_area=int(row["pred_area"]),
        gt_area=int(row["gt_area"]),
        gt_no_target=bool(row["gt_no_target"]),
        pred_no_target=bool(row["pred_no_target"]),
        score=real("score"),
        no_target_probability=real("no_target_probability"),
        missing=bool(row["missing"]),
    )


def _take(table: ScoreTable, rows: np.ndarray[Any, np.dtype[np.int64]]) -> ScoreTable:
    _, cluster = np.unique(table.cluster[rows], return_inverse=True)
    return ScoreTable(
        table.intersection[rows],
        table.union[rows],
        table.pred_area[rows],
        table.gt_area[rows],
        table.gt_no_target[rows],
        table.pred_no_target[rows],
        table.missing[rows],
        table.score[rows],
        table.no_target_probability[rows],
        np.asarray(cluster, np.int64),
    )


def _remarks(other: Report, first: ScoreTable, second: ScoreTable, protocol: Protocol) -> list[str]:
    remarks = []
    if other.protocol.name != protocol.name:
        remarks.append(
            f"The other run was made under {other.protocol.name}, this one under {protocol.name}: "
            "thresholds and resolutions of the masks may differ."
        )
    differ = int((first.gt_area != second.gt_area).sum())
    if differ:
        remarks.append(
            f"{differ} expressions have another ground-truth area in the other run: the two were "
            "not scored against the same masks."
        )
    return remarks
