"""From what a user names to a segmenter: a folder, a short name, a kind with its folders."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from risam_cli.errors import ModelError, UsageError
from risam_cli.files.jsonlines import load_json
from risam_cli.segmenters.hub import fetch, is_hub_name
from risam_cli.segmenters.names import BOX_SEGMENTERS, DEFAULT_SECOND, KINDS, KNOWN
from risam_cli.weights.folder import bundled_models, find_model

if TYPE_CHECKING:
    import torch

    from risam_cli.segmenters.risam import RisamSegmenter
    from risam_cli.segmenters.segmenter import Segmenter

_CLASSES = {
    "clipseg": "ClipSeg",
    "florence2": "Florence2",
    "sam3": "Sam3",
    "grounded-sam": "GroundedSam",
}


@dataclass(frozen=True, slots=True)
class Named:
    """A model as it was named, not yet looked for.

    Attributes:
        kind: ``risam``, a key of :data:`KINDS`, or None where only its config.json can tell.
        parts: folders or names on the hub; of ``risam`` one folder.
    """

    kind: str | None
    parts: tuple[str, ...]


def parse_model(source: str | Path | None) -> Named:
    """Reads what a user named, without opening weights or the network.

    Raises:
        ModelError: it names nothing that could be a model.
    """
    text = "" if source is None else str(source)
    if not text or os.path.isdir(text):
        kind = kind_of_folder(Path(text)) if text else "risam"
        if kind == "risam":
            return Named("risam", (str(find_model(source)),))
        return Named(kind, _with_second(kind, (text,)))
    prefix, colon, rest = text.partition(":")
    if colon and prefix in KINDS:
        parts = _parts(rest)
        return Named(prefix, _with_second(prefix, parts, text))
    if text in bundled_models():
        return Named("risam", (str(find_model(text)),))
    if text in KNOWN:
        return Named(KNOWN[text].kind, KNOWN[text].parts)
    parts = _parts(text)
    if "+".join(parts) == text and all(map(_may_be, parts)):
        return Named(None, parts)
    raise ModelError(
        f"no model folder {text!r}",
        f"give a folder written by risam train, a published model ({', '.join(KNOWN)}, or "
        f"KIND:FOLDER_OR_HUB_NAME), or a bundled one ({', '.join(bundled_models()) or 'none'})",
    )


def _parts(text: str) -> tuple[str, ...]:
    """The folders and names that a plus joins; a folder's name may hold one too."""
    if os.path.isdir(text):
        return (text,)
    places = [place for place, letter in enumerate(text) if letter == "+"]
    halves = [(text[:place], text[place + 1 :]) for place in places]
    both = next((pair for pair in halves if all(map(_may_be, pair))), None)
    return both or tuple(part for part in text.split("+") if part)


def _may_be(part: str) -> bool:
    return is_hub_name(part) or os.path.isdir(part)


def _with_second(kind: str, parts: tuple[str, ...], text: str = "") -> tuple[str, ...]:
    """The parts with the default segmenter of boxes, where a kind takes two and one was given."""
    wanted = 2 if kind == "grounded-sam" else 1
    if not 1 <= len(parts) <= wanted:
        form = "grounded-sam:DETECTOR+SEGMENTER" if wanted == 2 else f"{kind}:FOLDER_OR_HUB_NAME"
        raise ModelError(f"{text!r} names {len(parts)} parts of a {kind}", f"write {form}")
    return (*parts, DEFAULT_SECOND) if len(parts) < wanted else parts


def kind_of_folder(folder: Path) -> str:
    """``risam``, or the kind of published model that a folder's config.json describes.

    Raises:
        ModelError: the folder of a model that is none of these.
    """
    try:
        config = load_json((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return "risam"  # whose reader says what is wrong
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind is None or "format" in config:
        return "risam"
    for name, types in KINDS.items():
        if kind in types:
            return name
    fix = f"published models that work: {', '.join(KINDS)}"
    if kind in BOX_SEGMENTERS:
        fix = f"name a detector before it: grounded-sam:IDEA-Research/grounding-dino-tiny+{folder}"
    raise ModelError(f"{folder} is a {kind!r}, which does not take expressions here", fix)


def find_folders(named: Named, *, download: bool = True) -> tuple[str, tuple[Path, ...]]:
    """The kind and the folders on this machine, downloaded where they have to be.

    Args:
        download: without it a name must be in the cache.

    Raises:
        ModelError: a folder that is another model's, or a name that cannot be had.
    """
    folders = tuple(_folder(part, download) for part in named.parts)
    kind = kind_of_folder(folders[0])
    if kind == "risam" and named.kind != "risam":
        raise ModelError(
            f"{named.parts[0]} has no config.json of a published model", "download it again"
        )
    if named.kind is not None and kind != named.kind:
        raise ModelError(
            f"{named.parts[0]} is a {kind}, not a {named.kind}", f"write {kind}:{named.parts[0]}"
        )
    if named.kind is None:
        parts = _with_second(kind, named.parts, "+".join(named.parts))
        folders += tuple(_folder(part, download) for part in parts[len(folders) :])
    return kind, folders


def _folder(part: str, download: bool) -> Path:
    if os.path.isdir(part):
        return Path(part)
    if is_hub_name(part):
        return fetch(part, download=download)
    raise ModelError(f"no folder {part!r}", "give a folder, or a name such as facebook/sam3")


def require_risam_name(source: str | Path | None, what: str) -> None:
    """Refuses the name of a published model, before anything of it is downloaded or loaded.

    Args:
        what: is wanted, in words that begin a sentence.

    Raises:
        ModelError: it is one, or names no model.
    """
    if parse_model(source).kind != "risam":
        raise ModelError(
            f"{what} needs a RISAM model, and {source} is a published one",
            "name a folder written by risam train, or a bundled model",
        )


def require_risam(segmenter: Segmenter, what: str) -> RisamSegmenter:
    """The segmenter, where what is wanted of it takes RISAM.

    Args:
        what: is wanted, in words that begin a sentence.

    Raises:
        ModelError: it is a published model.
    """
    from risam_cli.segmenters.risam import RisamSegmenter

    if isinstance(segmenter, RisamSegmenter):
        return segmenter
    raise ModelError(
        f"{what} needs a RISAM model, and {segmenter.name} is a published {segmenter.kind}",
        "name a folder written by risam train, or a bundled model",
    )


def load_segmenter(
    source: str | Path | None,
    *,
    device: torch.device,
    precision: torch.dtype,
    compiled: bool = False,
) -> Segmenter:
    """Loads whatever a user named.

    Raises:
        ModelError: nothing there, damaged files, or weights that do not fit.
        UsageError: ``compiled`` for a model or on a device where it is not to be had.
    """
    from risam_cli.segmenters.published import Folder

    named = parse_model(source)
    if named.kind == "risam":
        from risam_cli.segmenters.risam import RisamSegmenter
        from risam_cli.weights.load import load_model

        loaded = load_model(source, device=device, precision=precision, compiled=compiled)
        return RisamSegmenter(loaded, device, precision)
    if compiled:
        raise UsageError("a published model cannot be compiled here", "leave that option out")
    kind, folders = find_folders(named)
    names = [*named.parts, *(DEFAULT_SECOND for _ in folders[len(named.parts) :])]
    module = importlib.import_module(f"risam_cli.segmenters.{kind.replace('-', '_')}")
    parts = [Folder(path, name) for path, name in zip(folders, names, strict=True)]
    segmenter: Segmenter = getattr(module, _CLASSES[kind])(*parts, device, precision)
    return segmenter
