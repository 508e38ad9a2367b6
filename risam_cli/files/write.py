"""The only way that a file is written: whole, durable, and then under its name."""

from __future__ import annotations

import itertools
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from risam_cli.errors import OutputError
from risam_cli.files.durable import sync_folder

_counter = itertools.count()


def write_atomic(path: Path, write: Any) -> None:
    """Calls ``write(temporary path)``, syncs the file, and moves it to ``path``.

    Raises:
        OutputError: where it cannot be written; an older file at ``path`` survives.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask grants; safetensors grants the owner only
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:200]
        raise OutputError(
            f"cannot write {path}: {reason}", "check disk space and permissions"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all, by way of a temporary one beside it.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{os.getpid()}-{next(_counter)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OutputError(f"{path}: {error.strerror or error}", "choose another place") from error
