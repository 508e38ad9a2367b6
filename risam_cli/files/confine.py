"""What is written stays under the output folder, whatever links were planted in it beforehand.

An output folder may itself be a link: the user named it. Below it, a symbolic link, a pipe or a
device where this tool is about to write would take the data elsewhere, or wait for ever.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from risam_cli.errors import OutputError, setting

_FIX = f"remove it if it does not belong there, or choose another {setting('output')}"


def require_own(folder: Path, names: Iterable[str]) -> None:
    """Make sure that names directly in a folder are free, or are plain files and folders.

    Raises:
        OutputError: one is a symbolic link, a pipe, a device …; nothing was written yet.
    """
    for name in names:
        path = folder / name
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                raise OutputError(
                    f"{path} is a link to {os.readlink(path)}, outside of the output folder or not",
                    _FIX,
                )
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OutputError(f"{path} is neither a file nor a folder", _FIX)


def require_own_tree(folder: Path) -> None:
    """:func:`require_own` for everything at any depth; for folders that hold one run's files only.

    Raises:
        OutputError: as :func:`require_own`.
    """
    for inside, folders, files in os.walk(folder):
        require_own(Path(inside), [*folders, *files])


def require_under(root: Path, folder: Path) -> None:
    """Make sure that a folder is at or under a root once links are followed; neither need exist.

    Raises:
        OutputError: it lies elsewhere.
    """
    whole, real = os.path.realpath(root), os.path.realpath(folder)
    if real != whole and not real.startswith(os.path.join(whole, "")):
        raise OutputError(f"{folder} leads to {real}, outside of {root}", _FIX)
