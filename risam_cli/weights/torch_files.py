"""Torch's own files from strangers: plain tensors and containers, no more than the file has.

``weights_only`` keeps code out. It does not keep out zips that unpack to a thousand times their
size, nor a few bytes that a view of stride 0 spreads over terabytes.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from risam_cli.errors import ModelError, reason_of
from risam_cli.files.hashing import sha256_of_stream

_END = 22  # bytes of a zip's last record, up to its comment
_MARK = b"sha256:"
_SEAL = len(_MARK) + 64
_FIX = "copy or download the file again, or name another"


def load_plain(path: Path, *, mapped: bool = False) -> Any:
    """What ``torch.save`` wrote, if it is plain; nothing that the file holds is run.

    Args:
        mapped: leave the values in the file until they are asked for, where that is possible.

    Raises:
        ModelError: it cannot be read, holds code, or stands for more than it holds.
    """
    if not path.is_file():
        raise ModelError(f"{path} is not a file", _FIX)
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _require_stored(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipped)
        tensors = list(_tensors(held))
    except Exception as error:  # the unpickler raises whatever a file's bytes make it raise
        why = f"{path} cannot be read as plain weights, and nothing in it was run"
        raise ModelError(f"{why}: {reason_of(error)}", _FIX) from error
    for tensor in tensors:
        if not _is_plain(tensor):
            raise ModelError(
                f"{path} holds a tensor {tuple(tensor.shape)} that is not a plain block of values",
                _FIX,
            )
    return held


def seal_file(path: Path) -> None:
    """Writes a SHA-256 of what ``torch.save`` wrote into the comment that ends the file.

    Every zip may have one, and torch does not look at it.
    """
    with open(path, "r+b") as file:
        file.seek(-_END, os.SEEK_END)
        if file.read(4) != b"PK\5\6":
            raise ValueError(f"{path} is not a file of torch.save, or is sealed already")
        file.seek(-2, os.SEEK_END)
        file.write(_SEAL.to_bytes(2, "little"))
        file.seek(0)
        digest = sha256_of_stream(file)
        file.seek(0, os.SEEK_END)
        file.write(_MARK + digest.encode())


def require_sealed(path: Path) -> None:
    """Make sure that a file is what :func:`seal_file` left, to the last bit.

    Raises:
        ModelError: it is not, or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size - _SEAL
            while left > 0 and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
            said = file.read()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {reason_of(error)}") from error
    if said != _MARK + digest.hexdigest().encode():
        raise ModelError(f"{path} is damaged: its checksum does not match", _FIX)


def _require_stored(path: Path) -> None:
    """Torch packs nothing: what is packed is no file of its, and may unpack to anything."""
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it holds compressed members, which torch does not write")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members claim to be longer than the file")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors at and below a value of containers."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (dict, list, tuple, set)) and id(one) not in seen:
            seen.add(id(one))
            waiting += [*one, *one.values()] if isinstance(one, dict) else [*one]


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
