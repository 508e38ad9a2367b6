"""What ``risam predict`` would do: every input and every header read, no network, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from risam_cli.console.text import sanitize
from risam_cli.data.images.images import Bands, image_size
from risam_cli.data.inputs.inputs import Entry
from risam_cli.errors import ImageError

_FIRST = 5  # entries that are listed


@dataclass(slots=True)
class DryRun:
    """What was found.

    Attributes:
        entries: image files and manifest lines.
        images: stretches of entries with one image.
        records: expressions that could be predicted.
        bad: expressions and lines that would fail.
        first: the first few entries, one line each.
    """

    entries: int = 0
    images: int = 0
    records: int = 0
    bad: int = 0
    first: list[str] = field(default_factory=list)


def look_through(
    entries: Iterable[Entry], found: DryRun, max_pixels: int, bands: Bands | None = None
) -> Iterator[str]:
    """Reads every entry and its image's header; gives a line for each problem as it is met."""
    run, size, problem = -1, (0, 0), ""
    for entry in entries:
        found.entries += 1
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
            problem = f"{entry.sample.path}: {width}x{height}, which is not what its data set says"
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
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    height, width = size
    return sanitize(f"{entry.image} ({width}x{height}): {', '.join(texts[:3])}{more}")
