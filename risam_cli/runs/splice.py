"""Records, failures and ledger written anew, out of what they hold and of what was done again."""

from __future__ import annotations

import heapq
import json
import os
import shutil
import zlib
from collections.abc import Container, Iterator
from contextlib import ExitStack, suppress
from typing import BinaryIO, Self

from risam_cli.data.inputs.inputs import Entry
from risam_cli.errors import OutputError, setting
from risam_cli.files.jsonlines import seal, unseal
from risam_cli.outputs.naming import (
    GALLERY,
    OVERLAYS,
    Names,
    gallery_name,
    mask_name,
    overlay_name,
)
from risam_cli.runs.folder import RunFolder
from risam_cli.runs.ledger import (
    LEDGER,
    LedgerLine,
    Redone,
    Span,
    read_header,
    read_lines,
    read_redone,
    read_span,
)

START_ANEW = f"start over with {setting('overwrite')}, or choose another {setting('output')}"

Texts = tuple[bytes | None, bytes | None]
At = tuple[BinaryIO, int]
"""The file that holds an entry's newest line, ledger or journal, and where it begins there."""


class Splice:
    """New versions of the three files, from them and from the journal; a context manager.

    Nothing changes before :meth:`finish`.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._dropped: set[str] = set()

    def __enter__(self) -> Self:
        folder = self._folder
        paths = (folder.predictions, folder.failures, folder.ledger)
        with ExitStack() as stack:
            self._new = [
                stack.enter_context(open(folder.spliced(path.name), "wb")) for path in paths
            ]
            *self._old, self._ledger = (stack.enter_context(open(path, "rb")) for path in paths)
            journal = folder.redo if folder.redo.exists() else os.devnull
            self._journal = stack.enter_context(open(journal, "rb"))
            self._header = self._new[2].write(self._ledger.readline())
            self._names = Names.from_json((read_header(folder.ledger) or {}).get("files"))
            self._files = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def newest(self) -> Iterator[tuple[LedgerLine, At]]:
        """Every entry's newest line, by entry; the older ones that it replaces are dropped."""
        redone = {
            one.line.entry: (one.line, (self._journal, start))
            for one, start in read_redone(self._folder.redo)
        }
        by_entry = (redone[entry] for entry in sorted(redone))
        yield from heapq.merge(self._in_ledger(redone), by_entry, key=lambda found: found[0].entry)

    def _in_ledger(self, redone: Container[int]) -> Iterator[tuple[LedgerLine, At]]:
        start = self._header
        for line, end in read_lines(self._folder.ledger):
            if line.entry in redone:
                self.drop(line)
            else:
                yield line, (self._ledger, start)
            start = end

    def read(self, at: At) -> tuple[LedgerLine, Texts]:
        """A line with its part of the records and of the failures; None for what is damaged."""
        file, start = at
        file.seek(start)
        raw = file.readline()
        with suppress(ValueError, TypeError, KeyError):
            if file is self._journal:
                redone = Redone.from_json(raw)
                return redone.line, (redone.predictions, redone.failures)
            line = LedgerLine.from_json(unseal(raw))
            records = read_span(self._old[0], line.predictions)
            return line, (records, read_span(self._old[1], line.failures))
        raise self._changed()

    def _changed(self) -> OutputError:
        path = self._folder.path
        return OutputError(f"{path} was changed by someone else during the run", START_ANEW)

    def add(self, line: LedgerLine, texts: Texts, entry: Entry | None = None) -> bool:
        """The next line, with its texts; its spans become those of the new files.

        Args:
            entry: what now asks the same, maybe by other ids: the records and files follow it.

        Returns:
            False, and nothing is added, where the records are not those of the entry.

        Raises:
            OutputError: the texts are not what was written.
        """
        records, failures = texts
        if records is None or failures is None:
            raise self._changed()
        if entry is not None and entry.key != line.key:
            try:
                line, records = self._renamed(line, records, entry)
            except (ValueError, TypeError, KeyError):
                return False
        spans = []
        for out, text in zip(self._new, (records, failures), strict=False):
            spans.append(Span(out.tell(), len(text), zlib.crc32(text)))
            out.write(text)
        line = line._replace(predictions=spans[0], failures=spans[1])
        self._new[2].write(seal(line._asdict()))
        return True

    def _renamed(self, line: LedgerLine, records: bytes, entry: Entry) -> tuple[LedgerLine, bytes]:
        """A line and its records with the ids and the files' names of an entry."""
        sample, rows = entry.sample, [json.loads(text) for text in records.splitlines()]
        if sample is None:
            raise ValueError(entry)
        by_id = dict(zip(dict.fromkeys(row["id"] for row in rows), sample.expressions, strict=True))
        first = sample.expressions[0].number
        names = {OVERLAYS: overlay_name(sample.image, first, self._names)}
        names[GALLERY] = gallery_name(sample.image, first, self._names)
        for row in rows:
            one = by_id[row["id"]]
            row["id"] = one.id
            if row["mask"] is not None:
                name = mask_name(
                    sample.image, one.number, one.text, row.get("instance"), self._names
                )
                names[row["mask"]] = row["mask"] = name
        files = []
        for mark in line.files:
            name = names.get(mark.path) or names[mark.path.partition("/")[0]]
            files.append(mark._replace(path=name))
            if name != mark.path:
                part = self._folder.incoming / name
                part.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._folder.path / mark.path, part)
        self.drop(line)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return line._replace(key=entry.key, files=tuple(files)), text.encode()

    def drop(self, line: LedgerLine) -> None:
        """A line that will not be there any more: files that no other has are deleted."""
        self._dropped.update(mark.path for mark in line.files)

    def finish(self) -> None:
        """Puts the new files in place, and deletes what only dropped lines have."""
        for out in self._new:
            out.flush()
        if self._dropped:
            for line, _ in read_lines(self._folder.spliced(LEDGER)):
                self._dropped.difference_update(mark.path for mark in line.files)
        self._folder.splice(self._dropped)


def splice_redone(folder: RunFolder) -> None:
    """Puts the entries of the journal into their places in the three files."""
    with Splice(folder) as splice:
        for _, at in splice.newest():
            splice.add(*splice.read(at))
        splice.finish()
