"""What of an earlier run still holds, and what is to be done again.

Three looks: does the folder hold what its ledger says (checksums of records and masks); do the
inputs still ask the same, in the same order; are the images still the same files.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from risam_cli.console.console import get_console
from risam_cli.data.images.files import file_sha256, file_stamp
from risam_cli.data.inputs.inputs import Entry
from risam_cli.errors import OutputError, setting
from risam_cli.files.patience import within
from risam_cli.files.write import own_file, write_file, writing
from risam_cli.inference.loading import TIMEOUT, timed_out
from risam_cli.outputs.records import FAILURES, PREDICTIONS
from risam_cli.runs.folder import RUN, RunFolder
from risam_cli.runs.ledger import (
    LEDGER,
    LedgerLine,
    file_is_whole,
    header_line,
    read_header,
    read_lines,
    read_marks,
    read_redone,
    read_span,
)
from risam_cli.runs.splice import START_ANEW, At, Splice


@dataclass(slots=True)
class Kept:
    """What an earlier run left.

    Attributes:
        lines: how many lines of its ledger hold, from the first on; what follows is cut off.
        entries: how many entries are done, by ledger and journal together.
        broken: among them, the entries whose record or mask is not what was written.
        redone: lines of entries that were computed again but are not in their places yet.
        retried: among these, what was done again since a retry of all failures was asked for.
    """

    lines: int = 0
    entries: int = 0
    broken: set[int] = field(default_factory=set)
    redone: dict[int, LedgerLine] = field(default_factory=dict)
    retried: set[int] = field(default_factory=set)


def prepare(folder: RunFolder, identity: Mapping[str, Any]) -> Kept:
    """Checks a folder that holds an earlier run, and cuts off what that run did not finish.

    A folder without a run is given an empty ledger.

    Raises:
        OutputError: the earlier run is another one, by its settings.
    """
    before = read_header(folder.ledger)
    if before is None:
        return _start(folder, identity)
    _require_same(before, identity, folder.path)
    for path in (folder.ledger, folder.predictions, folder.failures):
        own_file(path)
    kept = Kept()
    unlisted = _read_journal(folder, kept)
    ends = _audit(folder, kept, unlisted)
    kept.entries = sum(1 for _ in kept_lines(folder, kept))
    for paths in unlisted.values():
        folder.delete(paths)
    folder.delete(mark.path for mark in read_marks(folder.ledger, ends[0]))
    for path, end in zip((folder.ledger, folder.predictions, folder.failures), ends, strict=True):
        path.touch()
        if path.stat().st_size > end:
            os.truncate(path, end)
    return kept


def _start(folder: RunFolder, identity: Mapping[str, Any]) -> Kept:
    held = [path.name for path in (folder.predictions, folder.failures) if _size(path)]
    held += [name for name in (RUN, LEDGER) if _size(folder.path / name)]
    if held:
        raise OutputError(
            f"{folder.path} holds {', '.join(held)} but no complete {LEDGER} that says how",
            START_ANEW,
        )
    for name in (PREDICTIONS, FAILURES):
        folder.write(name, b"")
    folder.write(LEDGER, header_line(identity))
    return Kept()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_journal(folder: RunFolder, kept: Kept) -> dict[int, set[str]]:
    """Fills ``kept.redone``, and leaves in the journal what counts: more is appended to it.

    Entries are written to the journal before their files are moved to their places, so a kill
    leaves some without all of theirs. Gives the files of these, by entry.
    """
    unlisted: dict[int, set[str]] = {}
    counts: dict[int, int] = {}
    for redone, start in read_redone(folder.redo):
        line = redone.line
        if all(file_is_whole(folder.path, mark) for mark in line.files):
            kept.redone[line.entry], counts[line.entry] = line, start
            (kept.retried.add if redone.attempt == folder.attempt else kept.retried.discard)(
                line.entry
            )
        else:
            unlisted.setdefault(line.entry, set()).update(mark.path for mark in line.files)
    for entry in unlisted.keys() & kept.redone.keys():
        unlisted[entry] -= {mark.path for mark in kept.redone[entry].files}
    if folder.redo.exists():
        starts = set(counts.values())

        def copy(part: Path) -> None:
            with open(part, "wb") as out:
                for redone, start in read_redone(folder.redo):
                    if start in starts:
                        out.write(redone.to_json())

        write_file(folder.redo, copy)
    return unlisted


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> None:
    changed = [
        f"{key} was {_shown(before.get(key))}, is {_shown(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise OutputError(
            f"{place} holds a run with other settings: {'; '.join(changed)}", START_ANEW
        )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}…{text[-1]}"


def _audit(folder: RunFolder, kept: Kept, unlisted: Mapping[int, set[str]]) -> tuple[int, int, int]:
    """Fills ``kept`` from the ledger; gives where ledger, predictions and failures end.

    What the ledger lists is taken out of ``unlisted``.
    """
    with open(folder.ledger, "rb") as file:
        good_ends = (len(file.readline()), 0, 0)
    tail_broken: list[int] = []
    tail_lines = 0
    with _open_or_empty(folder.predictions) as predictions, _open_or_empty(folder.failures) as bad:
        for line, end in read_lines(folder.ledger):
            whole = (
                read_span(predictions, line.predictions) is not None
                and read_span(bad, line.failures) is not None
                and all(file_is_whole(folder.path, mark) for mark in line.files)
            )
            tail_lines += 1
            if line.entry in unlisted:
                unlisted[line.entry].difference_update(mark.path for mark in line.files)
            if not whole and line.entry not in kept.redone:
                tail_broken.append(line.entry)
                continue
            # Something good comes after what is broken, so that stays and is done again.
            kept.broken.update(tail_broken)
            kept.lines += tail_lines
            tail_broken, tail_lines = [], 0
            good_ends = (end, line.predictions.end, line.failures.end)
    return good_ends


def _open_or_empty(path: Path) -> Any:
    return open(path if path.exists() else os.devnull, "rb")


def kept_lines(folder: RunFolder, kept: Kept) -> Iterator[LedgerLine]:
    """What counts as done, in the order of entries, the newest version of each."""
    ledger = (line for line, _ in islice(read_lines(folder.ledger), kept.lines))
    own = (line for line in ledger if line.entry not in kept.redone)
    redone = (line for _, line in sorted(kept.redone.items()))
    yield from heapq.merge(own, redone, key=attrgetter("entry"))


# --- what the inputs ask now ----------------------------------------------------------------------


def follow_inputs(
    folder: RunFolder,
    kept: Kept,
    entries: Callable[[], Iterator[Entry]],
    picks: Callable[[], Callable[[Entry], bool]],
) -> Kept:
    """Puts what was done in the order of the inputs as they are now, where these changed.

    A result is known again by what was asked (image and texts), wherever that stands now and by
    whatever id. What is not asked any more is deleted, with its masks; what had failed or is
    damaged is left to be done again. All comes into place together, or nothing does. No image is
    read.

    Args:
        entries: gives the entries of all shards, each time from the first on.
        picks: gives what says of all entries, asked of one after another, whether each is this
            shard's.

    Raises:
        OutputError: less of what was done is still asked than not: these are hardly the inputs of
            this run.
    """
    if _fits(kept_lines(folder, kept), filter(picks(), entries())):
        return kept
    count = again = new = elsewhere = 0
    has = picks()
    with writing(folder.path), Splice(folder) as splice:
        places: dict[str, list[At]] = {}
        for line, at in splice.newest():
            places.setdefault(content_of(line.key), []).append(at)
        for entry in entries():
            found, mine = places.get(content_of(entry.key)), has(entry)
            if not found:
                new += mine
                continue
            line, texts = splice.read(found.pop(0))
            whole = not line.failures.length and line.entry not in kept.broken
            line = line._replace(entry=entry.index)
            if not (mine and whole and splice.add(line, texts, entry)):
                splice.drop(line)
                elsewhere, again = elsewhere + (not mine), again + mine
            else:
                count += 1
        left = [at for found in places.values() for at in found]
        for at in left:
            splice.drop(splice.read(at)[0])
        gone = len(left)
        if gone > count + again + elsewhere:
            raise OutputError(
                f"the images or expressions changed: {folder.path} holds results of {gone} "
                f"that are not among them, and of {count + again + elsewhere} that are",
                START_ANEW,
            )
        splice.finish()
    counts = {
        "kept": count,
        "new": new,
        "gone, and deleted with their masks": gone,
        "to compute again": again,
        "now in other shards, and deleted here": elsewhere,
    }
    parts = [f"{n} {what}" for what, n in counts.items() if n or what in ("kept", "new")]
    get_console().info(f"the inputs changed: {', '.join(parts)}")
    return Kept(count, count)


def content_of(key: str) -> str:
    """What of an entry's key says whose results it has, whatever these are called."""
    return key.partition("-")[0]


def _fits(lines: Iterator[LedgerLine], entries: Iterator[Entry]) -> bool:
    """Whether all that was done stands where it is asked now; what failed may ask another."""
    for line in lines:
        entry = next((one for one in entries if one.index >= line.entry), None)
        if entry is None or not _is_same(line, entry):
            return False
    return True


def _is_same(line: LedgerLine, entry: Entry) -> bool:
    return line.entry == entry.index and (line.key == entry.key or line.failures.length > 0)


class Place(Enum):
    """Where a result will stand among those that are there."""

    END = "behind all of them"
    BETWEEN = "between two, where there is none yet"
    AGAIN = "in the place of an earlier one"


def still_to_do(
    folder: RunFolder, kept: Kept, entries: Iterator[Entry]
) -> Iterator[tuple[Entry, Place]]:
    """The entries to compute, each with its place; all of ``END`` come last.

    Done again are those that are broken, whose image changed since, whose manifest line was wrong
    and is right now, or that failed where a retry was asked for and is not through.

    Raises:
        OutputError: the inputs are not those any more that :func:`follow_inputs` saw.
    """
    lines = kept_lines(folder, kept)
    line = next(lines, None)
    for entry in entries:
        if line is None:
            yield entry, Place.END
        elif entry.index < line.entry:
            yield entry, Place.BETWEEN
        elif not _is_same(line, entry):
            break
        else:
            if _is_to_do_again(folder, kept, line, entry):
                yield entry, Place.AGAIN
            line = next(lines, None)
    if line is not None:
        raise OutputError(
            f"the inputs changed while {folder.path} was compared with them",
            f"continue with {setting('resume')} once nobody changes them",
        )


def _is_to_do_again(folder: RunFolder, kept: Kept, line: LedgerLine, entry: Entry) -> bool:
    failed = folder.attempt and line.failures.length and line.entry not in kept.retried
    if entry.key != line.key or failed:
        return True
    if line.entry in kept.broken:
        get_console().warn(f"{entry.image}: its record or mask is damaged; computed again")
        return True
    if _image_changed(line, entry):
        get_console().info(f"{entry.image}: the image has changed since; computed again")
        return True
    return False


def _image_changed(line: LedgerLine, entry: Entry) -> bool:
    if entry.sample is None:
        return False
    stamp = file_stamp(entry.sample.path)
    if stamp == line.stamp or (stamp is None and line.image is not None):
        return False  # a file that is gone cannot be looked at again; what it gave is kept
    if line.image is None:  # a file that failed before has no hash
        return True
    # Touched, copied or moved: only the content counts.
    path = entry.sample.path
    try:
        return within(TIMEOUT, lambda: file_sha256(path)) != line.image
    except TimeoutError:
        get_console().warn(f"{entry.image}: {timed_out(TIMEOUT)}; its results are kept")
        return False
