"""Files from outside: opened once it is known that they can be read, and told from others."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from risam_cli.errors import (
    DataError,
    ImageError,
    MachineError,
    reason_of,
    require_machine,
    setting,
)
from risam_cli.files.hashing import sha256_of_stream
from risam_cli.files.remote import StoreError
from risam_cli.files.store import (
    ObjectInfo,
    RemotePath,
    TarPath,
    is_inside,
    object_info,
    read_member,
    read_object,
)

_HEAD = 1 << 16  # bytes


class FileStamp(NamedTuple):
    """What a file system says about a file: if none of it changed, the content did not.

    Attributes:
        size: bytes.
        mtime_ns, ctime_ns: times of the last change of content and of inode.
        inode: the file's number.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def file_stamp(path: Path) -> FileStamp | None:
    """The stamp of a file; None where there is none to be had."""
    try:
        if isinstance(path, RemotePath):
            return _stamp_of_object(object_info(path))
        if isinstance(path, TarPath):
            above = file_stamp(path.tar)
            if above is None:
                return None
            return FileStamp(path.size, above.mtime_ns, path.start, above.size)
        return stamp_of(os.stat(path))
    except (OSError, ValueError, StoreError):
        return None


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a regular file's bytes; None where it cannot be read."""
    try:
        with open_regular(path) as file:
            return sha256_of_stream(file)
    except (ImageError, OSError):
        return None


def stamp_of(status: os.stat_result) -> FileStamp:
    """The stamp out of what the system says."""
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def require_inside(path: Path, root: Path, where: str) -> None:
    """Make sure that a file named by a list from outside lies in the folder that it may name.

    Args:
        where: what names it, for the message.

    Raises:
        DataError: it lies elsewhere, once links are followed.
    """
    if isinstance(path, RemotePath) or isinstance(root, RemotePath):
        inside, is_out = str(root), not is_inside(path, root)
    else:
        inside, whole = os.path.realpath(root), os.path.realpath(path)
        is_out = whole != inside and not whole.startswith(os.path.join(inside, ""))
    if is_out:
        raise DataError(
            f"{where} is outside of {inside}, to which files are confined",
            f"name the folder that holds all images with {setting('image_root')}",
        )


def stamp_of_file(file: BinaryIO) -> FileStamp:
    """The stamp of what :func:`open_regular` gave."""
    return file.stamp if isinstance(file, _Fetched) else stamp_of(os.fstat(file.fileno()))


class _Fetched(io.BytesIO):
    """The bytes of an image that lies on no disk of its own."""

    def __init__(self, data: bytes, stamp: FileStamp) -> None:
        super().__init__(data)
        self.stamp = stamp


def _stamp_of_object(info: ObjectInfo) -> FileStamp:
    return FileStamp(-1 if info.size is None else info.size, info.version, 0, 0)


def fetch_head(path: RemotePath) -> BinaryIO:
    """What an object begins with: enough for most images to tell their size.

    Raises:
        ImageError: it is not there, or may not be read.
    """
    return _fetch(path, _HEAD)


def _fetch(path: RemotePath | TarPath, most: int | None = None) -> _Fetched:
    """The image's bytes, from a store or a tar. Raises ImageError."""
    try:
        if isinstance(path, RemotePath):
            data, info = read_object(path, most)
            stamp = _stamp_of_object(info)
        else:
            data = read_member(path)
            stamp = file_stamp(path) or FileStamp(path.size, 0, path.start, 0)
    except StoreError as error:
        kind = MachineError if error.of_all else ImageError
        raise kind(*error.args) from None
    except OSError as error:
        require_machine(error)
        raise ImageError(f"{path}: {reason_of(error)}") from None
    if isinstance(path, TarPath) and len(data) < path.size:
        raise ImageError(f"{path}: the tar is truncated within it", "copy or download it again")
    if not data:
        raise ImageError(f"{path}: the file is empty (0 bytes)", "copy or download it again")
    return _Fetched(data, stamp)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading, once it is known to be a regular one with bytes in it."""
    if isinstance(path, (RemotePath, TarPath)):
        with _fetch(path) as fetched:
            yield fetched
        return
    try:
        status = os.stat(path)
        # A pipe or a device would be waited on for ever.
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{path}: is a folder, not an image")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: is not a regular file")
        if status.st_size == 0:
            raise ImageError(f"{path}: the file is empty (0 bytes)", "copy or download it again")
        file = open(path, "rb")  # noqa: SIM115 - closed below, outside of this try
    except FileNotFoundError:
        raise ImageError(
            f"{path}: no such file",
            "check the path",
            f"name the folder where paths start with {setting('image_root')}",
        ) from None
    except PermissionError:
        raise ImageError(f"{path}: permission denied", "make the file readable") from None
    except ValueError as error:  # a NUL byte
        raise ImageError(f"{path}: not a valid file path ({error})") from None
    except OSError as error:
        require_machine(error)
        raise ImageError(f"{path}: {reason_of(error)}") from None
    with file:
        yield file
