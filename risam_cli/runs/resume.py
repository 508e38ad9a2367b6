"""What of an earlier run still holds, and what is to be done again.

Three looks, each before anything is changed: does the folder hold what its ledger says (checksums
of records and masks); do the inputs still ask the same; are the images still the same files.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.console.console import get_console
from risam_cli.data.images.files import file_sha256, file_stamp
from risam_cli.data.inputs.inputs import Entry
from risam_cli.errors import OutputError, setting
from risam_cli.files.jsonlines import seal
from risam_cli.files.patience import within
from risam_cli.files.write import own_file, write_file
from risam_cli.inference.loading import TIMEOUT, timed_out
from risam_cli.outputs.records import FAILURES, PREDICTIONS
from risam_cli.runs.folder import RUN, RunFolder
from risam_cli.runs.ledger import (
    LEDGER,
    LedgerLine,
    Redone,
    Span,
    file_is_whole,
    header_line,
    read_all_lines,
    read_header,
    read_lines,
    read_redone,
    read_span,
)

_ANEW = f"start over with {setting('overwrite')}, or choose another {setting('output')}"


@dataclass(slots=True)
class Kept:
    """What an earlier run left.

    Attributes:
        lines: how many entries of its ledger hold, from the first on; what follows is cut off.
        broken: among them, the entries whose record or mask is not what was written.
        redone: lines of entries that were computed again but are not in their places yet.
        retried: among these, what was done again since a retry of all failures was asked for.
    """

    lines: int = 0
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
    for paths in unlisted.values():
        folder.delete(paths)
    for line in read_all_lines(folder.ledger, ends[0]):
        folder.delete(mark.path for mark in line.files)
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
            f"{folder.path} holds {', '.join(held)} but no whole {LEDGER} of how they came to be",
            _ANEW,
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
        raise OutputError(f"{place} holds a run with other settings: {'; '.join(changed)}", _ANEW)


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
    """The lines of the ledger that hold, newest version of each."""
    for number, (line, _) in enumerate(read_lines(folder.ledger)):
        if number >= kept.lines:
            return
        yield kept.redone.get(line.entry, line)


def check_inputs(folder: RunFolder, kept: Kept, entries: Iterator[Entry]) -> None:
    """Compares the inputs with what was asked before, by name and text; images are not read.

    Raises:
        OutputError: an input changed.
    """
    for line in kept_lines(folder, kept):
        _require_same_entry(line, next(entries, None), folder.path)


def still_to_do(
    folder: RunFolder, kept: Kept, entries: Iterator[Entry]
) -> Iterator[tuple[Entry, bool]]:
    """The entries to compute, each with whether it takes the place of an earlier result.

    First those among the kept ones that are broken, whose image changed since, whose manifest line
    was wrong and is right now, or that failed where a retry was asked for and is not through; then
    all never done.

    Raises:
        OutputError: an input changed.
    """
    for line in kept_lines(folder, kept):
        entry = next(entries, None)
        _require_same_entry(line, entry, folder.path)
        assert entry is not None
        failed = folder.attempt and line.failures.length and line.entry not in kept.retried
        if entry.key != line.key or failed:
            yield entry, True
        elif line.entry in kept.broken:
            get_console().warn(f"{entry.image}: its record or mask is damaged; done again")
            yield entry, True
        elif _image_changed(line, entry):
            get_console().info(f"{entry.image}: the image changed since; done again")
            yield entry, True
    for entry in entries:
        yield entry, False


def splice_redone(folder: RunFolder) -> None:
    """Puts the entries that were done again into their places in the three files."""
    new = {one.line.entry: start for one, start in read_redone(folder.redo)}
    gone: set[str] = set()
    still: set[str] = set()
    names = (folder.predictions.name, folder.failures.name, folder.ledger.name)
    with ExitStack() as stack:
        outs = [stack.enter_context(open(folder.spliced(name), "wb")) for name in names]
        olds = [stack.enter_context(open(folder.path / name, "rb")) for name in names[:2]]
        journal = stack.enter_context(open(folder.redo, "rb"))
        outs[2].write(stack.enter_context(open(folder.ledger, "rb")).readline())
        for line, _ in read_lines(folder.ledger):
            if line.entry not in new:
                spans = (line.predictions, line.failures)
                texts = [read_span(old, span) for old, span in zip(olds, spans, strict=True)]
            else:
                journal.seek(new[line.entry])
                redone = Redone.from_json(journal.readline())
                texts = [redone.predictions, redone.failures]
                gone.update(mark.path for mark in line.files)
                still.update(mark.path for mark in redone.line.files)
                line = redone.line
            moved = _write_spans(outs, texts, folder.path)
            line = replace(line, predictions=moved[0], failures=moved[1])
            outs[2].write(seal(line.to_json()))
    folder.delete(gone - still)  # the journal holds all that takes its place
    folder.splice()


def _write_spans(
    outs: Sequence[BinaryIO], texts: Sequence[bytes | None], folder: Path
) -> list[Span]:
    spans = []
    for out, text in zip(outs, texts, strict=False):
        if text is None:
            raise OutputError(f"{folder} was changed by someone else during the run", _ANEW)
        spans.append(Span(out.tell(), len(text), zlib.crc32(text)))
        out.write(text)
    return spans


def _require_same_entry(line: LedgerLine, entry: Entry | None, place: Path) -> None:
    if entry is None:
        raise OutputError(
            f"the inputs changed: {place} holds results of entry {line.entry + 1}, which is no "
            "longer there",
            _ANEW,
        )
    if entry.index != line.entry or (entry.key != line.key and not line.failures.length):
        raise OutputError(
            f"the inputs changed: entry {line.entry + 1} is now {entry.where or entry.image!r}, "
            f"and {place} holds results of another",
            _ANEW,
        )


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
        get_console().warn(f"{entry.image}: {timed_out(TIMEOUT)}; what it gave is kept")
        return False
