"""What an evaluation is asked for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from risam_cli.console.console import get_console
from risam_cli.data.images.files import require_inside
from risam_cli.data.images.images import Bands
from risam_cli.data.readers.catalog import count_differences, open_dataset
from risam_cli.data.readers.refshapes import BENCHMARKS, open_refshapes, open_refshapes_files
from risam_cli.data.readers.source import Columns, SampleSource
from risam_cli.errors import DataError, OutputError, UsageError, setting
from risam_cli.evaluation.report.assemble import HTML_FILE, MARKDOWN_FILE
from risam_cli.evaluation.report.compare import Other, read_other
from risam_cli.evaluation.report.schema import CountsPart
from risam_cli.evaluation.scoring import (
    ANSWERS_FILE,
    FAILURES_FILE,
    REPORT_FILE,
    ROWS_FILE,
    EvalRun,
)
from risam_cli.files.locks import PRIVATE
from risam_cli.metrics.slicer import COLUMNS, CustomSlice, parse_slices
from risam_cli.settings.data import PartOfFile

if TYPE_CHECKING:
    from risam_cli.inference.compute import Select
    from risam_cli.inference.feature_cache import CacheSettings


SURPLUS_FILE = "surplus.jsonl"
_LOOKED_AT = 20

PART_FILE = "part.json"
"""What a process of torchrun notes in its part."""


WRITTEN = (
    *(REPORT_FILE, MARKDOWN_FILE, HTML_FILE),
    *(ROWS_FILE, FAILURES_FILE, SURPLUS_FILE, ANSWERS_FILE),
)


DEFAULT_FAMILY = next(iter(BENCHMARKS))


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """The options of one call; names as on the command line."""

    dataset: str
    root: Path | None
    image_root: Path | None
    split: str | None
    split_by: str | None
    family: str | None
    model: str | None
    predictions: Path | None
    protocol_name: str
    output: Path
    compare: Path | None
    fit_no_target: bool
    only_every: int | None
    leave_out_every: int | None
    limit: int | None
    shuffle: int | None
    slices: tuple[str, ...]
    skip_missing: bool
    threshold: float | None
    no_target_threshold: float | None
    instance_threshold: float | None
    select: Select
    device: str
    precision: str
    compiled: bool
    batch_size: int
    workers: int | None
    feature_cache: Path | None
    feature_cache_limit: int
    full_decode: bool
    bands: Bands | None
    confine: bool
    resume: bool
    overwrite: bool
    as_json: bool
    answered: tuple[Path, ...] = ()
    """Folders in which processes of torchrun have left their answers."""

    def check(self) -> None:
        """Refuse options that contradict each other. Raises UsageError."""
        if self.predictions is not None:
            for key in (
                *("model", "threshold", "no_target_threshold", "instance_threshold"),
                *("fit_no_target", "resume", "feature_cache"),
            ):
                if getattr(self, key) is not None and getattr(self, key) is not False:
                    raise UsageError(
                        f"{setting(key)} is for a model, {setting('predictions')} brings its own "
                        "masks"
                    )
        if self.dataset != "refshapes":
            if self.family is not None:
                raise UsageError(f"{setting('family')} is for {setting('dataset', 'refshapes')}")
            if self.root is None:
                raise UsageError(
                    f"{setting('dataset', self.dataset)} needs {setting('root')}",
                    "name the folder of its files",
                )
        elif self.split_by is not None:
            raise UsageError(f"{setting('split_by')} is not for refshapes", "leave it out")
        if self.only_every and self.leave_out_every:
            raise UsageError(
                f"{setting('only_every', self.only_every)} and "
                f"{setting('leave_out_every', self.leave_out_every)} contradict each other",
                "give one of them",
            )
        if self.root is None and self.part is not None:
            key, every = self.part
            raise UsageError(
                f"{setting(key, every)} applies to files, but these scenes are drawn",
                f"use fewer of them with {setting('limit')}",
            )
        if self.split is None and self.root is None:
            raise UsageError(
                f"{setting('dataset', self.dataset)} needs {setting('split')}",
                f"such as {setting('split', 'val')}",
            )
        _ = self.custom

    @property
    def custom(self) -> tuple[CustomSlice, ...]:
        """The slices that the user defines. Raises UsageError where one is malformed."""
        return parse_slices(self.slices)

    @property
    def part(self) -> tuple[str, int] | None:
        """The setting that takes a part of the images, and its value."""
        if self.only_every is not None:
            return "only_every", self.only_every
        return None if self.leave_out_every is None else ("leave_out_every", self.leave_out_every)

    def kept_features(self) -> CacheSettings | None:
        """Where the image encoder's features are kept, if they are."""
        from risam_cli.inference.feature_cache import CacheSettings

        if self.feature_cache is None:
            return None
        return CacheSettings(self.feature_cache, self.feature_cache_limit)

    def open_source(self, scratch: Path) -> SampleSource:
        """The split that was asked for; images that are generated go to ``scratch``."""
        console = get_console()
        family = self.family or DEFAULT_FAMILY
        columns = Columns(one.name for one in self.custom if one.of_data)
        if self.root is None:
            assert self.split is not None
            source = open_refshapes(family, self.split, scratch)
        elif self.dataset == "refshapes":
            source = open_refshapes_files(self.root, family, self.split, self.image_root, columns)
        else:
            source = open_dataset(
                self.dataset,
                self.root,
                self.split,
                split_by=self.split_by,
                image_root=self.image_root,
                columns=columns,
            )
        if self.confine:
            _require_confined(source, self.image_root or self.root or scratch)
        _require_columns(source, columns)
        for line in (*count_differences(source, self.split_by), *source.notes):
            console.warn(line)
        if self.part is not None:
            part = PartOfFile(only_every=self.only_every, leave_out_every=self.leave_out_every)
            source = source.part(part.chosen(len(source.groups)))
            if not source.order:
                raise DataError(
                    f"{setting(*self.part)} leaves no image of {source.dataset} {source.split}",
                    f"it has {len(source.groups)}",
                )
        return source.limited(self.limit, self.shuffle)

    def open_other(self) -> Other | None:
        """The report to compare with, read before any work is done."""
        if self.compare is None:
            return None
        mine = {self.output.resolve(), (self.output / REPORT_FILE).resolve()}
        if self.compare.resolve() in mine:
            raise UsageError(
                f"{setting('compare')} names the folder that {setting('output')} writes to",
                f"choose another {setting('output')}",
            )
        return read_other(self.compare)

    def check_output(self) -> None:
        """Refuse a folder that holds a report unless told to replace it. Raises OutputError."""
        # A run that was cut off between its reports and its end still has its answers, or at least
        # its lock; then all is done again.
        left = (self.output / ANSWERS_FILE, self.output / PRIVATE)
        cut_off = self.resume and any(path.exists() for path in left)
        if (self.output / REPORT_FILE).exists() and not (self.overwrite or cut_off):
            raise OutputError(
                f"{self.output} already holds a report",
                f"choose another {setting('output')} or give {setting('overwrite')}",
            )


def cannot_fit() -> DataError:
    """The error of a split to which no no-target threshold can be fitted."""
    return DataError(
        f"{setting('fit_no_target')} needs expressions with and without a target, and this "
        "split does not have both",
        f"use grefcoco, or refshapes with {setting('family', 'grefshapes')}",
    )


def require_both_kinds(source: SampleSource) -> None:
    """Look for an expression with a target and one without. Raises DataError."""
    seen: set[bool] = set()
    for group in source.chosen():
        seen |= {bool(phrase.parts) for phrase in group.phrases if phrase.parts is not None}
        if len(seen) == 2:
            return
    raise cannot_fit()


def _require_confined(source: SampleSource, root: Path) -> None:
    """Refuse a data set with an image outside of the folder where its names start.

    Raises:
        DataError: naming the first.
    """
    for group in source.groups:
        name = Path(group.image)
        if name.name != group.path.name:  # found with slashes for its backslashes
            name = Path(group.image.replace("\\", "/").lstrip("/"))
        start = root if name.is_absolute() else group.path.parents[len(name.parts) - 1]
        require_inside(group.path, start, repr(group.image))


def _require_columns(source: SampleSource, columns: Columns) -> None:
    """Refuse a slice by a column that no expression has. Raises DataError."""
    known: dict[str, None] = {}
    # Groups that are drawn when they are looked at all know the same.
    groups = itertools.islice(source.groups, _LOOKED_AT if source.generated else None)
    for group in groups if columns.wanted else ():
        for phrase in group.phrases:
            known |= dict.fromkeys((*phrase.attributes, *phrase.attributes.get(COLUMNS, ())))
    for name in columns.wanted - known.keys():
        have = sorted({*known, *columns.seen} - {COLUMNS})
        raise DataError(
            f"{setting('slice')}: no expression of {source.dataset} {source.split} has a column "
            f"{name!r}",
            f"its columns: {', '.join(have)}; length and size are counted for any data",
        )


def count(run: EvalRun, **more: int) -> CountsPart:
    """What the figures of a run stand on; ``more`` are fields of the schema."""
    table = run.scored.table
    return CountsPart(
        images=run.scored.images,
        scored=len(table),
        no_target=int(table.gt_no_target.sum()),
        missing=int(table.missing.sum()),
        unscored=run.scored.unscored,
        overlapping=run.scored.overlapping,
        **more,
    )
