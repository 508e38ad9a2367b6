"""Files wherever they lie: on a disk, behind a URL that fsspec knows, or in a tar.

The one place that opens what a user names. A path on a disk goes straight to the system. What lies
in a store (``s3://``, ``gs://``, ``hf://``, ``https://``, ``memory://`` …) is a :class:`RemotePath`
and a member of a tar a :class:`TarPath`: both are paths, so whatever carries a path carries them,
and whatever opens one opens it here. Objects are read whole or in blocks, never copied to a disk.
What a store says against it for the moment (time-outs, 5xx, cut connections) is tried again, a
little later each time; what it says for good becomes one line.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
import uuid
import zlib
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from risam_cli.files.remote import StoreError, file_system, patiently

if TYPE_CHECKING:
    from typing import Self

    _Base = Path
else:
    _Base = type(Path())

T = TypeVar("T")

_BLOCK = 4 << 20  # bytes of a large object that are read, and held, at a time
_NO_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "http", "https"}
_LARGEST = 2 << 30  # bytes of an object that is read whole

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_PATTERN = re.compile(r"[*?\[{]")


class RemotePath(_Base):
    """A place in a store, which no operation of the system finds; ``str`` gives its URL."""

    __slots__ = ("url",)
    url: str

    def __new__(cls, url: str) -> Self:  # noqa: D102
        self = super().__new__(cls, url)
        self.url = url
        return self

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __fspath__(self) -> str:
        return self.url

    def __reduce__(self) -> Any:
        return type(self), (self.url,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: Any) -> Any:
        return join(self, str(name))

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Any:
        """The place above; that of a bucket or a host is itself."""
        above = self.url.rstrip("/").rpartition("/")[0]
        return self if above.endswith(":/") else RemotePath(above)

    def exists(self, **_: Any) -> bool:
        """Whether there is such an object or folder. Raises StoreError where that is not told."""
        return self._kind() is not None

    def is_file(self, **_: Any) -> bool:
        """Whether there is such an object. Raises StoreError where that is not told."""
        return self._kind() == "file"

    def is_dir(self, **_: Any) -> bool:
        """Whether there are objects below it. Raises StoreError where that is not told."""
        return self._kind() == "directory"

    def glob(self, pattern: str, **_: Any) -> Generator[Any, None, None]:
        """What lies directly in it and has a name of this pattern; nothing where it is no folder.

        Raises:
            StoreError: it cannot be listed.
        """
        for url, _is_folder in list_folder(self.url) if self.is_dir() else ():
            if fnmatchcase(url.rpartition("/")[2], pattern):
                yield RemotePath(url)

    def open(self, mode: str = "rb", *_: Any, encoding: str | None = None, **__: Any) -> Any:
        """The object, for reading in order; what reads all of a path goes through here."""
        binary = open_place(self)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding=encoding)

    def _kind(self) -> str | None:
        try:
            return kind_of(self.url)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise


class TarPath(_Base):
    """A member of a tar; ``str`` gives the tar's place, a slash, and the member's name.

    Attributes:
        tar: on a disk or in a store.
        start, size: bytes of the tar that are the member's.
    """

    __slots__ = ("member", "size", "start", "tar")
    tar: Path
    member: str
    start: int
    size: int

    def __new__(cls, tar: Path, member: str, start: int, size: int) -> Self:  # noqa: D102
        self = super().__new__(cls, f"{tar}/{member}")
        self.tar, self.member, self.start, self.size = tar, member, start, size
        return self

    def __init__(self, *_: Any) -> None:
        if sys.version_info >= (3, 12):  # before, all is done by __new__
            super().__init__(f"{self.tar}/{self.member}")

    def __str__(self) -> str:
        return f"{self.tar}/{self.member}"

    def __fspath__(self) -> str:
        return str(self)

    def __reduce__(self) -> Any:
        return type(self), (self.tar, self.member, self.start, self.size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TarPath) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash((self.tar, self.start))


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says of an object: bytes, and a number that changes with its content."""

    size: int | None
    version: int


# --- places ---------------------------------------------------------------------------------------


def is_url(text: str) -> bool:
    """Whether it begins as a URL does: ``scheme://``."""
    return _URL.match(text) is not None


def is_pattern(url: str) -> bool:
    """Whether a URL stands for several; an address of the web may hold a question mark."""
    return not url.startswith(("http://", "https://")) and _PATTERN.search(url) is not None


def place(text: str) -> Path:
    """A path on a disk, or a URL, as a path; ``file://`` is the disk."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return RemotePath(text) if is_url(text) else Path(text)


def join(base: Path, name: str) -> Path:
    """A name from where names start; a URL and an absolute path stand for themselves."""
    if is_url(name) or not isinstance(base, RemotePath):
        return place(name) if is_url(name) else Path(base, name)
    scheme, _, path = base.url.partition("://")
    host, _, folder = path.partition("/")
    if name.startswith("/"):
        return Path(name)
    parts = folder.rstrip("/").split("/") if folder else []
    for part in name.split("/"):  # as in a path; but a//b and a/b are two objects
        if part == "..":
            parts = parts[:-1]
        elif part != ".":
            parts.append(part)
    return RemotePath(f"{scheme}://{host}/{'/'.join(parts)}")


def is_inside(path: Path, base: Path) -> bool:
    """Whether a place in a store is below another."""
    return str(path).startswith(str(base).rstrip("/") + "/")


# --- reading --------------------------------------------------------------------------------------


def open_place(path: Path) -> BinaryIO:
    """A file for reading from its beginning on, wherever it lies.

    Raises:
        OSError: of a file on a disk.
        StoreError: of one in a store.
    """
    if not isinstance(path, RemotePath):
        return open(path, "rb")
    return io.BufferedReader(_RemoteFile(path.url), 1 << 18)


def object_info(path: Path) -> ObjectInfo:
    """What a store says of an object.

    Raises:
        StoreError: there is none, or it is not told.
    """
    return patiently(lambda: _info(str(path)), str(path))


def size_of(path: Path) -> int | None:
    """Bytes of a file, wherever it lies; None where a store does not tell.

    Raises:
        OSError: of a file on a disk.
        StoreError: of one in a store.
    """
    return object_info(path).size if isinstance(path, RemotePath) else path.stat().st_size


def kind_of(url: str) -> str:
    """``file`` or ``directory``.

    Raises:
        StoreError: it is neither, or that is not told.
    """
    fs, path = file_system(url)
    return str(patiently(lambda: fs.info(path)["type"], url))


def read_object(path: RemotePath, most: int | None = None) -> tuple[bytes, ObjectInfo]:
    """All bytes of an object, or the first ``most``, and what the store says of it.

    Raises:
        StoreError: it is not there, may not be read, is too large, or did not come whole.
    """

    def once() -> tuple[bytes, ObjectInfo]:
        fs, inner = file_system(path.url)
        info = _info(path.url)
        wanted = info.size if most is None or info.size is None else min(info.size, most)
        if wanted is not None and wanted > _LARGEST:
            raise StoreError(f"{path}: {wanted} bytes are too many for one object")
        part = {} if wanted == info.size else {"start": 0, "end": wanted}
        data: bytes = fs.cat_file(inner, **part)
        if wanted is not None and len(data) != wanted:
            raise ConnectionError(f"{len(data)} of {wanted} bytes were received")
        return data, info

    return patiently(once, path.url)


def read_member(path: TarPath) -> bytes:
    """All bytes of a member of a tar; fewer where a tar on a disk is cut.

    Raises:
        OSError: the tar is on a disk and cannot be read.
        StoreError: likewise, in a store.
    """
    if not isinstance(path.tar, RemotePath):
        with open(path.tar, "rb") as file:
            file.seek(path.start)
            return file.read(path.size)
    url, end = path.tar.url, path.start + path.size

    def once() -> bytes:
        fs, inner = file_system(url)
        data: bytes = fs.cat_file(inner, start=path.start, end=end)
        if len(data) != path.size:
            raise ConnectionError(f"{len(data)} of {path.size} bytes were received")
        return data

    return patiently(once, str(path))


def list_folder(path: str) -> list[tuple[str, bool]]:
    """What lies directly in a folder of a store: URLs, and whether each is a folder; by name.

    Raises:
        StoreError: it cannot be listed.
    """

    def is_folder(one: dict[str, Any]) -> bool:
        return bool(one["type"] == "directory")

    def once() -> list[tuple[str, bool]]:
        fs, inner = file_system(path)
        own = inner.rstrip("/")
        listed = fs.ls(inner, detail=True, refresh=True)
        return sorted(
            (f"{path.rstrip('/')}/{one['name'].rstrip('/').rpartition('/')[2]}", is_folder(one))
            for one in listed
            if one["name"].rstrip("/") != own
        )

    return patiently(once, path)


def match_urls(pattern: str) -> list[str]:
    """The objects that a pattern names, sorted; braces stand for lists and ranges.

    Raises:
        StoreError: the store cannot be listed.
    """
    found: list[str] = []
    for one in expand_braces(pattern):
        fs, inner = file_system(one)
        if _PATTERN.search(one):
            names = patiently(lambda fs=fs, inner=inner: fs.glob(inner), one)  # type: ignore[misc]
            hidden = one.rpartition("/")[2].startswith(".")
            kept = [name for name in names if hidden or not name.rpartition("/")[2].startswith(".")]
            found += sorted(fs.unstrip_protocol(name) for name in kept)
        else:
            found.append(one)
    return found


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}.tar`` and ``a{x,y}.tar`` as a shell expands them."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    if found[3] is not None:
        middle = found[3].split(",")
    else:
        first, last = int(found[1]), int(found[2])
        middle = [f"{n:0{len(found[1])}}" for n in range(first, last + 1)]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [one for part in middle for one in expand_braces(f"{head}{part}{tail}")]


class _RemoteFile(io.RawIOBase):
    """An object read in blocks, in order; a connection that is cut is taken up where it was."""

    def __init__(self, url: str) -> None:
        self.name = url
        self._at = 0
        self._file: Any = None
        self._size: int | None = None
        patiently(self._open, url)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = patiently(lambda: self._read(len(buffer)), self.name)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            with suppress(Exception):
                self._file.close()
        super().close()

    def _open(self) -> None:
        fs, path = file_system(self.name)
        self._file = fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead")
        self._size = getattr(self._file, "size", None)

    def _read(self, most: int) -> bytes:
        try:
            if self._file is None:
                self._open()
                if self._at:
                    self._skip()
            data: bytes = self._file.read(most)
        except Exception:
            self._file = None  # whatever state it is in
            raise
        if not data and most and self._size is not None and self._at < self._size:
            self._file = None
            raise ConnectionError(f"{self._at} of {self._size} bytes were received")
        return data

    def _skip(self) -> None:
        try:
            self._file.seek(self._at)
        except (OSError, ValueError, NotImplementedError):  # a server without ranges
            left = self._at
            while left and (data := self._file.read(min(left, _BLOCK))):
                left -= len(data)


def _info(url: str) -> ObjectInfo:
    fs, path = file_system(url)
    told = fs.info(path)
    if told.get("type") == "directory":
        raise IsADirectoryError(url)
    size = told.get("size")
    keys = ("ETag", "etag", "LastModified", "mtime", "modified", "updated", "created", "sha256")
    marks = "|".join(str(told[key]) for key in keys if key in told)
    return ObjectInfo(None if size is None else int(size), zlib.crc32(marks.encode()))


# --- writing --------------------------------------------------------------------------------------


def put_file(path: Path, url: str) -> None:
    """Write a file of the disk to a store: the object is there whole, or as it was.

    Raises:
        OSError: the file cannot be read.
        StoreError: the store does not take it.
    """
    path.stat()

    def once() -> None:
        fs, inner = file_system(url)
        _make_parent(fs, inner, url)
        fs.put_file(str(path), inner)

    patiently(once, url)


def require_writable(url: str) -> None:
    """Make sure that objects can be written below a URL, by writing one and deleting it.

    Raises:
        StoreError: the store does not take it.
    """
    own = f"{url.rstrip('/')}/.risam-{uuid.uuid4().hex}"

    def once() -> None:
        fs, inner = file_system(own)
        _make_parent(fs, inner, url)
        fs.pipe_file(inner, b"")

    patiently(once, url)
    remove_objects([own])


def _make_parent(fs: Any, path: str, url: str) -> None:
    """Makes the folder of a file, where a store has any: others would make a bucket instead."""
    if url.partition("://")[0] not in _NO_FOLDERS:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def get_file(url: str, path: Path) -> None:
    """Write an object of a store to the disk.

    Raises:
        OSError: it cannot be written.
        StoreError: the store does not give it.
    """
    with open_place(RemotePath(url)) as source, open(path, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def remove_objects(urls: Iterable[str]) -> None:
    """Delete objects of a store, as far as they are there.

    Raises:
        StoreError: the store refuses.
    """
    for url in urls:
        patiently(lambda url=url: _remove(url), url)  # type: ignore[misc]


def _remove(url: str) -> None:
    fs, inner = file_system(url)
    with suppress(FileNotFoundError, KeyError):  # the latter is what a store in memory says
        fs.rm_file(inner)
