"""What published models hold, from headers alone, and whether their files are sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from risam_cli.errors import RisamError
from risam_cli.segmenters.names import KNOWN
from risam_cli.segmenters.published import Folder, hash_folders
from risam_cli.segmenters.resolve import Named, find_folders, load_segmenter
from risam_cli.weights.folder import count_by_part, read_tensors


def inspect_published(named: Named) -> dict[str, Any]:
    """Folders, files, sizes and parameters of a model that is on this machine.

    Raises:
        ModelError: it is not here, or a file is damaged.
    """
    kind, paths = find_folders(named, download=False)
    names = [*named.parts, *map(str, paths[len(named.parts) :])]
    folders = [Folder(path, name) for path, name in zip(paths, names, strict=True)]
    parts: dict[str, int] = {}
    for folder in folders:
        for path in _weights(folder):
            for name, count in count_by_part(path).items():
                part = f"{folder.config().get('model_type')}.{name}"
                parts[part] = parts.get(part, 0) + count
    known = next((one for one in KNOWN.values() if one.parts == named.parts), None)
    files = [path for folder in folders for path in folder.files()]
    return {
        "path": " + ".join(str(path) for path in paths),
        "kind": kind,
        "hash": hash_folders(folders),
        "bytes": sum(path.stat().st_size for path in files),
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "needs": [],
        "settings": {},
        "card": {}
        if known is None
        else {
            "licence": known.licence,
            "gated": known.gated,
            "good at": known.good_at,
            "published figures": known.figures,
        },
    }


def verify_published(named: Named, source: str) -> tuple[str, str | None, list[str]]:
    """Loads a model as predict does: where it is, its hash, and what is wrong, a line each."""
    _, paths = find_folders(named, download=False)
    where = " + ".join(str(path) for path in paths)
    problems = []
    try:
        segmenter = load_segmenter(source, device=torch.device("cpu"), precision=torch.float32)
        for path in (one for folder in paths for one in _weights(Folder(folder, str(folder)))):
            bad = [k for k, v in read_tensors(path).items() if not torch.isfinite(v).all()]
            if bad:
                problems.append(
                    f"{path}: {len(bad)} tensors hold NaN or infinity, first {bad[0]!r}"
                )
    except RisamError as error:
        return where, None, [str(error)]
    return where, None if problems else segmenter.hash, problems


def _weights(folder: Folder) -> list[Path]:
    return [path for path in folder.files() if path.suffix == ".safetensors"]
