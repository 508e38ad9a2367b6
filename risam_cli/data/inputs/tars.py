"""Tar shards in the layout of WebDataset: members of one name, but for their endings, are a sample.

``0001.jpg`` with ``0001.json`` (the object of a manifest's line) or ``0001.txt`` (one expression a
line). A tar is gone through once to learn where its members lie; images are then read from there
each by itself, so a run can be resumed, sharded and gone through again without unpacking anything.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from risam_cli.data.inputs.walk import is_image_name
from risam_cli.errors import DataError, reason_of
from risam_cli.files.jsonlines import parse_json
from risam_cli.files.store import RemotePath, TarPath, open_place, place, size_of

MOST_KEPT = 200_000
"""Samples of tars in stores whose places are remembered, some 600 bytes each."""

_LONGEST = 16 << 20  # bytes of a member that holds text


@dataclass(slots=True)
class TarSample:
    """One sample of a tar.

    Attributes:
        key: what its members' names begin with.
        plain, others: its images, by whether their names have one ending or several.
        asked: the object of its ``.json``; None where it has none.
        texts: the lines of its ``.txt``.
        error: what is wrong with it, or empty.
    """

    key: str
    plain: list[TarPath] = field(default_factory=list)
    others: list[TarPath] = field(default_factory=list)
    asked: Any = None
    texts: tuple[str, ...] = ()
    error: str = ""

    @property
    def images(self) -> list[TarPath]:
        """Its images; a sample should have one."""
        return self.plain or self.others


class TarIndex:
    """Where samples lie; those of tars in stores are remembered, up to a number of them."""

    def __init__(self) -> None:
        self._known: dict[str, list[TarSample]] = {}
        self._left = MOST_KEPT

    def samples(self, tar: str) -> Iterator[TarSample]:
        """As :func:`read_tar`; a tar in a store is not fetched anew by each look at the inputs."""
        path = place(tar)
        if tar in self._known or not isinstance(path, RemotePath):
            yield from self._known[tar] if tar in self._known else read_tar(path)
            return
        found: list[TarSample] = []
        for sample in read_tar(path):
            if len(found) <= self._left:
                found.append(sample)
            yield sample
        if len(found) <= self._left:
            self._known[tar] = found
            self._left -= len(found)


def is_tar(name: str) -> bool:
    """Whether a file is a tar by its name."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst"))


def read_tar(path: Path) -> Iterator[TarSample]:
    """The samples of a tar in its order; what is cut or damaged ends it, as a sample with an error.

    Raises:
        DataError: it cannot be opened, or is packed as a whole.
    """
    if not str(path).lower().endswith(".tar"):
        raise DataError(
            f"{path}: members of a compressed tar cannot be read one by one",
            "decompress it to a plain .tar; images are compressed already",
        )
    last, end = TarSample(""), 0
    try:
        with open_place(path) as file:
            # A store is read in order; on a disk what is not wanted is skipped.
            mode: Any = "r|" if isinstance(path, RemotePath) else "r:"
            with tarfile.open(fileobj=file, mode=mode) as tar:
                for member in _members(tar):
                    end = member.offset_data + member.size
                    key, ending = split_name(member.name)
                    if key != last.key:
                        if last.key:
                            yield last
                        last = TarSample(key)
                    _take(last, member, ending, tar, path)
        size = size_of(path)
        end = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
        if size is not None and size < end:  # which tarfile takes for the end
            raise tarfile.ReadError(f"{size} bytes of {end} or more")
    except tarfile.TarError as error:
        where = f"in or after {last.key!r}" if last.key else "at its beginning"
        message = f"{path}: the tar is truncated or damaged {where} ({reason_of(error)})"
        yield TarSample("", error=f"{message}; copy or download it again")
        return
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error)}", "check the path") from None
    if last.key:
        yield last


def split_name(name: str) -> tuple[str, str]:
    """A member's key and ending: parted at the first dot of its last part, as WebDataset does."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, none of which it remembers."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]
        if member.isreg() and split_name(member.name)[0].rpartition("/")[2]:
            yield member


def _take(
    sample: TarSample, member: tarfile.TarInfo, ending: str, tar: tarfile.TarFile, path: Path
) -> None:
    if is_image_name(f"x.{ending}"):
        # 1.mask.png beside 1.jpg is no second image.
        images = sample.others if "." in ending else sample.plain
        images.append(TarPath(path, member.name, member.offset_data, member.size))
    elif ending in ("json", "txt"):
        where = f"{path}: {member.name}"
        if member.size > _LONGEST:
            sample.error = f"{where}: longer than {_LONGEST >> 20} MiB"
            return
        inside = tar.extractfile(member)
        data = b"" if inside is None else inside.read()
        try:
            if len(data) < member.size:
                raise tarfile.ReadError("unexpected end of data")
            if ending == "json":
                sample.asked = parse_json(data, where)
            else:
                lines = data.decode("utf-8-sig").splitlines()
                sample.texts = tuple(line.strip() for line in lines if line.strip())
        except UnicodeDecodeError:
            sample.error = f"{where}: not UTF-8; save it as UTF-8"
        except DataError as error:
            sample.error = str(error)
