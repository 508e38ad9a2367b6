"""Where a benchmark's files are looked for below its root, and what is said if they are not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from risam_cli.errors import DataError, UsageError, setting

_MOST_LISTED = 12


def find_folder(root: Path, names: Sequence[str], marks: Sequence[str]) -> Path:
    """The data set's own folder: ``root`` itself, or one of ``names`` in it, that holds a mark.

    Args:
        names: folders below ``root``, such as ``refcoco`` and ``data/refcoco``.
        marks: file names, any of which tells that this is the place.

    Raises:
        DataError: none does; the message lists every file that was looked for.
    """
    if not root.exists():
        raise DataError(
            f"{setting('root', root)} does not exist", "name the folder that holds the data set"
        )
    folders = [root, *(root / name for name in names)]
    for folder in folders:
        if any((folder / mark).is_file() for mark in marks):
            return folder
    raise missing([folder / mark for folder in folders for mark in marks], "the annotations")


def find_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of ``names`` that is a file in ``folder``. Raises DataError with all of them."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise missing([folder / name for name in names], what)


def find_images(folders: Iterable[Path], first: str) -> Path | None:
    """The first folder that holds the image ``first``, else the first that exists, else None."""
    present = [folder for folder in folders if folder.is_dir()]
    for folder in present:
        if is_file(folder / first):
            return folder
    return present[0] if present else None


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file system takes is none."""
    try:
        return path.is_file()
    except OSError:  # too long, a circle of links
        return False


def missing(paths: Sequence[Path], what: str) -> DataError:
    """The error of files that are nowhere, with the list of what was looked for and where."""
    shown = [str(path) for path in paths[:_MOST_LISTED]]
    if len(paths) > _MOST_LISTED:
        shown.append(f"… {len(paths) - _MOST_LISTED} more")
    return DataError(
        f"{what} were not found; looked for: {', '.join(shown)}",
        f"name with {setting('root')} the folder that holds the data set, or its own folder",
    )


def wrong_split(where: str, split: str, counts: dict[str, int]) -> DataError:
    """The error of a split that does not exist, with those that do and their sizes."""
    have = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return DataError(f"{where} has no split {split!r}", f"its splits: {have or 'none'}")


def only_split(where: str, names: Iterable[str]) -> str:
    """The split of data that has one only.

    Raises:
        UsageError: there are several; the message lists them.
    """
    found = sorted(set(names))
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(f"{where} holds no split", "check that it is the data set's own")
    raise UsageError(
        f"{where} holds several splits and needs {setting('split')}", f"one of {', '.join(found)}"
    )
