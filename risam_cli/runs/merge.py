"""The output folders of shards, put together to what one run would have written, byte for byte."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.errors import DataError, OutputError, reason_of, setting
from risam_cli.files.jsonlines import load_json, seal
from risam_cli.outputs.records import FAILURES, PREDICTIONS
from risam_cli.runs.folder import RUN, RunFolder
from risam_cli.runs.gallery import write_gallery
from risam_cli.runs.ledger import (
    LEDGER,
    FileMark,
    LedgerLine,
    Span,
    header_line,
    read_header,
    read_lines,
    read_span,
    settings_hash,
)

SHARDS = "shard-*-of-*"  # what a run under torchrun calls its folders


@dataclass(frozen=True, slots=True)
class Part:
    """One shard's folder.

    Attributes:
        identity: what decides its results; see :mod:`risam_cli.runs.ledger`.
        run: its ``run.json``.
        index, count: which shard of how many.
    """

    folder: Path
    identity: Mapping[str, Any]
    run: Mapping[str, Any]
    index: int
    count: int

    @property
    def entries(self) -> int:
        """How many entries the inputs of all shards have."""
        return int(self.run["inputs"]["entries"])


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge wrote."""

    entries: int
    records: int
    failures: int
    files: int


def find_parts(folders: Sequence[Path]) -> list[Part]:
    """The shards in the folders named, checked to be all shards of one run, by index.

    A folder that holds no run itself, but shards (``shard-00000-of-00004`` …), stands for those.

    Raises:
        DataError: a folder holds no finished run, the runs do not belong together, or a shard is
            missing or doubled.
    """
    found = [part for folder in folders for part in _expand(folder)]
    parts = sorted((_read_part(folder) for folder in found), key=lambda part: part.index)
    first = parts[0]
    for part in parts[1:]:
        _require_same(first, part)
    for one, other in itertools.pairwise(parts):
        if one.index == other.index:
            raise DataError(
                f"{one.folder} and {other.folder} are both shard {one.index} of {one.count}",
                "name each shard once",
            )
    there = {part.index for part in parts}
    # A file says how many there are: count no further than is shown.
    missing = list(itertools.islice((n for n in range(first.count) if n not in there), 11))
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
        raise DataError(
            f"shards {listed} of {first.count} are missing (counted from 0)",
            "name the folders of all shards, and run those that were not",
        )
    return parts


def merge_parts(
    parts: Sequence[Part],
    output: Path,
    *,
    overwrite: bool = False,
    advance: Callable[[], None] = lambda: None,
    link: bool = False,
) -> Merged:
    """Write one output folder of all shards: records, failures, ledger, masks, ``run.json``.

    Every slice and every file is checked against the checksum that its shard noted. All is written
    aside and comes into place together, or none of it does, whatever happens in between; memory
    does not grow with the run.

    Args:
        parts: as :func:`find_parts` gives them.
        overwrite: start anew in a folder that holds a run.
        advance: called after each entry.
        link: masks keep their place on the disk where that can be: the shards will be deleted.

    Raises:
        DataError: an entry is missing or doubled, or what a shard wrote was changed since.
        OutputError: the folder holds a run and ``overwrite`` is not set, or cannot be written.
    """
    for part in parts:
        if part.folder.resolve() == output.resolve():
            raise OutputError(
                f"{output} is one of the shards", f"choose another {setting('output')}"
            )
    try:
        with RunFolder(output) as folder:
            if folder.holds_run():
                if not overwrite:
                    raise OutputError(
                        f"{output} holds a run already",
                        f"choose another {setting('output')} or give {setting('overwrite')}",
                    )
                folder.require_known()
            merged = _write(parts, folder, advance, link)
            text = json.dumps(_run_json(parts, merged), indent=2, allow_nan=False) + "\n"
            folder.spliced(RUN).write_text(text, encoding="utf-8")
            if overwrite:  # not before all that takes its place is there
                folder.start_anew()
            folder.splice()
            write_gallery(folder.path, folder.write, _model(parts))
            return merged
    except OSError as error:
        raise OutputError(
            f"{error.filename or output}: {reason_of(error)}",
            f"free disk space or choose another {setting('output')}",
        ) from error


# --- reading the parts ----------------------------------------------------------------------------


def _expand(folder: Path) -> list[Path]:
    if (folder / LEDGER).is_file() or (folder / RUN).is_file():
        return [folder]
    shards = sorted(path for path in folder.glob(SHARDS) if path.is_dir())
    if not shards:
        raise DataError(
            f"{folder} holds no run of `risam predict`", "name the output folders of the shards"
        )
    return shards


def _read_part(folder: Path) -> Part:
    path = folder / RUN
    try:
        run = load_json(path.read_bytes())
        status = run["status"]
        entries, checked = run["inputs"]["entries"], run["inputs"]["hash"]
        index, count = run["settings"]["shard"]
        fits = all(type(v) is int for v in (index, count)) and 0 <= index < count
    except FileNotFoundError:
        raise DataError(f"{folder} has no {RUN}", "its run must at least have started") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} is not what `risam predict` writes", "run the shard again"
        ) from None
    if status != "complete" or type(entries) is not int or not isinstance(checked, str):
        raise DataError(f"the run in {folder} is not finished: {status}", "finish it first")
    identity = read_header(folder / LEDGER)
    if identity is None or identity != run["settings"] or not fits:
        raise DataError(
            f"{folder}: {LEDGER} and {RUN} do not belong together", "run the shard again"
        )
    return Part(folder, identity, run, index, count)


def _require_same(first: Part, other: Part) -> None:
    pair = f"{first.folder} and {other.folder} do not belong together"
    fix = "merge shards of one run: the same inputs, model and settings"
    if changed := differing(first.identity, other.identity):
        raise DataError(f"{pair}: {changed}", fix)
    if first.count != other.count:
        raise DataError(f"{pair}: one of {first.count} and one of {other.count} shards", fix)
    for key in ("entries", "hash"):
        if first.run["inputs"][key] != other.run["inputs"][key]:
            raise DataError(f"{pair}: their inputs differ", fix)
    changed = differing(versions_of(first.run), versions_of(other.run))
    if changed:
        raise DataError(
            f"{pair}: {changed}",
            f"run one of them again with {setting('overwrite')}, by the other's versions",
        )


def versions_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The versions in a ``run.json`` that results can depend on."""
    listed = run.get("versions")
    return {**(listed if isinstance(listed, dict) else {}), "risam": run.get("risam")}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What two processes of one run should agree in and do not; empty where they agree."""
    return "; ".join(
        f"{key} is {one.get(key)!r} and {other.get(key)!r}"
        for key in sorted({*one, *other} - {"shard"})
        if one.get(key) != other.get(key)
    )


def _lines(parts: Sequence[Part]) -> Iterator[tuple[int, LedgerLine]]:
    """All ledger lines in the order of entries, each with its part's place in ``parts``."""

    def of(place: int, part: Part) -> Iterator[tuple[int, int, LedgerLine]]:
        return ((line.entry, place, line) for line, _ in read_lines(part.folder / LEDGER))

    expected = 0
    streams = [of(place, part) for place, part in enumerate(parts)]
    for entry, place, line in heapq.merge(*streams, key=itemgetter(0, 1)):
        if entry < expected:
            raise DataError(
                f"input {entry} is in {parts[place].folder} and in another shard as well",
                "run the shards again with the same inputs",
            )
        if entry > expected:
            raise _missing(expected)
        expected += 1
        yield place, line
    if expected != parts[0].entries:
        raise _missing(expected)


def _missing(entry: int) -> DataError:
    return DataError(
        f"input {entry} (counted from 0) is in no shard",
        "finish the run of its shard",
    )


# --- writing --------------------------------------------------------------------------------------


class _Joined:
    """One JSONL file that grows by slices of the parts' files."""

    def __init__(
        self, name: str, parts: Sequence[Part], folder: RunFolder, stack: ExitStack
    ) -> None:
        self._paths = [part.folder / name for part in parts]
        self._from = [stack.enter_context(_opened(path)) for path in self._paths]
        to = open(folder.spliced(name), "wb")  # noqa: SIM115 - the stack closes it
        self._to = stack.enter_context(to)
        self._end = 0
        self.lines = 0

    def add(self, place: int, span: Span) -> Span:
        """Append a slice of part ``place``; gives the slice that it is now."""
        data = read_span(self._from[place], span)
        if data is None:
            raise _changed(self._paths[place])
        self._to.write(data)
        self.lines += data.count(b"\n")
        start, self._end = self._end, self._end + span.length
        return span._replace(start=start)


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error)}", "run the shard again") from None


def _write(
    parts: Sequence[Part], folder: RunFolder, advance: Callable[[], None], link: bool
) -> Merged:
    entries = files = 0
    _allow_files(3 * len(parts) + 64)
    with ExitStack() as stack:
        predictions = _Joined(PREDICTIONS, parts, folder, stack)
        failures = _Joined(FAILURES, parts, folder, stack)
        ledger = stack.enter_context(open(folder.spliced(LEDGER), "wb"))
        ledger.write(header_line(_identity(parts)))
        for place, line in _lines(parts):
            for mark in line.files:
                _copy(parts[place].folder, folder.incoming, mark, link)
            moved = line._replace(
                predictions=predictions.add(place, line.predictions),
                failures=failures.add(place, line.failures),
            )
            ledger.write(seal(moved._asdict()))
            entries += 1
            files += len(line.files)
            advance()
        return Merged(entries, predictions.lines, failures.lines, files)


def _allow_files(number: int) -> None:
    """Let this process have so many files open, as far as the system lets it: three a shard."""
    with suppress(ImportError, OSError, ValueError):  # no such limit on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < number:
            wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _copy(source: Path, target: Path, mark: FileMark, link: bool) -> None:
    try:
        status = os.stat(source / mark.path)
        if status.st_size != mark.size or not stat.S_ISREG(status.st_mode):
            raise _changed(source / mark.path)
        data = (source / mark.path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{source / mark.path}: {reason_of(error)}", "run the shard again"
        ) from None
    if len(data) != mark.size or zlib.crc32(data) != mark.crc:
        raise _changed(source / mark.path)
    place = target / mark.path
    try:
        _link_or_write(source / mark.path, place, data, link)
    except FileNotFoundError:
        place.parent.mkdir(parents=True, exist_ok=True)
        _link_or_write(source / mark.path, place, data, link)


def _link_or_write(source: Path, place: Path, data: bytes, link: bool) -> None:
    if link:
        with suppress(OSError):  # a file system without links
            os.link(source, place)
            return
    place.write_bytes(data)


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path} is not what its run wrote", f"run the shard again with {setting('overwrite')}"
    )


def _identity(parts: Sequence[Part]) -> dict[str, Any]:
    """That of a run without shards."""
    return {**parts[0].identity, "shard": [0, 1]}


def _model(parts: Sequence[Part]) -> str:
    """The name of the one that answered; empty where run.json does not say."""
    told = parts[0].run.get("model")
    return str(told.get("name", "")) if isinstance(told, dict) else ""


def _run_json(parts: Sequence[Part], merged: Merged) -> dict[str, Any]:
    first = parts[0].run
    identity = _identity(parts)
    kept = ("command", "launch", "risam", "versions", "model")
    return {
        "status": "complete",
        **{key: first[key] for key in kept if key in first},
        "settings": identity,
        "settings_hash": settings_hash(identity),
        "shard": {"index": 0, "count": 1},
        "inputs": first["inputs"],
        "counts": {"records": merged.records, "failures": merged.failures},
        "merged_from": [
            {
                "folder": str(part.folder),
                "shard": [part.index, part.count],
                **{k: part.run.get(k) for k in ("command", "machine", "started", "seconds")},
            }
            for part in parts
        ],
    }
