"""Folders and patterns to image files, in a fixed order, without leaving the folder."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from risam_cli.data.images.images import SUFFIXES
from risam_cli.errors import reason_of, require_machine
from risam_cli.files.locks import PRIVATE
from risam_cli.files.store import list_folder

_MARKS = {
    "export.json": '"owns"',
    "report.json": '"schema_version"',
    "config.resolved.yaml": "precision:",
}
"""Files by which folders of exports, explanations, evaluations and training are known, and a word
that stands in each."""
_HEAD = 1 << 12
_LONGEST_SUFFIX = 8


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A folder inside of the input that cannot be listed."""

    path: str
    reason: str


def walk_images(
    folder: str, skipped: Counter[str], exclude: str | None = None
) -> Iterator[str | Unreadable]:
    """Image files under a folder, by name within each folder, a subfolder in its own place.

    Left out, and counted in ``skipped``: other files, hidden ones, linked folders, links to files
    outside of ``folder``, and output folders of this tool.

    Args:
        folder: as the user gave it; the paths begin with it.
        exclude: a folder that is not entered, by its real path.
    """
    inside = os.path.join(os.path.realpath(folder), "")
    stack = [_listed(folder, skipped)]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
        elif isinstance(item, Unreadable):
            yield item
        elif item.is_dir:
            if item.path != folder and _is_results(item.path, exclude):
                skipped["output folders"] += 1
            else:
                stack.append(_listed(item.path, skipped))
        elif item.is_link and not os.path.realpath(item.path).startswith(inside):
            skipped["links that lead out of the folder"] += 1
        else:
            yield item.path


def walk_remote(url: str, skipped: Counter[str], exclude: str | None = None) -> Iterator[str]:
    """As :func:`walk_images`, below an address of a store, which knows no links.

    Args:
        exclude: the address of a folder that is not entered.

    Raises:
        StoreError: it cannot be listed.
    """
    for found, is_folder in list_folder(url):
        name = found.rpartition("/")[2]
        if name.startswith("."):
            skipped["hidden files and folders"] += 1
        elif is_folder:
            inside = [one.rpartition("/")[2] for one, _ in list_folder(found)]
            if found == exclude or "ledger.jsonl" in inside:
                skipped["output folders"] += 1
            else:
                yield from walk_remote(found, skipped, exclude)
        elif is_image_name(name):
            yield found
        else:
            skipped[kind_of_file(name)] += 1


def match_pattern(pattern: str) -> list[str]:
    """Files and folders that a pattern names, sorted; ``**`` stands for any depth.

    As ``glob.glob(pattern, recursive=True)``, but ``**`` goes through no linked folder: two links
    to the folder that they are in make 2^40 paths. Where nothing matches, ``[`` stands for itself.
    """
    found = _matches(pattern)
    if not found and "[" in pattern:  # a folder's own name, such as "[2024] trip"
        found = _matches(pattern.replace("[", "[[]"))
    return found


def _matches(pattern: str) -> list[str]:
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    at = parts.index("**")
    rest = parts[at + 1 :] or ["*"]
    above = os.sep.join(parts[:at])
    root = above or (os.sep if pattern.startswith(os.sep) else "")
    found: set[str] = set()
    for folder in glob.glob(root) if above else [root]:
        for inside, folders, _ in os.walk(folder or "."):
            folders[:] = [name for name in folders if not name.startswith(".")]
            own = os.path.join(folder, os.path.relpath(inside, folder or "."))
            own = "" if own == "." else own.removesuffix(f"{os.sep}.")
            found.update(_matches(os.path.join(glob.escape(own), *rest)))
    return sorted(found)


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as an image's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def kind_of_file(name: str) -> str:
    """What a file that is not an image is counted as."""
    suffix = os.path.splitext(name)[1].lower()
    return (
        f"{suffix} files" if suffix and len(suffix) <= _LONGEST_SUFFIX else "files of other kinds"
    )


@dataclass(frozen=True, slots=True)
class _Item:
    path: str
    is_dir: bool
    is_link: bool


def _listed(folder: str, skipped: Counter[str]) -> Iterator[_Item | Unreadable]:
    """The subfolders and image files of one folder, by name."""
    try:
        with os.scandir(folder) as found:
            items = [item for entry in found if (item := _item(entry, skipped)) is not None]
    except OSError as error:
        require_machine(error)
        yield Unreadable(folder, reason_of(error))
        return
    items.sort(key=lambda item: item.path)
    yield from items


def _item(entry: os.DirEntry[str], skipped: Counter[str]) -> _Item | None:
    if entry.name.startswith("."):
        skipped["hidden files and folders"] += 1
        return None
    link = entry.is_symlink()
    try:
        if entry.is_dir(follow_symlinks=False):
            return _Item(entry.path, True, link)
        if link and entry.is_dir():
            skipped["linked folders"] += 1
            return None
    except OSError:  # a link in a circle: let the reading of it say so
        pass
    if not is_image_name(entry.name):
        skipped[kind_of_file(entry.name)] += 1
        return None
    return _Item(entry.path, False, link)


def _is_results(folder: str, exclude: str | None) -> bool:
    """Whether this tool wrote the folder: its pictures are no input."""
    if os.path.isdir(os.path.join(folder, PRIVATE)):
        return True
    if exclude is not None and os.path.realpath(folder) == exclude:
        return True
    return any(_says(os.path.join(folder, name), key) for name, key in _MARKS.items())


def _says(path: str, key: str) -> bool:
    """Whether a file of a run is this tool's, not another's of the same name."""
    try:
        with open(path, "rb") as file:
            return key.encode() in file.read(_HEAD)
    except OSError as error:
        require_machine(error)
        return False
