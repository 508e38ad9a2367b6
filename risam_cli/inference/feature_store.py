"""Arrays on disk under a limit, one file a picture; no torch. What they mean is the caller's.

::

    DIR/lock, DIR/used              one process at a time counts the bytes of all
    DIR/<encoder>/about.json        what the entries depend on; its time is that of the last use
    DIR/<encoder>/<ab>/<key>.safetensors

An entry is a plain safetensors file with a checksum in its metadata, moved to its place whole, so
any number of processes may read and write one folder. Nothing is synced: what a power cut leaves
damaged is found by its checksum, and made anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from risam_cli.console.console import get_console
from risam_cli.errors import OutputError, reason_of
from risam_cli.files.confine import require_own, require_under
from risam_cli.files.jsonlines import load_json
from risam_cli.files.sizes import show_size
from risam_cli.files.write import create

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Bytes = NDArray[np.uint8]

_WRITING = "writing"  # a lock: held by each entry that has its room and is not whole
_ABOUT = "about.json"
_ENDING = ".safetensors"
_FORMAT = 1
_KEPT_FREE = 1 << 30  # bytes left to others on the disk, such as the run's own results
_STALE = 3600.0  # seconds after which a part belongs to nobody
_TOLD = 3  # damaged entries told of one by one
_CRC_AT = len('{"__metadata__":{"crc32":"')  # place of the checksum within the header
_NO_CRC = b"0" * 8


@dataclass(frozen=True, slots=True)
class Stored:
    """One array of an entry: safetensors' name of its type, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture's arrays, and what was said of them when they were written."""

    arrays: Mapping[str, Stored]
    notes: Mapping[str, str]


@dataclass(slots=True)
class Counts:
    """What a store did so far: entries read, written, found damaged; bytes written."""

    read: int = 0
    written: int = 0
    damaged: int = 0
    bytes_written: int = 0


class FeatureStore:
    """The entries of one encoder in a folder that encoders share; safe in threads and processes.

    What does not fit under the limit is made room for by deleting entries of other encoders, the
    one not used for longest first. Those of this encoder stay: once they alone fill the limit, no
    more are added. A run that goes round and round a set larger than the limit so still finds a
    part of it, where deleting the oldest would find none.

    Args:
        folder: made if it is not there.
        about: what the entries depend on; other values, other entries.
        limit: bytes that all entries of the folder may take.

    Raises:
        OutputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.counts = Counts()
        self.adds = True
        text = json.dumps({"risam_features": _FORMAT, **about}, sort_keys=True, indent=1) + "\n"
        self.own = folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.used, self.held = self._open(text)

    def read(
        self,
        key: str,
        allocate: Callable[[int], Bytes] | None = None,
        require: Callable[[Entry], object] = lambda entry: None,
    ) -> Entry | None:
        """An entry, its checksum verified; None where there is none, or where it was damaged.

        A damaged one is deleted and told of.

        Args:
            key: hexadecimal, of the picture.
            allocate: gives a place for so many bytes, which the entry will lie in.
            require: raises what an entry that is not of the caller's kind makes it raise.
        """
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                place = allocate(size) if allocate else np.empty(size, np.uint8)
                view = place.data
                got = 0
                while got < size and (more := file.readinto(view[got:])):
                    got += more
        except FileNotFoundError:
            return None
        except OSError as error:
            self._damaged(path, reason_of(error), 0)
            return None
        try:
            entry = _parse(place, self._name(key))
            require(entry)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            self._damaged(path, str(error), size)
            return None
        with self._lock:
            self.counts.read += 1
        return entry

    def write(self, key: str, entry: Entry) -> None:
        """Adds an entry, if there is room and nobody was faster; no failure of it is the run's."""
        path = self._path(key)
        if not self.adds or path.exists():
            return
        try:
            with self._locked(_WRITING, alone=False):
                self._write(path, *_header(self._name(key), entry), key, entry)
        except OSError as error:
            self._stop_adding(reason_of(error))

    def _write(self, path: Path, header: bytes, size: int, key: str, entry: Entry) -> None:
        if not self._reserve(size):
            return
        part = path.with_name(f".{key}-{os.getpid()}-{next(self._numbers)}.part")
        try:
            require_under(self.folder, path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "xb") as file:
                file.write(header)
                for one in entry.arrays.values():
                    file.write(one.data.data)
            os.replace(part, path)
        except OutputError as error:  # a link where a folder was
            self._release(size)
            self._stop_adding(error.message)
            return
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            self._release(size)
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            self._stop_adding("the disk is full" if full else reason_of(error))
            return
        with self._lock:
            self.counts.written += 1
            self.counts.bytes_written += size

    # --- the folder -------------------------------------------------------------------------------

    def _open(self, about: str) -> tuple[int, int]:
        """Bytes in the folder, and entries of this encoder; what the dead left goes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.listdir(self.folder)
        except OSError as error:
            raise OutputError(
                f"feature cache {self.folder}: {reason_of(error)}", "choose another folder"
            ) from error
        require_own(self.folder, [self.own.name, "lock", "used", _WRITING])
        if self.own.is_dir():
            require_own(self.own, os.listdir(self.own))
        try:
            self.own.mkdir(exist_ok=True)
            _replace(self.own / _ABOUT, about)
            with self._counting(), self._locked(_WRITING, alone=True, wait=False) as alone:
                used, held = self._scan()
                if not alone:  # an entry that is being written has its room, and is not found yet
                    used = self._used()
                self._say_used(used)
        except OSError as error:
            used, held = self._scan()
            self._stop_adding(f"it cannot be written: {reason_of(error)}")
        return used, held

    def _scan(self) -> tuple[int, int]:
        used = held = 0
        now = time.time()
        for encoder in self._encoders():
            for path, status in _files(encoder):
                if path.name.endswith(_ENDING):
                    used += status.st_size
                    held += encoder == self.own
                elif now - status.st_mtime > _STALE:
                    with contextlib.suppress(OSError):
                        path.unlink()
        return used, held

    def _encoders(self) -> list[Path]:
        """Folders of entries, ours by what they say of themselves; longest unused first."""
        found = []
        for path in self.folder.iterdir():
            about = path / _ABOUT
            try:
                if load_json(about.read_bytes())["risam_features"] == _FORMAT:
                    found.append((about.stat().st_mtime_ns, path))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return [path for _, path in sorted(found)]

    def _path(self, key: str) -> Path:
        return self.own / key[:2] / f"{key}{_ENDING}"

    def _name(self, key: str) -> str:
        """What an entry calls itself: of this encoder too, if someone puts it elsewhere."""
        return f"{self.own.name}/{key}"

    def _damaged(self, path: Path, why: str, size: int) -> None:
        with self._lock:
            self.counts.damaged += 1
            told = self.counts.damaged
        if told <= _TOLD:
            get_console().warn(f"feature cache: {path} is damaged ({why}); it is computed again")
        with contextlib.suppress(OSError):
            path.unlink()
            self._release(size)

    def _stop_adding(self, why: str) -> None:
        with self._lock:
            first, self.adds = self.adds, False
        if first:
            get_console().warn(
                f"feature cache {self.folder}: {why}; what is not in it is computed each time"
            )

    # --- bytes of all processes -------------------------------------------------------------------

    def _reserve(self, size: int) -> bool:
        """Whether there is room for an entry; it then counts as taken."""
        try:
            free = shutil.disk_usage(self.folder).free
            with self._counting():
                used = self._used()
                if used + size > self.limit:
                    used -= self._evict(used + size - self.limit)
                fits = used + size <= self.limit
                self._say_used(used + size if fits else used)
        except OSError as error:
            self._stop_adding(reason_of(error))
            return False
        if not fits:
            self._stop_adding(f"its limit of {show_size(self.limit)} is reached")
        elif free - size < _KEPT_FREE:
            self._release(size)
            self._stop_adding(f"only {show_size(free)} are free on the disk")
            return False
        return fits

    def _release(self, size: int) -> None:
        with contextlib.suppress(OSError), self._counting():
            self._say_used(max(0, self._used() - size))

    def _evict(self, wanted: int) -> int:
        """Deletes entries of other encoders until so many bytes are free; gives how many became."""
        freed = 0
        for encoder in self._encoders():
            if encoder == self.own:
                continue
            for path, status in _files(encoder):
                if freed >= wanted:
                    return freed
                # Not what is being written: that process is told of its room already.
                if path.name.endswith(_ENDING):
                    with contextlib.suppress(OSError):
                        path.unlink()
                        freed += status.st_size
        return freed

    def _counting(self) -> contextlib.AbstractContextManager[bool]:
        """One process at a time; without locks on the drive, the sum may drift until next open."""
        return self._locked("lock", alone=True)

    @contextlib.contextmanager
    def _locked(self, name: str, *, alone: bool, wait: bool = True) -> Iterator[bool]:
        """Holds a lock of the folder, alone or beside others; gives whether it is had.

        It is where locks are not to be had at all, since then nobody holds one.
        """
        with open(self.folder / name, "ab") as file:
            had = True
            if fcntl is not None:
                how = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
                try:
                    fcntl.flock(file, how)
                except BlockingIOError:
                    had = False
                except OSError:
                    pass
            yield had

    def _used(self) -> int:
        try:
            return int((self.folder / "used").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return self._scan()[0]

    def _say_used(self, used: int) -> None:
        _replace(self.folder / "used", str(used))


def _files(encoder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All files of the shards of an encoder, as far as they are still there."""
    for shard in encoder.iterdir():
        if not shard.is_dir():
            continue
        for path in shard.iterdir():
            with contextlib.suppress(OSError):
                yield path, path.stat()


# --- one file -------------------------------------------------------------------------------------


def _header(name: str, entry: Entry) -> tuple[bytes, int]:
    """Safetensors' length and header, the checksum in its place; and the size of the file."""
    described: dict[str, Any] = {
        "__metadata__": {"crc32": _NO_CRC.decode(), "key": name, **entry.notes}
    }
    end = 0
    for name, one in entry.arrays.items():
        begin, end = end, end + one.data.nbytes
        described[name] = {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays lie at whole words
    crc = zlib.crc32(text)
    for one in entry.arrays.values():
        crc = zlib.crc32(one.data.data, crc)
    text = text[:_CRC_AT] + b"%08x" % crc + text[_CRC_AT + 8 :]
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def _replace(path: Path, text: str) -> None:
    """Writes a small file, through no link, within the folder that it is in."""
    part = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}.part")
    try:
        with create(part) as file:
            file.write(text.encode())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _parse(place: Bytes, name: str) -> Entry:
    """The entry that lies in a buffer.

    Raises:
        ValueError, KeyError, TypeError: it is not what was written.
    """
    length = int.from_bytes(place[:8].tobytes(), "little")
    if len(place) < 8 + length or length < _CRC_AT + 8:
        raise ValueError("it is truncated")
    text = place[8 : 8 + length].tobytes()
    data = place[8 + length :]
    blank = text[:_CRC_AT] + _NO_CRC + text[_CRC_AT + 8 :]
    if b"%08x" % zlib.crc32(data.data, zlib.crc32(blank)) != text[_CRC_AT : _CRC_AT + 8]:
        raise ValueError("its checksum is wrong")
    described = load_json(text)
    notes = described.pop("__metadata__")
    if notes["key"] != name:
        raise ValueError("it belongs to another picture or encoder")
    # The length before the header has no checksum: another one would move where data begin.
    if max(one["data_offsets"][1] for one in described.values()) != len(data):
        raise ValueError("its header has another length")
    arrays = {
        name: Stored(one["dtype"], tuple(one["shape"]), data[slice(*one["data_offsets"])])
        for name, one in described.items()
    }
    return Entry(arrays, notes)
