"""What ``risam predict`` would do: every input and every header read, no network, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from risam_cli.console.text import first_of, sanitize
from risam_cli.data.images.images import Bands, image_size
from risam_cli.data.inputs.inputs import Entry
from risam_cli.errors import ImageError
from risam_cli.runs.folder import redo_of
from risam_cli.runs.ledger import LEDGER, LedgerLine, read_lines, read_redone
from risam_cli.runs.resume import content_of

_FIRST = 5  # entries that are listed


@dataclass(slots=True)
class DryRun:
    """What was found.

    Attributes:
        entries: image files and manifest lines.
        images: stretches of entries with one image.
        records: expressions that could be predicted.
        bad: expressions and lines that would fail.
        covered: entries that are not to be done any more, and what came of them:
        done: expressions that an earlier run has answered.
        failed: expressions and lines that failed in it and are not retried.
        first: the first few entries, one line each.
    """

    entries: int = 0
    images: int = 0
    records: int = 0
    bad: int = 0
    covered: int = 0
    done: int = 0
    failed: int = 0
    first: list[str] = field(default_factory=list)


class EarlierRun:
    """What a run left in its folder, by its ledger: looked at, not checked, nothing changed.

    Args:
        folders: its own, and those of the parts that are not put together yet.
        retry: what failed is to be done again.
    """

    def __init__(self, folders: Iterable[Path], *, retry: bool) -> None:
        self.retry = retry
        lines: dict[int, LedgerLine] = {}
        for folder in folders:
            with suppress(OSError):
                lines |= {line.entry: line for line, _ in read_lines(folder / LEDGER)}
            lines |= {one.line.entry: one.line for one, _ in read_redone(redo_of(folder))}
        self._failed: dict[str, list[bool]] = {}
        for _, line in sorted(lines.items()):
            self._failed.setdefault(content_of(line.key), []).append(line.failures.length > 0)

    def covers(self, entry: Entry, found: DryRun) -> bool:
        """Whether an entry is not to be done any more; it is counted then."""
        failed = self._failed.get(content_of(entry.key))
        if not failed or (failed[0] and self.retry):
            return False
        found.covered += 1
        if failed.pop(0):
            found.failed += entry.size
        else:
            found.done += entry.size
        return True


def look_through(
    entries: Iterable[Entry],
    found: DryRun,
    max_pixels: int,
    bands: Bands | None = None,
    earlier: EarlierRun | None = None,
) -> Iterator[str]:
    """Reads every entry and its image's header; gives a line for each problem as it is met.

    Args:
        earlier: the run that is gone on with; what it has done is counted and not read again.
    """
    run, size, problem = -1, (0, 0), ""
    for entry in entries:
        found.entries += 1
        if earlier is not None and earlier.covers(entry, found):
            continue
        for failure in entry.failures:
            found.bad += 1
            yield sanitize(failure.message)
        if entry.sample is None:
            continue
        if entry.run != run:
            run = entry.run
            found.images += 1
            try:
                size, problem = image_size(entry.sample.path, max_pixels, bands), ""
            except ImageError as error:
                problem = str(error)
        if not problem and entry.sample.size not in {None, size}:
            height, width = size
            problem = f"{entry.sample.path}: {width}x{height}, which differs from its data set"
        if problem:
            found.bad += len(entry.sample.expressions)
            where = f"{entry.where}: " if entry.where else ""
            yield sanitize(f"{where}{problem}")
            continue
        found.records += len(entry.sample.expressions)
        if len(found.first) < _FIRST:
            found.first.append(_shown(entry, size))


def _shown(entry: Entry, size: tuple[int, int]) -> str:
    assert entry.sample is not None
    texts = [repr(one.text) for one in entry.sample.expressions]
    height, width = size
    return sanitize(f"{entry.image} ({width}x{height}): {first_of(texts, 3)}")
