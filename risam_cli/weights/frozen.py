"""Frozen parts that a model folder does not hold, but needs: which files, and where they are.

A model tuned through adapters shares most of its weights with the SAM file, and its text encoder
with the published one, that it started from. Its folder holds what was trained, and says of each
frozen part its name, size and SHA-256 (ours). When it is loaded, such a file is looked for, in
this order: in the model folder, beside it, in the folders of the environment variable
``RISAM_WEIGHTS``, at the path that training was given, and for a text encoder in the local Hugging
Face cache. Only a file of that size and SHA-256 is taken; nothing is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from risam_cli.errors import ModelError, reason_of

if TYPE_CHECKING:
    from risam_cli.model.risam import Risam

WEIGHTS_VARIABLE = "RISAM_WEIGHTS"
IMAGE_ENCODER, TEXT_ENCODER = "image_encoder", "text_encoder"
_PREFIXES = {IMAGE_ENCODER: "image_encoder.", TEXT_ENCODER: "text_encoder.backbone."}


@dataclass(frozen=True, slots=True)
class Needed:
    """A frozen part and the files that hold it.

    Attributes:
        part: ``image_encoder`` or ``text_encoder``.
        name: of the file or folder, or the text encoder's name on the hub.
        path: as the settings gave it.
        size: bytes of all weight files together; sha256: see ``sha256_of`` in
            :mod:`risam_cli.weights.sam`.
    """

    part: str
    name: str
    path: str
    size: int
    sha256: str


def describe(part: str, path: str) -> Needed:
    """What a model folder says of a frozen part that is at ``path`` now.

    Raises:
        ModelError: no weights are there.
    """
    place = _place(part, path)
    if place is None:
        raise ModelError(f"no weights at {path}", "give a file or folder that exists")
    # A name on the hub is kept whole; of a path on some machine, the last part.
    name = Path(path).name if Path(path).exists() else path
    return Needed(part, name, path, *_identity(place))


def parse_needed(raw: Any, where: str) -> tuple[Needed, ...]:
    """The section ``needs`` of a model folder's config.json.

    Raises:
        ModelError: it is not what :func:`plain` writes.
    """
    try:
        found = tuple(Needed(**entry) for entry in raw)
        parts = [needed.part for needed in found]
        fits = len(set(parts)) == len(parts) and all(
            needed.part in _PREFIXES
            and all(isinstance(v, str) for v in (needed.name, needed.path, needed.sha256))
            and type(needed.size) is int
            for needed in found
        )
    except TypeError:
        fits = False
    if not fits:
        raise ModelError(
            f"{where}: its section 'needs' is damaged", "copy or download the folder again"
        )
    return found


def plain(needs: Sequence[Needed]) -> list[dict[str, Any]]:
    """As config.json holds them."""
    return [asdict(needed) for needed in needs]


def covers(needs: Sequence[Needed], name: str) -> bool:
    """Whether a weight of the network is in a needed file and not in the model folder."""
    from risam_cli.weights.lora import is_lora

    return any(
        name.startswith(_PREFIXES[needed.part]) and ".adapter." not in name and not is_lora(name)
        for needed in needs
    )


def find(needed: Needed, folder: Path) -> Path:
    """The file, or folder of files, that holds a frozen part of the model in ``folder``.

    Raises:
        ModelError: it is nowhere, or what is there is another one; the message says what is
            needed and where it was looked for.
    """
    looked, others = [], []
    for place in _candidates(needed, folder):
        looked.append(str(place))
        held = _place(needed.part, str(place))
        if held is None:
            continue
        if _size(held) == needed.size and _identity(held) == (needed.size, needed.sha256):
            return held
        others.append(str(place))
    want = f"{needed.name} ({needed.size} bytes, SHA-256 {needed.sha256})"
    fix = (
        f"put that file beside the model folder, or name its folder in {WEIGHTS_VARIABLE}; "
        "a folder merged by risam models export needs none"
    )
    if others:
        raise ModelError(
            f"model folder {folder} needs {want}, but {others[0]} is a different one", fix
        )
    raise ModelError(
        f"model folder {folder} needs {want}, which is not at {', '.join(dict.fromkeys(looked))}",
        fix,
    )


def fill(model: Risam, needed: Needed, folder: Path) -> None:
    """Loads a frozen part into a network without LoRA.

    Raises:
        ModelError: as :func:`find`, or weights that do not fit the network.
    """
    place = find(needed, folder)
    if needed.part == IMAGE_ENCODER:
        from risam_cli.weights.sam import load_sam_encoder

        load_sam_encoder(model.image_encoder, place)
        return
    from risam_cli.weights.text import pretrained_text

    backbone = pretrained_text(str(place), max_tokens=1 << 30).backbone
    try:
        model.text_encoder.backbone.load_state_dict(backbone.state_dict())
    except RuntimeError as error:
        raise ModelError(
            f"{place} does not fit the text encoder of {folder}: {reason_of(error)}",
            "copy or download the folder again",
        ) from error


def _candidates(needed: Needed, folder: Path) -> Iterator[Path | str]:
    last = Path(needed.name).name
    yield folder / last
    yield folder.resolve().parent / last
    for place in os.environ.get(WEIGHTS_VARIABLE, "").split(os.pathsep):
        if place:
            yield Path(place) / last
    yield Path(needed.path)
    if needed.part == TEXT_ENCODER and needed.name == needed.path:
        yield needed.name  # on the hub: looked for in the local cache


def _place(part: str, path: str) -> Path | None:
    """Where the weights at a path are: the path itself, or the hub's cache; None for nowhere."""
    if Path(path).exists():
        return Path(path)
    if part != TEXT_ENCODER or os.path.isabs(path):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None


def _size(place: Path) -> int:
    """Bytes of the weight files at a place; -1 where one is no file: a device has no end."""
    from risam_cli.weights.sam import weight_files

    try:
        files = weight_files(place) if place.is_dir() else [place]
    except ModelError:
        return -1
    return sum(f.stat().st_size for f in files) if all(f.is_file() for f in files) else -1


def _identity(place: Path) -> tuple[int, str]:
    """Size and SHA-256 of the weight files at a place."""
    from risam_cli.weights.sam import weight_files

    files = weight_files(place) if place.is_dir() else [place]
    stamps = []
    for file in files:
        stat = file.stat()
        stamps.append((str(file), stat.st_size, stat.st_mtime_ns))
    return sum(size for _, size, _ in stamps), _hash(tuple(stamps))


@lru_cache(maxsize=16)
def _hash(stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Of files that have not changed since they were last asked for in this process."""
    from risam_cli.weights.sam import sha256_of

    return sha256_of([Path(name) for name, _, _ in stamps])
