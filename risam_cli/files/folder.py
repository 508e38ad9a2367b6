"""The only base of output folders: who made one, who writes to it now, and how a file gets into it.

``.risam`` within the folder holds the lock, what is in the making, and the name of the command
that made it (``made_by``), which stays until a file of the run says the same. No command touches a
folder that another one made.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from risam_cli.errors import OutputError
from risam_cli.files.confine import require_own, require_under
from risam_cli.files.jsonlines import load_json
from risam_cli.files.locks import PRIVATE, FolderLock
from risam_cli.files.write import make_file, sync_folders, write_file, writing

OTHER = "choose another output folder"

MADE_BY = "made_by"
SPLICE = "splice"
"""Stands in the private folder while a merge, or what was done again, is moved in."""
_KNOWN_BY = {
    "ledger.jsonl": "predict",
    "run.json": "predict",
    "answers.jsonl": "eval",
    "report.json": "eval",
    "config.resolved.yaml": "train",
}
_EXPORT = "export.json"  # of two commands; it says of which
_LONGEST = 1 << 20

_BY_DESCRIPTOR = {os.open, os.mkdir, os.rename} <= os.supports_dir_fd


def makers_of(path: Path) -> set[str]:
    """The commands that made what is in a folder, by its marker and by their own files."""
    found = _makers_by_files(path)
    with suppress(OSError, ValueError):
        found.add((path / PRIVATE / MADE_BY).read_text("ascii").strip())
        found.discard("")  # of a power cut
    return found


def _makers_by_files(path: Path) -> set[str]:
    found = {maker for name, maker in _KNOWN_BY.items() if os.path.lexists(path / name)}
    if os.path.lexists(path / _EXPORT):
        found.add("explain" if read_summary(path).get("kind") == "explanation" else "export-masks")
    return found


def read_summary(path: Path) -> dict[str, object]:
    """``export.json`` of a folder; empty where there is none, or none that can be read."""
    with suppress(OSError, ValueError), open(path / _EXPORT, "rb") as file:
        said = load_json(file.read(_LONGEST))
        if isinstance(said, dict):
            return said
    return {}


def require_made_by(path: Path, maker: str, names: Iterable[str] = ()) -> None:
    """Make sure that no one else made a folder.

    Args:
        names: of files that nobody else may have written there.

    Raises:
        OutputError: another command did, or there is such a file and nothing says whose it is.
    """
    makers = makers_of(path)
    others = sorted(makers - {maker})
    if others:
        raise OutputError(f"{path} holds files of `risam {', '.join(others)}`", OTHER)
    found = [name for name in names if os.path.lexists(path / name)]
    if found and not makers:
        raise OutputError(
            f"{path} holds {', '.join(found)}, which `risam {maker}` did not write",
            f"move it away, or {OTHER}",
        )


class OutputFolder:
    """An output folder of one command, locked for this process; a context manager.

    Attributes:
        stays: whether ``.risam`` is left in a finished folder.

    Args:
        path: made if it is not there, and removed again if nothing came to be in it.
        maker: the command.
        names: what the command writes directly in the folder.
        shared: among them, what others may have put there too.

    Raises:
        OutputError: it cannot be made or written, another process works in it, another command
            made it, or a link stands where it would be written.
    """

    stays = False

    def __init__(
        self, path: Path, maker: str, names: Sequence[str], *, shared: Sequence[str] = ()
    ) -> None:
        self.path = path
        self.maker = maker
        self.names = names
        self.private = path / PRIVATE
        self.staging = self.private / "staging"
        self._numbers = itertools.count()
        self._is_new = not path.exists()
        with writing(path, OTHER):
            alone = [name for name in names if name not in shared]
            require_own(path, names)
            require_made_by(path, maker, alone)
            self._lock: FolderLock | None = FolderLock(path)
        try:
            with writing(path, OTHER):
                require_made_by(path, maker, alone)  # again: it may have been another's until now
                write_file(self.private / MADE_BY, f"{maker}\n")
                shutil.rmtree(self.staging, ignore_errors=True)  # what never came to count
                self.staging.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder back to others. Files in the making are deleted; the lock goes last."""
        if self._lock is None:
            return
        shutil.rmtree(self.staging, ignore_errors=True)
        begun = any(os.path.lexists(self.path / name) for name in self.names)
        with suppress(OSError):
            for left in self.private.glob("lock.*"):  # of a process killed while it took the lock
                left.unlink()
            if not begun or (not self.stays and self.maker in _makers_by_files(self.path)):
                (self.private / MADE_BY).unlink()
        self._lock.release()
        self._lock = None
        if self._is_new and not begun:
            with suppress(OSError):
                self.path.rmdir()

    def require_held(self) -> None:
        """To be called before results are put in place.

        Raises:
            OutputError: the lock was lost, or the folder deleted.
        """
        if self._lock is not None:
            self._lock.require_held()

    def write(
        self, name: str, content: bytes | str | Callable[[Path], object], *, sync: bool = True
    ) -> None:
        """Write one file, whole or not at all; ``name`` is relative, with forward slashes.

        Raises:
            OutputError: it cannot be written; nothing of it is left, an older one survives.
        """
        part = self.staging / f"write-{next(self._numbers)}"
        with writing(self.path / name):
            try:
                make_file(part, content, sync=sync)
                self.place([(part, name)], sync=sync)
            except BaseException:
                with suppress(OSError):
                    part.unlink()
                raise

    def place(self, moves: Iterable[tuple[Path, str]], *, sync: bool = True) -> None:
        """Move finished files to names in this folder, through no link, and sync their names.

        Args:
            moves: each file and its place, relative, with forward slashes.

        Raises:
            OutputError: a link or a file stands where a folder should be, or the lock was lost.
        """
        self.require_held()
        by_folder: dict[str, list[tuple[Path, str]]] = {}
        for part, name in moves:
            folder, _, file = name.rpartition("/")
            by_folder.setdefault(folder, []).append((part, file))
        for folder, files in by_folder.items():
            with self._inside(folder) as descriptor:
                for part, file in files:
                    target = self.path / folder / file
                    with writing(target):
                        if descriptor is None:
                            os.replace(part, target)
                        else:
                            os.replace(part, file, dst_dir_fd=descriptor)
        if sync:
            sync_folders(self.path, [self.path / folder for folder in by_folder])

    @contextmanager
    def _inside(self, folder: str) -> Iterator[int | None]:
        """A folder of this one, open by a way without links; made where it is missing.

        None where the system opens no folders.
        """
        place = self.path / folder
        if not _BY_DESCRIPTOR:
            with writing(place):
                require_under(self.path, place)
                place.mkdir(parents=True, exist_ok=True)
            yield None
            return
        flags = os.O_RDONLY | os.O_DIRECTORY
        with writing(place), ExitStack() as stack:
            try:
                descriptor = _open(stack, os.fspath(self.path), flags, None)
                for name in filter(None, folder.split("/")):
                    descriptor = _open(stack, name, flags | os.O_NOFOLLOW, descriptor)
            except NotADirectoryError:
                require_under(self.path, place)  # says where a link leads
                raise
            yield descriptor


def _open(stack: ExitStack, name: str, flags: int, above: int | None) -> int:
    """A folder within an open one, made where it is missing; closed by the stack."""
    try:
        descriptor = os.open(name, flags, dir_fd=above)
    except FileNotFoundError:
        if above is None:
            raise
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=above)
        descriptor = os.open(name, flags, dir_fd=above)
    stack.callback(os.close, descriptor)
    return descriptor
