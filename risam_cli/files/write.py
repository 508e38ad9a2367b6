"""The only way that a file is written: whole, durable, and then under its name.

A file is safe from a power cut once its content is synced and then the folder that holds its name.
A kill needs neither: what a process handed to the system survives the process. A file is replaced,
never written in place, so that a link to it from elsewhere keeps what it had.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from risam_cli.errors import OutputError, reason_of, require_machine
from risam_cli.files.locks import PRIVATE

CHECK = "check disk space and permissions"

_LONGEST = 200  # bytes of a file's name that its temporary file takes over; systems allow 255


@contextmanager
def writing(path: Path, fix: str = CHECK) -> Iterator[None]:
    """What the system says against writing ``path`` (OSError), as one line for the user.

    The line names ``path``, whatever temporary file the fault befell.

    Raises:
        OutputError: in place of OSError.
        MachineError: likewise, where there are no more files to be had.
    """
    try:
        yield
    except OSError as error:
        require_machine(error)
        raise OutputError(f"cannot write {shown(path)}: {reason_of(error)}", fix) from error


def shown(path: Path | str) -> str:
    """A path for a message: of what is in the making, the folder that it is made for."""
    return os.fspath(path).partition(f"{os.sep}{PRIVATE}{os.sep}")[0]


def write_file(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file, whole or not at all; its folder is made where it is missing.

    Content and name are on the disk when this returns.

    Args:
        content: bytes; text, of which a lone surrogate, which UTF-8 cannot hold, is written as its
            escape; or what writes the file at a path that it is given.

    Raises:
        OutputError: it cannot be written; an older file at ``path`` survives.
    """
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST])
    part = path.with_name(f".{name}.part")
    with writing(path):
        try:
            make_file(part, content)
            replace(part, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise


def make_file(
    part: Path, content: bytes | str | Callable[[Path], object], *, sync: bool = True
) -> None:
    """Write a file that is yet to be moved to its place.

    Args:
        content: as for :func:`write_file`.
        sync: whether the content is on the disk when this returns.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    with create(part) as file:
        if callable(content):
            # By the umask; safetensors grants the owner only.
            mode = os.fstat(file.fileno()).st_mode
            try:
                content(part)
            except RuntimeError as error:  # torch tells of a full disk so
                raise OSError(reason_of(error)) from error
            part.chmod(mode)
        else:
            if isinstance(content, str):
                content = content.encode("utf-8", "backslashreplace")
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    if sync and callable(content):
        sync_file(part)


def create(path: Path) -> BinaryIO:
    """A new file, open for writing; what had its name loses it, and is not written to."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, "xb")


def replace(part: Path, path: Path) -> None:
    """Move a file to its place; the place's folder is made where it is missing."""
    try:
        os.replace(part, path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)


def own_file(path: Path) -> None:
    """Before a file is appended to or cut: where another name leads to it too, make it a copy.

    Raises:
        OutputError: it cannot be copied.
    """
    with suppress(FileNotFoundError):
        if os.lstat(path).st_nlink > 1:
            write_file(path, lambda part: shutil.copyfile(path, part))


# --- what a power cut leaves ----------------------------------------------------------------------


def sync_file(path: Path) -> None:
    """Has the system write a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Has the system write a folder's names to the disk, where folders can be opened."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folders(root: Path, folders: Iterable[Path]) -> None:
    """Syncs folders at or under ``root``, and those between it and them, each once."""
    between = {root}
    for folder in folders:
        while folder not in between and folder != folder.parent:
            between.add(folder)
            folder = folder.parent
    for folder in between:
        sync_folder(folder)


def sync_tree(root: Path) -> None:
    """Has the system write all files under ``root`` and their names to the disk.

    Linux is told once, for the file system that they are on; elsewhere they are synced one by one.
    """
    if not root.exists() or _sync_file_system(root):
        return
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_folder(Path(folder))


def _sync_file_system(root: Path) -> bool:
    """Whether the system wrote all that is on the file system of ``root``."""
    if not sys.platform.startswith("linux"):
        return False
    descriptor = os.open(root, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(descriptor) == 0:
            return True
        number = ctypes.get_errno()
    except AttributeError:  # a C library without it
        return False
    finally:
        os.close(descriptor)
    if number == errno.ENOSYS:
        return False
    raise OSError(number, os.strerror(number), str(root))
