"""Runs beside each other, expression by expression: two in a report, any number in a table."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from risam_cli.console.text import sanitize
from risam_cli.data.identity import expression_key, image_core
from risam_cli.errors import DataError, UsageError, reason_of
from risam_cli.evaluation.report.schema import (
    ChangedExpression,
    ChangePart,
    ComparisonPart,
    LevelChangePart,
    Report,
    SliceChangePart,
    SlicePart,
    value,
)
from risam_cli.evaluation.scoring import REPORT_FILE, ROWS_FILE
from risam_cli.files.jsonlines import brief, parse_json, read_lines
from risam_cli.metrics.figures import (
    ExpressionScore,
    ScoreTable,
    Tally,
    Terms,
    outcome,
    summarize,
    terms,
)
from risam_cli.metrics.intervals import Change, compare, intervals, masked
from risam_cli.metrics.protocols import Protocol, get_protocol
from risam_cli.metrics.slices import SLICE_FIGURES

_MOST_CHANGED = 20

_LONGEST = 1 << 26  # bytes of a row
_AGAIN = "write the report again with risam eval"


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


def comparison_part(
    this_rows: Path, other: Other, protocol: Protocol, slices: Sequence[SlicePart]
) -> ComparisonPart:
    """Paired bootstrap over the expressions that both runs scored, and those that changed most.

    ``slices`` are this run's; changes are given level by level too.

    Both runs' raw counts are put under this run's protocol; where the other was made under another
    one, its masks may have been made at another threshold or size, which a remark says.

    Raises:
        DataError: the other run shares no expression with this one, or most shared ids are of
            other images or expressions in it, or its rows are damaged.
    """
    mine = _Rows(this_rows)
    theirs = _rows_of(other)
    shared, unlike = _shared([mine, theirs])
    if not shared:
        raise DataError(
            f"{other.rows} shares no expression id with this run",
            "compare runs on the same data set and split",
        )
    rows = np.array([mine.places[name] for name in shared])
    their_rows = np.array([theirs.places[name] for name in shared])
    first, second = _take(theirs.table, their_rows), _take(mine.table, rows)
    first_terms, second_terms = terms(first, protocol), terms(second, protocol)
    changes = compare(first_terms, second_terms, second.cluster)
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
        slices=slice_changes(first_terms, second_terms, second, mine.labels, slices),
        better=changed(better),
        worse=changed(worse),
        remarks=[*_unlike(unlike), *_remarks(other.report, first, second, protocol)],
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of one run in a table of several.

    Attributes:
        figure: such as ``miou``; run: its label.
        value: on the expressions that all runs scored, a fraction.
        change: against the first run; None for the first itself.
        expressions, images: how many it is taken from.
        slice, level: which part of the expressions; empty for all.
        low, high: the value's own 95 % interval, of all expressions only; None where there is none.
    """

    figure: str
    run: str
    value: float | None
    change: ChangePart | None
    expressions: int
    images: int
    slice: str = ""
    level: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Runs on the expressions of one split that all of them scored.

    Attributes:
        runs: labels, the first being the one that the others are held against.
        dataset, split: what was scored.
        protocol: that of the first, under which all counts were put.
        shared: how many expressions; images: of how many images.
        no_target: how many of the expressions have no target.
        rows: figure by figure, run by run.
        slices: the same by slice and level.
        remarks: what a reader must know.
    """

    runs: tuple[str, ...]
    dataset: str
    split: str
    protocol: str
    shared: int
    images: int
    no_target: int
    rows: tuple[Row, ...]
    slices: tuple[Row, ...]
    remarks: tuple[str, ...]


def side_by_side(
    others: Sequence[tuple[str, Other]], *, with_slices: bool = False
) -> list[SideBySide]:
    """Puts runs side by side, split by split, each paired with the first by the bootstrap.

    The raw counts of all runs of a split are put under the first one's protocol.

    Args:
        others: reports, each with what its run is to be called, or "".
        with_slices: also level by level.

    Raises:
        DataError: those of a split share no expression, no two reports have a split or a run in
            common, or a file is damaged.
    """
    groups: dict[tuple[str | None, ...], list[tuple[str, Other]]] = {}
    for name, other in others:
        data = other.report.dataset
        key = (data.name, data.family, data.split, data.split_by)
        groups.setdefault(key, []).append((name, other))
    runs = {name or other.report.answers.name for name, other in others}
    if 1 < len(groups) == len(others) == len(runs):
        raise DataError(
            f"the {len(others)} reports share no expression",
            "compare runs on the same data set and split, or one run on several splits",
        )
    return [_one_split(group, with_slices=with_slices) for group in groups.values()]


def _one_split(named: Sequence[tuple[str, Other]], *, with_slices: bool) -> SideBySide:
    others = [other for _, other in named]
    labels = _labels(named)
    read = [_rows_of(other) for other in others]
    shared, unlike = _shared(read)
    if not shared:
        raise DataError(
            f"the {len(others)} reports share no expression",
            "compare runs on the same data set and split",
        )
    tables = [_take(one.table, np.array([one.places[name] for name in shared])) for one in read]
    first = others[0].report
    protocol = get_protocol(first.protocol.name)
    figures = [terms(table, protocol) for table in tables]
    changes = [compare(figures[0], one, tables[0].cluster) for one in figures]
    images = int(tables[0].cluster.max()) + 1
    own = [intervals(one.values(), tables[0].cluster) for one in figures]
    rows = [
        Row(
            name,
            label,
            value(found[name].second),
            _change(found[name]) if k else None,
            len(shared),
            images,
            low=value(float(own[k][place, 0])),
            high=value(float(own[k][place, 1])),
        )
        for place, name in enumerate(figures[0])
        for k, (label, found) in enumerate(zip(labels, changes, strict=True))
    ]
    slices: list[Row] = []
    if with_slices:
        parts = [
            slice_changes(figures[0], one, tables[0], read[0].labels, first.slices)
            for one in figures
        ]
        slices = _slice_rows(labels, parts)
    remarks = _unlike(unlike)
    for other, label, one, table in zip(others, labels, read, tables, strict=True):
        left = len(one.places) - len(shared) - unlike
        if left:
            remarks.append(f"{label}: {left} of its expressions are not in every report.")
        for remark in _remarks(other.report, tables[0], table, protocol):
            remarks.append(f"{label}: {remark}")
    return SideBySide(
        tuple(labels),
        first.dataset.name,
        first.dataset.split,
        protocol.name,
        len(shared),
        images,
        int(tables[0].gt_no_target.sum()),
        tuple(rows),
        tuple(slices),
        tuple(remarks),
    )


def _shared(runs: Sequence[_Rows]) -> tuple[list[str], int]:
    """The ids that all runs have for one image and expression, and how many more they share.

    Raises:
        DataError: most ids that they share are of other images or expressions in one of them.
    """
    first, *others = runs
    ids = [name for name in first.places if all(name in one.places for one in others)]
    same = [name for name in ids if len({one.pairs[one.places[name]] for one in runs}) == 1]
    unlike = len(ids) - len(same)
    if unlike > len(same):
        kept = set(same)
        name = next(name for name in ids if name not in kept)
        raise DataError(
            f"{unlike} of the {len(ids)} expression ids that the runs share are of another image "
            f"or expression in each (the first is {brief(name)})",
            "compare runs on the same data set and split",
        )
    return same, unlike


def _unlike(count: int) -> list[str]:
    """The remark on ids that runs share but use for different things; none where there are none."""
    if not count:
        return []
    return [
        f"{count} expression ids that the runs share are of another image or expression in each: "
        "they are left out."
    ]


def _slice_rows(labels: Sequence[str], parts: Sequence[Sequence[SliceChangePart]]) -> list[Row]:
    """Rows of what changed by slice; ``parts`` are those of each run, alike in their levels."""
    rows = []
    for number, part in enumerate(parts[0]):
        for place, level in enumerate(part.levels):
            for figure in level.figures:
                for k, label in enumerate(labels):
                    change = parts[k][number].levels[place].figures[figure]
                    shown = change if k else None
                    rows.append(
                        Row(
                            figure,
                            label,
                            change.this,
                            shown,
                            level.expressions,
                            change.images or 0,
                            part.title,
                            level.label,
                        )
                    )
    return rows


def _labels(named: Sequence[tuple[str, Other]]) -> list[str]:
    """What the runs are called: as they were named, by their answers' names, or where those are
    equal by their folders too.
    """
    folders = [str(other.rows.resolve()) for _, other in named]
    if len(set(folders)) < len(folders):
        twice = next(k for k, one in enumerate(folders) if folders.count(one) > 1)
        raise DataError(
            f"the report in {sanitize(str(named[twice][1].rows.parent))} is named twice",
            "name each report once",
        )
    names = [sanitize(name or other.report.answers.name) for name, other in named]
    return [
        name if names.count(name) == 1 else f"{name} ({sanitize(str(other.rows.parent))})"
        for name, (_, other) in zip(names, named, strict=True)
    ]


def _change(c: Change) -> ChangePart:
    return ChangePart(
        other=value(c.first),
        this=value(c.second),
        difference=value(c.difference),
        low=value(c.low),
        high=value(c.high),
        p=value(c.p),
        images=c.images,
    )


def slice_changes(
    first: Terms,
    second: Terms,
    table: ScoreTable,
    labels: Mapping[str, Sequence[str]],
    slices: Sequence[SlicePart],
) -> list[SliceChangePart]:
    """What changed from the first to the second in each level of slices.

    Args:
        table: of the expressions that both scored, with the levels of each.
        labels: of the levels, by slice, in the order of their numbers.
        slices: those to show, as a report has them.
    """
    names = [name for name in SLICE_FIGURES if name in first and name in second]
    parts = []
    for part in slices:
        known = labels.get(part.name, ())
        numbers = table.slices.get(part.name, np.zeros(0, np.int64))
        sizes = np.bincount(numbers[numbers >= 0], minlength=len(known))
        places = [known.index(level.label) for level in part.levels if level.label in known]
        places = [k for k in places if sizes[k]]
        if len(places) < 2:
            continue
        # All levels in one comparison, so that they share their draws.
        before, after = (
            {f"{name} {k}": masked(side[name], numbers == k) for k in places for name in names}
            for side in (first, second)
        )
        found = compare(before, after, table.cluster)
        levels = [
            LevelChangePart(
                label=known[k],
                expressions=int(sizes[k]),
                figures={name: _change(found[f"{name} {k}"]) for name in names},
            )
            for k in places
        ]
        parts.append(SliceChangePart(name=part.name, title=part.title, levels=levels))
    return parts


def _rows_of(other: Other) -> _Rows:
    """The expressions of a report, which must give its figures.

    Raises:
        DataError: they do not: rows were lost or changed, or are another run's.
    """
    rows = _Rows(other.rows)
    try:
        found = summarize(rows.table, other.report.protocol.name)
    except UsageError as error:  # no such protocol
        raise DataError(f"{other.rows.parent / REPORT_FILE}: {error.message}", _AGAIN) from None
    for name, figure in found.items():
        noted = other.report.figures.get(name)
        known = np.nan if noted is None or noted.value is None else noted.value
        if not np.isclose(figure, known, rtol=0, atol=1e-9, equal_nan=True):
            raise DataError(
                f"{other.rows} does not belong to the report beside it: {name} of its "
                f"{len(rows.table)} expressions is {figure:.6g}, the report says {known:.6g}",
                _AGAIN,
            )
    return rows


class _Rows:
    """A ``per_expression.jsonl`` as a table; ids stay in memory, texts are read again on demand.

    Attributes:
        places: of the rows, by id.
        pairs: a hash of each row's image and expression, by which two runs' rows are held against
            each other. Folders and suffixes of images do not count, since roots and formats differ.
        labels: of the levels of each slice, in the order of their numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, int] = {}
        self.pairs = array("q")
        tally = Tally()
        numbers: dict[str, dict[str, int]] = {}
        columns: dict[str, array[int]] = {}
        for row in _read_rows(path):
            try:
                if self.places.setdefault(row["id"], len(tally)) != len(tally):
                    raise ValueError(f"its id {brief(row['id'])} is that of an earlier row")
                for name, label in (row.get("slices") or {}).items():
                    column = columns.setdefault(name, array("i"))
                    column.extend([-1] * (len(tally) - len(column)))
                    known = numbers.setdefault(name, {})
                    column.append(known.setdefault(str(label), len(known)))
                self.pairs.append(
                    hash((image_core(row["image"]), expression_key(row["expression"])))
                )
                tally.add(_score(row))
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise DataError(
                    f"{path}: row {len(tally) + 1} is damaged: {error!r}", _AGAIN
                ) from error
        self.labels = {name: tuple(known) for name, known in numbers.items()}
        for column in columns.values():
            column.extend([-1] * (len(tally) - len(column)))
        slices = {name: np.array(column, np.int64) for name, column in columns.items()}
        self.table = replace(tally.table(), slices=slices)

    def texts(self, wanted: set[int]) -> dict[int, tuple[str, str]]:
        """Image and expression of the wanted rows."""
        return {
            k: (str(row["image"]), str(row["expression"]))
            for k, row in enumerate(_read_rows(self.path))
            if k in wanted
        }


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as stream:
            for number, line in read_lines(stream, _LONGEST):
                where = f"{path}: line {number}"
                if line is None:
                    raise DataError(f"{where} is longer than {_LONGEST >> 20} MiB")
                yield parse_json(line, where)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason_of(error)}") from error


def _score(row: dict[str, Any]) -> ExpressionScore:
    def real(key: str) -> float:
        return float("nan") if row[key] is None else float(row[key])

    def pixels(key: str) -> int:
        if type(row[key]) is not int or not 0 <= row[key] < 1 << 48:
            raise ValueError(f"{key} is {brief(row[key])}")
        return int(row[key])

    return ExpressionScore(
        row["id"],
        row["image"],
        intersection=pixels("intersection"),
        union=pixels("union"),
        pred_area=pixels("pred_area"),
        gt_area=pixels("gt_area"),
        gt_no_target=bool(row["gt_no_target"]),
        pred_no_target=bool(row["pred_no_target"]),
        score=real("score"),
        no_target_probability=real("no_target_probability"),
        missing=bool(row["missing"]),
    )


def _take(table: ScoreTable, rows: np.ndarray[Any, np.dtype[np.int64]]) -> ScoreTable:
    columns: dict[str, Any] = {
        one.name: getattr(table, one.name)[rows] for one in fields(table) if one.name != "slices"
    }
    _, cluster = np.unique(columns["cluster"], return_inverse=True)
    columns["cluster"] = np.asarray(cluster, np.int64)
    slices = {name: column[rows] for name, column in table.slices.items()}
    return ScoreTable(**columns, slices=slices)


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
