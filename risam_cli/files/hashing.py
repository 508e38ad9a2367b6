"""The one hash of a file's content, SHA-256 in hexadecimal, and the one short hash of a text."""

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


def hash64(text: str) -> int:
    """64 bits of a text's BLAKE2b; it may hold surrogates, as names of files do."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
