"""The one hash of a file's content: SHA-256 in hexadecimal."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import BinaryIO, cast


def sha256_of_stream(file: BinaryIO) -> str:
    """SHA-256 of what is left to read of a file."""
    return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return sha256_of_stream(file)
